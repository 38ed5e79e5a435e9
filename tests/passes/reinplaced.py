"""The pass that avoids clones, run and checked: what its tests share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memplan.ir.program import Program, TensorInput
from memplan.ir.verify import verify_program
from memplan.passes.reinplace import Reinplace
from tests.program_runner import copy_inputs, make_inputs, run_program

I64 = torch.int64


def reinplaced(program: Program, *, inputs: Sequence[object] | None = None) -> Program:
    """The pass's result, verified and run against the program as it was: outputs and mutated inputs are equal."""
    verify_program(program)
    after = Reinplace().run(program)
    verify_program(after)
    given = list(inputs) if inputs is not None else make_inputs(program)
    first, second = copy_inputs(given), copy_inputs(given)
    expected, found = run_program(program, first), run_program(after, second)
    donated = {i.position for i in program.inputs if isinstance(i, TensorInput) and _dies(program, i)}
    kept = [[v for k, v in enumerate(values) if k not in donated] for values in (first, second)]
    for a, b in zip([*expected, *kept[0]], [*found, *kept[1]], strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(b, a, equal_nan=True)
    return after


def _dies(program: Program, item: TensorInput) -> bool:
    return program.buffers[item.view.buffer].donated


def names(program: Program) -> list[str]:
    return [op.name for op in program.operations]


def notes(program: Program) -> str:
    return "\n".join(f"{name}: {text}" for name, text in program.notes)
