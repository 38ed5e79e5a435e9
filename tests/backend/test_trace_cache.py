"""Traces from the cache: right answers whatever was traced before, in other processes and with damaged entries."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memplan
from memplan import trace_cache
from memplan.region import Region
from memplan.runtime.cache import CacheWarning
from tests.backend.again import TRAINING, Block, Function, Options, check, entries, two


def test_what_was_traced_is_not_traced_again(options: Options, traced: list[str]) -> None:
    check(options)
    assert traced == TRAINING
    assert len(entries(options)) == 1
    check(options)
    assert traced == TRAINING
    check({**options, "trace_cache": False})
    assert traced == TRAINING * 2
    check({**options, "plan_cache": False})
    assert traced == TRAINING * 3


SCRIPT = """
import hashlib, json, sys, torch
import memplan
from memplan.region import Region
traced = []
for phase in ("forward", "backward", "inference"):
    def watched(self, module, inputs, phase=phase, original=getattr(Region, f"compile_{phase}")):
        traced.append(phase)
        return original(self, module, inputs)
    setattr(Region, f"compile_{phase}", watched)
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Dropout(0.5), torch.nn.LayerNorm(16), torch.nn.Linear(16, 8)
)
x = torch.randn(4, 8, requires_grad=True)
digest = hashlib.sha256()
with memplan.record() as recording:
    compiled = torch.compile(model, backend="memplan")
    for _ in range(3):
        torch.manual_seed(3)
        out = compiled(x)
        out.square().sum().backward()
        for t in (out, x.grad, *(p.grad for p in model.parameters())):
            digest.update(t.detach().numpy().tobytes())
    with torch.no_grad():
        digest.update(compiled.eval()(x).numpy().tobytes())
report = hashlib.sha256(memplan.report(recording).json().encode()).hexdigest()
print(json.dumps([digest.hexdigest(), report, max(max(p.timeline) for p in recording.plans), traced]))
"""


def start(folder: Path, **environment: str) -> subprocess.Popen[str]:
    told = {"MEMPLAN_CACHE_DIR": str(folder), "MEMPLAN_PLAN_CACHE": "1", "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **told, **environment}
    command = [sys.executable, "-c", SCRIPT]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> list[Any]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return list(json.loads(out.splitlines()[-1]))


def test_another_process_has_the_same_bits_and_the_same_report(tmp_path: Path) -> None:
    both = [start(tmp_path), start(tmp_path)]  # at once: one may have what the other has just kept
    *first, traced = finished(both[0])
    *second, also_traced = finished(both[1])
    everything = ["forward", "backward", "inference"]
    assert first == second
    assert {*traced, *also_traced} == set(everything)
    assert finished(start(tmp_path)) == [*first, []]
    assert finished(start(tmp_path, MEMPLAN_TRACE_CACHE="0")) == [*first, everything]


def test_a_recording_is_the_same(options: Options, traced: list[str]) -> None:
    with memplan.record() as first:
        check(options)
    with memplan.record() as again:
        check(options)
    assert traced == TRAINING
    for a, b in zip(first.graphs, again.graphs, strict=True):
        assert (a.plan.order, a.plan.timeline, a.plan.placements) == (b.plan.order, b.plan.timeline, b.plan.placements)
        assert [op.origins for op in a.plan.program.operations] == [op.origins for op in b.plan.program.operations]
        assert (a.joins, a.waterfall, a.activations, a.eager) == (b.joins, b.waterfall, b.activations, b.eager)
    numbered = re.compile(r"(forward|backward)\d+")  # regions count up in a process
    told = [numbered.sub(r"\1", memplan.report(r).json()) for r in (first, again)]
    assert told[0] == told[1]


# -- what a hit has to do --------------------------------------------------------------------------------------------


def changed_input(x: Tensor, y: Tensor) -> Tensor:
    x.mul_(2).add_(y.sin())
    return x * y


def aliases(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = y.exp()
    return x, x[1:], z, z.t(), z[0], y.view(-1)


def nothing_and_more(x: Tensor, y: Tensor) -> tuple[object, ...]:
    return None, 3, x.sin().detach(), (y * 2, {"k": x + y})


def broken(x: Tensor, y: Tensor) -> Tensor:
    z = x.sin() * y
    torch._dynamo.graph_break()
    w = z.cos() + x
    torch._dynamo.graph_break()
    return w * z


def checkpointed(x: Tensor, y: Tensor) -> Tensor:
    out: Tensor = torch.utils.checkpoint.checkpoint(lambda a, b: (a @ b.t()).sin() @ b, x, y, use_reentrant=False)
    return out


class Normalised(nn.Module):
    """Buffers that a step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x)).relu()
        return out


