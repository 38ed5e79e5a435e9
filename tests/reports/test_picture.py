"""The still picture: its letters, its axes, and that what it says stands where it says it."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.reports import glyphs, png
from memplan.reports.build import build_report
from memplan.reports.colours import rgb
from memplan.reports.model import Measurement, Report
from memplan.reports.picture import CURVES, HEADING, LEFT, PAGE, RIGHT, numbers, picture, tick, ticks
from memplan.reports.shown import Still
from tests.reports import plans
from tests.reports.test_renderers import HOSTILE, hostile_report, training_report

Golden = Callable[[str, str], None]
Texts = list[tuple[int, int, str]]


def pixels(data: bytes) -> png.Image:
    """The picture of a PNG whose rows are not filtered, as `png.encode` makes it."""
    width, height = struct.unpack(">II", data[16:24])
    rows = zlib.decompress(data[data.index(b"IDAT") + 4 : data.index(b"IEND") - 8])
    return np.frombuffer(rows, dtype=np.uint8).reshape(height, 1 + 3 * width)[:, 1:].reshape(height, width, 3)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Texts:
    """Every text that is drawn, with its place."""
    found: Texts = []
    draw = png.Raster.text

    def noted(self: png.Raster, x: float, y: float, text: str, *more: str, **options: object) -> float:
        found.append((round(x), round(y), text))
        return draw(self, x, y, text, *more, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(png.Raster, "text", noted)
    return found


def test_what_is_written_on_it(golden: Golden, written: Texts) -> None:
    picture(training_report())
    golden("picture.txt", "".join(f"{x:>4} {y:>4}  {text}\n" for x, y, text in written))


def test_the_colours_and_the_peak_stand_where_the_plan_has_them() -> None:
    report = training_report()
    graph, image = report.step, pixels(picture(report))
    width = (PAGE - LEFT - RIGHT) / len(graph.steps)
    middle = round(LEFT + (graph.peak_step + 0.5) * width)
    assert (image[HEADING:, middle] == rgb("#1c1c1c")).all(axis=1)[: CURVES + 300].all(), "a line through the peak"
    floor, high = HEADING + CURVES, (CURVES - 4) / 1_905_000
    for k, (live, held) in enumerate(zip(graph.live, graph.allocated, strict=True)):
        column = image[HEADING:floor, round(LEFT + (k + 0.25) * width)]
        line = np.flatnonzero((column == rgb("#0072b2")).all(axis=1))
        assert abs(HEADING + line.mean() - (floor - live * high)) <= 2, f"the live curve at step {k}"
        grey = int((column == rgb("#c8c8c8")).all(axis=1).sum())
        assert abs(grey - (held - live) * high - live * high) <= 4, f"the allocated bytes at step {k}"
    boxes = image[floor:]
    assert all((boxes == rgb(c)).all(axis=2).sum() > 100 for c in ("#d55e00", "#56b4e9", "#009e73"))


def test_measured_bytes_are_drawn_over_the_plan(written: Texts) -> None:
    timeline = (1 << 20, None, *[1 << 19] * (len(training_report().step.steps) - 2))
    measured = Measurement(device="cpu", peak_allocated=1 << 20, timeline=timeline)
    plain, seen = build_report([plans.inference()]), training_report().model_copy(update={"measured": (measured,)})
    orange = [(pixels(picture(r))[HEADING : HEADING + CURVES] == rgb("#d55e00")).all(axis=2) for r in (plain, seen)]
    assert orange[0].sum() == 0
    assert orange[1].sum() > 500
    assert "measured" in [text for _, _, text in written]


def test_two_reports_are_drawn_on_one_scale(written: Texts) -> None:
    small = build_report([plans.inference()], target="small")
    both = pixels(Still(training_report(), small)._repr_png_())
    one = pixels(picture(training_report()))
    assert both.shape == (2 * one.shape[0], PAGE, 3)
    names = [text for _, _, text in written]
    assert "before: train.py:make: peak 1.81 MiB" in names
    assert "after: small: peak 48.0 KiB" in names
    for name in ("512 KiB", "1 MiB", "1.50 MiB"):
        assert len({y for _, y, text in written if text == name and y < HEADING + CURVES}) == 1
    lower = both[one.shape[0] + HEADING : one.shape[0] + HEADING + CURVES]
    assert 0 < (lower == rgb("#0072b2")).all(axis=2).any(axis=1).sum() < 15, "48 KiB of 1.81 MiB"


def test_a_hostile_name_is_written_and_nothing_else(written: Texts) -> None:
    assert picture(hostile_report()).startswith(b"\x89PNG")
    assert any("<script>" in text for _, _, text in written)
    assert all(text.isprintable() for _, _, text in written)
    assert HOSTILE not in [text for _, _, text in written]


def test_absurd_sizes_and_many_pools_are_drawn() -> None:
    huge = [plans.Made("b", 1 << 59, plans.BufferKind.TEMPORARY, 0, 1, plans.Own(), plans.Origin())]
    assert picture(build_report([plans.make_plan("g", plans.Phase.INFERENCE, huge, 1)])).startswith(b"\x89PNG")
    for seed in range(20):
        report = build_report([plans.random_plan(seed)])
        assert pixels(picture(report)).shape[1] == PAGE, seed


def test_no_steps(written: Texts) -> None:
    picture(build_report([plans.make_plan("empty", plans.Phase.INFERENCE, [], 0)]))
    assert "no steps: nothing runs" in [text for _, _, text in written]


def test_letters(golden: Golden) -> None:
    lines = ["".join("#" if p else "." for p in row) for row in glyphs.mask("16 MiB, Fgé…")]
    golden("letters.txt", "\n".join(lines) + "\n")
    assert glyphs.mask("").shape == (glyphs.HEIGHT, 0)
    assert (glyphs.mask("é") == glyphs.mask("漢")).all(), "a box for what the font does not have"
    assert glyphs.mask("b", bold=True).sum() > glyphs.mask("b").sum()
    drawn = {glyphs.mask(chr(c)).tobytes() for c in range(0x21, 0x7F)}
    assert len(drawn) == 0x7F - 0x21, "no two characters look the same"


def test_text_is_fitted_and_clipped() -> None:
    assert glyphs.fitted("abcdef", 6 * glyphs.WIDTH) == "abcdef"
    assert glyphs.fitted("abcdef", 5 * glyphs.WIDTH) == "abcd…"
    assert glyphs.fitted("abcdef", glyphs.WIDTH) == ""
    paper = png.Raster(20, 10)
    for x, y in ((-10, 2), (15, -4), (-100, 0), (5, 9), (40, 40)):
        paper.text(x, y, "mm")
    assert 0 < (paper.image == 255).mean() < 1
    paper.across(0, 20, 5, "#ff0000", dash=3)
    red = (paper.image[5] == (255, 0, 0)).all(axis=1)
    assert "".join("-" if p else " " for p in red) == "---   ---   ---   --"


@given(st.integers(1, 1 << 62), st.integers(1, 8))
def test_ticks_are_few_and_round(highest: int, at_most: int) -> None:
    found = ticks(highest, at_most)
    assert found[0] == 0
    assert len(found) <= at_most + 1
    assert found[-1] <= highest
    assert len(found) > 1 or at_most == 1 or highest < 4, "one above nothing"
    assert len({b - a for a, b in itertools.pairwise(found)}) <= 1


def test_ticks_for_people() -> None:
    assert [tick(n) for n in ticks(64.1 * (1 << 20), 4)] == ["0", "16 MiB", "32 MiB", "48 MiB", "64 MiB"]
    assert [tick(n) for n in ticks(1.81 * (1 << 20), 4)] == ["0", "512 KiB", "1 MiB", "1.50 MiB"]
    assert [tick(n) for n in ticks(1, 4)] == ["0", "1 B"]
    assert list(numbers(117, 10)) == [0, 20, 40, 60, 80, 100]
    assert list(numbers(3, 10)) == [0, 1, 2, 3]


def test_it_is_what_a_saved_notebook_keeps(tmp_path: object) -> None:
    import base64

    from memplan.reports.shown import ShownReport

    report: Report = training_report()
    bundle, _ = ShownReport(report)._repr_mimebundle_()
    assert base64.b64decode(str(bundle["image/png"])) == picture(report)
