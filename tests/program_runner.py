"""Runs a whole `Program` on CPU tensors, slowly and plainly: what passes are checked against.

Kernels run by the reference evaluator, extern calls by torch, copies by `copy_`. Every buffer is a storage of its
own, filled with a poison pattern when it is made, so that reading what nobody wrote shows. There is no plan here, no
reuse and no freeing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import sympy
import torch

from memplan.ir.program import (
    Argument,
    BufferKind,
    Contract,
    Copy,
    Extern,
    KernelOp,
    Literal,
    OpaqueInput,
    Operation,
    Program,
    ProgramOutput,
    Symbolic,
    SymbolInput,
    TensorInput,
    Tuple,
    UserKernel,
    View,
    evaluate,
)
from tests.reference_kernel import run_reference

Value = torch.Tensor | int | float | bool | None | str
Symbols = dict[sympy.Symbol, int]  # floats too, where a program reads a tensor's element


def run_program(program: Program, inputs: Sequence[object]) -> list[object]:
    """The program's outputs for positional ``inputs`` (tensors, and integers for symbolic sizes).

    Inputs that the program mutates are changed. Outputs are views of the runner's buffers.
    """
    return ProgramRunner(program, inputs).run()


class ProgramRunner:
    """One run. ``buffers`` maps each buffer's name to a flat tensor over its whole storage, in its dtype."""

    def __init__(self, program: Program, inputs: Sequence[object]) -> None:
        self.program = program
        self.symbols: Symbols = dict(program.hints)
        self.buffers: dict[str, torch.Tensor] = {}
        for item in program.inputs:
            value = inputs[item.position]
            match item:
                case SymbolInput():
                    assert isinstance(value, int)
                    self.symbols[item.symbol] = value
                case TensorInput():
                    assert isinstance(value, torch.Tensor)
                    first = value.storage_offset() * value.element_size() // item.view.dtype.itemsize
                    self._bind(item.view.buffer, value, first - evaluate(item.view.offset, self.symbols))
                case OpaqueInput():
                    pass
        for name, tensor in program.constants.items():
            if name in program.buffers:
                self._bind(name, tensor)

    def _bind(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """The buffer is the tensor's storage from element ``start`` on."""
        dtype = self.program.buffers[name].dtype
        storage = tensor.detach().untyped_storage()
        count = storage.nbytes() // dtype.itemsize - start
        self.buffers[name] = torch.empty(0, dtype=dtype).set_(storage, start, (count,), (1,))

    def run(self) -> list[object]:
        for op in self.program.operations:
            self.step(op)
        return [self.output(o) for o in self.program.outputs]

    def step(self, op: Operation) -> None:
        """Run one operation."""
        match op:
            case KernelOp():
                for name in (*op.kernel.written_buffers, *op.kernel.read_buffers):
                    self.storage(name)
                run_reference(op.kernel, self.buffers, self.symbols)
            case Copy():
                self.view(op.target).copy_(self.view(op.source))
            case Extern():
                self.call(op)
            case UserKernel():
                raise AssertionError(f"{op.name} needs Triton's interpreter, see tests/user_kernels")

    def storage(self, name: str) -> torch.Tensor:
        """The flat tensor of a buffer, made (poisoned) on first use."""
        if name not in self.buffers:
            buffer = self.program.buffers[name]
            nbytes = evaluate(buffer.nbytes, self.symbols)
            assert buffer.kind not in (BufferKind.INPUT, BufferKind.PARAMETER), f"{name} is not bound"
            count = -(-nbytes // buffer.dtype.itemsize)
            fill = torch.zeros if buffer.zero_fill else poisoned
            self.buffers[name] = fill(count, dtype=buffer.dtype)
        return self.buffers[name]

    def view(self, view: View) -> torch.Tensor:
        flat = self.storage(view.buffer)
        if flat.dtype != view.dtype:
            flat = flat.view(view.dtype)
        sizes = [evaluate(s, self.symbols) for s in view.sizes]
        strides = [evaluate(s, self.symbols) for s in view.strides]
        return flat.as_strided(sizes, strides, flat.storage_offset() + evaluate(view.offset, self.symbols))

    def argument(self, argument: Argument) -> object:
        match argument:
            case View():
                return self.view(argument)
            case Literal():
                return argument.value
            case Symbolic():
                return self.number(argument.expr)
            case Tuple():
                return [self.argument(a) for a in argument.items]

    def number(self, expr: sympy.Basic) -> int | float | bool:
        """The value of an expression of sizes, of numbers read from tensors, or of a comparison of these."""
        value = expr.xreplace({s: sympy.sympify(self.symbols[s]) for s in expr.free_symbols if s in self.symbols})
        assert not value.free_symbols, f"nothing gives {value.free_symbols} a value"
        if value in (sympy.true, sympy.false):
            return bool(value)
        return int(value) if value.is_Integer else float(value)

    def call(self, op: Extern) -> None:
        args = [self.argument(a) for a in op.args]
        kwargs = {name: self.argument(a) for name, a in op.kwargs}
        if op.contract is Contract.OUT and "out" in op.target.rpartition(".")[2]:
            outs = [self.view(v) for v in op.results if v is not None]
            names = ["out"] if len(outs) == 1 else [f"out{k}" for k in range(len(outs))]
            self.resolve(op.target)(*args, **kwargs, **dict(zip(names, outs, strict=True)))
            return
        result = self.resolve(op.target)(*args, **kwargs)
        flat = list(result) if isinstance(result, (tuple, list)) else [result]
        for accessor, symbol in op.symbols:
            self.symbols[symbol] = read_accessor(accessor, flat)
        if op.contract in (Contract.ALIAS, Contract.MUTATE):
            return
        for view, value in zip(op.results, flat, strict=False):
            if view is not None:
                assert isinstance(value, torch.Tensor), f"{op.name} gave {value!r} for {view}"
                self.view(view).copy_(value)

    def resolve(self, target: str) -> object:
        """The function that an extern's target names."""
        if target.startswith("callable:"):
            return self.program.callables[target.removeprefix("callable:")]
        found: object = torch.ops
        for part in target.split("."):
            found = getattr(found, part)
        return found

    def output(self, output: ProgramOutput) -> object:
        match output:
            case View():
                return self.view(output)
            case Symbolic():
                return self.number(output.expr)
            case Literal():
                return output.value


def read_accessor(accessor: str, results: Sequence[object]) -> int | float:
    """``[0].size(1)``, ``[0].size()[1]``, ``[0].stride(0)``, ``[0].item()//4`` or ``[0]`` of flat results."""
    match = re.fullmatch(r"\[(\d+)\](?:\.(\w+)\((\d*)\))?(?:\[(\d+)\])?(?://(\d+))?", accessor)
    assert match is not None, f"accessor {accessor!r}"
    value = results[int(match[1])]
    if match[2]:
        value = getattr(value, match[2])(*([int(match[3])] if match[3] else []))
    elif isinstance(value, torch.Tensor):
        value = value.item()
    if match[4]:
        value = value[int(match[4])]  # type: ignore[index]
    assert isinstance(value, (int, float))
    return value // int(match[5]) if match[5] else value


def poisoned(count: int, *, dtype: torch.dtype) -> torch.Tensor:
    """NaN for floats, a large odd pattern for integers, True for booleans."""
    out = torch.empty(count, dtype=dtype)
    if dtype.is_floating_point or dtype.is_complex:
        return out.fill_(float("nan"))
    return out.fill_(True if dtype is torch.bool else torch.iinfo(dtype).max // 3)


def make_inputs(program: Program, *, seed: int = 0, symbols: Mapping[sympy.Symbol, int] | None = None) -> list[object]:
    """Random inputs for a program: normal floats, small non-negative integers, booleans.

    Tensors that share a buffer share their storage, as the caller's would.
    """
    generator = torch.Generator().manual_seed(seed)
    values: Symbols = {**program.hints, **(symbols or {})}
    made: dict[str, torch.Tensor] = {}
    out: list[object] = [None] * (1 + max((i.position for i in program.inputs), default=-1))
    for item in program.inputs:
        if isinstance(item, SymbolInput):
            out[item.position] = values[item.symbol]
        elif isinstance(item, TensorInput):
            buffer = program.buffers[item.view.buffer]
            if buffer.name not in made:
                count = evaluate(buffer.nbytes, values) // buffer.dtype.itemsize
                made[buffer.name] = random_values(count, buffer.dtype, generator)
            sizes = [evaluate(s, values) for s in item.view.sizes]
            strides = [evaluate(s, values) for s in item.view.strides]
            flat = made[buffer.name]
            flat = flat if flat.dtype == item.view.dtype else flat.view(item.view.dtype)
            out[item.position] = flat.as_strided(sizes, strides, evaluate(item.view.offset, values))
    return out


def random_values(count: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.randint(0, 2, (count,), generator=generator).bool()
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(count, generator=generator).to(dtype)
    return torch.randint(0, 4, (count,), generator=generator).to(dtype)


def copy_inputs(inputs: Sequence[object]) -> list[object]:
    """The inputs again, on storages of their own; tensors that shared a storage share the copy."""
    copies: dict[int, torch.UntypedStorage] = {}
    out: list[object] = []
    for value in inputs:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            clone = copies.setdefault(storage.data_ptr(), storage.clone())
            value = torch.empty(0, dtype=value.dtype).set_(clone, value.storage_offset(), value.size(), value.stride())
        out.append(value)
    return out
