"""Plans from the cache: right answers whatever lies in it, hits for what is equal, misses for what is not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import memplan
from memplan import compilation, plan_cache, saving_encoding
from memplan.ir.verify_plan import verify_plan
from memplan.program_identity import carried_over, identify, roles
from memplan.runtime.cache import CacheWarning

Options = dict[str, object]


class Block(nn.Module):
    """A constant, a saved value, a kernel and products."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
        out: Tensor = x + self.second(torch.nn.functional.gelu(self.first(x * scale)))
        return out


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that has seen one training step of `Block`."""
    folder = tmp_path_factory.mktemp("filled")
    check({"plan_cache": True, "cache_dir": str(folder)})
    return folder


@pytest.fixture
def options(filled: Path, tmp_path: Path) -> Options:
    """Options with a copy of the filled cache."""
    shutil.copytree(filled, tmp_path / "cache")
    return {"plan_cache": True, "cache_dir": str(tmp_path / "cache")}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the programs that are planned, and not taken from the cache."""
    found: list[str] = []
    plan = compilation.plan_program

    def watched(program, config, kept=compilation.NOTHING_KEPT):  # type: ignore[no-untyped-def]
        found.append(program.phase.value)
        return plan(program, config, kept)

    monkeypatch.setattr(compilation, "plan_program", watched)
    return found


