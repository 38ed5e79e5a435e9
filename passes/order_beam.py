"""A beam over the sets of operations that have run, in Python, for graphs of some hundred operations."""

from __future__ import annotations

from dataclasses import dataclass

from .order_model import Adjacency, OrderGraph


@dataclass(frozen=True, slots=True)
class _State:
    done: int  # bit set of operations
    live: int
    peak: int
    order: tuple[int, ...]


def beam(graph: OrderGraph, near: Adjacency, *, width: int, target: int, bound: int) -> tuple[int, ...] | None:
    """The best order with a peak below ``target`` that a beam of ``width`` sets finds, if any.

    States are compared by (peak or ``bound``, live bytes). What neither raises the peak nor leaves more bytes live is
    run at once: an order in which it runs later is never better.
    """
    needs = [sum(1 << op for op in ops) for ops in near.before]
    users = [sum(1 << op for op in set(buffer.consumers)) for buffer in graph.buffers]

    def effect(op: int, done: int) -> tuple[int, int]:
        after = done | 1 << op
        transient = graph.scratch[op] if graph.scratch else 0
        net = 0
        for index in near.outputs[op]:
            buffer = graph.buffers[index]
            transient += buffer.size
            net += buffer.size if buffer.kept or users[index] else 0
        dying = {i for i in near.inputs[op] if not graph.buffers[i].kept and not users[i] & ~after}
        net -= sum(graph.buffers[index].size for index in dying)
        taken: set[int] = set()
        for pair in graph.in_place:
            if pair.op == op and pair.input in dying and not taken & {pair.input, pair.output}:
                taken |= {pair.input, pair.output}
                transient -= min(graph.buffers[pair.input].size, graph.buffers[pair.output].size)
        return transient, net

    def step(state: _State, op: int) -> _State:
        transient, net = effect(op, state.done)
        peak = max(state.peak, state.live + transient)
        return _State(state.done | 1 << op, state.live + net, peak, (*state.order, op))

    def ready(state: _State) -> list[int]:
        return [op for op in range(graph.ops) if not state.done >> op & 1 and not needs[op] & ~state.done]

    def settle(state: _State) -> _State:
        while True:
            for op in ready(state):
                after = step(state, op)
                if after.peak == state.peak and after.live <= state.live:
                    state = after
                    break
            else:
                return state

    levels: dict[int, dict[int, _State]] = {}
    start = settle(_State(0, graph.initial_bytes(), max(bound, graph.initial_bytes()), ()))
    levels[len(start.order)] = {start.done: start}
    for level in range(graph.ops):
        states = sorted(levels.pop(level, {}).values(), key=lambda s: (s.peak, s.live, s.done))[:width]
        for state in states:
            for op in ready(state):
                after = step(state, op)
                if after.peak >= target:
                    continue
                after = settle(after)
                known = levels.setdefault(len(after.order), {})
                if after.done not in known or after.peak < known[after.done].peak:
                    known[after.done] = after
    final = list(levels.get(graph.ops, {}).values())
    return min(final, key=lambda s: s.peak).order if final else None
