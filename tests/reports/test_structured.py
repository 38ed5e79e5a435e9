"""The plan in torch's structured trace, as a process that writes one leaves it for tlparse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import torch
def model(x, w):
    return (x @ w).relu().sum()
torch.compile(model, backend="memplan")(torch.randn(8, 4), torch.randn(4, 4, requires_grad=True)).backward()
"""


def test_every_graph_leaves_an_artifact(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "TORCH_TRACE": str(tmp_path / "trace")}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = [line for log in (tmp_path / "trace").iterdir() for line in log.read_text().splitlines()]
    found: dict[str, str] = {}
    for k, line in enumerate(lines):
        if '"artifact"' in line and "memplan_" in line:
            name = json.loads(line[line.index("{") :])["artifact"]["name"]
            payload = []
            for text in lines[k + 1 :]:  # a payload's lines start with a tab
                if not text.startswith("\t"):
                    break
                payload.append(text)
            found[name.rstrip("0123456789")] = "\n".join(payload)
    assert set(found) == {"memplan_forward", "memplan_backward"}
    assert "Allocated, step by step" in found["memplan_forward"]
    assert "train.py:4" in found["memplan_forward"]