def plain_two() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 8), torch.randn(6, 8).requires_grad_()


def conjugated() -> tuple[Tensor, Tensor]:
    return torch.randn(4, dtype=torch.cfloat).conj(), torch.randn(4).requires_grad_()


def with_complex(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).real


def plain(x: Tensor, y: Tensor) -> Tensor:
    return x.sin() * y


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: changed_input, plain_two),
        (lambda: aliases, two),
        (lambda: nothing_and_more, two),
        (lambda: broken, two),
        (lambda: checkpointed, two),
        (Normalised, lambda: (torch.randn(2, 3, 9, 9),)),
        (lambda: with_complex, conjugated),
        (lambda: plain, lambda: (torch.randn(4), torch.randn(4))),
    ],
    ids=["changed", "aliases", "nothing", "breaks", "checkpoint", "buffers", "conj", "inference"],
)
def test_a_hit_does_as_eager(
    options: Options, traced: list[str], make: Callable[[], Function], inputs: Callable[[], Any]
) -> None:
    check(options, make, inputs)
    cold = list(traced)
    assert cold
    check(options, make, inputs)
    assert traced == cold


@pytest.mark.parametrize(
    "given", [{"pools": "always"}, {"budget": "40 KB"}, {"random": "eager"}, {"wrapper": "python"}]
)
def test_a_hit_goes_with_options(options: Options, traced: list[str], given: Options) -> None:
    def dropping() -> nn.Module:
        return (
            nn.Sequential(Block(), nn.Dropout(0.5), Block()) if "random" in given else nn.Sequential(Block(), Block())
        )

    for _ in range(2):
        check({**options, **given}, dropping, lambda: (torch.randn(64, 8, requires_grad=True),))
    assert traced == TRAINING


def test_graphs_that_are_kept_and_hooks_go_with_a_hit(options: Options, traced: list[str]) -> None:
    for _ in range(2):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Block()
        x = torch.randn(5, 8)
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        compiled = torch.compile(model, backend="memplan", options={**options, "pools": "always"})
        loss = compiled(x).square().sum()
        for keep in (True, True, False):
            found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=keep)
            torch.testing.assert_close(found, expected)
        ahead = [compiled(x).square().sum() for _ in range(2)]
        for loss in ahead:
            torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), expected)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            loss = compiled(x).square().sum()
        torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), expected)
    assert traced == TRAINING


def test_sizes_that_vary(options: Options, traced: list[str]) -> None:
    def sized(x: Tensor) -> Tensor:
        return (x.softmax(0) * x.shape[0] if x.shape[0] > 3 else x.cos()) * x.shape[1]

    def of(rows: int) -> None:
        check(options, lambda: sized, lambda: (torch.randn(rows, 7, requires_grad=True),), dynamic=True)

    of(5)
    assert traced == TRAINING
    of(5)
    assert traced == TRAINING
    of(6)  # the plan is made for the sizes that are seen first
    assert traced == TRAINING * 2
    of(2)
    assert traced == TRAINING * 3
    torch._dynamo.reset()
    compiled = torch.compile(sized, backend="memplan", options=options, dynamic=True)
    for rows in (5, 9, 3, 2, 6):  # what a hit was guarded by is guarded by again
        x = torch.randn(rows, 7)
        torch.testing.assert_close(compiled(x.clone().requires_grad_()), sized(x), check_dtype=False)
    assert "inference" not in traced


