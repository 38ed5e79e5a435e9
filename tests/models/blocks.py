"""Blocks that tests stack."""

from __future__ import annotations

from torch import Tensor, nn


class FeedForward(nn.Module):
    """A residual block whose inner activations are four times as wide as what it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]
