"""Commands that decide: diff, check, fit, verify. They exit with 1 where a gate or a budget fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..ir.config import parse_bytes
from ..ir.errors import OptionError, ReportError
from . import command_options as given
from . import page, terminal
from .activations import milliseconds
from .compare import Comparison, compare, gates
from .fit import Attempt, Point, attempt, changes, curves, default_batch, largest_batch
from .model import Report, read_report, write_report
from .target import Request, factory_of, is_saved, make, report_for
from .text import clean, percent, shape, signed, size, whereabouts
from .working import planned, working

#: Largest difference of prediction and measurement that `memplan verify` accepts, in percent.
TOLERANCE = 1.0


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("diff", epilog="Example: memplan diff before.json after.json")(diff)
    app.command("check", epilog="Example: memplan check train.py:make --baseline memory.json --max-growth 2%")(check)
    app.command("fit", epilog="Example: memplan fit train.py:make --budget 16GiB --max-batch")(fit)
    app.command("verify", epilog="Example: memplan verify train.py:make")(verify)


def diff(
    before: given.Target,
    after: Annotated[str | None, typer.Argument(help="The other report or MODULE:FACTORY.", show_default=False)] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="Run and measure BEFORE with this backend: eager or inductor.")
    ] = None,
    with_option: Annotated[
        list[str] | None, typer.Option("--with", metavar="NAME=VALUE", help="Plan BEFORE again with these options.")
    ] = None,
    group_by: Annotated[given.By, typer.Option("--group-by", help="Group what is alive at the peak.")] = given.By.line,
    top: given.Top = 12,
    output: given.OutputPage = None,
    backward: given.Backward = None,
    option: given.Options = None,
) -> None:
    """What changed between two plans: the peak, the lines that hold it, and which buffers came and went."""
    if sum(x is not None for x in (after, against, with_option)) != 1:
        raise OptionError("give a second target, or --against BACKEND, or --with NAME=VALUE, one of them")
    request = given.request(backward=backward, options=option)
    if against is not None:
        if output is not None:
            raise OptionError("--against measures a peak and has no chart; -o goes with two plans")
        _against(before, against, request)
        return
    left = planned(before, request)
    if after is not None:
        right = planned(after, request)
    else:
        more = given.parse_options(with_option or ())
        right = planned(before, replace(request, options={**request.options, **more}))
    show_comparison(terminal.console(), compare(left, right, group_by.value), top)
    if output is not None:
        output.write_text(page.html(left, other=right), encoding="utf-8")
        terminal.console().print(Text(f"Both charts: {clean(str(output))}", style="dim"))


def show_comparison(out: Console, found: Comparison, top: int) -> None:
    """Print a comparison."""
    text = Text("Peak ", style="bold")
    text.append(f"{size(found.before)} -> {size(found.after)}")
    difference = found.after - found.before
    text.append(f"  {signed(difference)} ({percent(difference, found.before)})", style=_colour(difference))
    out.print(text)
    rows = [c for c in found.changes if c.difference]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("change", "before", "after"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("alive at the peak")
    for c in rows[:top]:
        table.add_row(
            Text(signed(c.difference), style=_colour(c.difference)), size(c.before), size(c.after), clean(c.key)
        )
    if len(rows) > top:
        rest = sum(c.difference for c in rows[top:])
        table.add_row(signed(rest), "", "", f"{len(rows) - top} more", style="dim")
    out.print(table if rows else Text("What is alive at the peak is the same.", style="dim"))
    out.print(Text(f"{found.same} buffers are in both, {len(found.gone)} only before, {len(found.new)} only after."))
    for title, buffers in (("only before", found.gone), ("only after", found.new)):
        for b in buffers[: min(top, 5)]:
            out.print(Text(f"  {title}: {size(b.nbytes):>9}  {whereabouts(b.origin)}  {shape(b)}  {clean(b.name)}"))


def _colour(difference: int) -> str:
    return "green" if difference < 0 else "red" if difference > 0 else ""


def _against(target: str, backend: str, request: Request) -> None:
    from .measure import BACKENDS, STAGES, measured, measured_with

    if backend not in BACKENDS:
        raise OptionError(f"--against takes {' or '.join(BACKENDS)}, not {backend!r}")
    if is_saved(target):
        raise OptionError(f"{target!r} is a saved report: only a MODULE:FACTORY can be run with another backend")
    with working(f"running with {backend}"):
        theirs = measured_with(make(target), request, backend, target)
    with working("running with memplan", parts=STAGES) as begin:
        ours = measured(make(target), request, target, begin).measured[0]
    text = Text("Measured peak ", style="bold")
    text.append(f"on {ours.device}: {backend} {size(theirs.peak_allocated)} -> memplan {size(ours.peak_allocated)}")
    difference = ours.peak_allocated - theirs.peak_allocated
    text.append(f"  {signed(difference)} ({percent(difference, theirs.peak_allocated)})", style=_colour(difference))
    terminal.console().print(text)


def check(
    target: given.Target,
    baseline: Annotated[Path | None, typer.Option("--baseline", help="A saved report to compare with.")] = None,
    max_growth: Annotated[str | None, typer.Option("--max-growth", help="2% or 10MiB; nothing if not given.")] = None,
    max_peak: Annotated[str | None, typer.Option("--max-peak", help="For example 12GiB.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Save the new report as the baseline.")] = False,
    backward: given.Backward = None,
    option: given.Options = None,
) -> None:
    """For CI: exit with 1 if the peak grew beyond the baseline, or beyond a limit."""
    if update and baseline is None:
        raise OptionError("--update needs a --baseline to write")
    if baseline is not None and not update and not baseline.exists():
        raise ReportError(f"there is no baseline {str(baseline)!r}; make one with --update")
    report = planned(target, given.request(backward=backward, options=option))
    out = terminal.console()
    if update and baseline is not None:
        write_report(report, baseline)
        out.print(f"{clean(str(baseline))}: saved, peak {size(report.step.peak)}")
        if max_peak is None:
            return
    old = read_report(baseline) if baseline is not None and not update else None
    results = gates(report, old, None if update else max_growth, max_peak)
    for gate in results:
        mark = Text("pass ", style="green") if gate.passed else Text("FAIL ", style="bold red")
        out.print(mark.append(f"{gate.title}: {gate.detail}", style="none"))
    if all(g.passed for g in results):
        return
    if old is not None:
        show_comparison(out, compare(old, report), 8)
    raise typer.Exit(1)


def fit(
    target: given.Target,
    budget: Annotated[str | None, typer.Option("--budget", help="Memory of the device, for example 16GiB.")] = None,
    curve: Annotated[bool, typer.Option("--curve", help="Peak and time of the step for all budgets.")] = False,
    batch: Annotated[int | None, typer.Option("--batch", help="Batch size, given to the factory.", min=1)] = None,
    max_batch: Annotated[bool, typer.Option("--max-batch", help="Find the largest batch size that fits.")] = False,
    backward: given.Backward = None,
    option: given.Options = None,
) -> None:
    """Does the step fit, and if not, which known change would make it fit. Nothing is run."""
    request = given.request(backward=backward, options=option, batch=batch)
    out = terminal.console()
    saved = is_saved(target)
    if curve:
        if saved:
            raise OptionError(f"{target!r} is a saved report: a curve needs a MODULE:FACTORY")
        with working("planning for all budgets"):
            found_curves = curves(make(target, batch), request)
        show_curves(out, found_curves)
        return
    if budget is None:
        raise OptionError("give --budget, for example --budget 16GiB, or --curve")
    limit = parse_bytes(budget)
    if saved and (batch is not None or max_batch):
        raise OptionError(f"{target!r} is a saved report: other batch sizes need a MODULE:FACTORY")
    if max_batch:
        with working("planning batch sizes") as begin:
            largest, found = largest_batch(lambda r: report_for(target, r), request, limit, begin)
        if found is None:
            out.print(f"Not even a batch of one fits into {size(limit)}.")
            raise typer.Exit(1)
        out.print(f"The largest batch that fits into {size(limit)} is {largest}.")
        _show_attempts(out, [found], limit)
        return
    now = attempt("as it is", planned(target, request))
    _show_attempts(out, [now], limit)
    if now.total <= limit:
        out.print(Text(f"It fits: {size(limit - now.total)} to spare.", style="green"))
        return
    out.print(Text(f"It does not fit: {size(now.total - limit)} too much.", style="bold red"))
    if not saved:
        request = replace(request, batch=batch or default_batch(factory_of(target)))

        def plan(asked: Request) -> Report:
            return report_for(target, asked)

        with working("planning within the budget") as begin:
            tried = changes(plan, request, limit, now.held, lambda text: told(out, text), begin)
        _show_attempts(out, tried, limit)
    raise typer.Exit(1)


def told(out: Console, text: str) -> None:
    """A message of several lines, each of it without control characters."""
    for part in text.splitlines():
        out.print(Text(clean(part, 2000), style="dim"))


def show_curves(out: Console, found: list[list[Point]]) -> None:
    """Peak over time, a row for each plan that is smaller or faster than all others."""
    if not found:
        out.print("Nothing of it has a backward: there is nothing to recompute, and one plan.")
    for number, points in enumerate(found):
        of = f" of graph {number}" if len(found) > 1 else ""
        out.print(Text(f"Peak and estimated time{of} for all budgets", style="bold"))
        table = Table(box=None, pad_edge=False, header_style="dim")
        offload = any(p.on_host for p in points)
        for title in ("peak of the step", "time", "of it recomputing", *(("on the host",) if offload else ())):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("")
        most = max(p.peak for p in points)
        for p in points:
            part = f"{100 * p.recomputation / p.microseconds:.1f}%" if p.microseconds else "-"
            host = (size(p.on_host),) if offload else ()
            bar = "█" * max(1, round(30 * p.peak / most))
            table.add_row(size(p.peak), milliseconds(p.microseconds), part, *host, bar)
        out.print(table)


def _show_attempts(out: Console, rows: list[Attempt], limit: int) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("how")
    for title in ("held by the caller", "peak of the step", "together", "room"):
        table.add_column(title, justify="right", no_wrap=True)
    for a in rows:
        room = Text(signed(limit - a.total), style="green" if a.total <= limit else "red")
        table.add_row(a.title, size(a.held), size(a.peak), size(a.total), room)
    out.print(table)


def verify(
    target: given.Target,
    backward: given.Backward = None,
    option: given.Options = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference in percent.", min=0)] = TOLERANCE,
) -> None:
    """Run the step with poisoned memory, then as it is, and hold measurement against plan."""
    from .answers import compare_with_eager
    from .measure import STAGES, measured

    if is_saved(target):
        raise OptionError(f"{target!r} is a saved report: verify runs a MODULE:FACTORY")
    request = given.request(False, backward, False, option)
    out = terminal.console()
    with working("running with poison"):
        found = compare_with_eager(make(target), request, target)
    mark = Text("pass ", style="green") if found.right else Text("FAIL ", style="bold red")
    detail = (
        f"poison on: results, gradients and state differ from eager by at most {found.difference:.3g} of their size"
    )
    out.print(mark.append(f"{detail} ({clean(found.where)})", style="none"))
    if found.rounding:
        names = ", ".join(map(clean, found.rounding[:4])) + (", ..." if len(found.rounding) > 4 else "")
        told(out, f"     left out: {names}: rounding alone, in eager as well")
    with working("measuring", parts=STAGES) as begin:
        report = measured(make(target), request, target, begin)
    if not _holds(out, report, tolerance) or not found.right:
        raise typer.Exit(1)


def _holds(out: Console, report: Report, tolerance: float) -> bool:
    holds = True
    for m in report.measured:
        predicted = report.predicted.get(m.device, report.step.peak)
        off = 100 * abs(predicted - m.peak_allocated) / m.peak_allocated if m.peak_allocated else 0.0
        good = off <= tolerance
        holds = holds and good
        mark = Text("pass ", style="green") if good else Text("FAIL ", style="bold red")
        detail = f"{m.device}: predicted {size(predicted)}, measured {size(m.peak_allocated)} ({off:.2f}% apart)"
        out.print(mark.append(detail, style="none"))
    return holds
