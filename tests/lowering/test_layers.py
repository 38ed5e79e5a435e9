"""Small models, forward and backward: every ATen call on the way is lowered and compared with eager."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.lowering.harness import LoweringMode

#: what may stay an ATen call in these models
LIBRARY = {
    "aten.addmm.default", "aten.mm.default", "aten.bmm.default", "aten.convolution.default",
    "aten.convolution_backward.default", "aten.randn.default",
    "aten.randint.low",
}  # fmt: skip


def transformer() -> torch.Tensor:
    model = nn.Sequential(
        nn.Embedding(20, 16), nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.Softmax(-1),
        nn.RMSNorm(16), nn.Linear(16, 20),
    )  # fmt: skip
    tokens, targets = torch.randint(0, 20, (2, 5)), torch.randint(0, 20, (2, 5))
    return F.cross_entropy(model(tokens).view(-1, 20), targets.view(-1))


def convolutional() -> torch.Tensor:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.GroupNorm(2, 8), nn.SiLU(),
        nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    return model(torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)).square().mean()


@pytest.mark.parametrize("model", [transformer, convolutional])
def test_a_training_step(model) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    mode = LoweringMode()
    with mode:
        model().backward()
    assert sum(mode.lowered.values()) > 40
    # an empty tensor is an allocation, there is nothing to compute
    assert set(mode.extern) <= LIBRARY | {"aten.empty.memory_format", "aten.new_empty_strided.default"}
