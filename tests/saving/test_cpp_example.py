"""The example in C++: a saved model run by a program without Python."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import memplan
from memplan.runtime.toolchain import find_toolchain
from tests.saving.models import Counter, tied

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp" / "run_saved.cpp"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built with the system's compiler."""
    lib = Path(torch.__path__[0]) / "lib"
    path = tmp_path_factory.mktemp("cpp") / "run_saved"
    links = [f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch_cpu", "-ltorch", "-lc10", "-ldl"]
    command = [
        *find_toolchain().command,
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Werror",
        str(EXAMPLE),
        "-o",
        str(path),
        *links,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, args, kwargs = tied()
    shapes = {"tokens": {1: torch.export.Dim("tokens", min=2, max=30)}, "scale": None, "shift": None}
    path = tmp_path_factory.mktemp("saved") / "tied.memplan"
    memplan.save(torch.export.export(model, args, kwargs, dynamic_shapes=shapes), path)
    return path


def run(program: Path, model: Path, inputs: list[torch.Tensor], folder: Path) -> subprocess.CompletedProcess[str]:
    words = []
    for k, t in enumerate(inputs):
        t.detach().numpy().tofile(folder / f"in{k}.bin")
        kind = {torch.int64: "i64", torch.float32: "f32"}[t.dtype]
        words.append(f"{kind}:{'x'.join(map(str, t.shape))}:{folder / f'in{k}.bin'}")
    command = [str(program), str(model), *words, str(folder / "out")]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def output(folder: Path, k: int, like: torch.Tensor) -> torch.Tensor:
    kind = np.int64 if like.dtype == torch.int64 else np.float32
    return torch.from_numpy(np.fromfile(folder / f"out{k}.bin", kind)).reshape(like.shape)


def test_it_gives_the_models_numbers(program: Path, saved: Path, tmp_path: Path) -> None:
    model, _, kwargs = tied()
    tokens = torch.randint(0, 32, (2, 11))
    expected = model(tokens, **kwargs)
    done = run(program, saved, [tokens, kwargs["scale"], kwargs["shift"]], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "output 0: 2 11 32\noutput 1: 2 16\n"
    for k, name in enumerate(("logits", "shifted")):
        torch.testing.assert_close(output(tmp_path, k, expected[name]), expected[name])
    libraries = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"lib\w*python\S*\.so", libraries), libraries


class Dtypes(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x > 0, x.double() * 2, x.half(), (x * 100).to(torch.int16), x.t() * 3, x.long(), (x < 0).any()


def test_outputs_of_every_size_of_element(program: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5)
    memplan.save(torch.export.export(Dtypes(), (x,)), tmp_path / "m")
    done = run(program, tmp_path / "m", [x], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for k, wanted in enumerate(Dtypes()(x)):
        written = torch.frombuffer(bytearray((tmp_path / f"out{k}.bin").read_bytes()), dtype=wanted.dtype)
        torch.testing.assert_close(written.reshape(wanted.shape), wanted)


def test_changed_buffers(program: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Counter(), torch.randn(5, 6)
    memplan.save(torch.export.export(model, (x, torch.ones(6))), tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    expected = model(x, torch.ones(6))
    done = run(program, tmp_path / "m", [x, torch.ones(6)], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    torch.testing.assert_close(output(tmp_path, 0, expected[0]), expected[0])
    torch.testing.assert_close(output(tmp_path, 1, expected[1]), expected[1])
    assert (tmp_path / "m").read_bytes() == before


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.full((2, 4), 32), "out of range"),
        (torch.zeros(3, 4, dtype=torch.int64), "input 0 is not of the dtype and sizes"),
        (torch.zeros(2, 4), "input 0 is not of the dtype and sizes"),
    ],
)
def test_wrong_inputs(program: Path, saved: Path, tmp_path: Path, tokens: torch.Tensor, message: str) -> None:
    _, _, kwargs = tied()
    done = run(program, saved, [tokens, kwargs["scale"], kwargs["shift"]], tmp_path)
    assert done.returncode == 1
    assert message in done.stderr


def test_damage_is_found(program: Path, saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    for place in range(100, len(data), len(data) // 12):
        changed = bytearray(data)
        changed[place] ^= 4
        (tmp_path / "m").write_bytes(changed)
        done = run(program, tmp_path / "m", [], tmp_path)
        assert done.returncode == 1, (place, done.stderr)  # damaged, or (in what it does not use) called with no inputs
        assert "damaged" in done.stderr or "takes 3 tensors" in done.stderr or "format" in done.stderr
    (tmp_path / "m").write_bytes(data[: len(data) // 2])
    assert "damaged" in run(program, tmp_path / "m", [], tmp_path).stderr
