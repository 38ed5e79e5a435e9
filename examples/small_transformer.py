"""A small transformer to look at: ``memplan run examples/small_transformer.py``, or ``make`` as a factory."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """Attention and a two-layer perceptron, each with its residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        attended = scores.softmax(-1) @ v
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        hidden = nn.functional.gelu(self.up(self.norm2(x)))
        return x + self.down(hidden)


class Model(nn.Module):
    """Blocks one after another, and the mean square of what comes out as a loss."""

    def __init__(self, width: int = 128, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def make(batch: int = 8) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The model and example inputs: what ``memplan report examples/small_transformer.py:make`` asks for."""
    torch.manual_seed(0)
    return Model(), (torch.randn(batch, 128, 128),)


if __name__ == "__main__":
    model, inputs = make()
    step = torch.compile(model, backend="memplan")
    step(*inputs).backward()
