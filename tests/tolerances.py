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
    torch.float16: (1e-2, 1e-3),
    torch.bfloat16: (4e-2, 4e-3),
}


def assert_near(actual: Tensor, expected: Tensor, what: str = "result", *, dtype: torch.dtype | None = None) -> None:
    """Raise AssertionError unless shape, dtype, device and strides' order agree and the values are near.

    The absolute tolerance is scaled by the largest finite value expected (sums of many terms cancel); ``dtype`` is the
    one whose tolerance holds, where the computation was in a narrower one than the result's (autocast).
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype or actual.device != expected.device:
        raise AssertionError(f"{what}: {_kind(actual)} where eager has {_kind(expected)}")
    if expected.layout is not torch.strided:
        actual, expected = actual.to_dense(), expected.to_dense()
    if not (expected.is_floating_point() or expected.is_complex()):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, msg=lambda m: f"{what}: {m}")
        return
    relative, absolute = TOLERANCES[dtype or expected.dtype]
    finite = expected.detach()[torch.isfinite(expected.detach())]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    torch.testing.assert_close(
        actual, expected, rtol=relative, atol=absolute * scale, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def _kind(t: Tensor) -> str:
    return f"{t.dtype} {tuple(t.shape)} on {t.device}"
