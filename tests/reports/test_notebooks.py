"""The view in a real JupyterLab and in marimo, in a real headless Chromium: drawn, hovered, selected, zoomed, searched.

``make notebooks-test`` sets up what it takes and runs this file. By hand: set ``MEMPLAN_NOTEBOOKS`` to a Python that
has jupyterlab, ipykernel, marimo, anywidget and memplan (else this one is asked), ``NODE_PATH`` to a folder in which
``playwright-core`` is, and ``MEMPLAN_PICTURES`` to a folder for screenshots. Takes a minute or two.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from memplan.reports.build import build_report
from memplan.reports.model import write_report
from tests.reports import plans
from tests.reports.test_browser import CHROMIUM

PYTHON = os.environ.get("MEMPLAN_NOTEBOOKS") or sys.executable
EXAMPLES = Path(__file__).parents[2] / "examples"
MARIMO = """
import marimo
app = marimo.App()

@app.cell
def _():
    import memplan
    memplan.report("step.json", {other})
    return

if __name__ == "__main__":
    app.run()
"""


@cache
def missing(module: str) -> str:
    """What the test with a notebook of this module lacks, and how to get it; nothing if all is there."""
    if CHROMIUM is None:
        return "needs Chromium: apt install chromium, or set CHROMIUM"
    if shutil.which("node") is None:
        return "needs node"
    found = subprocess.run(
        ["node", "-e", 'require("playwright-core")'], capture_output=True, cwd=Path(__file__).parent, check=False
    )
    if found.returncode:
        return "needs playwright-core where node finds it: `make notebooks-test`, or set NODE_PATH"
    has = subprocess.run([PYTHON, "-c", f"import anywidget, memplan, {module}"], capture_output=True, check=False)
    return (
        f"{PYTHON} lacks {module}, anywidget or memplan: `make notebooks-test`, or set MEMPLAN_NOTEBOOKS"
        if has.returncode
        else ""
    )


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


@contextmanager
def serving(command: list[str], folder: Path, url: str) -> Iterator[None]:
    """A server that answers at ``url``; ended afterwards."""
    log = folder / "server.log"
    environment = os.environ | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    with log.open("wb") as output:
        server = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=environment)
        try:
            for _ in range(180):
                assert server.poll() is None, log.read_text()
                try:
                    with urlopen(url, timeout=5):
                        break
                except (URLError, ConnectionError, TimeoutError):
                    time.sleep(0.5)
            else:
                raise AssertionError(f"nothing at {url}:\n{log.read_text()}")
            yield
        finally:
            server.terminate()
            server.wait(timeout=30)


def looked_at(host: str, url: str, folder: Path) -> dict[str, object]:
    """What the driver saw of the view at ``url``, after what holds everywhere was checked."""
    pictures = Path(os.environ.get("MEMPLAN_PICTURES", folder))
    pictures.mkdir(exist_ok=True, parents=True)
    picture = pictures / f"{host}.png"
    driver = Path(__file__).with_name("notebooks.mjs")
    words = ["node", str(driver), host, url, str(picture), str(CHROMIUM)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr + (folder / "server.log").read_text()
    seen: dict[str, object] = json.loads(done.stdout)
    assert seen["errors"] == []
    assert str(seen["label"]).startswith("Chart of ")
    assert seen["whole"]["colours"] > 3  # type: ignore[index]
    assert "FX node" in str(seen["tip"])
    assert "same storage" in str(seen["detail"]) or "bytes" in str(seen["detail"])
    sums = {name: seen[name]["sum"] for name in seen if isinstance(seen[name], dict)}  # type: ignore[index]
    assert len({sums[n] for n in ("whole", "zoomed", "moved", "peak")}) == 4, f"each shows another part: {sums}"
    assert sums["cleared"] == sums["back"], "a search that is taken back leaves nothing"
    assert len({sums[n] for n in ("back", "searched", "coloured")}) == 3, sums
    assert picture.stat().st_size > 10_000
    return seen


@pytest.mark.skipif(bool(missing("jupyterlab, ipykernel")), reason=missing("jupyterlab, ipykernel"))
def test_jupyterlab(tmp_path: Path) -> None:
    for name in ("memory_of_a_step.ipynb", "small_transformer.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    port = free_port()
    command = [
        PYTHON, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--IdentityProvider.token=", "--ServerApp.password=", f"--ServerApp.root_dir={tmp_path}",
    ]  # fmt: skip
    if extensions := os.environ.get("MEMPLAN_LABEXTENSIONS"):  # of anywidget, where another environment has it
        command.append(f"--LabApp.extra_labextensions_path={extensions}")
    url = f"http://127.0.0.1:{port}"
    with serving(command, tmp_path, f"{url}/api"):
        seen = looked_at("jupyterlab", f"{url}/lab/tree/memory_of_a_step.ipynb?reset", tmp_path)
    assert "small_transformer.py" in str(seen["tip"])
    assert "2.00 MiB" in str(seen["largest"])


@pytest.mark.skipif(bool(missing("marimo")), reason=missing("marimo"))
@pytest.mark.parametrize(("other", "views"), [("None", 1), ('"step.json"', 2)], ids=["one", "side by side"])
def test_marimo(tmp_path: Path, other: str, views: int) -> None:
    forward, backward, joins = plans.training()
    write_report(build_report([forward, backward], joins=joins, target="train.py:make"), tmp_path / "step.json")
    (tmp_path / "app.py").write_text(MARIMO.format(other=other))
    port = free_port()
    command = [
        PYTHON, "-m", "marimo", "run", "app.py", "--headless", "--no-token", "--host=127.0.0.1", f"--port={port}",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with serving(command, tmp_path, url):
        seen = looked_at("marimo", url, tmp_path)
    assert seen["views"] == views
    assert "train.py" in str(seen["tip"])
    assert "1.00 MiB" in str(seen["largest"])
