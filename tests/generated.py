"""Random programs for properties: a short list of choices becomes a program of kernels and extern calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from memplan.ir.program import Contract, Program, View
from tests.programs import F32, ProgramBuilder

ROWS = 4
_KINDS = ("pointwise", "binary", "transpose", "softmax", "mm", "relu", "cast", "copy", "flip")

Choice = tuple[str, int, int]
choices: st.SearchStrategy[list[Choice]] = st.lists(
    st.tuples(st.sampled_from(_KINDS), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=10
)


def program_from(steps: Sequence[Choice], *, donated: bool = False) -> Program:
    """All values are 4 by 4; float32, but for what a ``cast`` makes (int16 and back)."""
    p = ProgramBuilder()
    values = [p.input("x", (ROWS, ROWS)), p.input("d", (ROWS, ROWS), donated=donated)]
    for k, (kind, first, second) in enumerate(steps):
        a, b = values[-1 - first % min(3, len(values))], values[-1 - second % min(3, len(values))]
        values.append(_step(p, f"t{k}", kind, a, b))
    outputs = [values[-1], values[len(values) // 2]]
    return p.program(*outputs)


def _step(p: ProgramBuilder, name: str, kind: str, a: View, b: View) -> View:
    square = (ROWS, ROWS)
    match kind:
        case "pointwise":
            return p.pointwise(name, "tanh", a)
        case "binary":
            return p.pointwise(name, "maximum", a, b)
        case "transpose":
            return p.pointwise(name, "maximum", b, View(a.buffer, F32, square, (1, ROWS)))
        case "flip":
            # one dimension read at twice the stride: overlaps with what others write
            return p.pointwise(name, "neg", View(a.buffer, F32, square, (2, 1), 1))
        case "softmax":
            return p.softmax(name, a)
        case "mm":
            return p.extern(name, "aten.mm.default", (a, b), square, contract=Contract.OUT)
        case "relu":
            return p.extern(name, "aten.relu.default", (a,), square, contract=Contract.OUT)
        case "cast":
            small = p.pointwise(f"{name}_small", "neg", a, dtype=torch.int16)
            wide = p.buffer(name, square)
            p.extern(
                name, "aten._to_copy.default", (small,), contract=Contract.FRESH, kwargs={"dtype": F32}, result=wide
            )
            return wide
        case "copy":
            return p.copy(name, a, p.buffer(name, square), fresh=True)
        case _:
            raise AssertionError(kind)
