"""The command line: ``memplan report``, ``peak``, ``buffers`` and the rest.

Exit codes: 0 well; 1 a gate or a budget failed; 2 wrong usage; 3 the target failed; 4 an unreadable report.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import typer

from ..ir.errors import MemplanError, OptionError, ReportError
from . import bisect_command, commands_cache, commands_gate, commands_run, commands_show, planner_commands
from .terminal import silence
from .text import clean

EXIT_GATE = 1
EXIT_USAGE = 2
EXIT_TARGET = 3
EXIT_REPORT = 4

app = typer.Typer(
    name="memplan",
    help="Where every byte of a PyTorch model's step goes, before it runs.",
    epilog="Start with: memplan report mymodel:make   (make() returns a model and example inputs)",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
commands_show.register(app)
commands_run.register(app)
commands_gate.register(app)
planner_commands.register(app)
bisect_command.register(app)
commands_cache.register(app)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"memplan {version('memplan')}")
        raise typer.Exit


@app.callback()
def _common(
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_version, is_eager=True),
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code."""
    # the profiler that measures CPU steps would write lines of its own to standard error
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="memplan")
    except MemplanError as error:
        complain(error)
        code = (
            EXIT_REPORT
            if isinstance(error, ReportError)
            else EXIT_USAGE
            if isinstance(error, OptionError)
            else EXIT_TARGET
        )
        sys.exit(code)
    except BrokenPipeError:
        silence()
    except OSError as error:  # of a file that could not be written after all: what a target raises is a TargetError
        complain(OptionError(f"cannot write: {error}"))
        sys.exit(EXIT_USAGE)
    except Exception:  # our own mistake: shown whole, and no verdict of a gate
        traceback.print_exc()
        sys.exit(EXIT_TARGET)


def complain(error: MemplanError) -> None:
    """The error's message on standard error, without control characters, in red where there are colours."""
    lines = [clean(line, 2000) for line in str(error).splitlines()]
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    label = "\x1b[31merror:\x1b[0m" if colour else "error:"
    try:
        print(label, "\n".join(lines), file=sys.stderr, flush=True)
    except BrokenPipeError:  # nobody reads it: the exit code says the rest
        silence(sys.stderr)


if __name__ == "__main__":
    main()
