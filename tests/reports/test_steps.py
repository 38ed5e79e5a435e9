"""The whole step: what was compiled again, its waterfall from eager on, and its measured timeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import memplan
from memplan.ir.eager import EagerMemory
from memplan.ir.errors import ReportError
from memplan.ir.program import Phase
from memplan.recording import CompiledGraph, Recording, Region
from memplan.reports.build import compilations
from memplan.reports.cells import cropped
from memplan.reports.measure import measured
from memplan.reports.model import Report, dump_report, parse_report
from memplan.reports.payload import payload
from memplan.reports.shown import report
from memplan.reports.step_waterfall import eager_peak
from memplan.reports.target import Made, Request, report_from
from memplan.reports.terminal import rendered, summary
from tests.reports import plans


class Broken(torch.nn.Module):
    """Two graphs: Dynamo breaks between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(16, 64), torch.nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.nn.functional.gelu(self.a(x))
        torch._dynamo.graph_break()
        return self.b(h)


@pytest.fixture(scope="module")
def run() -> Report:
    """A training step with a graph break, and run again with other sizes."""
    torch.compiler.reset()
    step = torch.compile(Broken(), backend="memplan")
    with memplan.record() as recording:
        for n in (32, 48):
            step(torch.randn(n, 16)).sum().backward()
    return report_from(recording.graphs)


@pytest.fixture(scope="module")
def seen() -> Report:
    model = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.GELU(), torch.nn.Linear(256, 8))
    return measured(Made(model, (torch.randn(64, 32),), {}), Request(fake=False), "model", warm_up=1)


def test_a_step_runs_one_compilation_of_each_frame(run: Report) -> None:
    assert len(run.graphs) == 8
    inside = list(dict.fromkeys(s.graph for s in run.step.steps))
    assert len(inside) == 4
    forwards = [g for g in run.graphs if g.phase == "forward"]
    assert inside[:2] == [g.name for g in forwards[2:]], "the larger batch needs more"
    assert run.step.peak < sum(g.peak for g in run.graphs)
    assert rendered(summary(run)).count("(another compilation)") == 4


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x))


