"""``options={"cuda_graphs": True}``: what runs on a GPU is recorded into CUDA graphs once and replayed from then on.

The recording is torch's own (`torch._inductor.cudagraph_trees`, which takes any boxed callable): one memory pool for
all graphs of a device, a warm-up run, outputs of a forward that its backward reads in place, a graph per path through
the program. It keeps what lives in its pool apart from what the user holds, and tells the user who reads a result that
a later run has overwritten.

What cannot be recorded is found out before: `obstacle`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.fx

from memplan.ir.program import Contract, Extern, OpaqueInput, Operation, Program, SymbolInput, TensorInput

Boxed = Callable[..., object]

#: Higher-order operators that launch kernels and do nothing else.
_RECORDABLE = ("triton_kernel_wrapper",)


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a program cannot be recorded, and the operation that stands in the way, for the message."""

    reason: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.reason}\n  at {self.where}" if self.where else self.reason


def static_positions(program: Program) -> frozenset[int]:
    """Positional inputs whose address is the same in every call: parameters, and what the forward saved.

    (The forward's results lie in the graphs' pool, at the addresses that were recorded.)
    """
    return frozenset(
        i.position
        for i in program.inputs
        if isinstance(i, TensorInput)
        and (program.buffers[i.view.buffer].kind.value == "parameter" or program.buffers[i.view.buffer].donated)
    )


def changed_positions(program: Program) -> tuple[int, ...]:
    """Positional inputs that the program writes to."""
    changed = {b for op in program.operations for b in (*op.mutates, *op.writes)}
    return tuple(i.position for i in program.inputs if isinstance(i, TensorInput) and i.view.buffer in changed)


def gpu_of(program: Program) -> int | None:
    """The index of the GPU that the program uses first; None for a program of the CPU alone."""
    devices = [b.device for b in program.buffers.values() if b.device.startswith("cuda")]
    return int(devices[0].partition(":")[2] or 0) if devices else None


def obstacle(program: Program) -> Obstacle | None:
    """What keeps a program that uses a GPU from being recorded, or None.

    An operation on the CPU or on a second GPU, an input that is an integer (dynamic shapes) or no tensor, a result
    whose size is known only afterwards, a call that must not be recorded, a change of an input that is not a
    parameter or a buffer of the model.
    """
    for i in program.inputs:
        if isinstance(i, SymbolInput):
            return Obstacle(f"shapes are dynamic (the size {i.symbol} is an input); compile with dynamic=False")
        if isinstance(i, OpaqueInput):
            return Obstacle(f"the input {i.name} is no tensor")
    gpu = f"cuda:{gpu_of(program)}"
    for op in program.operations:
        reason = _unrecordable(op, gpu)
        if reason:
            return Obstacle(reason, _place(op))
    for name, buffer in program.buffers.items():
        if buffer.device != gpu:
            return Obstacle(f"{name} is on {buffer.device}, not on {gpu}", buffer.origin.location)
    static = static_positions(program)
    for position in changed_positions(program):
        if position not in static:
            changed = next(
                i.view.buffer for i in program.inputs if isinstance(i, TensorInput) and i.position == position
            )
            writer = next(op for op in program.operations if changed in (*op.mutates, *op.writes))
            return Obstacle(f"it changes its input {changed}", _place(writer))
    return None


def _unrecordable(op: Operation, gpu: str) -> str:
    target = op.target if isinstance(op, Extern) else op.name
    if op.device != gpu:
        return f"{target} runs on {op.device}, not on {gpu}"
    if not isinstance(op, Extern):
        return ""
    if op.contract is Contract.DYNAMIC or op.symbols:
        return f"the size of the result of {target} is known only after it has run"
    if op.target.startswith("callable:"):
        name = op.origins[0].op if op.origins else op.target
        return "" if name.startswith(_RECORDABLE) else f"{name} may do more than launch kernels"
    found: object = torch.ops
    for part in op.target.split("."):
        found = getattr(found, part)
    if torch.Tag.cudagraph_unsafe in getattr(found, "tags", ()):
        return f"{target} must not be recorded (it says so itself)"
    return ""


def _place(op: Operation) -> str:
    origin = next((o for o in op.origins if o.location), None)
    return "" if origin is None else f"{origin.location}   {origin.code}".rstrip()


def recorded(
    call: Boxed,
    inputs: Sequence[object],
    program: Program,
    module: torch.fx.GraphModule,
    static: frozenset[int],
) -> Boxed:
    """``call``, recorded at its second call and replayed from the third on.

    Parameters
    ----------
    call:
        Takes a boxed list of arguments. It must not write into any input but the static ones that the program changes.
    inputs:
        Example inputs: their number and kinds are used.
    program:
        What ``call`` does; `obstacle` found none in it.
    module:
        The FX graph that it came from, for the messages about overwritten results.
    static:
        `static_positions` of the program.
    """
    from torch._inductor.cudagraph_trees import cudagraphify_impl
    from torch._inductor.cudagraph_utils import get_placeholder_info

    device = gpu_of(program)
    assert device is not None
    outputs = module.graph.output_node().args[0]
    traces = [getattr(out, "stack_trace", None) for out in outputs]  # type: ignore[union-attr]
    constants = tuple(c for c in program.constants.values() if c.is_cuda)
    kinds = [0 if isinstance(value, int) else None for value in inputs]  # recording asks only which are integers
    phase = program.phase.value
    local = threading.local()

    def run(args: list[object]) -> object:
        if phase != "backward":
            keep_gradients(args[k] for k in static)
        # as the pools are each thread's own, so are the recordings
        recording = getattr(local, "recording", None)
        if recording is None:
            recording = local.recording = cudagraphify_impl(
                call,  # type: ignore[arg-type]
                list(kinds),
                tuple(sorted(static)),
                device_index=device,
                is_backward=phase == "backward",
                is_inference=phase == "inference",
                stack_traces=traces,
                constants=constants,
                placeholders=tuple(get_placeholder_info(module.graph)),
                mutated_input_idxs=changed_positions(program),
            )
        out = recording(args)  # type: ignore[arg-type]
        if phase == "backward":
            note_gradients(out)
        return out

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


#: Addresses of what recorded backwards gave; autograd may have made it the parameters' ``grad``. Shared by all threads:
#: autograd runs backwards in threads of its own. (An address too many costs a copy.)
_given: set[int] = set()


def note_gradients(results: object) -> None:
    """Remember where the results of a recorded backward lie."""
    for t in results:  # type: ignore[attr-defined]
        if isinstance(t, torch.Tensor):
            _given.add(t.untyped_storage().data_ptr())


def keep_gradients(parameters: Iterable[object]) -> None:
    """Move gradients that are still held out of the recordings' memory, before a new step overwrites it.

    Gradients are accumulated over several steps then. Who sets them to None, as optimisers do, pays nothing.
    """
    if not _given:
        return
    for p in parameters:
        if not isinstance(p, torch.Tensor) or not p.is_leaf:
            continue
        held = p.grad
        if held is not None and held.layout == torch.strided and held.untyped_storage().data_ptr() in _given:
            p.grad = held.detach().clone()
    _given.clear()


def beside_recordings(call: Boxed, device: int) -> Boxed:
    """A backward that is not recorded, of a forward that is: the recording is told that the backward has begun."""

    def run(args: list[object]) -> object:
        from torch._inductor.cudagraph_trees import get_manager

        manager = get_manager(device, create_if_none_exists=False)
        if manager is not None:
            manager.set_to_running_backward()
        return call(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
