"""What a call of an operator moves and computes, by torch's formulas and by what libraries make of a call's sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from .device import Unit, Work
from .flops import flops, has_formula

_ATTENTION = ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "_cudnn_attention")
#: Rows of queries and of keys that an attention kernel computes together; a part of a tile takes as long as all of it.
_TILE = 128
#: The backward of attention has five products where the forward has two.
_BACKWARD = 2.5
#: Channels that one instruction of a matrix unit sums over. Convolutions over a number that these do not divide do not
#: run there.
_CHANNELS = 8


def call_work(
    target: object,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    result: object,
    *,
    nbytes: int,
    itemsize: int,
    elements: int,
) -> Work:
    """The work of a call.

    Parameters
    ----------
    target:
        The overload; anything else, or one that torch has no formula for, does an operation an element.
    args, kwargs, result:
        As for `memplan.ir.flops.flops`.
    nbytes:
        Bytes of operands and results.
    itemsize:
        Bytes of an element of its factors.
    elements:
        Elements of its results.
    """
    name = target._schema.name.partition("::")[2] if isinstance(target, torch._ops.OpOverload) else ""
    if isinstance(target, torch._ops.OpOverload):
        given = {a.name: v for a, v in zip(target._schema.arguments, args, strict=False)} | dict(kwargs)
        if name.startswith("_scaled_dot_product"):
            return Work(nbytes, _attention(given, backward=name.endswith("_backward")), Unit.ATTENTION, itemsize)
        if name in ("convolution", "convolution_backward"):
            return Work(nbytes, _convolution(given, result), _convolution_unit(given), itemsize)
        if has_formula(target):
            found = flops(target, args, kwargs, result)
            unit = Unit.ATTENTION if name.startswith(_ATTENTION) else Unit.PRODUCT
            unit = Unit.CONVOLUTION if "convolution" in name else unit
            return Work(nbytes, found // 2 if given.get("is_causal") is True else found, unit, itemsize)
    return Work(nbytes, elements, Unit.SCALAR, itemsize)


def _attention(given: Mapping[str, object], *, backward: bool) -> int:
    """Operations of whole tiles; half of them above the diagonal where that is left out."""
    query, key, value = (_shape(given[n]) for n in ("query", "key", "value"))
    rows, columns = (-(-s[-2] // _TILE) * _TILE for s in (query, key))
    found = 2 * math.prod(query[:-2]) * rows * columns * (query[-1] + value[-1]) * (_BACKWARD if backward else 1)
    return int(found) // 2 if given.get("is_causal") is True else int(found)


def _convolution(given: Mapping[str, object], result: object) -> int:
    """Operations of a convolution or of its gradients. (Torch's formula counts a weight's gradient as if there were one
    group.)"""
    weight = _shape(given["weight"])
    gradients = given.get("output_mask")
    of_output = given.get("grad_output", result)
    spread_over = given["input"] if given["transposed"] else of_output
    once = 2 * math.prod(_shape(spread_over)) * math.prod(weight[1:])
    return once if gradients is None else once * sum(map(bool, gradients[:2]))  # type: ignore[index]


def _convolution_unit(given: Mapping[str, object]) -> Unit:
    weight = _shape(given["weight"])
    groups = given["groups"]
    assert isinstance(groups, int)
    channels = weight[0] // groups if given["transposed"] else weight[1]
    if channels % _CHANNELS == 0:
        return Unit.CONVOLUTION
    return Unit.DEPTHWISE if groups > 1 else Unit.NARROW


def _shape(value: object) -> tuple[int, ...]:
    assert isinstance(value, torch.Tensor)
    return tuple(value.shape)
