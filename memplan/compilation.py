"""One program from capture to a callable: lowering, passes, planning, emission, build."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import sympy

from .codegen.python_wrapper import print_python
from .codegen.wrapper_lines import wrapper_lines
from .ir.config import Config
from .ir.plan import Plan
from .ir.program import KernelOp, Program
from .passes.schedule import make_plan
from .runtime.python_runtime import namespace

log = logging.getLogger(__name__)
KernelArguments = tuple[str, tuple[str, ...], tuple[sympy.Symbol, ...]]


@dataclass(frozen=True)
class CompiledProgram:
    """A program ready to run: ``call`` takes one boxed list of arguments and returns a tuple."""

    plan: Plan
    call: Callable[..., object]
    source: str
    waterfall: tuple[tuple[str, int], ...] = ()


def plan_program(program: Program, config: Config) -> Plan:
    """All passes and the planner; nothing is built."""
    order = [op.name for op in program.operations]
    return make_plan(program, order, in_place={})


def compile_program(program: Program, config: Config) -> CompiledProgram:
    """Plan, print, build and load."""
    plan = plan_program(program, config)
    kernels, arguments = build_kernels(plan.program, config)
    lines = wrapper_lines(plan, arguments)
    wrapper = print_python(lines, poison=config.poison)
    if config.dump:
        folder = Path(config.dump)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{program.name}.py").write_text(wrapper.source)
    names = namespace(wrapper.operators, plan.program.callables, plan.program.constants, kernels)
    code = compile(wrapper.source, f"<memplan {program.name}>", "exec")
    exec(code, names)
    call = names["call"]
    call._boxed_call = True  # type: ignore[attr-defined]
    return CompiledProgram(plan, call, wrapper.source)  # type: ignore[arg-type]


def build_kernels(
    program: Program, config: Config
) -> tuple[Mapping[str, Callable[..., object]], Mapping[str, KernelArguments]]:
    """Callables by source name, and for each kernel operation its source and arguments."""
    found = [op for op in program.operations if isinstance(op, KernelOp)]
    if not found:
        return {}, {}
    raise NotImplementedError
_ = os
