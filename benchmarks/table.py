"""Results as markdown: a row for each model, the systems side by side, ratios and their geometric means."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

Row = Mapping[str, object]
Results = Mapping[str, Row]
GB = 1e9


def markdown(results: Results, environment: Mapping[str, str]) -> str:
    """Tables of times, memory, compile time and agreement; those of the optimiser step where it was measured."""
    rows = list(results.values())
    about = ", ".join(f"{k} {v}" for k, v in sorted(environment.items()))
    parts = [f"{about}\n"]
    parts += ["## Forward and backward, or inference\n", *_section([r for r in rows if "ms" in r])]
    second = [{**r, **cast(dict[str, object], r["optimizer"])} for r in rows if "optimizer" in r]
    if second:
        parts += ["## Gradients accumulated twice, then AdamW\n", *_section(second, compile_time=False)]
    failed = [r for r in rows if "error" in r]
    if failed:
        parts.append("## Not measured\n")
        parts += [f"- {r['model']}, {r['system']}: {' '.join(str(r['error']).split())[:300]}" for r in failed]
    return "\n".join(parts) + "\n"


def _section(rows: Sequence[Row], *, compile_time: bool = True) -> list[str]:
    if not rows:
        return ["nothing measured yet\n"]
    systems = list(dict.fromkeys(str(r["system"]) for r in rows))
    by = {(str(r["model"]), str(r["system"])): r for r in rows}
    models = list(dict.fromkeys(m for m, _ in by))
    cuda = any("reserved" in r for r in rows)
    taken = ("reserved", "reserved GB") if cuda else ("resident", "resident GB")
    out = [_table(models, systems, by, "ms", "step, ms", _milliseconds)]
    if any("cpu_ms" in r for r in rows):
        out.append(
            _table(models, systems, by, "cpu_ms", "CPU time of the fastest step, all threads, ms", _milliseconds)
        )
    out.append(_table(models, systems, by, "peak", "live peak above what was there before the step, GB", _gigabytes))
    out.append(_table(models, systems, by, taken[0], taken[1], _gigabytes))
    if any("reserved_above" in r for r in rows):
        beyond = "reserved beyond what parameters, batch and cuBLAS' workspaces hold, GB"
        out.append(_table(models, systems, by, "reserved_above", beyond, _gigabytes))
    if any("device_used" in r for r in rows):
        out.append(_table(models, systems, by, "device_used", "used on the device, all of the process, GB", _gigabytes))
    if compile_time:
        out.append(_table(models, systems, by, "compile_s", "first step with its compilation, s", _seconds))
        out.append(_agreement(rows))
    return out


def _table(
    models: Sequence[str], systems: Sequence[str], by: Mapping[tuple[str, str], Row], key: str, title: str,
    show: Callable[[float], str],
) -> str:  # fmt: skip
    """One quantity; where memplan was measured, its ratio to each of the others."""
    ours = [s for s in systems if s.startswith("memplan")]
    others = [s for s in systems if not s.startswith("memplan")]
    pairs = [(a, b) for a in ours for b in others]
    head = ["model", *systems, *(f"{_short(a)} / {b}" for a, b in pairs)]
    lines = [f"**{title}**\n", _line(head), "|---" * len(head) + "|"]
    ratios: dict[tuple[str, str], list[float]] = {p: [] for p in pairs}
    for m in models:
        cells = [m]
        cells += [show(v) if (v := _number(by, m, s, key)) is not None else "" for s in systems]
        for a, b in pairs:
            x, y = _number(by, m, a, key), _number(by, m, b, key)
            ratio = x / y if x is not None and y else None
            if ratio:
                ratios[a, b].append(ratio)
            cells.append(f"{ratio:.2f}" if ratio is not None else "")
        lines.append(_line(cells))
    if pairs and len(models) > 1:
        means = [_geometric(ratios[p]) for p in pairs]
        lines.append(_line(["geometric mean", *([""] * len(systems)), *means]))
    return "\n".join(lines) + "\n"


def _agreement(rows: Sequence[Row]) -> str:
    """Difference from eager and from a wider dtype in the norm, and the prediction against what was measured."""
    head = ["model", "system", "result", "gradients", "gradients from the reference", "eager's from it"]
    head += ["predicted GB", "measured GB", "prediction off by"]
    reserves = any("predicted_reserved" in r for r in rows)
    head += ["predicted reserved GB", "reserved beyond, GB", "off by"] if reserves else []
    lines = [
        "**agreement with eager (norm of the difference / norm), and the prediction**\n",
        "The reference is eager in a wider dtype on the same batch: where a compiler is as far from it as eager, the "
        "difference between the two is rounding. Models with dropout draw eager's random numbers for this.\n",
        _line(head),
    ]
    lines.append("|---" * len(head) + "|")
    for r in rows:
        if "result_difference" not in r:
            continue
        peak = cast(float, r["peak"])
        cells = [str(r["model"]), str(r["system"]), f"{cast(float, r['result_difference']):.1e}"]
        cells.append(f"{cast(float, r['gradient_difference']):.1e}" if "gradient_difference" in r else "")
        if r.get("finite") is False:
            cells[2] += " NOT FINITE"
        for key in ("reference_difference", "eager_reference_difference"):
            cells.append(f"{cast(float, r[key]):.1e}" if key in r else "")
        cells += _kept(r.get("predicted"), peak)
        if reserves:
            above = r.get("reserved_above")
            cells += _kept(r.get("predicted_reserved"), above) if above is not None else ["", "", ""]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _kept(predicted: object, measured: object) -> list[str]:
    """Cells of a prediction, of what was measured, and of how far they are apart."""
    assert isinstance(measured, (int, float))
    if not isinstance(predicted, (int, float)):
        return ["", _gigabytes(measured), ""]
    return [_gigabytes(predicted), _gigabytes(measured), f"{(predicted / measured - 1) * 100:+.1f} %"]


def _number(by: Mapping[tuple[str, str], Row], model: str, system: str, key: str) -> float | None:
    value = by.get((model, system), {}).get(key)
    return float(value) if isinstance(value, (int, float)) else None


def _geometric(values: Sequence[float]) -> str:
    return f"**{math.exp(sum(map(math.log, values)) / len(values)):.2f}**" if values else ""


def _short(system: str) -> str:
    return system if len(system) < 24 else system[:22] + ".."


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _milliseconds(value: float) -> str:
    return f"{value:.1f}"


def _gigabytes(value: float) -> str:
    return f"{value / GB:.2f}" if value >= 1e9 else f"{value / GB:.4f}"


def _seconds(value: float) -> str:
    return f"{value:.1f}"
