"""Exits with an error where the compiled answer is not eager's: what ``memplan bisect`` asks for.

The fault is planted: ``scale_`` changes its argument and does not say so, so a compiler may take a copy for needless.
"""

import torch


@torch.library.custom_op("samples::scale_", mutates_args=())  # a lie: it should be mutates_args=("x",)
def scale_(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(2) + 1


@scale_.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def f(x: torch.Tensor) -> torch.Tensor:
    h = x.sin()
    before = h.clone()
    return scale_(h) + before


x = torch.linspace(0, 1, 1024)
expected = f(x)
found = torch.compile(f, backend="memplan")(x)
torch.testing.assert_close(found, expected)
