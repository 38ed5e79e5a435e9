"""The first pass: ATen calls become kernels, and what is left learns what it does with memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, TypeGuard

from .call_scratch import count_scratch
from .convolutions import plan_convolutions
from .ir.config import Config
from .ir.in_flight import HostCopy
from .ir.loops import Size
from .ir.program import Contract, Extern, Operation, Program
from .lowering.call_site import LOWERINGS
from .lowering.contracts import contract
from .lowering.lower import NOTHING_KEPT, Kept, lower_program
from .passes.padding import pad_rows

_PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.mm.dtype")
DEFAULTS = Config()


@dataclass(frozen=True, slots=True)
class Lowering:
    """ATen calls become kernels where there is a lowering; what is left learns its extern contract."""

    name: ClassVar[str] = "lowering"
    requires: ClassVar[tuple[str, ...]] = ()
    config: Config = DEFAULTS
    #: what stays a call though there is a lowering
    kept: Kept = NOTHING_KEPT

    @classmethod
    def configured(cls, config: Config) -> Lowering:
        return cls(config)

    def run(self, program: Program) -> Program:
        if self.config.enabled("padding") and not self.kept.devices:
            program = pad_rows(program, LOWERINGS.__contains__)
        program = with_contracts(lower_program(program, self.config, self.kept))
        if self.config.enabled("convolutions"):
            program = plan_convolutions(program, self.config)
        return count_scratch(program, self.config) if self.config.enabled("scratch") else program


def _is_undecided(op: Operation) -> TypeGuard[Extern]:
    """Whether what a call does with memory is still to be looked up."""
    if not isinstance(op, Extern) or isinstance(op, HostCopy):
        return False
    return op.contract is Contract.FRESH and not op.target.startswith("callable:")


def with_contracts(program: Program) -> Program:
    """What each remaining extern call does with memory: those that can write into planned buffers do."""
    operations: list[Operation] = []
    for op in program.operations:
        if _is_undecided(op):
            found = contract(op.target, op.device.partition(":")[0])
            if found.contract is Contract.OUT and found.out_target and _takes_out(op):
                op = replace(op, target=found.out_target, contract=Contract.OUT)
        operations.append(op)
    return program.with_operations(tuple(operations))


def _takes_out(op: Extern) -> bool:
    """Whether every result is laid out so that the call can write it: contiguous, or a matrix with padded rows."""
    for view in op.results:
        if view is None or view.offset != 0:
            return False
        stride: Size = 1
        for k, (size, given) in enumerate(zip(reversed(view.sizes), reversed(view.strides), strict=True)):
            padded_rows = (
                k == 1
                and len(view.sizes) == 2
                and op.target in _PRODUCTS
                and isinstance(given, int)
                and isinstance(stride, int)
                and given >= stride
            )
            if size != 1 and given != stride and not padded_rows:
                return False
            stride = stride * size
    return True
