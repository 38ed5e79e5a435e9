"""Two kernels made one: `merge` (one iteration space for both) and `inline` (a producer's expression at each load).

Both are functions of data alone and say None where the result would not be provably the same. The values are those
of the separate kernels, bit for bit: where a value went through a buffer it is still rounded to that buffer's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import sympy
import torch

from memplan.ir.index import expand, ranges_of
from memplan.ir.index_inversion import invert
from memplan.ir.loops import Call, Constant, Kernel, Level, Load, Reduce, Store, StoreMode, operands, value_references

from .fuse_body import Body, needed, store_operands
from .fuse_mapping import mappings, same_index
from .fuse_masks import assume

#: integer division traps on a zero that a masked-off load may give
_TRAPPING = frozenset({"floordiv", "truncdiv", "mod", "fmod"})


@dataclass(frozen=True, slots=True)
class MergeRules:
    """What the program knows and the kernels do not.

    ``changed`` names buffers that either kernel mutates (they hold an earlier value); ``dropped`` those that nobody
    reads once the two are one, so that their stores go.
    """

    changed: frozenset[str] = frozenset()
    dropped: frozenset[str] = frozenset()


def merge(producer: Kernel, consumer: Kernel, rules: MergeRules = MergeRules()) -> Kernel | None:
    """One kernel that does what ``producer`` and then ``consumer`` do, over the ranges of one of them.

    The consumer's loads of what the producer stores must all be at the very point where it is stored. None where no
    common iteration space is found, or where a point would need another point's new value.
    """
    names = tuple(dict.fromkeys((*producer.buffers, *consumer.buffers)))
    number = {name: k for k, name in enumerate(names)}
    found = _merged(
        producer.anonymous,
        consumer.anonymous,
        tuple([number[b] for b in consumer.buffers]),
        frozenset([number[b] for b in rules.changed if b in number]),
        frozenset([number[b] for b in rules.dropped if b in number]),
    )
    return None if found is None else found.numbered_over(names)


@lru_cache(maxsize=1 << 14)
def _merged(
    producer: Kernel, consumer: Kernel, shared: tuple[int, ...], changed: frozenset[int], dropped: frozenset[int]
) -> Kernel | None:
    """`merge` of kernels whose buffers have numbers: ``shared[k]`` is what the consumer's ``b<k>`` is to the two.

    Layers of a model that do the same differ in names alone, so that they are merged once.
    """
    consumer = consumer.over(tuple([f"b{k}" for k in shared]))
    rules = MergeRules(frozenset([f"b{k}" for k in changed]), frozenset([f"b{k}" for k in dropped]))
    for producer_is_base in _orientations(producer, consumer):
        base, other = (producer, consumer) if producer_is_base else (consumer, producer)
        identity = {r.symbol: r.symbol for r in (*base.outer, *base.row)}
        for mapping in mappings(base, other):
            maps = (identity, mapping) if producer_is_base else (mapping, identity)
            joined = _join(Body(base.outer, base.row), producer, maps[0], consumer, maps[1], rules)
            if joined is not None:
                return joined
    return None


def _orientations(producer: Kernel, consumer: Kernel) -> tuple[bool, ...]:
    """Whose ranges to keep: a reduction's; else the consumer's, which is nearer to how results are laid out."""
    if bool(producer.row) != bool(consumer.row):
        return (bool(producer.row),)
    return (True, False) if producer.row else (False, True)


def _join(
    body: Body,
    producer: Kernel,
    producer_map: Mapping[sympy.Symbol, sympy.Expr],
    consumer: Kernel,
    consumer_map: Mapping[sympy.Symbol, sympy.Expr],
    rules: MergeRules,
) -> Kernel | None:
    moved = body.embed(producer, producer_map)
    stored: dict[str, list[Store]] = {}
    produced = body.embed_stores(producer, producer_map, moved)
    for s in produced:
        stored.setdefault(s.buffer, []).append(s)
    read_before = [n for n in body.nodes if isinstance(n, Load)]
    failed = False

    def forward(load: Load) -> int | None:
        nonlocal failed
        if load.buffer not in stored:
            return None
        value = _forwarded(body, load, stored[load.buffer])
        failed = failed or value is None
        return value

    moved = body.embed(consumer, consumer_map, forward=forward)
    if failed:
        return None
    consumed = body.embed_stores(consumer, consumer_map, moved)
    kept = _overwritten(body, produced, consumed, rules)
    if kept is None or not _reads_stay_before(body, read_before, consumed):
        return None
    body.stores = [s for s in (*kept, *consumed) if s.buffer not in rules.dropped]
    joined = body.kernel()
    return joined if updates_once_a_row(joined) else None


def updates_once_a_row(kernel: Kernel) -> bool:
    """Whether what a kernel with rows both reads and writes is read and written once a row, at one element.

    Running statistics are: read after the row's reductions, and stored. Anything else might be read by a later pass
    over the row after an earlier one has written it; so might a value that something along the row depends on.
    """
    both = set(kernel.read_buffers) & set(kernel.written_buffers) if kernel.row else set()
    return not both or _updates_once_a_row(kernel.anonymous)


@lru_cache(maxsize=1 << 14)
def _updates_once_a_row(kernel: Kernel) -> bool:
    """`updates_once_a_row` of a kernel that reads and writes a buffer."""
    both = set(kernel.read_buffers) & set(kernel.written_buffers)
    ranges = ranges_of((*kernel.outer, *kernel.row))
    for s in kernel.stores:
        if s.buffer in both and (s.mode is not StoreMode.SET or s.mask is not None or value_references(s.index)):
            return False
        if s.buffer in both and kernel.store_level(s) is Level.POINT:
            return False
    updated = [False] * len(kernel.nodes)
    for k, node in enumerate(kernel.nodes):
        if isinstance(node, Load) and node.buffer in both:
            indices = [s.index for s in kernel.stores if s.buffer == node.buffer]
            if node.mask is not None or any(not same_index(i, node.index, ranges) for i in indices):
                return False
            updated[k] = True
        updated[k] = updated[k] or any(updated[a] for a in operands(node))
        if updated[k] and (isinstance(node, Reduce) or kernel.levels[k] is Level.POINT):
            return False
    return all(
        kernel.store_level(s) is not Level.POINT for s in kernel.stores if any(updated[k] for k in store_operands(s))
    )


def _forwarded(body: Body, load: Load, stores: list[Store]) -> int | None:
    """The value that a load finds where the same point has just stored it, or None.

    At a computed index another point may have stored as well.
    """
    for s in stores:
        exact = s.mode is StoreMode.SET and s.mask is None and s.dtype == load.dtype and not value_references(s.index)
        if exact and same_index(s.index, load.index, body.ranges):
            value = body.rounded(s.value, s.dtype)
            if load.mask is None:
                return value
            other = body.add(Constant(_literal(load), load.dtype))
            return body.add(Call("where", (load.mask, value, other), load.dtype))
    return None


def _literal(load: Load) -> bool | int | float:
    """``Load.other`` as a literal of the load's dtype."""
    if load.dtype is torch.bool:
        return bool(load.other)
    return float(load.other) if load.dtype.is_floating_point else int(load.other)


