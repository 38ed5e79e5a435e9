"""How near to eager an answer must be: the one place where tolerances by dtype stand.

A compiled model adds in another order and keeps more digits inside a kernel than eager does, so answers differ by a few
roundings of the dtype: for the half types of the values that eager itself rounds away between operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: (relative, absolute) by dtype; a tensor is also scaled, see `assert_near`. Integers and booleans must be equal.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-9, 1e-10),
    torch.complex128: (1e-9, 1e-10),
    torch.float32: (2e-4, 2e-5),
    torch.complex64: (2e-4, 2e-5),
    torch.complex32: (1e-2, 1e-3),
    torch.float16: (1e-2, 1e-3),
    torch.bfloat16: (4e-2, 4e-3),
    torch.float8_e4m3fn: (0.13, 2e-3),
    torch.float8_e5m2: (0.26, 2e-3),
}


class Differs(AssertionError):
    """An answer is not eager's."""


def assert_near(actual: Tensor, expected: Tensor, what: str = "result", *, dtype: torch.dtype | None = None) -> None:
    """Raise `Differs` unless shape, dtype, device and strides' order agree and the values are near.

    The absolute tolerance is scaled by the largest finite value expected (sums of many terms cancel); ``dtype`` is the
    one whose tolerance holds, where the computation was in a narrower one than the result's (autocast).
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype or actual.device != expected.device:
        raise Differs(f"{what}: {_kind(actual)} where eager has {_kind(expected)}")
    if expected.layout is not torch.strided:
        actual, expected = actual.to_dense(), expected.to_dense()
    relative, absolute = 0.0, 0.0
    if expected.is_floating_point() or expected.is_complex():
        relative, absolute = TOLERANCES[dtype or expected.dtype]
        if expected.dtype.itemsize == 1:
            actual, expected = actual.float(), expected.float()
        finite = expected.detach()[torch.isfinite(expected.detach())]
        absolute *= max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    try:
        torch.testing.assert_close(actual, expected, rtol=relative, atol=absolute, equal_nan=True)
    except AssertionError as error:
        raise Differs(f"{what}: {error}") from None


def _kind(t: Tensor) -> str:
    return f"{t.dtype} {tuple(t.shape)} on {t.device}"
