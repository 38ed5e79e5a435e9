"""Models saved, and run from their file by a process that compiles nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import memplan
from memplan import loading, package
from memplan.ir.errors import SavedModelError
from memplan.ir.verify_plan import verify_plan
from tests.saving.models import Counter, tied


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with tied weights, for two to 30 tokens."""
    model, args, kwargs = tied()
    tokens = torch.export.Dim("tokens", min=2, max=30)
    shapes = {"tokens": {1: tokens}, "scale": None, "shift": None}
    path = tmp_path_factory.mktemp("saved") / "tied.memplan"
    memplan.save(torch.export.export(model, args, kwargs, dynamic_shapes=shapes), path)
    return path


SCRIPT = """
import subprocess, sys, torch
def refused(*given, **more):
    raise AssertionError(f"something is run: {given}")
subprocess.Popen.__init__ = refused
sys.modules["torch._dynamo"] = sys.modules["torch._inductor"] = sys.modules["triton"] = None  # importing them fails
import memplan
inputs, expected = torch.load(sys.argv[2])
model = memplan.load(sys.argv[1])
for (args, kwargs), wanted in zip(inputs, expected):
    torch.testing.assert_close(model(*args, **kwargs), wanted)
stages = ("torch._dynamo.", "torch._inductor.", "memplan.passes", "memplan.lowering")
compilers = [m for m in sys.modules if m.startswith(stages)]
assert not compilers, compilers
print("loaded")
"""


def test_a_fresh_process_loads_it_and_compiles_nothing(saved: Path, tmp_path: Path) -> None:
    model, _, kwargs = tied()
    inputs = [((torch.randint(0, 32, (2, n)),), kwargs) for n in (8, 2, 30)]
    torch.save((inputs, [model(*a, **k) for a, k in inputs]), tmp_path / "data.pt")
    env = {**os.environ, "PATH": "", "HOME": str(tmp_path), "MEMPLAN_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", SCRIPT, str(saved), str(tmp_path / "data.pt")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "loaded\n"), done.stderr
    assert not (tmp_path / "cache").exists()


def test_it_is_called_like_the_module(saved: Path) -> None:
    model, (tokens,), kwargs = tied()
    loaded = memplan.load(saved)
    expected = model(tokens, **kwargs)
    reordered = dict(reversed(kwargs.items()))
    torch.testing.assert_close(loaded(tokens, **reordered), expected)
    strided = torch.stack([tokens, tokens], -1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(loaded(strided, **kwargs), expected)
    assert not loaded(tokens, scale=kwargs["scale"].requires_grad_(), shift=kwargs["shift"])["logits"].requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, k: ((t[:, :1],), k), "exported for from 2 to 30"),
        (lambda t, k: ((torch.zeros(2, 31, dtype=torch.int64),), k), "exported for from 2 to 30"),
        (lambda t, k: ((t[:1],), k), r"tokens is a tensor torch.int64 \(1, 8\)"),
        (lambda t, k: ((t.int(),), k), "tokens is a tensor torch.int32"),
        (lambda t, k: ((t.to("meta"),), k), "on meta"),
        (lambda t, k: ((t,), {"scale": k["scale"]}), "another structure"),
        (lambda t, k: (([t],), k), "another structure"),
        (lambda t, k: ((3,), k), "int 3"),
    ],
)
def test_other_arguments_are_refused(saved: Path, change: Callable[..., object], message: str) -> None:
    _, (tokens,), kwargs = tied()
    args, kwargs = change(tokens, kwargs)  # type: ignore[misc]
    with pytest.raises(SavedModelError, match=message):
        memplan.load(saved)(*args, **kwargs)


def test_shared_memory_is_stored_once_and_shared_again(saved: Path) -> None:
    model, _, _ = tied()
    with zipfile.ZipFile(saved) as archive:
        stored = sum(e.file_size for e in archive.infolist() if e.filename.startswith("weights/"))
    distinct = {p.data_ptr(): p.nbytes for p in model.parameters()}
    assert stored <= sum(distinct.values()) + 32 * 16 * 4 + 64 + 64 * len(distinct)  # and the rows of the table used
    state = memplan.load(saved).state_dict()
    assert state["table"].data_ptr() + 3 * 64 == state["row"].data_ptr()
    for name, tensor in model.state_dict().items():
        if name in state:
            torch.testing.assert_close(state[name], tensor)


def contents(path: Path) -> dict[str, tuple[int, int]]:
    """For each entry where its bytes are in the file, and how many."""
    found = {}
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            head = data[info.header_offset : info.header_offset + 30]
            names, extra = (int.from_bytes(head[k : k + 2], "little") for k in (26, 28))
            found[info.filename] = (info.header_offset + 30 + names + extra, info.file_size)
    return found


def test_weights_lie_at_multiples_of_64_bytes(saved: Path) -> None:
    for name, (start, _) in contents(saved).items():
        assert start % 64 == 0, name


