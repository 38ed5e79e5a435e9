"""Operations over lists of tensors: each element as the operation on single tensors, by the same formula."""

from __future__ import annotations

from dataclasses import replace

from ..ir.program import Argument, Extern, KernelOp, Tuple
from . import activations, arithmetic, creation, special  # noqa: F401  (what is applied to each element)
from .call_site import LOWERINGS, CallSite, Operations, lowers, parameters, resolve

#: operators that apply one of a single tensor to each
UNARY = (
    "abs", "acos", "asin", "atan", "ceil", "cos", "cosh", "erf", "erfc", "exp", "expm1", "floor", "frac", "lgamma",
    "log", "log10", "log1p", "log2", "neg", "reciprocal", "round", "rsqrt", "sigmoid", "sign", "sin", "sinh", "sqrt",
    "tan", "tanh", "trunc", "clone",
)  # fmt: skip
#: operator over two lists -> operator over two tensors
BINARY = {
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "div": "div",
    "maximum": "maximum",
    "minimum": "minimum",
    "clamp_max": "clamp_max",
    "clamp_min": "clamp_min",
    "pow": "pow",
}
_OF_NUMBERS = {"maximum": "clamp_min", "minimum": "clamp_max"}


def _single_target(name: str, overload: str) -> str | None:
    """The operator on single tensors that an overload over lists applies to each."""
    if name in UNARY:
        return f"aten.{name}.default"
    if name in BINARY:
        scalar = overload in ("Scalar", "ScalarList")
        base = _OF_NUMBERS.get(name, name) if scalar else name
        choices = ("Scalar", "Tensor_Scalar", "default") if scalar else ("Tensor", "Tensor_Tensor", "default")
        return next((f"aten.{base}.{o}" for o in choices if f"aten.{base}.{o}" in LOWERINGS), None)
    if name in ("addcmul", "addcdiv"):
        return f"aten.{name}.default"
    if name == "lerp":
        return "aten.lerp.Scalar" if overload in ("Scalar", "ScalarList") else "aten.lerp.Tensor"
    if name == "copy":
        return "aten.copy.default"
    if name == "zero":
        return "aten.zero.default"
    return None


def _element(argument: Argument, position: int) -> Argument:
    return argument.items[position] if isinstance(argument, Tuple) else argument


def _lower_each(site: CallSite, single: str) -> Operations | None:
    """Every element's kernels, named after the call and the element's position."""
    schema, own = parameters(site.op.target), parameters(single)
    assert schema is not None
    assert own is not None
    bound = dict(zip((p.name for p in schema), site.op.args, strict=False)) | dict(site.op.kwargs)
    ordered = [bound[p.name] for p in schema if p.name in bound]
    scale = {p.name for p in own} & {"alpha", "value"}
    out: list[KernelOp] = []
    for k, result in enumerate(site.results):
        if result is None:
            continue
        arguments = [_element(a, k) for a in ordered]
        keywords: tuple[tuple[str, Argument], ...] = ()
        positional = [p for p in own if p.positional]
        if len(arguments) > len(positional):
            # the factor is positional over lists and a keyword for single tensors
            (name,) = scale
            keywords = ((name, arguments.pop()),)
        op = replace(
            site.op,
            name=f"{site.op.name}_{k}",
            target=single,
            args=tuple(arguments),
            kwargs=keywords,
            results=(result,),
        )
        found = _lower_single(op, site)
        if found is None:
            return None
        out.extend(found)
    return tuple(out)


def _lower_single(op: Extern, site: CallSite) -> Operations | None:
    one = CallSite.of(op, site.context)
    return None if one is None else LOWERINGS[op.target](one)


def _has_tensor_factor(site: CallSite) -> bool:
    """Whether the factor of an addcmul or addcdiv is a tensor of numbers, one for each element."""
    return site.op.target.endswith(("addcmul.Tensor", "addcdiv.Tensor"))


def _register() -> None:
    names = (*UNARY, *BINARY, "addcmul", "addcdiv", "lerp", "copy", "zero")
    for name in names:
        for overload in ("default", "Tensor", "Scalar", "List", "ScalarList"):
            target = f"aten._foreach_{name}.{overload}"
            single = _single_target(name, overload)
            if resolve(target) is None or single not in LOWERINGS:
                continue

            def lowering(site: CallSite, single: str = single) -> Operations | None:
                return None if _has_tensor_factor(site) else _lower_each(site, single)

            lowers(target)(lowering)


_register()
