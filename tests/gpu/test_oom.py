"""Running out of a GPU's memory: the error of torch ends with the plan at that step."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="running out of device memory needs a GPU")


@pytest.fixture
def small_gpu() -> Iterator[None]:
    """At most a GiB of the device for this process."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (1 << 30)) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def outer_sum(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = (x @ w).relu()
    outer = h[:, :, None] * h[:, None, :]
    return torch.cumsum(outer, 0).sum()


@pytest.mark.usefixtures("small_gpu")
@pytest.mark.parametrize("train", [False, True])
def test_the_error_shows_the_plan(train: bool) -> None:
    torch.compiler.reset()
    x = torch.randn(100_000, 64, device="cuda")
    w = torch.randn(64, 64, device="cuda", requires_grad=train)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.compile(outer_sum, backend="memplan")(x, w)
    text = str(caught.value)
    assert "Tried to allocate" in text, "torch's own words come first"
    assert "memplan: memory ran out at step" in text
    assert "test_oom.py:" in text, "the user's line"
    assert "there were about" in text
    assert "The largest buffer is" in text


def layers(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    for up, down in zip(weights[::2], weights[1::2], strict=True):
        x = x + torch.nn.functional.gelu(x @ up) @ down  # 156 MiB are kept for the backward of each layer
    return x.square().mean()


@pytest.mark.usefixtures("small_gpu")
@pytest.mark.parametrize("wrapper", ["python", "cpp"])
def test_the_budget_that_it_names_does_make_it_fit(wrapper: str) -> None:
    x = torch.randn(80_000, 128, device="cuda")
    weights = [torch.randn(s, device="cuda", requires_grad=True) for s in [(128, 512), (512, 128)] * 8]

    def step(options: dict[str, object]) -> None:
        torch.compiler.reset()
        torch.compile(layers, backend="memplan", options={"wrapper": wrapper, **options})(x, weights).backward()
        for w in weights:
            w.grad = None

    with pytest.raises(torch.OutOfMemoryError) as caught:
        step({})
    text = str(caught.value)
    found = re.search(r'What would have made it fit:\n    options=\{"budget": (\d+)\}', text)
    assert found, text
    del caught
    step({"budget": int(found[1])})
