"""What is stated of operations on symmetric memory, against those of the torch that is installed."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.distributed._symmetric_memory  # defines the operations

from memplan.ir.communication import MULTICAST_KINDS, SYMMETRIC_FORMS
from memplan.lowering.contracts import resolve
from memplan.runtime import peers  # noqa: F401  (defines the others)


@pytest.mark.parametrize("target", SYMMETRIC_FORMS)
def test_torch_has_the_operation_as_it_is_called(target: str) -> None:
    """The tensor in symmetric memory is its first argument or its last, and the group is named."""
    operator = resolve(target)
    assert isinstance(operator, torch._ops.OpOverload)
    form, arguments = SYMMETRIC_FORMS[target], operator._schema.arguments
    tensors = [k for k, a in enumerate(arguments) if str(a.type) == "Tensor"]
    assert "group_name" in [a.name for a in arguments if str(a.type) == "str"]
    assert form.argument == (
        None if form == SYMMETRIC_FORMS["symm_mem.multimem_all_gather_out.default"] else tensors[0]
    )
    written = [k for k, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    assert written[-1] == tensors[-1]


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("symm_mem.multimem_all_reduce_.default", ["input", "reduce_op", "group_name"]),
        ("symm_mem.multimem_one_shot_all_reduce_out.default", ["input", "reduce_op", "group_name", "out"]),
        ("symm_mem.multimem_all_gather_out.default", ["input", "group_name", "out"]),
    ],
)
def test_operations_through_multicast_take_these(target: str, names: list[str]) -> None:
    operator = resolve(target)
    assert isinstance(operator, torch._ops.OpOverload)
    assert [a.name for a in operator._schema.arguments] == names
    assert SYMMETRIC_FORMS[target].kind in MULTICAST_KINDS


def test_an_operation_that_peers_write_through_has_both_barriers() -> None:
    """Peers write the result while this rank's stream is inside of the call, and at no other time."""
    forms = [form for form in SYMMETRIC_FORMS.values() if form.argument is None]
    assert forms
    assert all(form.barrier_before and form.barrier_after for form in forms)


def test_torch_says_whether_a_device_has_multicast() -> None:
    memory = torch._C._distributed_c10d._SymmetricMemory
    assert "has_multicast_support(arg0: c10::DeviceType, arg1:" in (inspect.getdoc(memory.has_multicast_support) or "")
    assert isinstance(memory.multicast_ptr, property)
