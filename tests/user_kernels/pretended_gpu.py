"""An H100 for Triton to compile for where there is none: kernels are built to cubins, and nothing can be launched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock


class PretendedDriver:
    """What Triton's front end asks of a driver."""

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Inside, Triton compiles for an H100, and torch takes user kernels."""
    import torch.utils._triton as torch_triton
    from triton.runtime import driver

    before = driver._active
    driver.set_active(PretendedDriver())
    try:
        with contextlib.ExitStack() as stack:
            for name in ("has_triton", "has_triton_tensor_descriptor_host_tma"):
                stack.enter_context(mock.patch.object(torch_triton, name, return_value=True))
            yield
    finally:
        driver._active = before