def _overwritten(body: Body, produced: list[Store], consumed: list[Store], rules: MergeRules) -> list[Store] | None:
    """The producer's stores less those that the consumer overwrites at the same point; None if at another point."""
    kept: list[Store] = []
    for p in produced:
        later = [c for c in consumed if c.buffer == p.buffer]
        if not later or p.buffer not in rules.changed:
            kept.append(p)  # parts of one fresh buffer do not overlap
            continue
        plain = all(s.mode is StoreMode.SET and s.mask is None for s in (p, *later))
        if not plain or not all(same_index(p.index, c.index, body.ranges) for c in later):
            return None
    return kept


def _reads_stay_before(body: Body, loads: list[Load], stores: list[Store]) -> bool:
    """Whether what the producer reads is only overwritten by the very point that has read it.

    Two points may compute the same index, so that equal ones say nothing.
    """
    written: dict[str, list[Store]] = {}
    for s in stores:
        written.setdefault(s.buffer, []).append(s)
    for load in loads:
        for s in written.get(load.buffer, ()):
            if s.mode is not StoreMode.SET or s.dtype != load.dtype or value_references(s.index):
                return False
            if not same_index(s.index, load.index, body.ranges):
                return False
    return True


def stored_value(producer: Kernel, buffer: str) -> Store | None:
    """The one plain store of a pointwise kernel to ``buffer`` that `inline` can replay anywhere, or None."""
    stores = [s for s in producer.stores if s.buffer == buffer]
    if producer.row or len(stores) != 1:
        return None
    store = stores[0]
    if store.mode is not StoreMode.SET or store.mask is not None or value_references(store.index):
        return None
    return store


