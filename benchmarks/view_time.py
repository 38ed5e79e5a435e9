"""How long the view of 100,000 buffers takes in headless Chromium: its first picture, and drawing it again.

python -m benchmarks.view_time [--buffers 10000 100000] [--runs 3] [-o benchmarks/results/view_time.md]

The page of a report is opened (software rendering, 1200 by 900 pixels). The first picture is timed from the encoded
data in the page to the drawn canvas: decoding, building the view with its tables, drawing. Redraws are of the whole
step and of three parts of it (40 %, 1 %, 20 steps), the fastest of five each, since other load only adds. Of several
runs the median counts. The clock is the wall's (under Chromium's virtual time it would not be).
"""

from __future__ import annotations

import argparse
import html as markup
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memplan.reports.allocation import allocated_bytes, live_bytes
from memplan.reports.model import Buffer, Graph, Origin, Report, Step
from memplan.reports.page import html

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
#: The end of the page's own module, whose names it uses.
_SCRIPT = """
const seen = {}, again = document.createElement("main");
const view = globalThis.memplan[0];
view.root.remove(); document.body.append(again);
const start = performance.now();
const [other] = mount(again, headers, headers.map((h, k) => decode(document.getElementById("data" + k).textContent)));
seen.first = performance.now() - start;
seen.redraws = [[0, 1], [0.2, 0.6], [0.5, 0.51]].map(([a, b]) => [a * other.steps, b * other.steps])
  .concat([[other.steps / 2, other.steps / 2 + 20]]).map(([a, b]) => {
    other.x0 = a; other.x1 = b;
    for (let k = 0; k < 5; k++) other.draw();
    return Math.min(...other.timings.slice(-5));
  });
seen.count = other.count;
const out = document.createElement("pre"); out.id = "seen"; out.textContent = JSON.stringify(seen);
document.body.append(out);
</script></body>"""


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds: of the first picture, and of redraws of ever smaller parts."""

    buffers: int
    first: float
    redraws: tuple[float, ...]


def step_of(count: int) -> Report:
    """A step of ``count`` operations, as a deep network's: most buffers short-lived, some kept for the backward."""
    rng = random.Random(1)
    steps, buffers = [], []
    for k in range(count):
        life = rng.choice((1, 2, 3, 8)) if rng.random() < 0.8 else max(2, 2 * (count // 2 - k))
        nbytes = rng.choice((4096, 65536, 1 << 20, 3 << 20))
        origin = Origin(node=f"n{k}", module=f"layers.{k % 48}.mlp", file="/m.py", line=k % 50)
        steps.append(Step(name=f"op{k}", graph="g", kind="kernel", target="pointwise"))
        kind = "saved" if life > 8 else "temporary"
        buffers.append(
            Buffer(
                name=f"b{k}", nbytes=nbytes, dtype="float32", device="cuda:0", kind=kind, origin=origin, birth=k,
                death=min(count, k + life), placement="own", storage=f"b{k}",
            )
        )  # fmt: skip
    live, allocated = live_bytes(buffers, steps), allocated_bytes(buffers, (), steps)
    graph = Graph(
        name="g", phase="inference", steps=tuple(steps), buffers=tuple(buffers), live=live, allocated=allocated
    )
    return Report(graphs=(graph,))


def times(report: Report, chromium: str) -> Times:
    """One run of Chromium."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        page.write_text(html(report).replace("</script></body>", _SCRIPT, 1), encoding="utf-8")
        command = [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--window-size=1200,900",
            f"--user-data-dir={folder}/profile", "--dump-dom", page.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    match = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    if match is None:
        raise SystemExit(f"the page drew nothing:\n{done.stderr[-2000:]}")
    seen = json.loads(markup.unescape(match.group(1)))
    return Times(seen["count"], seen["first"], tuple(seen["redraws"]))


def median(runs: list[Times]) -> Times:
    """The median of each time."""
    redraws = zip(*(r.redraws for r in runs), strict=True)
    first = statistics.median_low([r.first for r in runs])
    return Times(runs[0].buffers, first, tuple(statistics.median_low(list(r)) for r in redraws))


def table(rows: list[Times], runs: int, version: str) -> Iterator[str]:
    yield "# The view in headless Chromium"
    yield ""
    yield (
        f"{version}, software rendering, {os.cpu_count()} processors, {platform.machine()}, load "
        f"{os.getloadavg()[1]:.1f}; medians of {runs} runs, milliseconds (a redraw: the fastest of five). "
        "`python -m benchmarks.view_time`"
    )
    yield ""
    yield "| buffers | first picture | redraw: whole step | 40 % of it | 1 % | 20 steps |"
    yield "|---|---|---|---|---|---|"
    for r in rows:
        yield f"| {r.buffers:,} | {r.first:.0f} | {' | '.join(f'{t:.0f}' for t in r.redraws)} |"
    yield ""
    yield (
        "The first picture is from the encoded data in the page to the drawn canvas and its tables. The aim at 100,000 "
        "is 500 for it and 150 for a redraw."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--buffers", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if CHROMIUM is None:
        raise SystemExit("needs Chromium: apt install chromium, or set CHROMIUM")
    version = subprocess.run([CHROMIUM, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    rows = []
    for count in options.buffers:
        report = step_of(count)
        rows.append(median([times(report, CHROMIUM) for _ in range(options.runs)]))
    text = "\n".join([*table(rows, options.runs, version), ""])
    print(text, end="")
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
