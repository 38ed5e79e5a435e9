"""``--update-golden``, and the fixture that compares text with a file kept beside the test."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Tests watch and replace stages of the compiler, which a plan from the cache would pass by. Tests of it switch it on.
os.environ.setdefault("MEMPLAN_PLAN_CACHE", "0")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the goldens instead of comparing with them")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)`` compares with ``goldens/name`` in the folder of the test."""
    folder = Path(request.path).parent / "goldens"

    def check(name: str, text: str) -> None:
        file = folder / name
        if request.config.getoption("--update-golden"):
            folder.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
            return
        if not file.exists():
            pytest.fail(f"no golden {file}: look at the text, then write it with --update-golden\n{text}")
        expected = file.read_text(encoding="utf-8")
        if text != expected:
            lines = difflib.unified_diff(expected.splitlines(), text.splitlines(), str(file), "now", lineterm="")
            pytest.fail("\n".join(lines), pytrace=False)

    return check