def test_changed_buffers_and_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Counter(), torch.randn(5, 6)
    memplan.save(torch.export.export(model, (x, torch.ones(6))), tmp_path / "m")
    loaded = memplan.load(tmp_path / "m")
    ours, theirs = torch.ones(6, 2)[:, 0], torch.ones(6)
    for _ in range(3):
        torch.testing.assert_close(loaded(x, ours), model(x, theirs))
        torch.testing.assert_close(ours, theirs)
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name])
    assert memplan.load(tmp_path / "m").state_dict()["calls"].item() == 0


class Chosen(nn.Module):
    """Sizes and numbers that are known only when it runs."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[x > 0].sin() * 2, x + x.sum().item() * 1.5


def test_sizes_and_numbers_known_only_when_it_runs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    memplan.save(torch.export.export(Chosen(), (x,)), tmp_path / "m")
    loaded = memplan.load(tmp_path / "m")
    for given in (x, -x, x.abs(), -x.abs()):
        torch.testing.assert_close(loaded(given), Chosen()(given))


class Numbers(nn.Module):
    """Numbers taken out of tensors, as factors, terms and results."""

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        return x * x.max().item() + (x > 0).any().item(), x.abs().max().item()


def test_numbers_taken_out_of_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    memplan.save(torch.export.export(Numbers(), (x,)), tmp_path / "m")
    loaded = memplan.load(tmp_path / "m")
    for given in (x, -x.abs(), x * 3):
        found, wanted = loaded(given), Numbers()(given)
        torch.testing.assert_close(found[0], wanted[0])
        assert found[1] == wanted[1]


class Solved(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.inv(a) @ torch.linalg.solve(a + 1, b)


def test_a_check_of_an_operator_is_kept(tmp_path: Path) -> None:
    """torch exports the check of a factorisation on a chain of tokens."""
    torch.manual_seed(0)
    a, b = torch.randn(4, 4) + 4 * torch.eye(4), torch.randn(4, 2)
    memplan.save(torch.export.export(Solved(), (a, b)), tmp_path / "m")
    loaded = memplan.load(tmp_path / "m")
    torch.testing.assert_close(loaded(a, b), Solved()(a, b))
    with pytest.raises(RuntimeError, match="singular"):
        Solved()(torch.zeros(4, 4), b)
    with pytest.raises(RuntimeError, match="singular"):
        loaded(torch.zeros(4, 4), b)


def test_an_operator_of_the_users_has_to_be_registered(tmp_path: Path) -> None:
    with torch.library._scoped_library("memplan_saved", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        library.impl("twice", torch.empty_like, "Meta")

        class Twice(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                found: Tensor = torch.ops.memplan_saved.twice(x.sin()) + 1
                return found

        x = torch.randn(3)
        memplan.save(torch.export.export(Twice(), (x,)), tmp_path / "m")
        torch.testing.assert_close(memplan.load(tmp_path / "m")(x), Twice()(x))
    code = f"import memplan\nmemplan.load({str(tmp_path / 'm')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "SavedModelError" in done.stderr
    assert "operator memplan_saved::twice, which is not registered" in done.stderr


def test_an_operator_that_changes_its_argument(tmp_path: Path) -> None:
    """torch wraps it in a function over graphs, which is taken apart: it runs in place, on what nobody else reads."""
    path = tmp_path / "m.memplan"
    with torch.library._scoped_library("memplan_saved_change", "DEF") as library:
        library.define("raise_(Tensor(a!) x, Tensor by) -> ()", tags=torch.Tag.pt2_compliant_tag)

        def added(x: Tensor, by: Tensor) -> None:
            x.add_(by)

        library.impl("raise_", added, "CPU")
        torch.library.register_fake("memplan_saved_change::raise_", lambda x, by: None, lib=library)

        class Changing(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                y, z = x.cos(), x.exp()
                torch.ops.memplan_saved_change.raise_(y, z)
                torch.ops.memplan_saved_change.raise_(z, x)
                return y.sin(), z

        x = torch.randn(5, 3)
        kept = x.clone()
        memplan.save(torch.export.export(Changing(), (x,)), path)
        found = memplan.load(path)(x)
        torch.testing.assert_close(found, Changing()(kept))
        torch.testing.assert_close(x, kept)


def test_a_loaded_model_is_shown_in_one_line(saved: Path) -> None:
    """Not with its weights, which a debugger or a notebook would print."""
    assert repr(memplan.load(saved)) == f"LoadedModel(path={saved!r})"


def test_plan_and_report_are_inside(saved: Path, tmp_path: Path) -> None:
    loaded = memplan.load(saved)
    verify_plan(loaded.plan, check_program=False)
    assert loaded.report().report.step.peak == max(loaded.plan.timeline)
    command = [sys.executable, "-m", "memplan.reports.cli", "report", str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Peak memory" in done.stdout


def test_every_damaged_entry_is_found(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    path = tmp_path / "damaged.memplan"
    for start, size in contents(saved).values():
        changed = bytearray(data)
        changed[start + size // 2] ^= 16
        path.write_bytes(changed)
        with pytest.raises(SavedModelError, match="damaged"):
            memplan.load(path)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_cut_file_is_refused(saved: Path, tmp_path: Path, part: float) -> None:
    data = saved.read_bytes()
    path = tmp_path / "cut.memplan"
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(SavedModelError, match="no saved model, or it is damaged"):
        memplan.load(path)


def test_a_damaged_directory_of_the_file_is_found(saved: Path, tmp_path: Path) -> None:
    """The way in which an entry says that it is packed, changed to one that Python's zip files do not know."""
    data = bytearray(saved.read_bytes())
    path = tmp_path / "damaged.memplan"
    for start in [m.start() for m in re.finditer(b"PK\x01\x02", bytes(data))]:
        changed = bytearray(data)
        changed[start + 10] = 0x20
        path.write_bytes(changed)
        with pytest.raises(SavedModelError, match="damaged"):
            memplan.load(path)


