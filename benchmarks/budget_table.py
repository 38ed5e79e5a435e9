"""What `benchmarks.budget` found, as a table for each model and what follows from it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

HEAD = (
    "| system | budget MB | predicted live MB | live MB | off | predicted reserved MB | reserved MB "
    "| held / budget | next plan MB | ms | / Inductor | gradients' bits | first step s |"
)
#: Peaks nearer to one another than this part are not distinct.
DISTINCT = 0.002


@dataclass(frozen=True)
class Row:
    """A job, and what came of it: ``error``, or bytes and milliseconds."""

    model: str
    job: Mapping[str, object]
    said: Mapping[str, object]

    def number(self, name: str) -> float | None:
        found = self.said.get(name)
        return float(found) if isinstance(found, (int, float)) else None

    @property
    def measured(self) -> bool:
        return "ms" in self.said

    @property
    def budget(self) -> float:
        """memplan's in bytes, Inductor's as a share; infinite without one."""
        found = self.job.get("budget")
        return float(found) if isinstance(found, (int, float)) else float("inf")

    @property
    def system(self) -> str:
        return str(self.job["system"])

    @property
    def live(self) -> float:
        return self.number("peak") or 0.0

    @property
    def reserved(self) -> float | None:
        """What the caching allocator holds beyond what it held for parameters and batch; None on a CPU."""
        return self.number("reserved_above")

    @property
    def held(self) -> float:
        """What is held to the budget: reserved bytes on a GPU, else those alive."""
        return self.live if self.reserved is None else max(self.live, self.reserved)

    @property
    def off(self) -> float | None:
        """How far the prediction of live bytes is off, as a part of what was measured."""
        predicted = self.number("predicted")
        return predicted / self.live - 1 if predicted is not None and self.live else None

    @property
    def above(self) -> tuple[float, int] | None:
        """Bytes of the next plan above the budget, and plans between that were not made."""
        found = self.said.get("above")
        return (float(found[0]), int(found[1])) if isinstance(found, (list, tuple)) else None

    def __str__(self) -> str:
        given = self.job.get("budget")
        what = f"{self.system} {_mb(given) if self.system == 'memplan' else given or ''}".strip()
        if self.measured:
            said = self.said.get("predicted_reserved")
            held = f"{self.held / 1e6:.1f} held" + ("" if said is None else f" ({_mb(said)} predicted)")
            return f"{what}: {self.live / 1e6:.1f} MB live, {held}, {self.number('ms'):.2f} ms"
        return f"{what}: {dict(self.said)}"


def table(rows: Sequence[Row], environment: Mapping[str, str]) -> str:
    """Markdown, one section a model."""
    lines = [", ".join(f"{k} {v}" for k, v in sorted(environment.items()))]
    for model in sorted({r.model for r in rows}):
        mine = [r for r in rows if r.model == model]
        lines += ["", f"## {model}", ""]
        limits = next((r.said for r in mine if r.system == "bounds"), {})
        if "least" in limits:
            lines += [
                f"Budgets from {_mb(limits['least'])} MB, the least that a plan needs, to what the fastest one needs, "
                f"{_mb(limits['most'])} MB.", "",
            ]  # fmt: skip
        free = {r.system: r for r in mine if r.job.get("budget") is None}
        base = free["inductor"].number("ms") if "inductor" in free else None
        plain = free["memplan"].said.get("gradients") if "memplan" in free else None
        lines += [HEAD, "|---" * (HEAD.count("|") - 1) + "|"]
        ordered = sorted((r for r in mine if r.system != "bounds"), key=lambda r: (r.system, -r.budget))
        lines += [_line(r, base, plain) for r in ordered]
        lines += ["", *(f"- {said}" for said in verdicts(mine))]
    return "\n".join(lines) + "\n"


def _line(r: Row, base: float | None, plain: object) -> str:
    given = r.job.get("budget")
    name = f"inductor, {given}" if r.system == "inductor" and given is not None else r.system
    cells = [name, _mb(given) if r.system == "memplan" else ""]
    if not r.measured:
        why = str(r.said.get("error", "")).strip().splitlines() or ["not reached"]
        return f"| {' | '.join(cells)} | {why[0][:200]} |" + " |" * 10
    ms = r.number("ms")
    assert ms is not None
    above = r.above
    bits = ""
    if r.system == "memplan" and plain is not None:
        bits = "the default's" if r.said.get("gradients") == plain else "others"
    cells += [
        _mb(r.said.get("predicted")), _mb(r.live), "" if r.off is None else f"{100 * r.off:+.2f} %",
        _mb(r.said.get("predicted_reserved")), _mb(r.reserved),
        f"{r.held / r.budget:.3f}" if cells[1] else "",
        "" if above is None else _mb(above[0]) + (f", {above[1]} between" if above[1] else ""),
        f"{ms:.2f}", "" if base is None else f"{ms / base:.3f}", bits, f"{r.number('first_step_s'):.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What the rows say of: within the budget, monotone, predicted, distinct, used, and as fast as Inductor."""
    own = sorted((r for r in rows if r.system == "memplan" and r.measured), key=lambda r: r.budget)
    given = [r for r in own if r.budget != float("inf")]
    if not given:
        return ["no budget was measured"]
    over = [r for r in given if r.held > r.budget]
    falls = [b for a, b in itertools.pairwise(given) if b.held < a.held * (1 - 1e-3)]
    found = [
        f"{len(given)} budgets measured; over their budget: {_named(over)}",
        f"a larger budget with a smaller peak: {_named(falls)}",
        f"predictions of live bytes off by at most {100 * max(abs(r.off or 0.0) for r in own):.2f} %",
        f"distinct peaks: {_distinct([r.held for r in given])}",
    ]
    unused = [r for r in given if r.held < 0.95 * r.budget]
    shown = [r for r in unused if r.above is None or r.above[1] == 0]
    found.append(
        f"at least 95 % used: {len(given) - len(unused)}; less, though no plan between it and the budget: "
        f"{len(shown)}; others: {_named([r for r in unused if r not in shown])}"
    )
    for peer in sorted((r for r in rows if r.system == "inductor" and r.measured), key=lambda r: -r.budget):
        share = "default" if peer.budget == float("inf") else f"{peer.budget:g}"
        parts = []
        for what, size in (("live", lambda r: r.live), ("held", lambda r: r.held)):
            times = [r.number("ms") or 0.0 for r in own if size(r) <= size(peer)]
            parts.append(f"{what} {_mb(size(peer))} MB: {min(times) / (peer.number('ms') or 1):.3f}" if times else
                         f"{what} {_mb(size(peer))} MB: memplan has no plan so small")  # fmt: skip
        found.append(f"memplan's time / Inductor's ({share}) with no more memory: {', '.join(parts)}")
    return found


def _distinct(peaks: Sequence[float]) -> int:
    count, last = 0, 0.0
    for peak in sorted(peaks):
        if peak > last * (1 + DISTINCT):
            count, last = count + 1, peak
    return count


def _named(rows: Sequence[Row]) -> str:
    return ", ".join(f"{_mb(r.budget)} MB" for r in rows) or "none"


def _mb(value: object) -> str:
    return f"{value / 1e6:.1f}" if isinstance(value, (int, float)) else ""
