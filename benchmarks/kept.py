"""What a training step keeps for its backward, and what stands at its peak, without a GPU.

    python -m benchmarks.kept [model ...] [--figures H100] [--option name=value ...]

The models and the tracing are those of `benchmarks.simulate_reserved`; the choice is made with the stated device's
figures. One table a model: bytes of the saved values by operator, dtype and shape, and of what is alive at the peak by
the kind of buffer, with the largest of them.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from unittest import mock

import memplan.backend
from memplan.ir.device import DEFAULTS
from memplan.passes.step_peak import alive_at, step_peak
from memplan.reports.command_options import parse_options

from .simulate_reserved import MODELS, plans_of


def report(model: str, figures: str, options: dict[str, object], rows: int) -> str:
    with mock.patch.object(memplan.backend, "figures_for", return_value=DEFAULTS[figures]):
        plans, joins = plans_of(model, options)
    peak = step_peak(plans, joins)
    peaks = " and ".join(f"{max(p.timeline) / 1e9:.3f} GB" for p in plans)
    lines = [
        "",
        f"{model}: the plans' own peaks {peaks}",
        "",
        f"## {model}: live peak {peak.nbytes / 1e9:.3f} GB, in the {plans[peak.plan].program.phase.value}",
        "",
    ]
    lines += ["| GB | buffers | saved for the backward |", "|---|---|---|"]
    forward = plans[0].program
    nbytes: Counter[str] = Counter()
    count: Counter[str] = Counter()
    roots = {plans[0].storage_of(b) for b in joins.values() if b in plans[0].placements}
    for root in roots:
        buffer = forward.buffers[root]
        if buffer.kind.value in ("input", "parameter", "constant"):
            continue
        what = f"{buffer.origin.op} {str(buffer.dtype).removeprefix('torch.')}, {buffer.origin.code}"
        nbytes[what] += forward.nbytes(root)
        count[what] += 1
    lines += [f"| {n / 1e9:.3f} | {count[w]} | {w} |" for w, n in nbytes.most_common(rows)]
    lines += [f"| {sum(nbytes.values()) / 1e9:.3f} | {sum(count.values())} | all |", ""]
    lines += ["| GB | buffers | alive at the peak |", "|---|---|---|"]
    alive: Counter[str] = Counter()
    number: Counter[str] = Counter()
    for size, buffer in alive_at(plans, joins, peak):
        what = f"{buffer.kind.value} {str(buffer.dtype).removeprefix('torch.')} {buffer.origin.op}"
        alive[what] += size
        number[what] += 1
    lines += [f"| {n / 1e9:.3f} | {number[w]} | {w} |" for w, n in alive.most_common(rows)]
    lines += ["", "| MB | largest alive at the peak | code |", "|---|---|---|"]
    for size, buffer in alive_at(plans, joins, peak)[:rows]:
        lines.append(f"| {size / 1e6:.1f} | {buffer.name} {buffer.dtype} {buffer.origin.op} | {buffer.origin.code} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[m for m in MODELS if not m.endswith("-inference")])
    parser.add_argument("--figures", default="H100", choices=list(DEFAULTS))
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--rows", type=int, default=16)
    given = parser.parse_args(arguments)
    for model in given.models:
        print(report(model, given.figures, dict(parse_options(given.option)), given.rows), flush=True)


if __name__ == "__main__":
    main()
