"""Which launches are early, on a GPU that is not there: of both wrappers, from the cache and from a saved model."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import memplan
import memplan.exported
from memplan import loading
from memplan.runtime import cuda_launch
from memplan.runtime.triton_build import Target
from tests.fake_gpu import FakeGpu, make_fake_gpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    yield make_fake_gpu(monkeypatch)
    monkeypatch.undo()
    cuda_launch._given.clear()
    cuda_launch.native_launch.cache_clear()


def chain(x: Tensor) -> Tensor:
    for k in range(4):
        x = torch.softmax(x, k % 2)
    return x


def run(wrapper: str, dynamic: bool = False, **options: object) -> None:
    torch._dynamo.reset()
    given = {"wrapper": wrapper, **options}
    compiled = torch.compile(chain, backend="memplan", options=given, dynamic=dynamic)
    for rows in (8, 12):
        x = torch.randn(rows, 20)
        torch.testing.assert_close(compiled(x), chain(x))


def early(gpu: FakeGpu) -> set[bool]:
    launches = gpu.launches()
    assert len(launches) >= 4
    gpu.driver.fake_reset()
    return {k.early for k in launches}


WRAPPERS = pytest.mark.parametrize("wrapper", ["python", "cpp"])


@WRAPPERS
@pytest.mark.parametrize("dynamic", [False, True])
def test_all_kernels_of_ours_are(gpu: FakeGpu, wrapper: str, dynamic: bool) -> None:
    for policy, wanted in {"start": True, "end": True, "wait": True, "never": False}.items():
        run(wrapper, dynamic, early_launch=policy)
        assert early(gpu) == {wanted}, policy


@WRAPPERS
def test_older_gpus_do_not_know_them(gpu: FakeGpu, wrapper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "current", staticmethod(lambda: Target(arch=80)))
    run(wrapper, early_launch="start")
    assert early(gpu) == {False}
    assert all("gdc_" not in kernel.source for _, kernel in gpu.emitted.values())


@WRAPPERS
def test_older_drivers_do_not_record_them(gpu: FakeGpu, wrapper: str) -> None:
    ctypes.c_int.in_dll(gpu.driver, "fake_version").value = 12020
    run(wrapper, early_launch="start")
    assert early(gpu) == {False}
    assert all("gdc_wait()" in kernel.source for _, kernel in gpu.emitted.values()), "which does nothing then"


@WRAPPERS
def test_the_cache_knows(gpu: FakeGpu, wrapper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPLAN_PLAN_CACHE", "1")
    for policy, wanted in [("start", True), ("never", False), ("start", True), ("never", False)]:
        run(wrapper, early_launch=policy, cache_dir=str(tmp_path))
        assert early(gpu) == {wanted}


class Chain(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return chain(x)


@pytest.mark.parametrize("policy", ["start", "never"])
def test_a_saved_model_keeps_its_launches(
    gpu: FakeGpu, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = memplan.exported.capture
    monkeypatch.setattr(memplan.exported, "capture", lambda *a, **k: gpu.on_gpu(capture(*a, **k)))
    monkeypatch.setattr(loading, "namespace", gpu.namespace)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", None, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (9, 0))
    x = torch.randn(8, 20)
    memplan.save(torch.export.export(Chain(), (x,)), tmp_path / "m", options={"early_launch": policy})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loaded = memplan.load(tmp_path / "m")
    gpu.driver.fake_reset()
    torch.testing.assert_close(loaded(x), chain(x))
    assert early(gpu) == {policy == "start"}
