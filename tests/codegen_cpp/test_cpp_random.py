"""Random kernels, emitted and built, against the literal evaluation."""

from __future__ import annotations

import ctypes

import torch
from cpp_running import build_and_load
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_strategies import Case, cases
from reference_kernel import run_reference

from memplan.ir.canonical import canonicalize


# Not shrunk: every attempt is a build, and the message names the one kernel of the batch with its source.
@given(st.lists(cases(), min_size=8, max_size=8))
@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
def test_random_kernels(batch: list[Case]) -> None:
    check(batch)


def check(batch: list[Case]) -> None:
    """Build the kernels as one library, run each, compare every buffer with the evaluation's."""
    kernels = [(f"kernel{i}", canonicalize(case.kernel)) for i, case in enumerate(batch)]
    library, source = build_and_load(kernels)
    for (name, canonical), case in zip(kernels, batch, strict=True):
        ours, expected = case.buffers(), case.buffers()
        getattr(library, name)(*(ctypes.c_void_p(ours[b].data_ptr()) for b in canonical.buffers))
        run_reference(case.kernel, expected)
        for buffer, value in ours.items():
            tolerance = 2e-2 if value.dtype in (torch.float16, torch.bfloat16) else 1e-4
            torch.testing.assert_close(
                value, expected[buffer], rtol=tolerance, atol=tolerance, equal_nan=True,
                msg=lambda text, b=buffer, n=name, c=case: f"{b} of {n}: {text}\n{c.kernel}\n{_function(source, n)}",
            )  # fmt: skip


def _function(source: str, name: str) -> str:
    start = source.index(f'extern "C" void {name}(')
    return source[start : source.index("\n}\n", start) + 3]
