"""``memplan bisect SCRIPT``: the pass that a wrong answer comes from, found by halving."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from . import terminal
from .target import TargetError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(
        "bisect",
        epilog="Example: memplan bisect check.py   (check.py exits with an error where the answer is wrong)",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    )(bisect)


@dataclass(frozen=True)
class Found:
    """What halving came to.

    ``culprit`` is the pass from which on the script fails, the passes before it enabled and those after it disabled;
    None where it fails with none enabled. ``runs``: how often the script ran.
    """

    culprit: str | None
    before: tuple[str, ...]
    runs: int
    #: whether the script also passes with this pass alone disabled
    alone: bool = False


def halve(passes: Sequence[str], fails: Callable[[frozenset[str]], bool]) -> Found | None:
    """The first pass whose being enabled makes the script fail; None if it does not fail with all of them.

    Parameters
    ----------
    passes:
        In the order in which they run.
    fails:
        Whether the script fails with these passes disabled.
    """
    if not fails(frozenset()):
        return None
    if fails(frozenset(passes)):
        return Found(None, (), 2)
    good, bad, runs = 0, len(passes), 2  # with the first `good` enabled it passes, with the first `bad` it fails
    while bad - good > 1:
        middle = (good + bad) // 2
        runs += 1
        if fails(frozenset(passes[middle:])):
            bad = middle
        else:
            good = middle
    culprit = passes[bad - 1]
    return Found(culprit, tuple(passes[: bad - 1]), runs + 1, not fails(frozenset({culprit})))


def bisect(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="Fails where the answer is wrong; what follows it is passed on.")],
    timeout: Annotated[float, typer.Option(help="Seconds that one run may take; longer is a failure.")] = 900.0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the runs print.")] = False,
) -> None:
    """Find the pass from which on a script fails, by running it with ever fewer passes."""
    from ..compilation import PASS_NAMES

    if not script.is_file():
        raise TargetError(f"there is no script {str(script)!r}")
    already = tuple(n for n in os.environ.get("MEMPLAN_DISABLE", "").replace(" ", ",").split(",") if n)
    passes = tuple(p for p in PASS_NAMES if p not in already)

    def fails(disabled: frozenset[str]) -> bool:
        failed = run_failed(script, context.args, (*already, *sorted(disabled)), timeout, verbose=verbose)
        terminal.write(f"  {'fails ' if failed else 'passes'}  with {enabled(passes, disabled)}\n")
        return failed

    found = halve(passes, fails)
    if found is None:
        terminal.write(f"{script} does not fail with all passes enabled.\n")
        return
    if found.culprit is None:
        raise TargetError(
            f"{script} fails with every pass disabled too: the fault lies in capture, a kernel or the script itself"
        )
    terminal.write(f"\nIt fails from pass {found.culprit} on ({found.runs} runs).\n")
    if found.alone:
        terminal.write(f'Without it alone it passes: options={{"disable": ["{found.culprit}"]}}\n')
    else:
        terminal.write("It also fails without this pass alone: another one has the same fault.\n")
    raise typer.Exit(1)


def enabled(passes: Sequence[str], disabled: frozenset[str]) -> str:
    """Which of the passes are on, in few words."""
    left = [p for p in passes if p not in disabled]
    if not left:
        return "no pass at all"
    if len(left) == len(passes):
        return f"all {len(passes)} passes"
    if left == list(passes[: len(left)]):
        return f"the first {len(left)} of {len(passes)} passes, up to {left[-1]}"
    return f"all but {', '.join(p for p in passes if p in disabled)}"


def run_failed(
    script: Path, arguments: Sequence[str], disabled: Sequence[str], timeout: float, *, verbose: bool
) -> bool:
    """Run the script in a process of its own; whether it ended with another code than 0, or not in time."""
    environment = {**os.environ, "MEMPLAN_DISABLE": ",".join(disabled)}
    output = None if verbose else subprocess.DEVNULL
    try:
        done = subprocess.run(
            [sys.executable, str(script), *arguments], env=environment, stdout=output, stderr=output, timeout=timeout,
            check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0
