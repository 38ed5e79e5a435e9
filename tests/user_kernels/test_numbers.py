"""User kernels run as planned, in poison mode, against the same functions uncompiled: by Triton's interpreter.

What has inline assembly or TMA descriptors the interpreter does not know; tests/gpu/check_user_kernels.py runs all.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import memplan
from tests.user_kernels.pretended_gpu import pretended_gpu

NAMES = (
    "add_kernel",
    "add_kernel, sizes that change",
    "add_kernel, launched twice",
    "add_kernel_with_none_param_and_equal_to_1_arg",
    "add_kernel_autotuned_weird_param_order",
    "add_kernel_2d_autotuned",
    "mul2_inplace_kernel",
    "mul2_inplace_kernel on an input",
    "indirection_kernel, mul2",
    "double_strided_kernel",
    "atomic_add_kernel",
    "a function of another module",
    "reads what it writes",
    "a type as an argument",
    "restore_value",
    "reset_to_zero",
    "heuristics",
    "pruned configurations",
    "a function as an argument",
    "a grid of nothing",
    "pointers at odd addresses",
    "triton_op that changes its argument",
)


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    requests = []
    with pretended_gpu():
        from tests.user_kernels.cases import CASES

        cases = {c.name: c for c in CASES}
        for name in NAMES:
            torch._dynamo.reset()
            with FakeTensorMode():
                (graph,) = memplan.analyze(
                    cases[name].function, cases[name].make("cpu"), dynamic=cases[name].dynamic, backward=False
                )
            requests.append((name, graph.plan.program))
    done = subprocess.run(
        [sys.executable, "-m", "tests.user_kernels.interpreter_worker"],
        input=pickle.dumps(requests),
        capture_output=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, str] = pickle.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_as_uncompiled(answers: dict[str, str], name: str) -> None:
    assert answers[name] == "", answers[name]
