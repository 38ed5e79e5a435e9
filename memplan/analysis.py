"""Plans of a model without building or running anything of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from .backend import CurveTeller, check_platform, compile_with
from .budget import CurvePoint
from .compilation import PASS_NAMES
from .frame_room import with_frame_room
from .ir.config import Config
from .recording import CompiledGraph, record


def analyze(
    model: Callable[..., object],
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    fake: bool = True,
    backward: bool = True,
    dynamic: bool = False,
    options: Mapping[str, object] | None = None,
) -> tuple[CompiledGraph, ...]:
    """The plans that ``torch.compile(model, backend="memplan")`` would run.

    Parameters
    ----------
    model:
        A module or a function of tensors.
    args, kwargs:
        Example inputs; their values do not matter when ``fake`` is set, only shapes, dtypes and devices.
    fake:
        Trace on fake tensors: no memory is taken and nothing is computed. Otherwise the model runs once, uncompiled.
    backward:
        Whether a backward pass is planned too (the inputs or parameters that require gradients decide what is in it).
    dynamic:
        Trace with symbolic sizes.
    options:
        As for ``torch.compile``.

    Returns
    -------
    One entry for each graph: a forward before its backward.

    Raises
    ------
    MemplanError, or what the model raises.

    Examples
    --------
    >>> import torch, memplan
    >>> graphs = memplan.analyze(torch.nn.Linear(4, 2), (torch.randn(3, 4),))
    >>> [g.plan.program.phase.value for g in graphs]
    ['forward', 'backward']
    """
    check_platform()
    config = replace(Config.from_options(options, known_passes=PASS_NAMES), plan_only=True)
    return _analyzed(model, args, kwargs, config, fake=fake, backward=backward, dynamic=dynamic)


def budget_curves(
    model: Callable[..., object],
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    fake: bool = True,
    options: Mapping[str, object] | None = None,
) -> tuple[tuple[CurvePoint, ...], ...]:
    """What the training step needs at all budgets, for each of its graphs: bytes and estimated time, least bytes first.

    Parameters are those of `analyze`; a ``budget`` among the options is not looked at.
    """
    check_platform()
    given = {**(options or {}), "budget": 2**61}
    config = replace(Config.from_options(given, known_passes=PASS_NAMES), plan_only=True)
    found: list[tuple[CurvePoint, ...]] = []
    _analyzed(model, args, kwargs, config, fake=fake, tell_curve=found.append)
    return tuple(found)


@with_frame_room
def _analyzed(
    model: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object] | None,
    config: Config,
    *,
    fake: bool = True,
    backward: bool = True,
    dynamic: bool = False,
    tell_curve: CurveTeller | None = None,
) -> tuple[CompiledGraph, ...]:
    def backend(module: torch.fx.GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        return compile_with(module, inputs, config, tell_curve)

    given = (tuple(args), dict(kwargs or {}))
    if fake:
        mode = _mode_of(model, given) or FakeTensorMode(allow_non_fake_inputs=True)
        model, given = _faked(model, given, mode)
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    with record(one_step=True) as recording, torch.set_grad_enabled(backward):
        compiled(*given[0], **given[1])
    return tuple(recording.graphs)


Given = tuple[tuple[object, ...], dict[str, object]]


def _mode_of(model: object, given: Given) -> FakeTensorMode | None:
    """The fake mode that the model or its inputs live in already."""
    tensors = list(pytree.tree_leaves(given))
    if isinstance(model, torch.nn.Module):
        tensors += [*model.parameters(), *model.buffers()]
    return detect_fake_mode(tensors)


def _faked(model: Callable[..., object], given: Given, mode: FakeTensorMode) -> tuple[Callable[..., object], Given]:
    """Copies on fake tensors; the user's own model and inputs are left as they are."""

    def fake(value: object) -> object:
        if isinstance(value, torch.Tensor) and not isinstance(value, torch._subclasses.FakeTensor):
            return mode.from_tensor(value)
        return value

    if isinstance(model, torch.nn.Module):
        # parameters and buffers are shared with the copy by the memo, then replaced: no bytes are copied
        memo: dict[int, object] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            fake_already = isinstance(tensor, torch._subclasses.FakeTensor)
            made: torch.Tensor = tensor if fake_already else mode.from_tensor(tensor)
            if isinstance(tensor, torch.nn.Parameter) and not isinstance(made, torch.nn.Parameter):
                made = torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = made
        model = copy.deepcopy(model, memo)
    return model, cast(Given, pytree.tree_map(fake, given))
