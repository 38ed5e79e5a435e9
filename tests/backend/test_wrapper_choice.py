"""``wrapper="auto"``: C++ where a compiler is found, Python with a word about it where not, Python under a mode."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import memplan
from memplan import wrapper_choice
from memplan.ir.errors import CompilerError, UnsupportedError


def product(x: Tensor, w: Tensor) -> Tensor:
    return torch.mm(x.sin(), w).cos()


def arguments() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 4), torch.randn(4, 4, requires_grad=True)


def sources(**options: object) -> list[str]:
    with memplan.record() as recording:
        compiled = torch.compile(product, backend="memplan", options=options)
        x, w = arguments()
        torch.testing.assert_close(compiled(x, w), product(x, w))
    return [g.wrapper for g in recording.graphs]


def test_auto_is_cpp_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMPLAN_WRAPPER", raising=False)
    assert all("memplan_run" in s for s in sources())


@pytest.mark.parametrize("failing", ["compiler", "printer", "torch"])
def test_auto_falls_back_and_says_it_once(
    failing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("MEMPLAN_WRAPPER", raising=False)
    error = UnsupportedError("no such line") if failing == "printer" else CompilerError("no such compiler")

    def fail(*args: object, **options: object) -> None:
        raise error

    where = {
        "compiler": "memplan.wrapper_choice.find_toolchain",
        "printer": "memplan.wrapper_choice.print_in_cpp",
        "torch": "memplan.compilation.load_in_cpp",
    }
    monkeypatch.setattr(where[failing], fail)
    wrapper_choice.say_python.cache_clear()
    with caplog.at_level(logging.WARNING, "memplan"):
        found = sources()
        torch._dynamo.reset()
        found += sources()
    assert all("def call(args)" in s for s in found)
    assert [r.getMessage() for r in caplog.records if "wrapper='auto' is Python" in r.getMessage()] == [
        f"wrapper='auto' is Python, which calls kernels more slowly: {error}"
    ]
    torch._dynamo.reset()
    if failing != "compiler":
        with pytest.raises(Exception, match="no such"):
            sources(wrapper="cpp")


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_mode_sees_the_operators_of_a_compiled_backward() -> None:
    compiled = torch.compile(product, backend="memplan", options={"wrapper": "cpp"})
    x, w = arguments()
    loss = compiled(x, w).sum()
    with Seen() as mode:
        loss.backward()
    assert "aten.mm.out" in mode.names
    expected = torch.autograd.grad(product(x, w).sum(), w)[0]
    torch.testing.assert_close(w.grad, expected)
