"""Plans written as JSON and read again are equal."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import nn
from torch.utils._sympy import functions
from torch.utils._sympy.numbers import int_oo

from memplan.analysis import analyze
from memplan.ir.errors import SavedModelError
from memplan.saving_encoding import decode, encode


@pytest.mark.parametrize("dynamic", [False, True])
def test_plans_come_back_equal(dynamic: bool) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 8))
    x = torch.randn(6, 16)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    graphs = analyze(model, (x,))
    assert len(graphs) == 2
    for g in graphs:
        assert decode(encode(g.plan)) == g.plan


S = sympy.Symbol("s0", integer=True, positive=True)
U, Z = sympy.Symbol("u0", integer=True), sympy.Symbol("z0", real=True)


@pytest.mark.parametrize(
    "size",
    [
        *(U >= 0, sympy.Eq(U, 3), sympy.Ne(U, S), (U > 0) & (S < 5), (U > 0) | sympy.Eq(S, 2), ~sympy.Eq(U, 1)),
        *(sympy.Float(1.0) * Z, sympy.Float(0.1, precision=53), Z + U, sympy.floor(Z), abs(U)),
        *(sympy.oo, -sympy.oo, sympy.nan, sympy.true, sympy.false, int_oo, -int_oo),
        *(functions.ToFloat(U), functions.Where(U > 0, U, S), functions.PythonMod(U, 3), functions.IntTrueDiv(U, S)),
        *(functions.TruncToInt(Z * 2.5), functions.RoundToInt(Z), functions.FloatPow(Z, 2.0)),
        *(functions.PowByNatural(U, S), functions.BitwiseFn_bitwise_and(U, S), functions.LShift(U, S)),
        sympy.Piecewise((U, U > 0), (S, True)),
    ],
    ids=str,
)
def test_sizes_known_only_when_it_runs_come_back_equal(size: sympy.Basic) -> None:
    found = decode(encode((size, U, S, Z)))
    assert isinstance(found, tuple)
    assert found == (size, U, S, Z)
    assert type(found[0]) is type(size)


def test_a_condition_stays_although_its_symbol_says_more_than_the_document() -> None:
    """Nobody evaluates it on the way, however little or much is known of its symbols."""
    size = sympy.Ge(S, 1, evaluate=False)
    assert decode(encode(size)) == size != sympy.true


def test_a_number_of_more_digits_than_a_double_has_is_refused() -> None:
    with pytest.raises(SavedModelError, match="a size with Float in it"):
        encode(sympy.Float("0.1", 40))
