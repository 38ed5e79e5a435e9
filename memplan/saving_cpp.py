"""What a program without Python needs of a saved model: the C++ wrapper as a library, and a description in plain lines.

``cpp.txt`` has one fact a line, read by ``examples/cpp/memplan_model.h``: ``input DTYPE DIM SIZES...`` (-1: any),
``weight ENTRY DTYPE BYTES DIM SIZES... DIM STRIDES...`` and ``constant`` likewise; by position ``argument w WEIGHT``,
``argument i INPUT`` or ``argument s INPUT DIM FACTOR OFFSET``; ``kernel NAME``; ``check LINE`` for lines of Python
that only say what is wrong; ``outputs TENSORS NUMBERS``. Data types are torch's own numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from .artifact import Artifact
from .codegen.cpp_wrapper import CPP_WRAPPER_FLAGS, CppWrapper
from .codegen.cpp_wrapper_externs import DTYPE_CODES
from .compilation import print_cpp_wrapper
from .interface import InputSpec, Interface
from .ir.config import Config
from .ir.errors import UnsupportedError
from .ir.loops import Size
from .ir.plan import Plan
from .runtime.cache import Cache
from .runtime.cpp_wrapper import build_wrapper

#: What lines of Python call whose words a program without Python can say itself.
_RAISES = "raise_out_of_range("


def cpp_parts(
    plan: Plan, interface: Interface, artifact: Artifact, constants: Mapping[str, torch.Tensor], config: Config
) -> tuple[bytes, str] | None:
    """The wrapper's library and the description; None where the model cannot run without Python.

    Raises
    ------
    CompilerError, CacheError
        If the wrapper cannot be built.
    """
    if artifact.gpu or any(_device(w.device) for w in interface.weights):
        return None
    try:
        printed = print_cpp_wrapper(plan, config)
    except UnsupportedError:
        return None
    if printed is None or not _without_python(printed, interface):
        return None
    text = "\n".join(_lines(printed, interface, constants)) + "\n"
    cache = Cache(config.cache_dir) if config.cache_dir else Cache()
    path: Path = build_wrapper(printed, plan.program.name, CPP_WRAPPER_FLAGS, cache)
    return path.read_bytes(), text


def _device(name: str) -> bool:
    return name != "cpu"


def _without_python(printed: CppWrapper, interface: Interface) -> bool:
    plain = not any(line.needed for line in printed.lines) and "object" not in printed.inputs
    return plain and all(_contiguous(i) for i in interface.inputs)


def _contiguous(spec: InputSpec) -> bool:
    """Whether an input is a tensor whose elements lie one after the other."""
    if spec.view is None:
        return False
    stride: Size = 1
    for size, given in zip(reversed(spec.view.sizes), reversed(spec.view.strides), strict=True):
        if size != 1 and given - stride != 0:
            return False
        stride = stride * size
    return spec.view.dtype in DTYPE_CODES


def _lines(printed: CppWrapper, interface: Interface, constants: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for spec in interface.inputs:
        assert spec.view is not None
        sizes = [s if isinstance(s, int) else -1 for s in spec.view.sizes]
        yield f"input {DTYPE_CODES[spec.view.dtype]} {_counted(sizes)}"
    for weight in interface.weights:
        view = weight.view
        start = view.offset * view.dtype.itemsize
        shape = f"{_counted(view.sizes)} {_counted(view.strides)}"
        yield f"weight {weight.storage} {DTYPE_CODES[view.dtype]} {start} {shape}"
    for name in printed.constants:
        t = constants[name]
        yield f"constant constants/{name} {DTYPE_CODES[t.dtype]} 0 {_counted(t.shape)} {_counted(t.stride())}"
    for kind, k in interface.arguments:
        if kind == "symbol":
            source = interface.symbols[k]
            yield f"argument s {source.input} {source.dim} {source.factor} {source.offset}"
        else:
            yield f"argument {kind[0]} {k}"
    for name in printed.kernels:
        yield f"kernel {name}"
    for number, line in enumerate(printed.lines, 1):
        if _RAISES in line.source:
            yield f"check {number}"
    yield f"outputs {printed.tensors_out} {printed.numbers_out}"


def _counted(values: Sequence[Size]) -> str:
    return " ".join(str(int(v)) for v in (len(values), *values))
