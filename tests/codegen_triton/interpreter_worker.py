"""Runs emitted kernels through Triton's interpreter, one request after another, over standard input and output.

A process of its own: the interpreter has to be on before Triton is imported, and then nothing can be compiled any more.
The interpreter knows no libdevice; `Libdevice` stands in for it, function by function, with torch's.
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
import traceback
from collections.abc import Callable
from types import ModuleType

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from memplan.runtime.triton_worker import load_module

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_with_scalars(tensor: type, scope: interpreter._LangPatchScope) -> None:
    """Triton 3.6 keeps scalars as arrays of one element, which numpy from 2.4 on takes for no bound of a loop."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_scalars


def _tensor(value: object) -> torch.Tensor:
    if isinstance(value, (int, float)):
        return torch.tensor(value)
    return torch.from_numpy(np.ascontiguousarray(value.handle.data))  # type: ignore[attr-defined]


def _function(compute: Callable[..., torch.Tensor]) -> Callable[..., object]:
    def call(*args: object) -> object:
        like = next(a for a in args if not isinstance(a, (int, float)))
        values = [_tensor(a) for a in args]
        own = values[args.index(like)].dtype
        out = compute(*(v.to(own) for v in values)).to(own).numpy()
        scalar = like.type.scalar  # type: ignore[attr-defined]
        kind = tl.block_type(scalar, list(out.shape)) if out.shape else scalar
        return tl.tensor(TensorHandle(out, scalar), kind)

    return call


def _with_limit(compute: Callable[[torch.Tensor], torch.Tensor], at_infinity: float) -> Callable[..., torch.Tensor]:
    """As libdevice has it: the limit at infinity, where torch's function is NaN."""
    return lambda x: torch.where(x.isinf(), torch.full_like(x, at_infinity), compute(x))


_OTHER_NAMES = {
    "nearbyint": torch.round,
    "cyl_bessel_i0": _with_limit(torch.i0, float("inf")),
    "cyl_bessel_i1": _with_limit(torch.special.i1, float("inf")),
    "normcdfinv": torch.special.ndtri,
    "j0": _with_limit(torch.special.bessel_j0, 0.0),
    "j1": _with_limit(torch.special.bessel_j1, 0.0),
    "erfcx": torch.special.erfcx,
}


class Libdevice:
    """`triton.language.extra.libdevice` in torch's functions."""

    def __getattr__(self, name: str) -> Callable[..., object]:
        return _function(_OTHER_NAMES.get(name) or getattr(torch, name))


def run(
    source: str, name: str, grid: int, buffers: list[torch.Tensor], extra: list[int], blocks: dict[str, int]
) -> None:
    """Run one kernel on CPU tensors, in place."""
    module: ModuleType = load_module(source, name)
    module.__dict__["libdevice"] = Libdevice()
    getattr(module, name)[(grid, 1, 1)](*buffers, *extra, **blocks)


def main() -> None:
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while header := source.read(8):
        request = pickle.loads(source.read(struct.unpack("<Q", header)[0]))
        try:
            run(*request)
            answer: object = request[3]
        except Exception:
            answer = traceback.format_exc()
        data = pickle.dumps(answer)
        sink.write(struct.pack("<Q", len(data)) + data)
        sink.flush()


if __name__ == "__main__":
    main()
