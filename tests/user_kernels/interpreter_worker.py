"""Runs planned programs with user kernels through Triton's interpreter, and the same functions uncompiled.

A process of its own: the interpreter has to be on before Triton is imported, and with it on Dynamo captures nothing. So
the programs come from the caller, as pickled data: what runs here was built from the data alone.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton.language as tl
import triton.runtime.jit
from triton.runtime.autotuner import Autotuner

import memplan.user_kernels
from memplan.compilation import compile_program
from memplan.ir.config import Config
from memplan.ir.program import Program, TensorInput, UserKernel
from memplan.runtime.user_kernel_launch import Grid, UserLauncher
from memplan.user_kernels import with_chosen_configs
from tests.user_kernels.pretended_gpu import pretended_gpu

#: times of the configurations when they are timed: the second one of all is the fastest
_TIMES = iter([1.0, 0.5] * 10_000)


class InterpretedLauncher(UserLauncher):
    """The launcher, its kernels interpreted and its clock a pretended one."""

    def prepare(self, hints: object) -> None:
        self.timer = lambda: _time
        for scope in self.built.scopes.values():
            scope["tl"] = tl  # the interpreter wants it in every function, used or not

    def start(self, number: int, stream: int, grid: Grid, values: object) -> None:
        if 0 in grid:
            return
        arguments = list(self.configs[number].arguments)
        for slot, value in zip(self.slots, values, strict=True):  # type: ignore[call-overload]
            arguments[slot] = value
        self.built.entry[grid](*arguments)  # type: ignore[index]


def _time(run) -> float:  # type: ignore[no-untyped-def]
    run()
    return next(_TIMES)


def _first_config(self, *args: object, grid: object, **kwargs: object) -> None:  # type: ignore[no-untyped-def]
    """Triton's autotuner without a clock."""
    named = dict(zip(self.arg_names, args, strict=False))
    config = self.prune_configs(kwargs)[0] if (setattr(self, "nargs", named) or True) else None
    for name in self.reset_to_zero:
        named[name].zero_()
    self.fn.run(*args, grid=grid, **kwargs, **config.kwargs)


def _unquoted(normalize):  # type: ignore[no-untyped-def]
    """The interpreter quotes annotations that are text already ("tl.constexpr") once more."""
    return lambda ty: normalize(ty.strip("'\"") if isinstance(ty, str) else ty)


def check(name: str, program: Program) -> str:
    """Empty, or how the compiled program differs from the function; also with one configuration chosen beforehand."""
    wrong = check_program(name, program)
    several = [op for op in program.operations if isinstance(op, UserKernel) and len(op.kernel.configs) > 1]
    if wrong or not several:
        return wrong
    chosen = with_chosen_configs(program)
    for old, new in zip(program.operations, chosen.operations, strict=True):
        if old in several:
            assert isinstance(old, UserKernel)
            assert isinstance(new, UserKernel)
            if not (len(new.kernel.configs) == len(new.grids) == 1 and new.kernel.configs[0] in old.kernel.configs):
                return f"{new.kernel.configs} are chosen of {old.kernel.configs}"
    return check_program(name, chosen)


def check_program(name: str, program: Program) -> str:
    """Empty, or how the compiled program differs from the function."""
    from tests.user_kernels.cases import CASES

    case = next(c for c in CASES if c.name == name)
    torch.manual_seed(0)
    arguments = case.make("cpu")
    mine = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    expected = case.function(*arguments)
    inputs: list[object] = []
    rest = iter(mine)
    for i in sorted(program.inputs, key=lambda i: i.position):
        # torch passes the one size that there is once for each tensor
        inputs.append(next(rest) if isinstance(i, TensorInput) else next(iter(program.hints.values())))
    found = compile_program(program, Config(poison=True)).call(inputs)
    assert isinstance(found, tuple)
    wanted = expected if isinstance(expected, tuple) else (expected,)
    returned = [f for f in found if isinstance(f, torch.Tensor)]
    for k, (a, b) in enumerate(zip((*returned[-len(wanted) :], *mine), (*wanted, *arguments), strict=True)):
        if not torch.equal(a, b):
            return f"result {k}: {(a.double() - b.double()).abs().max()}"
    return ""


def main() -> None:
    Autotuner.run = _first_config
    triton.runtime.jit._normalize_ty = _unquoted(triton.runtime.jit._normalize_ty)
    memplan.user_kernels.UserLauncher = InterpretedLauncher  # type: ignore[misc]
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    answers = {}
    with pretended_gpu():
        for name, program in pickle.load(source):
            try:
                answers[name] = check(name, program)
            except Exception:
                answers[name] = traceback.format_exc()
    sink.write(pickle.dumps(answers))


if __name__ == "__main__":
    main()
