"""A clean Dynamo for every test; a cache of its own, and what is traced, for those that ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from memplan.ir.program import Phase
from memplan.region import Region


@pytest.fixture(autouse=True)
def clean_dynamo() -> Iterator[None]:
    """No test sees another's compiled code or recompilation counts."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def options(tmp_path: Path) -> dict[str, object]:
    """Options with a cache of the test's own."""
    return {"plan_cache": True, "cache_dir": str(tmp_path / "cache")}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs that AOTAutograd hands over, and so has traced."""
    found: list[str] = []
    for phase in Phase:
        name = f"compile_{phase.value}"
        original = getattr(Region, name)

        def watched(self, module, inputs, phase=phase, original=original):  # type: ignore[no-untyped-def]
            found.append(phase.value)
            return original(self, module, inputs)

        monkeypatch.setattr(Region, name, watched)
    return found
