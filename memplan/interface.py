"""How a saved model is called: its inputs as they were exported, and what of a call they are checked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch

from .ir.errors import SavedModelError
from .ir.loops import Size
from .ir.program import View, evaluate
from .runtime.python_runtime import laid_out
from .saving_encoding import allow


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One leaf of the arguments. A tensor has a ``view`` and a ``device``, an integer a ``symbol``; what has neither is
    fixed to ``value`` (shown as text)."""

    name: str
    view: View | None = None
    device: str = ""
    symbol: sympy.Symbol | None = None
    value: str = ""
    changed: bool = False


@dataclass(frozen=True, slots=True)
class SymbolSource:
    """``symbol`` is ``(size of dimension dim of input - offset) / factor``."""

    symbol: sympy.Symbol
    input: int
    dim: int
    factor: int
    offset: int


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """A lifted parameter, buffer or constant: a view of a stored piece of memory."""

    name: str
    storage: str
    view: View
    device: str


@dataclass(frozen=True, slots=True)
class Interface:
    """Everything that a call needs to know.

    Attributes
    ----------
    arguments:
        What the compiled program takes by position: ``("symbol", k)``, ``("weight", k)`` or ``("input", k)``.
    ranges:
        For each symbol its least and largest value (None: no limit).
    keywords:
        Names of keyword arguments, in the order of the exported program.
    in_spec, out_spec:
        The pytrees of ``(args, kwargs)`` and of the result, as torch writes them.
    """

    inputs: tuple[InputSpec, ...]
    weights: tuple[WeightSpec, ...]
    symbols: tuple[SymbolSource, ...]
    ranges: tuple[tuple[sympy.Symbol, int | None, int | None], ...]
    arguments: tuple[tuple[str, int], ...]
    keywords: tuple[str, ...]
    in_spec: str
    out_spec: str


for _class in (InputSpec, SymbolSource, WeightSpec, Interface):
    allow(_class)


def symbol_values(interface: Interface, given: Sequence[object]) -> dict[sympy.Symbol, int]:
    """The sizes of a call.

    Raises
    ------
    SavedModelError
        If an input has no such dimension, or a size is out of the exported range.
    """
    found: dict[sympy.Symbol, int] = {}
    for k, spec in enumerate(interface.inputs):
        if spec.symbol is not None:
            found[spec.symbol] = _integer(spec, given[k])
    for source in interface.symbols:
        spec, value = interface.inputs[source.input], given[source.input]
        if not isinstance(value, torch.Tensor) or value.dim() <= source.dim:
            raise SavedModelError(f"input {spec.name} is {_told(value)}; the model takes {_wanted(spec)}")
        size, rest = divmod(value.shape[source.dim] - source.offset, source.factor)
        if rest:
            raise SavedModelError(f"input {spec.name} is {_told(value)}; the model takes {_wanted(spec)}")
        found[source.symbol] = size
    for symbol, low, high in interface.ranges:
        value = found.get(symbol)
        if isinstance(value, int) and ((low is not None and value < low) or (high is not None and value > high)):
            bounds = f"from {low}" + (f" to {high}" if high is not None else " on")
            raise SavedModelError(f"the size {symbol} is {value}; the model was exported for {bounds}")
    return found


def _integer(spec: InputSpec, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise SavedModelError(f"input {spec.name} is {_told(value)}; the model takes an integer")
    return value


def checked(spec: InputSpec, value: object, symbols: Mapping[sympy.Symbol, int]) -> object:
    """The input as the program takes it: a tensor of other strides is copied.

    Raises
    ------
    SavedModelError
        If it is not what the model was exported for.
    """
    if spec.symbol is not None:
        return value
    if spec.view is None:
        if repr(value) != spec.value:
            raise SavedModelError(f"input {spec.name} is {_told(value)}; the model was exported with {spec.value}")
        return value
    sizes = tuple(evaluate(s, symbols) for s in spec.view.sizes)
    if (
        not isinstance(value, torch.Tensor)
        or value.layout is not torch.strided
        or (value.dtype, tuple(value.shape)) != (spec.view.dtype, sizes)
        or not _same_device(value.device, spec.device)
    ):
        raise SavedModelError(f"input {spec.name} is {_told(value)}; the model takes {_wanted(spec)}")
    strides = tuple(evaluate(s, symbols) for s in spec.view.strides)
    return laid_out(value.detach().resolve_conj().resolve_neg(), sizes, strides)


def _same_device(device: torch.device, name: str) -> bool:
    wanted = torch.device(name)
    return device.type == wanted.type and (device.index or 0) == (wanted.index or 0)


def _told(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {value.dtype} {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"[:200]


def _wanted(spec: InputSpec) -> str:
    assert spec.view is not None
    sizes: tuple[Size, ...] = spec.view.sizes
    return f"a tensor {spec.view.dtype} ({', '.join(map(str, sizes))}) on {spec.device}"
