"""The C++ wrapper: the same bytes as the Python one, torch's own signatures, and what it refuses."""

from __future__ import annotations

import subprocess
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import nn

import memplan
from memplan.codegen.cpp_wrapper_externs import DTYPE_CODES
from memplan.runtime.cpp_wrapper import _dtype_codes
from memplan.runtime.toolchain import find_toolchain


class Mixed(nn.Module):
    """Products, a convolution, a reduction, an operator without a C function, a result that is an input's view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.first = nn.Linear(4, 16)
        self.norm = nn.LayerNorm(16)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.seen += 1
        y = self.conv(x).mean((2, 3))
        z = torch.nn.functional.gelu(self.norm(self.first(y)))
        return z.cumsum(0), z.sort(1).values, x.transpose(0, 1)


def run(wrapper: str, poison: bool, dynamic: bool) -> tuple[list[torch.Tensor], list[object]]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Mixed()
    with memplan.record() as recording:
        compiled = torch.compile(
            model, backend="memplan", dynamic=dynamic, options={"wrapper": wrapper, "poison": poison}
        )
        found: list[torch.Tensor] = []
        for n in (5, 7):
            x = torch.randn(n, 3, 6, 6, requires_grad=True)
            total, ordered, view = compiled(x)
            (total.square().sum() + ordered.sum()).backward()
            assert x.grad is not None
            found += [total.detach(), ordered.detach(), view.detach().clone(), x.grad]
        found += [p.grad for p in model.parameters() if p.grad is not None] + [model.seen]
    return found, [(p.order, p.placements, p.predicted_peak) for p in recording.plans]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("poison", [False, True])
def test_both_wrappers_give_the_same_bytes_and_plan(poison: bool, dynamic: bool) -> None:
    python, plans = run("python", poison, dynamic)
    cpp, cpp_plans = run("cpp", poison, dynamic)
    assert cpp_plans == plans
    for a, b in zip(python, cpp, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


def test_the_declarations_are_torchs_own(tmp_path: Path) -> None:
    """The compiler refuses a pointer to a function of another type."""
    text = (files("memplan.codegen") / "cpp_wrapper_prelude.h").read_text()
    declarations = text[text.index("#define MP_TORCH") : text.index("#define MP_DECLARE")]
    source = "#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n" + declarations
    source += "#define CHECK(name, arguments) int32_t(*check_##name) arguments = &::name;\nMP_TORCH(CHECK)\n"
    (tmp_path / "check.cpp").write_text(source)
    include = Path(torch.__file__).parent / "include"
    command = [*find_toolchain().command, "-std=c++20", f"-I{include}", "-fsyntax-only", "check.cpp"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (tmp_path / "check.cpp").write_text(source.replace("(AtenTensorHandle, void**)", "(AtenTensorHandle, int*)"))
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode != 0


def test_numbers_of_dtypes_are_torchs() -> None:
    found = _dtype_codes()
    assert {code: found[code] for code in DTYPE_CODES.values()} == {c: d for d, c in DTYPE_CODES.items()}


def test_an_error_of_an_operator_is_torchs_own() -> None:
    """What fails in the C interface is called again in Python, which raises."""

    def solve(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.cholesky(x)

    compiled = torch.compile(solve, backend="memplan", options={"wrapper": "cpp"})
    torch.testing.assert_close(compiled(torch.eye(3) * 4), torch.eye(3) * 2)
    with pytest.raises(torch.linalg.LinAlgError, match="positive-definite"):
        compiled(-torch.eye(3))