class Layered(torch.nn.Module):
    """Layers of one class, each a graph of its own: Dynamo compiles the second and uses it for the third and fourth."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x)
        return x


def test_a_graph_that_runs_more_than_once_counts_as_often() -> None:
    made = Made(Layered(), (torch.randn(512, 64, requires_grad=True),), {})
    found = measured(made, Request(fake=False), "layers", warm_up=1)
    phases = [g.phase for g in found.graphs]
    assert phases.count("forward") < 4, "layers share a graph"
    ran = list(dict.fromkeys(s.graph for s in found.step.steps))
    assert len(ran) == 8, "four forwards and four backwards"
    (m,) = found.measured
    assert m.peak_allocated >= 4 * 512 * 64 * 4, "each layer keeps its result"
    assert m.peak_allocated <= found.step.peak <= 1.35 * m.peak_allocated
    assert sum(v is not None for v in m.timeline) > 0.9 * len(m.timeline), "every run of a graph is measured apart"
    first = [k for k, s in enumerate(found.step.steps) if s.graph == ran[0]]
    last = [k for k, s in enumerate(found.step.steps) if s.graph == ran[3]]
    assert max(m.timeline[k] or 0 for k in last) > max(m.timeline[k] or 0 for k in first)
    assert " times)" in rendered(summary(found))
    assert sum(a.nbytes for a in found.activations if a.fate == "saved") >= 4 * 512 * 64 * 4
    planned = report_from(memplan.analyze(made.model, made.args))
    assert len(dict.fromkeys(s.graph for s in planned.step.steps)) == 8, "the same without running it"


def test_what_runs_again_without_being_compiled_is_recorded_again() -> None:
    """A cell of a notebook that is run a second time compiles nothing: Dynamo knows the code."""

    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (x @ w).sin().sum()

    def cell() -> Report:
        step = torch.compile(f, backend="memplan")
        with memplan.record() as recording:
            step(torch.ones(16, 8), torch.ones(8, 8, requires_grad=True)).backward()
        return report_from(recording.graphs)

    first, second = cell(), cell()
    assert [g.phase for g in second.graphs] == ["forward", "backward"]
    assert second.step == first.step
    with memplan.record() as nothing:
        pass
    assert nothing.graphs == []


def test_calls_are_parted_into_steps() -> None:
    def steps(calls: str, **how: bool) -> list[str]:
        """``F`` and ``B`` with the number of their region; regions of each step that differs."""
        recording = Recording(**how)
        plan = plans.inference()
        groups = sorted({int(n) for n in calls[1::2]})
        for group in groups:
            recording.add(CompiledGraph(plan, group), Region())
        phases = {"F": Phase.FORWARD, "B": Phase.BACKWARD, "I": Phase.INFERENCE}
        for phase, group in zip(calls[::2], calls[1::2], strict=True):
            recording.called(int(group), phases[phase])
        rows: dict[int, dict[int, int]] = {}
        for g in recording.graphs:
            for number, place in g.runs:
                rows.setdefault(number, {})[place] = g.group
        return ["".join(str(row[k]) for k in sorted(row)) for _, row in sorted(rows.items())]

    assert steps("F0B0F0B0") == ["0"], "two steps that are alike"
    assert steps("F0F1F1B1B1B0") == ["011"], "layers of one class"
    assert steps("F0B0F1B1") == ["0", "1"], "two sizes, one after the other"
    assert steps("F0F0F0") == ["0"], "without a backward these may be three steps"
    assert steps("F0F0F0", one_step=True) == ["000"]
    assert steps("I0I1I0I1F2B2") == ["012"]
    assert steps("") == []


def test_compilations_side_by_side() -> None:
    assert compilations([None, None]) == [(0, 1)]
    assert compilations([(0, 0), (1, 0), (0, 1), (1, 1)]) == [(0, 1), (2, 3)]
    assert compilations([(0, 0), (1, 0), (0, 1)]) == [(0, 1), (1, 2)], "one frame held for both sizes"


def test_the_waterfall_goes_from_eager_to_the_plan(run: Report, seen: Report) -> None:
    for found in (run, seen):
        names = [s.name for s in found.waterfall]
        assert names[:2] == ["eager", "partition"]
        assert found.waterfall[-1].peak == found.step.peak
        assert "unattributed" not in names


def test_eager_is_what_eager_needs() -> None:
    from memplan.reports.measure import measured_with

    model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.GELU(), torch.nn.Linear(512, 512), torch.nn.Tanh())
    made = Made(model, (torch.randn(128, 64),), {})
    torch.compiler.reset()
    graphs = memplan.analyze(made.model, made.args)
    simulated = report_from(graphs).waterfall[0]
    real = measured_with(made, Request(fake=False), "eager", "model", warm_up=1)
    assert simulated.name == "eager"
    assert abs(simulated.peak - real.peak_allocated) < 0.15 * real.peak_allocated


@given(st.lists(st.tuples(*[st.integers(0, 1000)] * 4), max_size=4))
def test_regions_in_eager_are_nested(numbers: list[tuple[int, int, int, int]]) -> None:
    regions = [EagerMemory(a + between, between, between + b, after) for a, between, b, after in numbers]
    series, held = [0], 0
    for k, r in enumerate(regions):
        series.append(sum(e.between for e in regions[:k]) + r.forward)
    for k in reversed(range(len(regions))):
        held = sum(e.between for e in regions[:k]) + sum(e.after for e in regions[k + 1 :])
        series.append(held + regions[k].backward)
    assert eager_peak(regions) == max(series)


def test_every_step_is_measured(seen: Report) -> None:
    (found,) = seen.measured
    assert len(found.timeline) == len(seen.step.steps)
    for planned, value in zip(seen.step.allocated, found.timeline, strict=True):
        assert value is not None
        assert abs(value - planned) <= 4096, "a loss of one number and its gradient are not the plan's"
    text = rendered(summary(seen))
    assert "Measured on cpu, step by step" in text
    assert "farthest from its plan" in text
    header = payload(seen, seen.step).header
    assert header["columns"]["measured"][2] == len(found.timeline)  # type: ignore[index]


def test_a_measured_timeline_is_saved_and_checked(seen: Report) -> None:
    text = dump_report(seen)
    assert parse_report(text) == seen
    (found,) = seen.measured
    wrong = seen.model_copy(update={"measured": (found.model_copy(update={"timeline": (1, None)}),)})
    with pytest.raises(ReportError, match="2 steps"):
        parse_report(dump_report(wrong))


def test_the_page_draws_both_timelines(seen: Report, tmp_path: Path) -> None:
    from tests.reports import test_browser

    if test_browser.CHROMIUM is None:
        pytest.skip("needs Chromium")
    found = test_browser.seen(
        seen,
        """const at0 = view.canvas.getContext("2d").getImageData(0, 0, view.canvas.width, 128 * view.ratio).data;
        let orange = 0;
        for (let k = 0; k < at0.length; k += 4) if (at0[k] > 180 && at0[k + 1] < 140 && at0[k + 2] < 60) orange += 1;
        seen.orange = orange; seen.legend = view.legend.textContent;
        at("pointermove", 400, 40); seen.tip = view.tip.innerText;""",
        tmp_path,
    )
    assert int(str(found["orange"])) > 50
    assert "measured step by step" in str(found["legend"])
    assert ", measured " in str(found["tip"])


def test_a_narrow_place_keeps_its_line() -> None:
    assert cropped("a/very/long/path/train.py:123", 12) == "…rain.py:123"
    long = "/home/ann/" + "x" * 60 + "/train.py:123"
    plan = report(memplan.analyze(torch.nn.Linear(4, 4), (torch.ones(2, 4),))).report
    graph = plan.step
    origin = graph.buffers[-1].origin.model_copy(update={"file": long.removesuffix(":123"), "line": 123, "code": "y"})
    moved = graph.model_copy(update={"buffers": tuple(b.model_copy(update={"origin": origin}) for b in graph.buffers)})
    for width in (60, 80, 120):
        text = rendered(summary(Report(graphs=(moved,))), width=width)
        assert "train.py:123" in text
