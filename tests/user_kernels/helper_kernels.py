"""Functions that kernels of another module reach as ``helper_kernels.<name>``."""

from __future__ import annotations

import triton
import triton.language as tl

FACTOR = tl.constexpr(3)


@triton.jit
def scale(x):  # type: ignore[no-untyped-def]
    return x * FACTOR


@triton.jit
def scale_and_shift(x, shift):  # type: ignore[no-untyped-def]
    return scale(x) + shift
