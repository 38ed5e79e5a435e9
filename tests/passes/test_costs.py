"""The cost model: rooflines, figures stored and read back, and what a program's operations move and compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import memplan
from memplan.calibration import calibrate, figures_for
from memplan.ir.config import Config
from memplan.ir.device import CPU, DEFAULTS, DeviceFigures, Unit, Work, default_figures, figures_from
from memplan.ir.program import Extern, KernelOp
from memplan.passes.costs import step_microseconds, work_of

FIGURES = DeviceFigures("test", bandwidth=100.0, half=40.0, single=20.0, double=10.0, scalar=5.0, launch=1.0)


@pytest.mark.parametrize(
    ("work", "microseconds"),
    [
        (Work(1000), 11.0),  # memory
        (Work(1000, 4000, Unit.PRODUCT, 2), 106.0),  # matrix units, and half of the time to move what they compute on
        (Work(1000, 4000, Unit.PRODUCT, 4), 206.0),
        (Work(1000, 4000, Unit.PRODUCT, 8), 406.0),
        (Work(0, 360, Unit.CONVOLUTION, 2), 11.0),
        (Work(0, 45, Unit.DEPTHWISE, 2), 21.0),  # the rate of pointwise kernels, or less
        (Work(0, 70, Unit.NARROW, 2), 11.0),
        (Work(0, 50), 11.0),
        (Work(0, launches=0), 0.0),
    ],
)
def test_the_slower_of_moving_and_computing(work: Work, microseconds: float) -> None:
    assert FIGURES.microseconds(work) == microseconds


def test_figures_are_read_back_or_refused() -> None:
    assert figures_from(FIGURES.as_dict()) == FIGURES
    assert figures_from({**FIGURES.as_dict(), "version": 0}) is None
    assert figures_from({**FIGURES.as_dict(), "bandwidth": "fast"}) is None
    assert figures_from({**FIGURES.as_dict(), "bandwidth": 0.0}) is None
    assert figures_from({"version": 2}) is None


def test_devices_are_known_by_their_names() -> None:
    assert default_figures("NVIDIA H100 80GB HBM3") is DEFAULTS["H100"]
    assert default_figures("NVIDIA A100-SXM4-40GB") is DEFAULTS["A100"]
    assert default_figures("some GPU of tomorrow") is DEFAULTS["A100"]
    assert default_figures("cpu") is CPU


def test_what_was_measured_is_stored(tmp_path: Path) -> None:
    config = Config(cache_dir=str(tmp_path))
    assert figures_for("cpu", config) == CPU
    found = calibrate("cpu", config)
    assert found.bandwidth > 0
    assert figures_for("cpu", config) == found
    other = Config(cache_dir=str(tmp_path / "."))  # the same folder by another name: read, not remembered
    assert figures_for("cpu", other) == found


def test_products_and_kernels_of_a_program() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ w) + 1.0

    (graph,) = memplan.analyze(function, (torch.randn(32, 16), torch.randn(16, 64)), backward=False)
    program = graph.plan.program
    works = {type(op): work_of(op, program) for op in program.operations}
    assert works[Extern].operations == 2 * 32 * 16 * 64
    assert works[Extern].unit is Unit.PRODUCT
    assert works[Extern].nbytes == 4 * (32 * 16 + 16 * 64 + 32 * 64)
    assert works[KernelOp].nbytes == 2 * 4 * 32 * 64
    assert set(step_microseconds(program, CPU)) == {op.name for op in program.operations}


def test_gradients_of_convolutions_are_counted_by_what_is_asked() -> None:
    convolution = torch.nn.Conv2d(4, 8, 3)
    graphs = memplan.analyze(convolution, (torch.randn(2, 4, 10, 10),))
    backward = graphs[1].plan.program
    (op,) = [o for o in backward.operations if isinstance(o, Extern) and "convolution" in o.target]
    # the input needs no gradient: one of the two products
    assert work_of(op, backward).operations == 2 * 2 * 8 * 8 * (8 * 4 * 3 * 3)
