"""Runs the commands on the pages in ``docs/`` and writes what they print below them.

A block that starts with ```` ```console ```` holds one line ``$ command``; all that follows it up to the closing fence
is replaced by what the command prints, both streams, and its exit code where that is not 0. Commands run by bash in a
folder of their own, with the examples and the samples in it: what one writes, the commands after it read. ``memplan``
and ``python`` are those of this checkout, the cache is an empty one.

``python docs/generate.py`` writes all pages, ``python docs/generate.py commands/pack.md`` one (after running the page
that makes ``step.json``); ``--check`` changes nothing and fails if a page is out of date. Outputs tell how long things
took, what that made on disk and the versions of a machine: numbers of seconds are not compared.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
BLOCK = re.compile(r"```console\n\$ (.*)\n((?:(?!```).*\n)*)```\n")
#: The page whose commands make what the others read.
FIRST = DOCS / "commands" / "run.md"
SECONDS = re.compile(r"\b\d+(?:\.\d+)? ?(m?s\b)|(?<=\"seconds\": )\d+\.\d+()")
IGNORED = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "cpp")


@dataclass(frozen=True, slots=True)
class Place:
    """A folder in which commands run, and the environment that they have."""

    folder: Path
    environment: dict[str, str]

    @classmethod
    def made(cls, folder: Path) -> Place:
        """With the examples and samples, and commands named ``memplan`` and ``python``."""
        work, commands = folder / "work", folder / "bin"
        for source in ("examples", "docs/samples"):
            shutil.copytree(ROOT / source, work / source, ignore=IGNORED)
        commands.mkdir()
        for name, what in (("memplan", f"{sys.executable} -m memplan.reports.cli"), ("python", sys.executable)):
            script = commands / name
            script.write_text(f'#!/bin/sh\nexec {what} "$@"\n', encoding="utf-8")
            script.chmod(0o755)
        environment = {
            **os.environ,
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "MEMPLAN_CACHE_DIR": str(work / "cache"),
            "COLUMNS": "100",
            "NO_COLOR": "1",
            "OMP_NUM_THREADS": "1",
        }
        return cls(work, environment)

    def output(self, command: str) -> str:
        """What a command prints, and its exit code where it is not 0."""
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command], cwd=self.folder, env=self.environment, text=True, timeout=600,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        text = done.stdout.replace(f"{self.folder}/", "").replace(str(Path.home()), "~")
        lines = [line.rstrip() for line in text.strip("\n").splitlines()]
        if done.returncode:
            lines.append(f"[exit code {done.returncode}]")
        return "\n".join([*lines, ""]).lstrip("\n")

    def regenerated(self, page: str) -> str:
        """The page with fresh output."""
        return BLOCK.sub(lambda m: f"```console\n$ {m[1]}\n{self.output(m[1])}```\n", page)


def pages() -> list[Path]:
    """All pages; the one that makes what the others read comes first."""
    return sorted(DOCS.rglob("*.md"), key=lambda p: (p != FIRST, p))


def shown_commands(page: str) -> Iterator[str]:
    """The commands whose output a page shows."""
    for found in BLOCK.finditer(page):
        yield found[1]


def same(a: str, b: str) -> bool:
    """Whether two pages say the same, apart from how long something took."""
    return SECONDS.sub(r"\1\2", a) == SECONDS.sub(r"\1\2", b)


def main() -> int:
    check = "--check" in sys.argv
    asked = [DOCS / name for name in sys.argv[1:] if not name.startswith("-")]
    stale = []
    with tempfile.TemporaryDirectory() as name:
        place = Place.made(Path(name))
        for page in pages():
            if asked and page not in (*asked, FIRST):
                continue
            old = page.read_text(encoding="utf-8")
            new = place.regenerated(old)
            if not same(old, new) and (not asked or page in asked):
                stale.append(str(page.relative_to(DOCS)))
                if not check:
                    page.write_text(new, encoding="utf-8")
    print(f"{'out of date' if check else 'written'}: {', '.join(stale) or 'none'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