def check(options: Options, make: Callable[[], nn.Module] = Block, rows: int = 5, dynamic: bool = False) -> None:
    """One training step of the compiled model against eager."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make()
    x = torch.randn(rows, 8, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    expected = model(x)
    expected.square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, backend="memplan", options=options, dynamic=dynamic)
    out = compiled(y)
    out.square().sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(y.grad, x.grad)
    for p, g in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g)


def entries(options: Options, suffix: str = "") -> list[Path]:
    folder = Path(str(options["cache_dir"]))
    return sorted(p for p in folder.rglob(f"*{suffix}") if p.is_file() and not p.name.endswith(".lock"))


def test_what_was_planned_is_not_planned_again(options: Options, planned: list[str]) -> None:
    check(options)
    assert planned == []
    check({**options, "plan_cache": False})
    assert planned == ["forward", "backward"]


def test_a_plan_from_the_cache_can_be_looked_at(options: Options, planned: list[str]) -> None:
    with memplan.record() as first:
        check({**options, "plan_cache": False})
    with memplan.record() as again:
        check(options)
    assert planned == ["forward", "backward"]
    for a, b in zip(first.graphs, again.graphs, strict=True):
        verify_plan(b.plan)
        assert (a.plan.order, a.plan.timeline, a.plan.placements) == (b.plan.order, b.plan.timeline, b.plan.placements)
        assert [op.origins for op in a.plan.program.operations] == [op.origins for op in b.plan.program.operations]
        assert (a.joins, a.waterfall, a.wrapper) == (b.joins, b.waterfall, b.wrapper)
    numbered = re.compile(r"(forward|backward)\d+")  # regions count up in a process
    assert numbered.sub(r"\1", memplan.report(again).json()) == numbered.sub(r"\1", memplan.report(first).json())


class Moved(Block):
    """The same computation from other lines."""

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
        wide = self.first(x * scale)
        out: Tensor = x + self.second(torch.nn.functional.gelu(wide))
        return out


def test_other_lines_of_the_user_hit_and_are_shown(options: Options, planned: list[str]) -> None:
    with memplan.record() as recording:
        check(options, Moved)
    assert planned == []
    lines = {o.code for p in recording.plans for op in p.program.operations for o in op.origins}
    assert "wide = self.first(x * scale)" in lines
    assert any("wide = self.first(x * scale)" in g.wrapper for g in recording.graphs)
    assert not any("self.second(torch.nn.functional.gelu(self.first" in g.wrapper for g in recording.graphs)


class OtherConstant(Block):
    def forward(self, x: Tensor) -> Tensor:
        scale = torch.tensor([8.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 1.0])
        out: Tensor = x + self.second(torch.nn.functional.gelu(self.first(x * scale)))
        return out


def test_constants_are_those_of_the_program_at_hand(options: Options) -> None:
    check(options, OtherConstant)


class OtherActivation(Block):
    def forward(self, x: Tensor) -> Tensor:
        scale = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
        out: Tensor = x + self.second(torch.nn.functional.gelu(self.first(x * scale), approximate="tanh"))
        return out


@pytest.mark.parametrize("change", ["model", "rows", "option", "deterministic"])
def test_what_differs_is_planned(options: Options, planned: list[str], change: str) -> None:
    match change:
        case "model":
            check(options, OtherActivation)
        case "rows":
            check(options, rows=6)
        case "option":
            check({**options, "poison": True})
        case _:
            torch.use_deterministic_algorithms(True)
            try:
                check(options)
            finally:
                torch.use_deterministic_algorithms(False)
    assert planned == ["forward", "backward"]


def test_another_version_of_memplan_misses(
    options: Options, planned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_cache.versions.cache_clear()
    monkeypatch.setattr(plan_cache, "source_digest", lambda: "another")
    try:
        check(options)
    finally:
        plan_cache.versions.cache_clear()
    assert planned == ["forward", "backward"]


def test_the_source_digest_is_of_every_package() -> None:
    folders = [p for name in plan_cache._PACKAGES for p in __import__(f"memplan{name}", fromlist=["x"]).__path__]
    assert {Path(p).name for p in folders} >= {"memplan", "ir", "capture", "lowering", "runtime", "passes", "codegen"}


def test_names_do_not_matter_and_are_carried_over() -> None:
    torch._dynamo.reset()
    with memplan.record() as recording:
        check({})
    for plan in recording.plans:
        program = replace(plan.program, operations=(), notes=(), callables={}, constants={})
        first = identify(replace(program, hints={}), lambda call: "")
        names = {n: f"other_{n}" for n in first.names}
        renamed = carried_over(replace(plan, program=program), first, replace(first, names=tuple(names.values())))
        assert list(renamed.program.buffers) == [names.get(n, n) for n in program.buffers]
        second = identify(renamed.program, lambda call: "")
        assert second.form == first.form
        assert second.names == tuple(names.values())
        whole = carried_over(plan, first, replace(first, names=tuple(names.values())))
        verify_plan(whole, check_program=False)
        assert not set(whole.program.buffers) & set(first.names)


#: Text in the classes of memplan.ir that names no buffer or operation of a program.
NO_NAMES = {
    "Origin": "*", "Pool": "name device group", "InPool": "pool", "Certificate": "note", "Buffer": "device group",
    "KernelOp": "device", "Extern": "device kwargs symbols", "Collective": "device group kwargs symbols",
    "Wait": "device kwargs symbols", "Copy": "device", "Program": "name constants callables", "Call": "op",
    "UserKernel": "*", "Plan": "predicted_peak requests reserve step", "Literal": "value",
    "Slab": "name device", "Workspace": "role", "Template": "device kwargs symbols", "Reserve": "device",
    "InFlight": "device kwargs symbols", "HostCopy": "device kwargs symbols",
    "CanonicalProduct": "*",  # a key of what is measured, in no plan
}  # fmt: skip


def test_every_text_is_known_as_a_name_or_as_none() -> None:
    """A new field of the intermediate language that holds names has to be said so, or two programs pass as one."""
    for kind in (c for c in saving_encoding._CLASSES.values() if c.__module__.startswith("memplan.ir.")):
        if kind.__module__ == "memplan.ir.user_kernel":
            continue  # the user's code, which knows nothing of the program
        for field in fields(kind):
            if "str" in str(field.type).replace("strides", "") and field.name not in roles(kind):
                known = {"*", field.name} & set(NO_NAMES.get(kind.__name__, "").split())
                assert known, f"{kind.__name__}.{field.name}: {field.type} in program_identity._ROLES or in NO_NAMES"


def test_size_symbols_of_other_names_hit(tmp_path: Path, planned: list[str]) -> None:
    options: Options = {"plan_cache": True, "cache_dir": str(tmp_path)}

    def f(x: Tensor, y: Tensor) -> Tensor:
        return torch.softmax(x, -1) @ y

    def g(unused: int, b: Tensor, a: Tensor) -> Tensor:  # torch names size symbols after where they come from
        return torch.softmax(b, -1) @ a

    for function, before in ((f, ()), (g, (3,))):
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="memplan", options=options, dynamic=True)
        for n in (5, 7):
            x, y = torch.randn(n, 6), torch.randn(6, 4)
            with memplan.record() as recording:
                torch.testing.assert_close(compiled(*before, x, y), function(*before, x, y))
            for plan in recording.plans:
                verify_plan(plan)
    assert planned == ["inference"]


@pytest.mark.parametrize("damage", ["gone", "empty", "short", "flipped", "everybody", "foreign"])
@pytest.mark.parametrize("suffix", [".plan", ".so"])
def test_damaged_entries_are_made_again(options: Options, planned: list[str], damage: str, suffix: str) -> None:
    found = entries(options, suffix)
    assert found
    if damage == "foreign" and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    for path in found:
        data = path.read_bytes()
        match damage:
            case "gone":
                path.unlink()
            case "empty":
                path.write_bytes(b"")
            case "short":
                path.write_bytes(data[: len(data) // 2])
            case "flipped":
                path.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
            case "everybody":
                path.chmod(0o666)
            case _:
                os.chown(path, 65534, 65534)
    check(options)
    assert planned == ["forward", "backward"]
    planned.clear()
    check(options)
    assert planned == []


def test_a_kill_at_any_point_leaves_right_answers(options: Options, tmp_path: Path) -> None:
    """Entries appear one after the other, each whole or not at all, a temporary file beside them."""
    every = entries(options)
    for k in range(0, len(every), 2):
        folder = tmp_path / f"killed{k}"
        for path in every[:k]:
            target = folder / path.relative_to(str(options["cache_dir"]))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        if every[:k]:
            (target.parent / "left.tmp").write_bytes(b"half of some")
        for part in [folder, *(p for p in folder.rglob("*") if p.is_dir())] if folder.exists() else ():
            part.chmod(0o700)
        check({**options, "cache_dir": str(folder)})


@pytest.mark.parametrize(
    "document", [b"", b"[]", b'{"table": [], "root": null}', b'{"table": [["data"]], "root": [0]}']
)
def test_an_entry_with_other_content_is_made_again(options: Options, planned: list[str], document: bytes) -> None:
    import zlib

    from memplan.runtime.cache import Cache, key_of

    head = zlib.compress(document)
    for path in entries(options, ".plan"):
        Cache(str(options["cache_dir"])).put(key_of(path), len(head).to_bytes(8, "little") + head, suffix=".plan")
    check(options)
    assert planned == ["forward", "backward"]


@pytest.mark.parametrize("trouble", ["a file", "full"])
def test_a_cache_that_cannot_be_written(tmp_path: Path, trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    if trouble == "a file":
        folder.write_text("in the way")
    else:
        from memplan.runtime import cache

        write = cache._write_atomically

        def full(target: Path, data: bytes) -> Path:
            if str(target).startswith(str(folder)):
                raise OSError(28, "No space left on device")
            return write(target, data)

        monkeypatch.setattr(cache, "_write_atomically", full)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check({"plan_cache": True, "cache_dir": str(folder)})
    assert sum(issubclass(w.category, CacheWarning) for w in caught) == 1


SCRIPT = """
import sys, torch
from memplan import compilation
plan = compilation.plan_program
planned = []
compilation.plan_program = lambda *given: (planned.append(1), plan(*given))[1]
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.LayerNorm(16))
x = torch.randn(4, 8)
expected = model(x)
compiled = torch.compile(model, backend="memplan")
torch.testing.assert_close(compiled(x), expected)
print("planned", len(planned))
"""


def test_several_processes_at_once_and_one_after(tmp_path: Path) -> None:
    env = {**os.environ, "MEMPLAN_CACHE_DIR": str(tmp_path), "MEMPLAN_PLAN_CACHE": "1", "OMP_NUM_THREADS": "1"}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    for process in (start(), start()):
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "planned" in out
    out, err = (last := start()).communicate(timeout=300)
    assert last.returncode == 0, err
    assert out.split() == ["planned", "0"]