def inline(producer: Kernel, consumer: Kernel, buffer: str) -> Kernel | None:
    """The consumer with each load of ``buffer`` replaced by the pointwise producer's expression at that element.

    The producer's store must cover all that is ever read of the buffer, and what the producer reads must still hold
    the same when the consumer runs: both are for the caller to see to.
    """
    names = tuple(dict.fromkeys((*producer.buffers, *consumer.buffers)))
    number = {name: k for k, name in enumerate(names)}
    shared = tuple([number[b] for b in consumer.buffers])
    found = _inlined(producer.anonymous, consumer.anonymous, shared, f"b{number[buffer]}")
    return None if found is None else found.numbered_over(names)


@lru_cache(maxsize=1 << 14)
def _inlined(producer: Kernel, consumer: Kernel, shared: tuple[int, ...], buffer: str) -> Kernel | None:
    """`inline` of kernels whose buffers have numbers; see `_merged`."""
    consumer = consumer.over(tuple([f"b{k}" for k in shared]))
    store = stored_value(producer, buffer)
    if store is None:
        return None
    wanted = needed(producer, store_operands(store))
    traps = any(isinstance(producer.nodes[k], Call) and producer.nodes[k].op in _TRAPPING for k in wanted)  # type: ignore[union-attr]
    body = Body(consumer.outer, consumer.row)
    failed = False

    def replay(load: Load) -> int | None:
        nonlocal failed
        if load.buffer != buffer or failed:
            return None
        if load.dtype != store.dtype or (load.mask is not None and traps):
            failed = True
            return None
        moved = _replayed(body, producer, store, load, wanted)
        if moved is None:
            failed = True
            return None
        value = body.rounded(moved[store.value], store.dtype)
        if load.mask is None:
            return value
        other = body.add(Constant(_literal(load), load.dtype))
        return body.add(Call("where", (load.mask, value, other), load.dtype))

    moved = body.embed(consumer, {}, forward=replay)
    if failed:
        return None
    body.stores = body.embed_stores(consumer, {}, moved)
    return body.kernel()


def _replayed(body: Body, producer: Kernel, store: Store, load: Load, wanted: frozenset[int]) -> list[int] | None:
    """The producer's nodes at the point that stored what ``load`` reads."""
    if all(producer.levels[k] is Level.CONSTANT for k in wanted):
        return body.embed(producer, {}, only=wanted, mask=load.mask)  # the same at every point
    space, ranges, index = ranges_of(producer.outer), body.ranges, load.index
    assumption = None if load.mask is None else assume(body.nodes, load.mask, ranges)
    if assumption is not None:
        index = expand(index.xreplace(assumption.forward))
        body.ranges, body.coordinates = assumption.ranges, assumption.back
    point = invert(store.index, space, index, body.ranges)
    moved = None if point is None else body.embed(producer, point, only=wanted, mask=load.mask)
    body.ranges, body.coordinates = ranges, {}
    return moved


def without_stores(kernel: Kernel, buffers: frozenset[str]) -> Kernel:
    """The kernel without its stores to these buffers and what only they needed."""
    gone = frozenset([k for k, b in enumerate(kernel.buffers) if b in buffers])
    return _without_stores(kernel.anonymous, gone).numbered_over(kernel.buffers)


@lru_cache(maxsize=1 << 14)
def _without_stores(kernel: Kernel, numbers: frozenset[int]) -> Kernel:
    buffers = frozenset([f"b{k}" for k in numbers])
    body = Body(kernel.outer, kernel.row)
    moved = body.embed(kernel, {})
    body.stores = [s for s in body.embed_stores(kernel, {}, moved) if s.buffer not in buffers]
    return body.kernel()


def renamed_buffers(kernel: Kernel, names: Mapping[str, str]) -> Kernel:
    """The kernel over other buffers; nothing else changes."""
    nodes = tuple(
        replace(n, buffer=names[n.buffer]) if isinstance(n, Load) and n.buffer in names else n for n in kernel.nodes
    )
    stores = tuple(replace(s, buffer=names[s.buffer]) if s.buffer in names else s for s in kernel.stores)
    return Kernel(kernel.outer, kernel.row, nodes, stores)


def iter_indices(kernel: Kernel, buffer: str) -> Iterator[sympy.Expr]:
    """Indices at which the kernel loads from ``buffer``."""
    return (n.index for n in kernel.loads if n.buffer == buffer)