# -- what may be wrong with an entry ---------------------------------------------------------------------------------


def damage(path: Path, change: Callable[[bytes], bytes], *, honest: bool) -> None:
    """Other bytes in an entry; ``honest``: under the name that they have."""
    data = change(path.read_bytes())
    path.unlink()
    name = path.name if not honest else f"{path.name[:64]}-{hashlib.sha256(data).hexdigest()}.trace"
    (path.parent / name).write_bytes(data)
    (path.parent / name).chmod(0o600)


@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize(
    "change", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"x" * 400], ids=["none", "half", "other"]
)
def test_a_damaged_entry_is_made_again(
    options: Options, traced: list[str], change: Callable[[bytes], bytes], honest: bool
) -> None:
    check(options)
    damage(entries(options)[0], change, honest=honest)
    check(options)
    assert traced == TRAINING * 2
    check(options)
    assert traced == TRAINING * 2


def test_what_others_may_write_is_not_read(options: Options, traced: list[str]) -> None:
    check(options)
    entries(options)[0].chmod(0o666)
    check(options)
    assert traced == TRAINING * 2


def test_without_plans_and_libraries_a_trace_still_serves(options: Options, traced: list[str]) -> None:
    check(options)
    for path in (*entries(options, ".plan"), *entries(options, ".so")):
        path.unlink()
    check(options)
    assert traced == TRAINING
    assert len(entries(options, ".plan")) == 2


def test_an_entry_that_cannot_be_used_is_traced(
    options: Options, traced: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check(options)

    def fails(self: object, *given: object) -> object:
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(Region, "restored", lambda self, step: fails)
        check(options)
    assert traced == TRAINING * 2
    assert "a kept trace cannot be used" in caplog.text


def test_a_directory_that_cannot_be_written(options: Options, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(CacheWarning):
        check({**options, "cache_dir": str(tmp_path / "file")})


@pytest.mark.parametrize("missing", ["make_entry", "save", "_lookup", "evaluate_guards"])
def test_a_torch_with_another_interface(
    options: Options, traced: list[str], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache

    assert trace_cache.interface() is not None
    monkeypatch.setattr(AOTAutogradCache, missing, staticmethod(lambda other: None))
    assert trace_cache.interface() is None
    for _ in range(2):
        check(options)
    assert traced == TRAINING * 2


def test_other_threads_have_torchs_own() -> None:
    """An autograd thread may be compiling for Inductor meanwhile."""
    seen: list[object] = []

    class Owner:
        @staticmethod
        def save(key: str) -> str:
            return f"torch's {key}"

    before = vars(Owner)["save"]
    with trace_cache._replaced(Owner, {"save": lambda key: f"ours {key}"}):
        seen.append(Owner.save("a"))
        thread = threading.Thread(target=lambda: seen.append(Owner.save("b")))
        thread.start()
        thread.join()
    assert seen == ["ours a", "torch's b"]
    assert vars(Owner)["save"] is before


def test_a_backward_that_is_traced_into_a_larger_one(options: Options, traced: list[str]) -> None:
    """Compiled autograd takes the backward's graph, which an entry has."""
    for _ in range(2):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = Block(), torch.randn(5, 8)
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        loss = torch.compile(model, backend="memplan", options=options)(x).square().sum()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))
    assert traced == TRAINING


def test_torchs_own_cache_is_as_before(options: Options) -> None:
    import torch._functorch._aot_autograd.autograd_cache as found

    before = (found.autograd_cache_key, dict(vars(found.AOTAutogradCache)))
    check(options)
    assert (found.autograd_cache_key, dict(vars(found.AOTAutogradCache))) == before


def test_a_budget_that_cannot_be_met_is_refused_warm_too(options: Options) -> None:
    for _ in range(2):
        with pytest.raises(Exception, match="the budget of 100 B cannot be met"):
            check({**options, "budget": 100})
