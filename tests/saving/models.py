"""Small models to save: what they hold is what saving has to get right."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Tied(nn.Module):
    """Attention between tied embeddings, a constant, a slice of a larger memory, and keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.norm = nn.LayerNorm(16)
        self.mix = nn.Linear(16, 48)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.randn(64, 16)[8:40])
        self.register_buffer("row", self.table[3])

    def forward(self, tokens: Tensor, *, scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
        constant = torch.tensor([0.5] * 8 + [0.25] * 8, device=tokens.device)
        x = self.embed(tokens) + self.table[: tokens.shape[1]] + constant
        q, k, v = self.mix(self.norm(x)).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True) * scale + self.row
        return {"logits": self.head(x), "shifted": x.mean(1) + shift}


class Counter(nn.Module):
    """Buffers that a call changes, and an input that it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, None]:
        self.calls.add_(1)
        memory.mul_(0.5).add_(x.mean(0))
        return self.norm(x) * memory, self.calls * 2, None


def tied() -> tuple[Tied, tuple[Tensor, ...], dict[str, Tensor]]:
    torch.manual_seed(0)
    kwargs = {"scale": torch.randn(16), "shift": torch.randn(2, 16)}
    return Tied().eval(), (torch.randint(0, 32, (2, 8)),), kwargs
