"""The verifier says each thing that it can say of launches of users' Triton kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memplan.ir.errors import VerificationError
from memplan.ir.program import Buffer, BufferKind, Descriptor, Fixed, Phase, Program, TensorInput, UserKernel, View
from memplan.ir.user_kernel import KernelConfig, KernelSource
from memplan.ir.verify import verify_program

GPU = "cuda:0"
X, Y = (View(n, torch.float32, (8,), (1,)) for n in ("x", "y"))
LAUNCH = UserKernel(
    "launch", KernelSource("add", (), ("x_ptr", "y_ptr", "n")), (("x_ptr", X), ("y_ptr", Y), ("n", Fixed(8))),
    ((1, 1, 1),), GPU, mutates=("y",),
)  # fmt: skip


def program(launch: UserKernel, device: str = GPU) -> Program:
    buffers = {n: Buffer(n, 32, torch.float32, GPU, BufferKind.INPUT) for n in ("x", "y", "z")}
    buffers["x"] = replace(buffers["x"], device=device)
    inputs = tuple(TensorInput(k, View(n, torch.float32, (8,), (1,))) for k, n in enumerate(buffers))
    return Program("p", Phase.INFERENCE, buffers, (launch,), inputs, (Y,))


def test_a_launch_is_right() -> None:
    verify_program(program(LAUNCH))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (program(replace(LAUNCH, kernel=replace(LAUNCH.kernel, configs=(KernelConfig(),) * 2))),
         "1 grids for 2 configurations"),
        (program(replace(LAUNCH, arguments=(*LAUNCH.arguments, ("m", Fixed(1))))), "gives 'm', which the kernel"),
        (program(replace(LAUNCH, arguments=(*LAUNCH.arguments, ("n", Fixed(8))))), "gives 'n', which the kernel"),
        (program(replace(LAUNCH, descriptors=(("n", Descriptor((8,))),))), "descriptor of 'n', which is no tensor"),
        (program(LAUNCH, device="cpu"), "runs on cuda:0, and 'x' is on cpu"),
        (program(replace(LAUNCH, mutates=("y", "z"))), "changes 'z', which it is not given"),
    ],
)  # fmt: skip
def test_each_rule_is_held(made: Program, message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        verify_program(made)
