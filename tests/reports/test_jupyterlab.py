"""The notebook in a real JupyterLab in a real headless Chromium: run, drawn, hovered, selected.

Only where asked for: ``MEMPLAN_JUPYTERLAB=PYTHON NODE_PATH=FOLDER``, a Python that has jupyterlab, ipykernel, anywidget
and memplan, and a folder with ``playwright-core``. Takes half a minute.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.reports.test_browser import CHROMIUM

PYTHON = os.environ.get("MEMPLAN_JUPYTERLAB")
EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="set MEMPLAN_JUPYTERLAB to a Python that has jupyterlab"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path, seconds: int = 90) -> None:
    for _ in range(2 * seconds):
        assert server.poll() is None, log.read_text()
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError(f"no JupyterLab at {url}:\n{log.read_text()}")


def test_the_view_in_jupyterlab(tmp_path: Path) -> None:
    for name in ("memory_of_a_step.ipynb", "small_transformer.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    port, log = free_port(), tmp_path / "server.log"
    command = [
        str(PYTHON), "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--IdentityProvider.token=", "--ServerApp.password=", f"--ServerApp.root_dir={tmp_path}",
    ]  # fmt: skip
    extensions = os.environ.get("MEMPLAN_LABEXTENSIONS")
    if extensions:  # of anywidget, where another environment has it
        command.append(f"--LabApp.extra_labextensions_path={extensions}")
    with log.open("wb") as output:
        server = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(f"{url}/api", server, log)
            driver = Path(__file__).with_name("jupyterlab.mjs")
            words = ["node", str(driver), url, "memory_of_a_step.ipynb", str(tmp_path / "picture.png"), str(CHROMIUM)]
            done = subprocess.run(words, capture_output=True, text=True, timeout=400)
        finally:
            server.terminate()
            server.wait(timeout=30)
    assert done.returncode == 0, done.stderr + log.read_text()
    seen = json.loads(done.stdout)
    assert seen["errors"] == []
    assert seen["label"].startswith("Chart of ")
    assert seen["colours"] > 3
    assert "small_transformer.py" in seen["tip"]
    assert "FX node" in seen["detail"]
    assert "2.00 MiB" in seen["largest"]
    assert (tmp_path / "picture.png").stat().st_size > 10_000
