"""What a step computes, held against eager: results, gradients, and what it leaves behind in buffers and inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch.utils import _pytree as pytree

from .measure import backward_wanted, compiled_with, failures, scalar
from .target import Made, Request

#: Largest difference from eager, relative to a tensor's largest magnitude, that rounding explains (half precision).
DIFFERENCE = 0.02
#: How many times eager's distance from float64, or the last digit of the largest gradient, is rounding in ours.
_ROUNDING = 32.0
_GRADIENT = "gradient"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Comparison:
    """``difference``: the largest, relative to the largest magnitude of its tensor ``where``; infinite where one is not
    finite and the other is, or where one has a tensor that the other lacks.

    ``rounding`` names gradients that are left out of it, since they are rounding alone: the exact gradient of a bias
    before a batch norm is zero.
    """

    difference: float
    where: str
    rounding: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        return self.difference <= DIFFERENCE


def compare_with_eager(made: Made, request: Request, target: str) -> Comparison:
    """Run one step in eager and one with poisoned memory, from the same state, and compare all that they compute.

    Random numbers follow eager's generator.

    Raises
    ------
    TargetError
        If the step fails.
    """
    options = {"random": "eager", **request.options, "poison": True}
    backward = backward_wanted(made, request)
    with failures(target), torch.random.fork_rng():
        expected = _tensors(made, made.model, backward)
        got = _tensors(made, compiled_with(made, replace(request, options=options), "memplan"), backward)
    if expected.keys() != got.keys():
        return Comparison(float("inf"), ", ".join(sorted(expected.keys() ^ got.keys())))
    off = {k: relative_difference(got[k], expected[k]) for k in expected}
    if any(DIFFERENCE < d < float("inf") for d in off.values()):
        exact = _exact(made, backward)
        rounding = tuple(
            k
            for k, d in off.items()
            if k.startswith(_GRADIENT) and DIFFERENCE < d < float("inf") and is_rounding(k, got, expected, exact, off)
        )
    else:
        rounding = ()
    held = {k: d for k, d in off.items() if k not in rounding}
    where = max(held, key=lambda k: held[k], default="")
    return Comparison(held.get(where, 0.0), where, rounding)


def is_rounding(name: str, got: Tensors, expected: Tensors, exact: Tensors, off: Mapping[str, float]) -> bool:
    """Whether all that there is of a tensor is rounding: in eager, too, it is farther from float64 than it is from 0
    (more than half as far), and ours is no farther than eager's or than sums of the other gradients are rounded.

    float64 is believed only where it agrees with most of the tensors in which the two do not disagree (``off``): a
    model that draws other random numbers in float64 says nothing of rounding.
    """
    if exact.keys() != expected.keys():
        return False
    agreed = [k for k, d in off.items() if d <= DIFFERENCE]
    confirmed = sum(relative_difference(expected[k], exact[k]) <= DIFFERENCE for k in agreed)
    if 2 * confirmed <= len(agreed):
        return False
    ours, eagers = (_farthest(t[name], exact[name]) for t in (got, expected))
    largest = max(float(t.abs().max()) for k, t in exact.items() if k.startswith(_GRADIENT) and t.numel())
    rounded = _ROUNDING * max(eagers, torch.finfo(got[name].dtype).eps * largest)
    return eagers > 0.5 * float(exact[name].abs().max()) and ours <= rounded


def _exact(made: Made, backward: bool) -> Tensors:
    """The same step in float64; nothing where the model cannot be copied or has no float64."""
    if not isinstance(made.model, torch.nn.Module):
        return {}
    try:
        double = copy.deepcopy(made.model).double()
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, (made.args, dict(made.kwargs))
        )
        return _tensors(Made(double, args, kwargs), double, backward)
    except Exception:  # whatever it is, there is nothing to excuse a difference by: the verdict stays what it is
        return {}


def _tensors(made: Made, call: Callable[..., object], backward: bool) -> Tensors:
    """All that one step computes, by name; inputs are copies, the model's buffers and gradients are put back."""
    modules = [made.model] if isinstance(made.model, torch.nn.Module) else []
    kept = {
        name: (m.get_submodule(name.rpartition(".")[0]), b, b.detach().clone())
        for m in modules
        for name, b in m.named_buffers()
    }
    args, kwargs = _copies((made.args, dict(made.kwargs)))
    torch.manual_seed(0)
    with torch.set_grad_enabled(backward):
        result = call(*args, **kwargs)
    leaves = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
    found = {f"result {k}": t.detach().clone() for k, t in enumerate(leaves)}
    if backward and modules:
        scalar(result).backward()  # type: ignore[no-untyped-call]
        for name, p in made.model.named_parameters():  # type: ignore[attr-defined]
            if p.grad is not None:
                found[f"{_GRADIENT} of {name}"], p.grad = p.grad, None
    for k, t in enumerate(t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)):
        found[f"input {k}"] = t.detach()
        if t.grad is not None:
            found[f"{_GRADIENT} of input {k}"] = t.grad
    for name, (module, b, before) in kept.items():
        leaf = name.rpartition(".")[2]
        found[f"buffer {name}"] = getattr(module, leaf).detach().clone()
        with torch.no_grad():
            b.copy_(before)
        setattr(module, leaf, b)
    return found


def _copies(values: tuple[tuple[object, ...], dict[str, object]]) -> tuple[tuple[object, ...], dict[str, object]]:
    """The same arguments with tensors of their own; one tensor given twice stays one."""
    made: dict[int, torch.Tensor] = {}

    def copied(t: torch.Tensor) -> torch.Tensor:
        if id(t) not in made:
            made[id(t)] = t.detach().clone().requires_grad_(t.requires_grad)
        return made[id(t)]

    return pytree.tree_map_only(torch.Tensor, copied, values)  # type: ignore[no-any-return]


def _farthest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest distance of two tensors of one shape."""
    return float((a.detach().cpu().to(torch.complex128) - b.detach().cpu().to(torch.complex128)).abs().max())


def relative_difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of two tensors, relative to the largest magnitude expected; infinite if shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    a, b = got.detach().cpu().to(torch.complex128), expected.detach().cpu().to(torch.complex128)
    same = (a == b) | (a.isnan() & b.isnan())
    off = torch.where(same, 0.0, (a - b).abs())
    if not off.isfinite().all():
        return float("inf")
    size = b.abs().nan_to_num(0.0, 0.0)
    return float(off.max() / size.max().clamp(min=1e-6))
