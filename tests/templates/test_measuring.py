"""What a measurement of templates holds: no more than the plan needs, and every contender in the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from memplan import template_tuning
from memplan.ir.config import Config
from memplan.ir.early_launch import EarlyLaunch
from memplan.ir.program import Program
from memplan.ir.template import Method, Product, ProductConfig
from memplan.passes.templates import Candidate, candidates, least_peak
from memplan.passes.templates import peak as program_order_peak
from memplan.template_tuning import Measured, contenders, held_bytes, measured_choices, reused
from tests.templates.test_pass import Shapes, all_in, analyzed, attention_scores, gelu_mlp, two_heads

H100 = 132
Usable = Sequence[tuple[ProductConfig, object]]


def tall(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x @ w * 0.125) @ v


def narrow(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (x @ w) > 0


MODELS: list[tuple[Callable[..., object], Shapes]] = [
    (gelu_mlp, [(640, 640), (640, 640), (640,), (640, 640)]),
    (two_heads, [(480, 320), (320, 800)]),
    (attention_scores, [(96, 512, 64), (96, 512, 64)]),
    (tall, [(4096, 64), (64, 4096), (4096, 64)]),
]


@pytest.mark.parametrize(("model", "shapes"), MODELS, ids=lambda m: getattr(m, "__name__", ""))
def test_what_a_program_needs_at_least_is_no_more_than_its_plan(model: Callable[..., object], shapes: Shapes) -> None:
    """The limit of a measurement is this and an allowance; program order may hold far more than the plan does."""
    program = analyzed(model, shapes)
    found = candidates(program)
    least = least_peak(found, program)
    assert 0 < least <= program_order_peak(program)
    for config in (None, ProductConfig(64, 64, 32)):
        planned = program if config is None else all_in(config).run(program)
        assert least <= planned_peak(planned)


def planned_peak(program: Program) -> int:
    from memplan.compilation import plan_program

    plan = plan_program(program, Config(disable=("templates",), plan_only=True)).plan
    return max(plan.timeline)


def test_the_kernel_after_a_product_is_timed_in_its_place_where_the_plan_has_it_there() -> None:
    program = analyzed(attention_scores, [(96, 512, 64), (96, 512, 64)])
    (found,) = candidates(program)
    result = found.call.results[0]
    assert result is not None
    assert found.kernel is not None
    assert reused(found, program) == {found.kernel.kernel.written_buffers[0]: result.buffer}
    assert held_bytes(found, program) == (96 * 512 * 64 * 2 + 96 * 512 * 512) * 2

    kept = analyzed(two_heads, [(480, 320), (320, 800)])  # the product is a result of its own
    (found,) = candidates(kept)
    assert found.kernel is not None
    assert reused(found, kept) == {}
    assert held_bytes(found, kept) == (480 * 320 + 320 * 800 + 2 * 480 * 800) * 2

    smaller = analyzed(narrow, [(480, 320), (320, 800)])
    (found,) = candidates(smaller)
    assert found.kernel is not None
    assert reused(found, smaller) == {}  # a truth value is no half


def on_cpu(candidate: Candidate) -> Candidate:
    return replace(candidate, call=replace(candidate.call, device="cpu"), kernel=None)


def test_contenders_share_their_workspaces_and_have_counters_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_tuning, "_stream", lambda: 7)
    program = analyzed(lambda x, w: x @ w, [(64, 512), (512, 64)])
    (found,) = candidates(program)
    held = template_tuning._Held(on_cpu(found), program)
    configs = [ProductConfig(32, 32, 32, Method.SPLIT, parts=p) for p in (2, 8, 4)]
    seen: list[tuple[int, ...]] = []
    runs = [held.template(c, lambda stream, *arguments: seen.append(arguments)) for c in configs]
    for run in runs:
        run()
    partials, counters = ([s[k] for s in seen] for k in (-2, -1))
    assert len(set(partials)) == 1
    assert len(set(counters)) == 3
    largest = max(w.count for c in configs for w in replace(found.product, config=c).workspaces() if not w.zero_fill)
    assert [t.nbytes for t in held.scratch.values()] == [largest]
    assert sum(t.nbytes for t in held.tensors.values()) == held_bytes(found, program)


def limited(monkeypatch: pytest.MonkeyPatch, program: Program, limit: int) -> Measured:
    """The measurement of the only product of a program on a GPU that only counts what it is asked for."""
    timed: list[Usable] = []

    def measure(candidate: Candidate, program: Program, usable: Usable, early: EarlyLaunch) -> Measured:
        timed.append(usable)
        return Measured(None, 1.0, 2.0, skipped=f"{len(usable)} would be timed")

    properties = SimpleNamespace(multi_processor_count=H100)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(template_tuning, "measure", measure)
    monkeypatch.setattr(template_tuning.Target, "current", staticmethod(template_tuning.Target))

    def pretended(builds: Sequence[template_tuning.Build], target: object) -> list[template_tuning.Compiled]:
        return [template_tuning.Compiled(b, SimpleNamespace(name=b.name), b"", 0, 0) for b in builds]

    monkeypatch.setattr(template_tuning, "compile_builds", pretended)
    (found,) = candidates(program)
    (measured,) = template_tuning.measure_all({found.key: found}, program, limit).values()
    for usable in timed:
        for config, _ in usable:
            spaces = sum(w.count for w in replace(found.key, config=config).workspaces())
            assert held_bytes(found, program) + spaces <= limit
    return measured


def test_workspaces_count_among_the_bytes_of_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    program = analyzed(lambda x, w: F.relu(x @ w), [(640, 640), (640, 640)])
    (found,) = candidates(program)
    needed = held_bytes(found, program)
    everything = len(contenders(found.key, H100))
    plain = sum(c.method is Method.TILE for c in contenders(found.key, H100))
    assert limited(monkeypatch, program, needed + (64 << 20)).skipped == f"{everything} would be timed"
    assert limited(monkeypatch, program, needed).skipped == f"{plain} would be timed"
    assert 0 < plain < everything


def test_what_one_program_has_no_room_for_is_measured_in_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = analyzed(lambda x, w: F.relu(x @ w), [(640, 640), (640, 640)])
    (found,) = candidates(program)
    small = limited(monkeypatch, program, held_bytes(found, program) - 1)
    assert "bytes to time it" in small.skipped
    assert not small.kept

    answers = [small, Measured(ProductConfig(64, 64, 64), 2.0, 1.0)]
    asked: list[Product] = []

    def measured(missing: Mapping[Product, Candidate], program: Program, early: EarlyLaunch) -> dict[Product, Measured]:
        asked.extend(missing)
        return {key: answers.pop(0) for key in missing}

    monkeypatch.setattr(template_tuning, "_without_modes", measured)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU at all")
    config = Config(cache_dir=tmp_path)
    assert measured_choices([found], program, config) == {}
    for _ in range(2):
        assert measured_choices([found], program, config) == {found.key: ProductConfig(64, 64, 64)}
    assert asked == [found.key] * 2