def test_nothing_of_a_damaged_file_runs(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: object) -> None:
        raise AssertionError("code of a damaged file is loaded")

    monkeypatch.setattr(loading, "load_kernels", refused)
    monkeypatch.setattr(loading, "namespace", refused)
    data = bytearray(saved.read_bytes())
    data[contents(saved)["report.json"][0] + 100] ^= 1
    (tmp_path / "m").write_bytes(data)
    with pytest.raises(SavedModelError, match=r"report\.json"):
        memplan.load(tmp_path / "m")


def rewritten(path: Path, target: Path, change: Callable[[dict[str, object]], None]) -> Path:
    """The package with another manifest, whole in itself."""
    with package.read(path) as reader:
        manifest = json.loads(json.dumps(reader.manifest))
        contents = {name: reader.read(name) for name in reader.entries}
    for name in ("entries", "format", "version"):
        manifest.pop(name)
    change(manifest)

    def fill(writer: package.Writer) -> dict[str, object]:
        for name, data in contents.items():
            writer.add(name, data)
        return manifest

    package.write(target, fill)
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"torch": "2.9.1"}, "saved with torch 2.9.1, this is torch"),
        ({"needs": {"machine": "sparc"}}, "saved for sparc"),
        ({"needs": {"instructions": ["avx1024f", "sse2"]}}, "a CPU with avx1024f, which this one lacks"),
        ({"needs": {"cuda": [8, 0]}}, "sm_80"),
    ],
)
def test_another_machine_is_refused(saved: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = rewritten(saved, tmp_path / "m", lambda manifest: manifest.update(change))
    with pytest.raises(SavedModelError, match=message):
        memplan.load(path)


def test_another_version_of_the_format_is_refused(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "VERSION", 999)
    path = rewritten_at(saved, tmp_path / "m")
    monkeypatch.undo()
    with pytest.raises(SavedModelError, match="has version 999 of the format"):
        memplan.load(path)


def rewritten_at(path: Path, target: Path) -> Path:
    def fill(writer: package.Writer) -> dict[str, object]:
        return {"torch": torch.__version__, "needs": {}}

    package.write(target, fill)
    return target


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(SavedModelError, match=r"torch\.export\.export"):
        memplan.save(nn.Linear(2, 2), tmp_path / "m")  # type: ignore[arg-type]

    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda a: a.sin(), lambda a: a.cos(), (x,))  # type: ignore[no-any-return]

    exported = torch.export.export(Branch(), (torch.randn(3),))
    with pytest.raises(SavedModelError, match=r"torch\.where"):
        memplan.save(exported, tmp_path / "m")

    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> object:
            return x.sort()

    with pytest.raises(SavedModelError, match="return its parts"):
        memplan.save(torch.export.export(Sorted(), (torch.randn(3),)), tmp_path / "m")
    exported = torch.export.export(nn.Linear(2, 2), (torch.randn(3, 2),))
    with pytest.raises(SavedModelError, match="cannot write"):
        memplan.save(exported, tmp_path / "nowhere" / "m")
    assert list(tmp_path.iterdir()) == []


def test_where_a_saved_model_is_written(saved: Path, tmp_path: Path) -> None:
    exported = torch.export.export(nn.Linear(2, 2), (torch.randn(3, 2),))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SavedModelError, match="no regular file"):
        memplan.save(exported, tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with pytest.raises(SavedModelError, match="is a folder"):
        memplan.save(exported, tmp_path)

    (tmp_path / "link").symlink_to(tmp_path / "there")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memplan.save(exported, tmp_path / "link")
    (tmp_path / "plain").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").stat().st_mode == (tmp_path / "plain").stat().st_mode
    memplan.load(tmp_path / "link")


def test_a_failed_save_leaves_the_old_file(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "m"
    shutil.copy(saved, target)

    def full(writer: package.Writer) -> dict[str, object]:
        writer.add("weights/0", b"x" * 1000)
        raise OSError(28, "No space left on device")

    with pytest.raises(SavedModelError, match="No space left"):
        package.write(target, full)
    assert target.read_bytes() == saved.read_bytes()
    assert list(tmp_path.iterdir()) == [target]


def test_no_file_and_another_file(tmp_path: Path) -> None:
    with pytest.raises(SavedModelError, match="there is no file"):
        memplan.load(tmp_path / "nothing")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(SavedModelError, match="no saved model"):
        memplan.load(tmp_path / "other.zip")
    with pytest.raises(SavedModelError, match="no device"):
        memplan.load(tmp_path / "other.zip", device="elsewhere")
