"""Reductions over a tile's row: whole in one block, or step by step over blocks.

``whole`` reduces a block that holds the row. ``start``, ``step`` and ``finish`` keep one accumulator for every lane of
the block and reduce the lanes at the end, which also makes long sums accurate (as pairwise summation is).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from memplan.ir.errors import LoweringError
from memplan.ir.loops import Reduce, Scalar

from .triton_printer import compute_type, literal, type_name

Use = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Reduction:
    """A reduction and its position among the kernel's nodes, which names its variables."""

    position: int
    node: Reduce
    operands: tuple[torch.dtype, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the accumulators; booleans are counted in int32."""
        own = compute_type(self.node.dtype)
        return torch.int32 if self.logical else own

    @property
    def op(self) -> str:
        """The operation (`triton_online`'s too); on booleans maximum, sum are ``any``, minimum, product ``all``."""
        if self.node.dtype == torch.bool:
            return {"max": "any", "sum": "any", "min": "all", "prod": "all"}.get(self.node.op, self.node.op)
        return self.node.op

    @property
    def logical(self) -> bool:
        return self.op in ("any", "all")


def _extreme(dtype: torch.dtype, *, largest: bool) -> Scalar:
    if dtype.is_floating_point:
        return float("inf") if largest else float("-inf")
    if dtype == torch.bool:
        return largest
    info = torch.iinfo(dtype)
    return info.max if largest else info.min


def _identity(op: str, dtype: torch.dtype) -> Scalar:
    match op:
        case "sum" | "any" | "welford" | "welford_combine":
            return 0
        case "prod" | "all":
            return 1
        case "max" | "argmax":
            return _extreme(dtype, largest=False)
        case "min" | "argmin":
            return _extreme(dtype, largest=True)
    raise LoweringError(f"reduction {op} has no Triton form")


def _combine(r: Reduction, dtype: torch.dtype, use: Use) -> str:
    """Name of the device function that joins two partial results."""
    floating = dtype.is_floating_point
    name = {
        "prod": "product",
        "max": "larger" if floating else "larger_integer",
        "min": "smaller" if floating else "smaller_integer",
        "argmax": "first_larger_float" if floating else "first_larger",
        "argmin": "first_smaller_float" if floating else "first_smaller",
        "welford": "welford_union",
        "welford_combine": "welford_union",
    }[r.op]
    use(name)
    return name


def _across(r: Reduction, text: str, use: Use) -> str:
    """One value reduced along the row."""
    simple = {"sum": "tl.sum", "any": "tl.max", "all": "tl.min"}
    if r.op in simple:
        out = f"{simple[r.op]}({text}, 1)[:, None]"
    else:
        out = f"tl.reduce({text}, 1, {_combine(r, r.dtype, use)})[:, None]"
    if r.logical:
        out = f"({out} != 0)"
        return out if r.node.dtype == torch.bool else f"{out}.to({type_name(compute_type(r.node.dtype))})"
    if r.dtype.itemsize < 4 and not r.dtype.is_floating_point:
        out += f".to({type_name(r.dtype)})"
    return out


def _operand(r: Reduction, text: str, dtype: torch.dtype) -> str:
    """A point value in the accumulator's type."""
    if r.logical:
        truth = text if dtype == torch.bool else f"({text} != 0)"
        return f"{truth}.to(tl.int32)"
    return text if compute_type(dtype) == r.dtype else f"{text}.to({type_name(r.dtype)})"


def _masked(text: str, mask: str, value: Scalar, dtype: torch.dtype) -> str:
    if not mask:
        return text
    return f"tl.where({mask}, {text}, {_typed(value, dtype)})"


def _typed(value: Scalar, dtype: torch.dtype) -> str:
    """A literal of exactly this type (Python floats would be float32, small integers int32)."""
    text = literal(value, dtype)
    return text if dtype in (torch.float32, torch.int32) else f"tl.full([1, 1], {text}, {type_name(dtype)})"


def _pair_types(r: Reduction) -> tuple[torch.dtype, torch.dtype]:
    value = compute_type(r.operands[0])
    return (torch.int8 if value == torch.bool else value), r.operands[1]


def _pair(r: Reduction, texts: list[str], mask: str) -> tuple[str, str]:
    value, index = _pair_types(r)
    text = f"{texts[0]}.to(tl.int8)" if compute_type(r.operands[0]) == torch.bool else texts[0]
    return (
        _masked(text, mask, _identity(r.op, value), value),
        _masked(texts[1], mask, torch.iinfo(index).max, index),
    )


def whole(r: Reduction, texts: list[str], mask: str, count: str, use: Use) -> tuple[list[str], tuple[str, ...]]:
    """Lines that reduce one block holding the whole row, and the names of the results."""
    name = f"tmp{r.position}"
    match r.op:
        case "argmax" | "argmin":
            value, index = _pair(r, texts, mask)
            combine = _combine(r, _pair_types(r)[0], use)
            return [
                f"{name}_value, {name}_index = tl.reduce(({value}, {index}), 1, {combine})",
                f"{name} = {name}_index[:, None].to({type_name(r.node.dtype)})",
            ], (name,)
        case "welford":
            return _two_pass(r, _operand(r, texts[0], r.operands[0]), mask, count), _parts(r)
        case "welford_combine":
            parts = [_masked(_operand(r, t, d), mask, 0, r.dtype) for t, d in zip(texts, r.operands, strict=True)]
            return _union(r, parts, use), _parts(r)
    text = _masked(_operand(r, texts[0], r.operands[0]), mask, _identity(r.op, r.dtype), r.dtype)
    return [f"{name} = {_across(r, text, use)}"], (name,)


def _parts(r: Reduction) -> tuple[str, ...]:
    return tuple(f"tmp{r.position}_{part}" for part in ("mean", "m2", "weight"))


def _two_pass(r: Reduction, text: str, mask: str, count: str) -> list[str]:
    """Mean, then squared deviations from it: the row is at hand."""
    mean, m2, weight = _parts(r)
    total = (
        f"tl.full([1, 1], {count}, {type_name(r.dtype)})" if count.isdigit() else f"({count}).to({type_name(r.dtype)})"
    )
    return [
        f"{weight} = {total}",
        f"{mean} = tl.sum({_masked(text, mask, 0, r.dtype)}, 1)[:, None] / {weight}",
        f"{m2}_point = {_masked(f'{text} - {mean}', mask, 0, r.dtype)}",
        f"{m2} = tl.sum({m2}_point * {m2}_point, 1)[:, None]",
    ]


def _union(r: Reduction, parts: list[str], use: Use) -> list[str]:
    names = _parts(r)
    lines = [f"{', '.join(names)} = tl.reduce(({', '.join(parts)}), 1, {_combine(r, r.dtype, use)})"]
    return [*lines, *(f"{n} = {n}[:, None]" for n in names)]


def start(r: Reduction, tile: str) -> list[str]:
    """Accumulators before the loop, one for every lane of the tile."""
    name = f"acc{r.position}"
    match r.op:
        case "online_softmax":
            return [
                f'{name}_top = tl.full({tile}, float("-inf"), tl.float32)',
                f"{name}_total = tl.zeros({tile}, tl.float32)",
            ]
        case "argmax" | "argmin":
            value, index = _pair_types(r)
            return [
                f"{name} = tl.full({tile}, {literal(_identity(r.op, value), value)}, {type_name(value)})",
                f"{name}_index = tl.full({tile}, {torch.iinfo(index).max}, {type_name(index)})",
            ]
        case "welford":
            zeros = f"tl.zeros({tile}, {type_name(r.dtype)})"
            # Python's 0.0 would be a float32 in the loop, and its inverse too inexact for a double
            count = "tl.full([], 0.0, tl.float64)" if r.dtype == torch.float64 else "0.0"
            return [f"{name}_mean = {zeros}", f"{name}_m2 = {zeros}", f"{name}_count = {count}"]
        case "welford_combine":
            zeros = f"tl.zeros({tile}, {type_name(r.dtype)})"
            return [f"{name}_{part} = {zeros}" for part in ("mean", "m2", "weight")]
    return [f"{name} = tl.full({tile}, {literal(_identity(r.op, r.dtype), r.dtype)}, {type_name(r.dtype)})"]


def step(r: Reduction, texts: list[str], mask: str, use: Use) -> list[str]:
    """Lines in the loop that take in one block."""
    name = f"acc{r.position}"
    match r.op:
        case "online_softmax":
            use("online_step")
            value = _masked(texts[0], mask, float("-inf"), r.dtype)
            return [f"{name}_top, {name}_total = online_step({name}_top, {name}_total, {value})"]
        case "argmax" | "argmin":
            value, index = _pair(r, texts, mask)
            combine = _combine(r, _pair_types(r)[0], use)
            return [f"{name}, {name}_index = {combine}({name}, {name}_index, {value}, {index})"]
        case "welford":
            return _welford_step(name, _operand(r, texts[0], r.operands[0]), mask)
        case "welford_combine":
            parts = [_masked(_operand(r, t, d), mask, 0, r.dtype) for t, d in zip(texts, r.operands, strict=True)]
            names = [f"{name}_{part}" for part in ("mean", "m2", "weight")]
            return [f"{', '.join(names)} = {_combine(r, r.dtype, use)}({', '.join((*names, *parts))})"]
    text = _masked(_operand(r, texts[0], r.operands[0]), mask, _identity(r.op, r.dtype), r.dtype)
    match r.op:
        case "sum":
            return [f"{name} += {text}"]
        case "prod":
            return [f"{name} *= {text}"]
        case "any":
            return [f"{name} = tl.maximum({name}, {text})"]
        case "all":
            return [f"{name} = tl.minimum({name}, {text})"]
    return [f"{name} = {_combine(r, r.dtype, use)}({name}, {text})"]


def _welford_step(name: str, text: str, mask: str) -> list[str]:
    """B. P. Welford, "Note on a method for calculating corrected sums of squares and products", 1962, in every lane.

    All lanes have seen equally many values but in the last block, so that the count is one scalar.
    """
    delta, mean = f"{name}_delta", f"{name}_next"
    lines = [
        f"{name}_count += 1.0",
        f"{delta} = {text} - {name}_mean",
        f"{mean} = {name}_mean + {delta} * (1.0 / {name}_count)",
    ]
    new_m2 = f"{name}_m2 + {delta} * ({text} - {mean})"
    if not mask:
        return [*lines, f"{name}_m2 = {new_m2}", f"{name}_mean = {mean}"]
    return [
        *lines,
        f"{name}_m2 = tl.where({mask}, {new_m2}, {name}_m2)",
        f"{name}_mean = tl.where({mask}, {mean}, {name}_mean)",
    ]


def finish(r: Reduction, count: str, tile: str, use: Use) -> tuple[list[str], tuple[str, ...]]:
    """Lines after the loop that reduce the lanes, and the names of the results."""
    name, acc = f"tmp{r.position}", f"acc{r.position}"
    match r.op:
        case "online_softmax":
            use("online_union")
            return [
                f"{name}_top, {name}_total = tl.reduce(({acc}_top, {acc}_total), 1, online_union)",
                f"{name}_top = {name}_top[:, None]",
                f'{name}_total = tl.where({name}_top == float("-inf"), float("nan"), {name}_total[:, None])',
            ], (f"{name}_top", f"{name}_total")
        case "argmax" | "argmin":
            combine = _combine(r, _pair_types(r)[0], use)
            return [
                f"{name}_value, {name}_index = tl.reduce(({acc}, {acc}_index), 1, {combine})",
                f"{name} = {name}_index[:, None].to({type_name(r.node.dtype)})",
            ], (name,)
        case "welford":
            lanes = f"tl.maximum(({count} - rbase + RBLOCK - 1) // RBLOCK, 0).to({type_name(r.dtype)})"
            lines = [f"{acc}_weight = tl.broadcast_to({lanes}, {tile})"]
            return [*lines, *_union(r, [f"{acc}_mean", f"{acc}_m2", f"{acc}_weight"], use)], _parts(r)
        case "welford_combine":
            return _union(r, [f"{acc}_mean", f"{acc}_m2", f"{acc}_weight"], use), _parts(r)
    return [f"{name} = {_across(r, acc, use)}"], (name,)
