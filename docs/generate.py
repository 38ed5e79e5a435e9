"""Runs the commands in ``docs/commands/*.md`` and writes what they print below them.

A block that starts with ```` ```console ```` holds one ``$ memplan ...`` line; all that follows it up to the closing
fence is replaced. ``python docs/generate.py --check`` changes nothing and fails if a page is out of date.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```console\n\$ memplan (.*)\n(?:.*\n)*?```\n")


def output(arguments: str, folder: Path) -> str:
    """What a command prints, both streams, and its exit code where it is not 0."""
    words = [f"{folder}/{w}" if w.startswith("step.") else w for w in shlex.split(arguments)]
    env = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "memplan.reports.cli", *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    text = (done.stdout + done.stderr).replace(f"{folder}/", "").replace(str(Path.home()), "~")
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    if done.returncode:
        lines.append(f"[exit code {done.returncode}]")
    return "\n".join(lines)


def regenerated(page: str, folder: Path) -> str:
    """The page with fresh output."""
    return BLOCK.sub(lambda m: f"```console\n$ memplan {m[1]}\n{output(m[1], folder)}\n```\n", page)


def main() -> int:
    check, stale = "--check" in sys.argv, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # the page of `run` comes first: it makes step.json, which the others read
        for page in sorted((ROOT / "docs/commands").glob("*.md"), key=lambda p: (p.stem != "run", p.stem)):
            old = page.read_text(encoding="utf-8")
            new = regenerated(old, folder)
            if new != old:
                stale.append(page.name)
                if not check:
                    page.write_text(new, encoding="utf-8")
    print(f"{'out of date' if check else 'written'}: {', '.join(stale) or 'none'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
