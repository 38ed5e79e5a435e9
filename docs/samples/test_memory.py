"""Tests that hold what they compile to a limit."""

import pytest
import torch

from examples.small_transformer import make


@pytest.mark.memplan_limit("32MiB")
def test_a_small_batch_fits() -> None:
    model, inputs = make(batch=8)
    torch.compile(model, backend="memplan")(*inputs).backward()


@pytest.mark.memplan_limit("32MiB")
def test_a_batch_twice_as_large_fits_too() -> None:
    model, inputs = make(batch=16)
    torch.compile(model, backend="memplan")(*inputs).backward()
