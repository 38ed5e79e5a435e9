"""Saved models on another GPU than the one they were saved on, and compiled ones on another than the current one."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import memplan
import memplan.exported
from memplan import loading
from memplan.artifact import Artifact
from memplan.codegen.python_wrapper import PythonWrapper
from memplan.interface import InputSpec, Interface, WeightSpec
from memplan.ir.errors import SavedModelError
from memplan.ir.program import View
from memplan.moved_model import gpus_of, moved
from memplan.runtime import cuda_launch
from memplan.runtime.current_device import on_own_device
from tests.fake_gpu import FakeGpu, make_fake_gpu


class Gated(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.softmax(x, -1) * 2
        return y, (y @ x.t()).relu()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """Two GPUs that are not there, the first being the current one."""
    fake = make_fake_gpu(monkeypatch)
    capture = memplan.exported.capture
    monkeypatch.setattr(memplan.exported, "capture", lambda *a, **k: fake.on_gpu(capture(*a, **k)))
    monkeypatch.setattr(loading, "namespace", fake.namespace)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", None, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (9, 0))
    yield fake
    monkeypatch.undo()
    cuda_launch._given.clear()
    cuda_launch.native_launch.cache_clear()


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The current GPU at last, and before it those that were."""
    found = [0]

    @contextmanager
    def device(index: int) -> Iterator[None]:
        found.append(index)
        yield
        found.append(0)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: found[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return found


def saved(folder: Path, x: Tensor) -> Path:
    memplan.save(torch.export.export(Gated(), (x,)), folder / "m")
    return folder / "m"


@pytest.mark.parametrize("device", [None, "cuda:1", 1, torch.device("cuda", 1), "cuda:0"])
def test_it_runs_on_the_gpu_that_is_asked_for(
    gpus: FakeGpu,
    current: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str | int | torch.device | None,
) -> None:
    x = torch.randn(6, 40)
    path = saved(tmp_path, x)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loaded = memplan.load(path, device=device)
    gpus.reset()
    torch.testing.assert_close(loaded(x), Gated()(x))
    index = 0 if device in (None, "cuda:0") else 1
    assert gpus.launches()
    assert {k.stream for k in gpus.launches()} == {0x5000 + index}
    assert current == ([0, 1, 0] if index else [0])


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cpu", "cannot be loaded for cpu: a model moves from one GPU to another only"),
        ("cuda:2", r"is to run on the GPU cuda:2, and there are 2 \(device='cuda:0' would be the first\)"),
    ],
)
def test_a_device_that_it_cannot_run_on_is_refused(gpus: FakeGpu, tmp_path: Path, device: str, message: str) -> None:
    path = saved(tmp_path, torch.randn(6, 40))
    with pytest.raises(SavedModelError, match=message):
        memplan.load(path, device=device)


def test_a_gpu_that_is_not_there_is_named(gpus: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus.device = "cuda:1"
    path = saved(tmp_path, torch.randn(6, 40))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SavedModelError, match="is to run on the GPU cuda:1, and there are 1"):
        memplan.load(path)
    assert memplan.load(path, device="cuda:0")


def test_a_model_of_the_cpu_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, torch.randn(6, 40))
    with pytest.raises(SavedModelError, match="there is none here"):
        memplan.load(path, device="cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SavedModelError, match="was saved for the CPU: only what runs on one GPU moves to cuda:0"):
        memplan.load(path, device="cuda:0")


SOURCE = """
def call(args):
    x, text, = args
    stream0 = current_stream(0)
    pool0 = allocate_pool(64, 'cuda:0')
    y = op(x, device=torch.device('cuda:0'), where=[device(type='cuda', index=0)], on='cuda', name='cuda:0 and cuda:x')
    z = torch.empty_strided((2,), (1,), dtype=torch.float32, device='cpu')
    return (y, z)
"""


def test_all_that_names_a_gpu_is_moved_and_nothing_else() -> None:
    view = View("w", torch.float32, (2,), (1,))
    interface = Interface(
        (InputSpec("x", view, "cuda:0"), InputSpec("n", value="3"), InputSpec("h", view, "cpu")),
        (WeightSpec("w", "weights/0", view, "cuda:0"), WeightSpec("c", "weights/1", view, "cpu")),
        *((), (), (), (), "", ""),
    )
    artifact = Artifact(PythonWrapper(SOURCE, {}), None, None, (), ())
    constants = {"a": ("torch.int64", (1,), (1,), "cuda:0"), "b": ("torch.int64", (1,), (1,), "cpu")}
    assert gpus_of(interface, artifact, constants) == {0}
    found, code, about = moved(interface, artifact, constants, 3)
    assert [i.device for i in found.inputs] == ["cuda:3", "", "cpu"]
    assert [w.device for w in found.weights] == ["cuda:3", "cpu"]
    assert [a[3] for a in about.values()] == ["cuda:3", "cpu"]
    wanted = SOURCE.replace("'cuda:0')", "'cuda:3')").replace("current_stream(0)", "current_stream(3)")
    wanted = wanted.replace("index=0", "index=3").replace("on='cuda'", "on='cuda:3'")
    assert ast.unparse(ast.parse(code.python.source)) == ast.unparse(ast.parse(wanted))
    assert gpus_of(found, code, about) == {3}
    other = replace(artifact, python=PythonWrapper(SOURCE.replace("'cuda:0')\n", "'cuda:2')\n"), {}))
    assert gpus_of(interface, other, constants) == {0, 2}


@pytest.mark.parametrize(
    ("devices", "wanted"),
    [
        ({"cpu"}, [0]),
        ({"cuda:0", "cpu"}, [0]),
        ({"cuda", "cpu"}, [0]),
        ({"cuda:1", "cpu"}, [0, 1, 0]),
        ({"cuda:0", "cuda:1"}, [0]),
    ],
)
def test_a_program_runs_with_its_own_gpu_as_the_current_one(
    current: list[int], devices: set[str], wanted: list[int]
) -> None:
    call: Callable[[list[object]], object] = on_own_device(lambda args: [*args, torch.cuda.current_device()], devices)
    assert call(["x"]) == ["x", wanted[len(wanted) // 2]]
    assert current == wanted


def test_where_there_is_one_gpu_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def call(args: list[object]) -> object:
        return args

    assert on_own_device(call, {"cuda:0"}) is call
