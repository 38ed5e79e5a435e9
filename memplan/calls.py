"""What stands between autograd and a wrapper's call: lazy bits, saved-tensor hooks, graphs that are kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from .ir.program import Program, SizeSource, SymbolInput, TensorInput

Made = TypeVar("Made")


def below_autograd(call: Callable[..., object]) -> Callable[..., object]:
    """The call, whose operators are not dispatched to autograd first: AOTAutograd has taken the gradients already.

    Autograd has nothing to record then, and takes 0.8 us a call all the same; of collectives it is a function in
    Python, 24 us an all-reduce and its wait (on a CPU, torch 2.13).
    """

    def run(args: list[object]) -> object:
        with torch._C._AutoDispatchBelowAutograd():
            return call(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def completed(program: Program, lazy: Sequence[int], call: Callable[..., object]) -> Callable[..., object]:
    """The call, given a graph's arguments as AOTAutograd passes them; ``lazy``: see `true_elements`."""
    return read_sizes(program, true_elements(program, lazy, call))


def read_sizes(program: Program, call: Callable[..., object]) -> Callable[..., object]:
    """The call, given also the sizes that are read off its tensors (see `SizeSource`)."""
    sources = [i.source for i in program.inputs if isinstance(i, SymbolInput) and i.source is not None]
    if not sources:
        return call

    def sized(args: list[object]) -> object:
        args.extend([_size(args[s.position], s) for s in sources])
        return call(args)

    sized._boxed_call = True  # type: ignore[attr-defined]
    return sized


def _size(tensor: object, source: SizeSource) -> int:
    assert isinstance(tensor, torch.Tensor)
    size = tensor.stride(source.dim) if source.stride else tensor.size(source.dim)
    return (size - source.offset) // source.factor


def true_elements(program: Program, lazy: Sequence[int], call: Callable[..., object]) -> Callable[..., object]:
    """The call, given lazily conjugated or negated inputs as their elements are: kernels read memory, not such bits.

    (Dynamo compiles again for an input with other bits.) What the program writes into such an input is written back.
    ``lazy`` are the positions of such inputs.
    """
    if not lazy:
        return call
    changed = {b for op in program.operations for b in op.mutates}
    changes = {i.position for i in program.inputs if isinstance(i, TensorInput) and i.view.buffer in changed}

    def resolved(args: list[object]) -> object:
        back = []
        for k in lazy:
            given = args[k]
            assert isinstance(given, torch.Tensor)
            made = torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=given.device)
            args[k] = made.copy_(given.detach())
            if k in changes:
                back.append((given.detach(), made))
        out = call(args)
        for given, made in back:
            given.copy_(made)
        return out

    resolved._boxed_call = True  # type: ignore[attr-defined]
    return resolved


def backward_call(
    donating: Callable[..., object], make_plain: Callable[[], Callable[..., object]], hooked: Callable[[], bool]
) -> Callable[..., object]:
    """The backward that frees and overwrites what the forward saved, unless somebody may still want it.

    Under ``retain_graph=True``, or where saved-tensor hooks gave us tensors that may be the user's, a variant of the
    same kernels and calls runs that leaves them alone, made when it is first needed.
    """
    keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
    plain = made_once(make_plain)

    def backward(args: list[object]) -> object:
        return donating(args) if not keeps_graph() and not hooked() else plain()(args)

    backward._boxed_call = True  # type: ignore[attr-defined]
    return backward


def forward_call(
    call: Callable[..., object],
    note: Callable[[], None],
    make_apart: Callable[[], Callable[..., object]] | None,
    settle: Callable[[], None] | None = None,
) -> Callable[..., object]:
    """The forward, which notes whether saved-tensor hooks (offload, for example) were active.

    A hook is given tensors of their own, not places in a slab that they would keep alive or copy as a whole: with
    hooks what ``make_apart`` makes runs instead. ``settle`` waits for what the call has left in flight to the host.
    """
    top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
    apart = made_once(make_apart) if make_apart is not None else None

    def forward(args: list[object]) -> object:
        if top_hooks(True) is None:
            return call(args)
        note()
        out = call(args) if apart is None else apart()(args)
        if settle is not None:
            settle()
        return out

    forward._boxed_call = True  # type: ignore[attr-defined]
    return forward


def made_once(make: Callable[[], Made]) -> Callable[[], Made]:
    """What ``make`` makes, made when it is first asked for, by whichever thread."""
    made: list[Made] = []
    lock = threading.Lock()

    def get() -> Made:
        with lock:
            if not made:
                made.append(make())
        return made[0]

    return get
