"""Everything the verifier says of slabs: one rejected plan each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memplan.ir.errors import VerificationError
from memplan.ir.plan import Plan, Slab
from memplan.ir.program import Contract
from memplan.ir.verify_plan import recomputed_timeline, verify_plan
from memplan.passes.schedule import make_plan
from tests.programs import ProgramBuilder


def plan(*slabs: Slab, in_place: dict[str, str] | None = None, returns_input: bool = False) -> Plan:
    """A backward that reads the donated ``a``, then ``b``; 64 bytes each."""
    p = ProgramBuilder()
    a = p.input("a", (4, 4), donated=True)
    b = p.input("b", (4, 4), donated=True)
    theirs = p.input("theirs", (4, 4))
    y = p.extern("y", "aten.neg.default", (a,), (4, 4), contract=Contract.OUT)
    z = p.extern("z", "aten.add.Tensor", (y, theirs), (4, 4), contract=Contract.OUT)
    w = p.extern("w", "aten.add.Tensor", (z, b), (4, 4), contract=Contract.OUT)
    program = p.program(w, *((b,) if returns_input else ()))
    return make_plan(program, ("y", "z", "w"), in_place=in_place or {}, slabs=slabs)


def slab(*members: str, nbytes: int = 128, name: str = "slab") -> Slab:
    return Slab(name, nbytes, "cpu", members, tuple(64 * k for k in range(len(members))))


def rejects(plan: Plan, *words: str) -> None:
    with pytest.raises(VerificationError) as caught:
        verify_plan(plan)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"


def test_a_slab_counts_until_its_last_member_is_dropped() -> None:
    verify_plan(plan())
    verify_plan(plan(slab("a", "b")))
    assert plan().timeline == (192, 192, 192)
    assert plan(slab("a", "b")).timeline == recomputed_timeline(plan(slab("a", "b"))) == (192, 256, 256)
    verify_plan(plan(slab("a", "b"), in_place={"y": "a"}))


def test_what_is_rejected() -> None:
    rejects(plan(slab("a", "nobody")), "slab 'slab' holds 'nobody', which does not exist")
    rejects(plan(slab("a", "b"), slab("b", name="other")), "'b' is in slab 'slab' and in slab 'other'")
    rejects(plan(slab("a", "theirs")), "slab 'slab' holds 'theirs', which is no donated input")
    rejects(plan(slab("a", "y")), "slab 'slab' holds 'y', which is no donated input")
    rejects(plan(Slab("slab", 128, "cuda:0", ("a", "b"), (0, 64))), "'a' on cpu is in slab 'slab' on cuda:0")
    rejects(plan(slab("a", "b", nbytes=127)), "'b' ends at byte 128 of slab 'slab', which has 127")
    rejects(plan(Slab("slab", 128, "cpu", ("a", "b"), (0, 32))), "'a' and 'b' overlap in slab 'slab'")
    rejects(plan(Slab("slab", 128, "cpu", ("a", "b"), (0,))), "slab 'slab' has 1 offsets for 2 inputs")
    rejects(plan(slab("a", "b"), in_place={"w": "b"}), "'w' leaves the program in the storage of 'b'", "slab 'slab'")
    rejects(plan(slab("a", "b"), returns_input=True), "'b' leaves the program in the storage of 'b'")
    rejects(replace(plan(slab("a", "b")), timeline=plan().timeline), "claims 192 bytes held at step 1")


def test_making_the_reserve_free_counts_for_the_peak() -> None:
    p = ProgramBuilder()
    y = p.pointwise("y", "neg", p.input("x", (4, 4)))
    made = make_plan(p.program(y), ("y",), in_place={}, reserve={"cpu": 1000})
    assert made.predicted_peak == {"cpu": 1000}
    verify_plan(made)
    rejects(replace(made, predicted_peak={"cpu": 64}), "a peak on cpu of 64 bytes", "give 1000")
