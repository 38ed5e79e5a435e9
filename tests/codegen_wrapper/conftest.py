"""A clean Dynamo for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def clean_dynamo() -> Iterator[None]:
    """No test sees another's compiled code or recompilation counts."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
