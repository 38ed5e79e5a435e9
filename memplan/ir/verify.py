"""The program verifier: what must hold after every pass.

It shares no code with a pass. Every message names the operation, the buffer or both buffers, and the user's line.
`verify_plan` (in `verify_plan.py`) does the same for plans.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import sympy

from .errors import VerificationError
from .loops import Index, Size, StoreMode
from .program import (
    EXTERNAL_KINDS,
    Argument,
    Buffer,
    BufferKind,
    Contract,
    Copy,
    Extern,
    KernelOp,
    Operation,
    Program,
    Symbolic,
    SymbolInput,
    TensorInput,
    Tuple,
    UserKernel,
    View,
    argument_views,
)
from .template import Template
from .verify_access import (
    POINTWISE_EXTERNS,
    Region,
    in_place_hazard,
    regions_disjoint,
    same_elements,
    store_region,
    view_region,
)
from .verify_communication import check_flights, check_memory
from .verify_kernel import evaluate_index, verify_kernel
from .verify_offload import check_host_copies
from .verify_template import check_template, check_workspaces

__all__ = ["ProgramVerifier", "verify_kernel", "verify_program"]


def verify_program(program: Program) -> None:
    """Check a program.

    Single assignment and declared mutation, buffers written before they are read, views and kernels in bounds, parts
    of a buffer written by several operations apart from one another, contracts of extern calls, sizes known when they
    are used, external storages written only where declared, outputs that outlive the program.

    Raises
    ------
    VerificationError
        At the first rule broken.
    """
    _ProgramCheck(program, _Accepted()).run()


class ProgramVerifier:
    """`verify_program` of a program after every pass.

    What an operation says by itself (views, kernel, contract) is checked again only where the operation or one of its
    buffers is another object than in a program that was accepted before; what it means among the others, always.
    """

    def __init__(self) -> None:
        self._accepted = _Accepted()

    def __call__(self, program: Program) -> None:
        if program.hints != self._accepted.hints:
            self._accepted = _Accepted(dict(program.hints))
        _ProgramCheck(program, self._accepted).run()


@dataclass
class _Accepted:
    """Operations found right, by identity, with the buffers they name; held, so that no identity is given twice."""

    hints: Mapping[sympy.Symbol, int] = field(default_factory=dict)
    operations: dict[int, tuple[Operation, tuple[Buffer, ...]]] = field(default_factory=dict)
    #: the values of sizes at the hints
    sizes: dict[sympy.Expr, int] = field(default_factory=dict)
    #: pairs of such operations that write separate parts of a buffer
    apart: set[tuple[int, int, str]] = field(default_factory=set)


def location(op: Operation) -> str:
    """The user's line that an operation comes from, or its FX node."""
    for origin in op.origins:
        if origin.location:
            return f"{origin.location} {origin.code}".rstrip()
    return next((o.node for o in op.origins if o.node), "")


def may_be_unwritten(b: Buffer) -> bool:
    """Zero-filled, or what the user made by ``torch.empty`` and its like, which no operation writes."""
    return b.zero_fill or "empty" in b.origin.op or "empty" in b.origin.node


def sizes_needed(op: Operation) -> set[sympy.Symbol]:
    """Symbols that must be known when the operation runs (those of ranges and values of a kernel among them)."""
    sizes: list[Size | sympy.Expr] = []
    for view in operation_views(op):
        sizes += [*view.sizes, *view.strides, view.offset]
    match op:
        case KernelOp():
            kernel = op.kernel
            sizes += [r.size for r in (*kernel.outer, *kernel.row)]
            sizes += [n.index for n in kernel.loads]
            sizes += [s.index for s in kernel.stores]
            sizes += [n.expr for n in kernel.nodes if isinstance(n, Index)]
        case Extern():
            stack: list[Argument] = [*op.args, *(a for _, a in op.kwargs)]
            while stack:
                argument = stack.pop()
                if isinstance(argument, Tuple):
                    stack.extend(argument.items)
                elif isinstance(argument, Symbolic):
                    sizes.append(argument.expr)
        case UserKernel():
            sizes += [n for grid in op.grids for n in grid]
            sizes += [a.expr for _, a in op.arguments if isinstance(a, Symbolic)]
        case Copy():
            pass
    return {s for n in sizes if not isinstance(n, int) for s in n.free_symbols}


def operation_views(op: Operation) -> Iterator[View]:
    """Views that an extern call or a copy names, results among them."""
    if isinstance(op, Copy):
        yield op.source
        yield op.target
    elif isinstance(op, Extern):
        yield from argument_views((*op.args, *(a for _, a in op.kwargs)))
        yield from (v for v in op.results if v is not None)
    elif isinstance(op, UserKernel):
        yield from op.views


class _ProgramCheck:
    def __init__(self, program: Program, accepted: _Accepted) -> None:
        self.program = program
        self.accepted = accepted
        self.hints: Mapping[sympy.Symbol, int] = program.hints
        self.written: dict[str, list[Operation]] = {}
        self.written_regions: dict[tuple[str, str], list[Region | None]] = {}
        self.mutated: dict[str, Operation] = {}
        self.defined: dict[sympy.Symbol, Operation] = {
            s: op for op in program.operations if isinstance(op, Extern) for _, s in op.symbols
        }
        self.known: set[sympy.Symbol] = set()

    def fail(self, message: str, op: Operation | None = None) -> VerificationError:
        head = f"program {self.program.name!r}" if op is None else f"operation {op.name!r}"
        return VerificationError(f"{head}: {message}", where="" if op is None else location(op))

    def run(self) -> None:
        self.check_buffers()
        self.check_inputs()
        seen: set[str] = set()
        for op in self.program.operations:
            if op.name in seen:
                raise self.fail("another operation has the same name", op)
            seen.add(op.name)
            self.check_operation(op)
        check_flights(self.program.operations, self.fail)
        check_host_copies(self.program, self.fail)
        check_workspaces(self.program, self.fail)
        self.check_outputs()

    # -- buffers ----------------------------------------------------------------------------------------------------

    def check_buffers(self) -> None:
        for key, b in self.program.buffers.items():
            if key != b.name:
                raise self.fail(f"buffer {b.name!r} is held under the name {key!r}")
            if self.size(b.nbytes, f"the size of buffer {key!r}") < 0:
                raise self.fail(f"buffer {key!r} has {b.nbytes} bytes")
            if b.alignment <= 0 or b.alignment & (b.alignment - 1):
                raise self.fail(f"buffer {key!r} has alignment {b.alignment}, which is no power of two")
            if b.donated and b.kind is not BufferKind.INPUT:
                raise self.fail(f"buffer {key!r} is donated, but it is {b.kind.value} and no input")
            if b.zero_fill and b.kind in EXTERNAL_KINDS:
                raise self.fail(f"buffer {key!r} is external ({b.kind.value}) and would be filled with zeros")

    def size(self, size: Size, what: str, op: Operation | None = None) -> int:
        if isinstance(size, int):
            return size
        found = self.accepted.sizes.get(size)
        if found is None:
            for symbol in size.free_symbols:
                if symbol not in self.hints:
                    raise self.fail(f"{what} uses the symbol {symbol}, which has no hint", op)
            found = self.accepted.sizes[size] = evaluate_index(size, self.hints)
        return found

    def check_inputs(self) -> None:
        positions: set[int] = set()
        passed: set[str] = set()
        for i in self.program.inputs:
            if i.position in positions:
                raise self.fail(f"two inputs have position {i.position}")
            positions.add(i.position)
            if isinstance(i, SymbolInput):
                if i.symbol not in self.hints:
                    raise self.fail(f"input {i.position} is the symbol {i.symbol}, which has no hint")
            elif isinstance(i, TensorInput):
                name = i.view.buffer
                if name not in self.program.buffers:
                    raise self.fail(f"input {i.position} is the buffer {name!r}, which does not exist")
                if self.program.buffers[name].kind not in EXTERNAL_KINDS:
                    kind = self.program.buffers[name].kind.value
                    raise self.fail(f"input {i.position} is the buffer {name!r}, whose kind is {kind}")
                self.check_view(i.view, f"input {i.position}")
                passed.add(name)
        for b in self.program.buffers.values():
            if b.kind in EXTERNAL_KINDS and b.name not in passed and b.name not in self.program.constants:
                raise self.fail(f"buffer {b.name!r} is external ({b.kind.value}), but neither an input nor a constant")

    def check_view(self, view: View, what: str, op: Operation | None = None) -> None:
        if view.buffer not in self.program.buffers:
            raise self.fail(f"{what} names the buffer {view.buffer!r}, which does not exist", op)
        if len(view.sizes) != len(view.strides):
            raise self.fail(f"{what} of {view.buffer!r} has {len(view.sizes)} sizes, {len(view.strides)} strides", op)
        label = f"{what} of {view.buffer!r}"
        sizes = [n if isinstance(n, int) else self.size(n, label, op) for n in view.sizes]
        strides = [n if isinstance(n, int) else self.size(n, label, op) for n in view.strides]
        first = self.size(view.offset, label, op)
        if min(sizes, default=0) < 0 or min(strides, default=0) < 0 or first < 0:
            raise self.fail(f"{label} has a negative size, stride or offset", op)
        if 0 in sizes:
            return
        last = first + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        nbytes = self.size(self.program.buffers[view.buffer].nbytes, label, op)
        if (last + 1) * view.dtype.itemsize > nbytes:
            raise self.fail(
                f"{what} reaches byte {(last + 1) * view.dtype.itemsize} of {view.buffer!r}, which has {nbytes} bytes",
                op,
            )

    # -- operations -------------------------------------------------------------------------------------------------

    def check_operation(self, op: Operation) -> None:
        self.check_symbols(op)
        for name in (*op.reads, *op.writes, *op.mutates):
            if name not in self.program.buffers:
                raise self.fail(f"it names the buffer {name!r}, which does not exist", op)
        for name in op.reads:
            self.check_read(name, op)
        if isinstance(op, Extern):
            self.check_target(op)
        if not self.is_accepted(op):
            self.check_alone(op)
        for name in op.mutates:
            self.check_mutation(name, op)
        for name in op.writes:
            self.check_write(name, op)
        for name in op.mutates:
            self.mutated[name] = op
        for name in op.writes:
            self.written.setdefault(name, []).append(op)
        if isinstance(op, Extern):
            self.known.update(s for _, s in op.symbols)

    def is_accepted(self, op: Operation) -> bool:
        found = self.accepted.operations.get(id(op))
        return found is not None and all(self.program.buffers.get(b.name) is b for b in found[1])

    def check_alone(self, op: Operation) -> None:
        """What is right or wrong of the operation whatever stands before or after it."""
        views = tuple(operation_views(op))
        for view in views:
            self.check_view(view, "a view", op)
        match op:
            case KernelOp():
                self.check_kernel(op)
            case Extern():
                self.check_extern(op)
            case Copy():
                self.check_copy(op)
            case UserKernel():
                self.check_user_kernel(op)
        names = dict.fromkeys((*op.reads, *op.writes, *op.mutates, *(v.buffer for v in views)))
        self.accepted.operations[id(op)] = op, tuple([self.program.buffers[n] for n in names])

    def check_symbols(self, op: Operation) -> None:
        """A size that a call makes known is not used before it."""
        if not self.defined:
            return
        for symbol in sizes_needed(op):
            definer = self.defined.get(symbol)
            if definer is not None and symbol not in self.known and definer is not op:
                raise self.fail(f"it uses the size {symbol}, which {definer.name!r} defines later", op)

    def check_read(self, name: str, op: Operation) -> None:
        b = self.program.buffers[name]
        if b.kind in EXTERNAL_KINDS or name in self.written or may_be_unwritten(b):
            return
        raise self.fail(f"it reads {name!r} ({b.nbytes} bytes), which nothing before it writes", op)

    def check_mutation(self, name: str, op: Operation) -> None:
        if self.program.buffers[name].kind is BufferKind.CONSTANT:
            raise self.fail(f"it changes the constant {name!r}", op)

    def check_write(self, name: str, op: Operation) -> None:
        b = self.program.buffers[name]
        if b.kind in EXTERNAL_KINDS:
            raise self.fail(f"it writes {name!r}, which is external ({b.kind.value}), without declaring it", op)
        if name in self.mutated:
            raise self.fail(f"it writes {name!r} afresh, after {self.mutated[name].name!r} changed it", op)
        for other in self.written.get(name, ()):
            self.check_parts(name, op, other)

    def check_parts(self, name: str, op: Operation, other: Operation) -> None:
        pair = (id(op), id(other), name)
        if pair in self.accepted.apart:
            return
        for o in (op, other):
            if isinstance(o, Extern) and o.contract in (Contract.FRESH, Contract.DYNAMIC):
                raise self.fail(f"{o.name!r} allocates {name!r} itself, yet another operation writes it", op)
        for p in self.regions(op, name):
            for q in self.regions(other, name):
                if p is not None and q is not None and regions_disjoint(p, q) is False:
                    raise self.fail(f"it writes {name!r}, and {other.name!r} writes some of the same elements", op)
        self.accepted.apart.add(pair)

    def regions(self, op: Operation, name: str) -> list[Region | None]:
        """What an operation of this program writes of a buffer."""
        found = self.written_regions.get((op.name, name))
        if found is None:
            found = self.written_regions[(op.name, name)] = self._regions(op, name)
        return found

    def _regions(self, op: Operation, name: str) -> list[Region | None]:
        if isinstance(op, KernelOp):
            return [store_region(op.kernel, s, self.hints) for s in op.kernel.stores if s.buffer == name]
        if isinstance(op, Copy):
            return [view_region(op.target, self.hints)]
        results = op.results if isinstance(op, Extern) else ()
        return [view_region(v, self.hints) for v in results if v is not None and v.buffer == name]

    def check_kernel(self, op: KernelOp) -> None:
        verify_kernel(op.kernel, self.program.buffers, self.hints, name=op.name, where=location(op))
        stored = set(op.kernel.written_buffers)
        for name in op.mutates:
            if name not in stored:
                raise self.fail(f"it declares that it changes {name!r}, but stores nothing there", op)
            if name in op.kernel.read_buffers:
                hazard = in_place_hazard(op.kernel, name, name)
                if hazard:
                    raise self.fail(f"it races with itself in {name!r}: {hazard}", op)
        for store in op.kernel.stores:
            b = self.program.buffers[store.buffer]
            given = store.mode in (StoreMode.SET, StoreMode.TOTAL) or store.buffer in op.mutates or b.zero_fill
            if not given:
                raise self.fail(f"its atomic {store.mode.value} goes to {store.buffer!r}, which holds no value yet", op)
        for name in (*op.reads, *op.writes):
            device = self.program.buffers[name].device
            if device != op.device:
                raise self.fail(f"it runs on {op.device}, and {name!r} is on {device}", op)

    def check_target(self, op: Extern) -> None:
        if op.target.startswith("callable:") and op.target.removeprefix("callable:") not in self.program.callables:
            raise self.fail(f"its target {op.target!r} is not among the program's callables", op)

    def check_extern(self, op: Extern) -> None:
        if isinstance(op, Template):
            check_template(op, self.program, self.fail, location(op))
        check_memory(op, self.program.buffers, self.fail)
        for name in {v.buffer for v in op.results if v is not None}:
            fresh = name not in op.mutates
            if fresh and op.contract is Contract.ALIAS and name not in op.reads:
                raise self.fail(f"its result is an alias of {name!r}, which it is not given", op)
            if fresh and op.contract is Contract.MUTATE:
                raise self.fail(f"it only changes its arguments, yet returns {name!r}", op)
        if self.size(op.scratch, "its scratch", op) < 0:
            raise self.fail(f"it takes {op.scratch} bytes of scratch", op)
        arguments = list(argument_views((*op.args, *(a for _, a in op.kwargs))))
        parts = op.target.split(".")
        pointwise = len(parts) > 1 and parts[1].rstrip("_") in POINTWISE_EXTERNS
        for name in op.mutates:
            own = [v for v in arguments if v.buffer == name]
            if op.contract is Contract.OUT:
                own = [*(v for v in op.results if v is not None and v.buffer == name), *own]
            if not own:
                raise self.fail(f"it declares that it changes {name!r}, which it is not given", op)
            for other in own[1:]:
                self.check_repeated(op, own[0], other, pointwise)

    def check_repeated(self, op: Extern | UserKernel, first: View, other: View, pointwise: bool) -> None:
        """A changed argument must not be read through another argument as well."""
        if pointwise and same_elements(first, other):
            return
        apart = regions_disjoint(view_region(first, self.hints), view_region(other, self.hints))
        if apart is not True:
            raise self.fail(f"it changes {first.buffer!r} and names it twice: it could read what it has written", op)

    def check_copy(self, op: Copy) -> None:
        sizes = [tuple(self.size(n, "a view", op) for n in v.sizes) for v in (op.source, op.target)]
        if sizes[0] != sizes[1]:
            raise self.fail(
                f"it copies {op.source.buffer!r} of shape {sizes[0]} to {op.target.buffer!r} of shape {sizes[1]}", op
            )
        for name in op.mutates:
            if name != op.target.buffer:
                raise self.fail(f"it declares that it changes {name!r}, but copies to {op.target.buffer!r}", op)
        if op.source.buffer == op.target.buffer and not same_elements(op.source, op.target):
            apart = regions_disjoint(view_region(op.source, self.hints), view_region(op.target, self.hints))
            if apart is False:
                raise self.fail(f"it copies {op.source.buffer!r} onto itself, to elements that it still reads", op)

    def check_user_kernel(self, op: UserKernel) -> None:
        if len(op.grids) != len(op.kernel.configs):
            raise self.fail(f"it has {len(op.grids)} grids for {len(op.kernel.configs)} configurations", op)
        names = [n for n, _ in op.arguments]
        known = {*op.kernel.parameters, *(n for n, _ in op.descriptors)}
        for name in names:
            if name not in known or names.count(name) > 1:
                raise self.fail(f"it gives {name!r}, which the kernel does not take (or takes once)", op)
        for name, _ in op.descriptors:
            if not isinstance(dict(op.arguments).get(name), View):
                raise self.fail(f"it makes a descriptor of {name!r}, which is no tensor", op)
        for view in op.views:
            device = self.program.buffers[view.buffer].device
            if device != op.device:
                raise self.fail(f"it runs on {op.device}, and {view.buffer!r} is on {device}", op)
        for name in op.mutates:
            own = [v for v in op.views if v.buffer == name]
            if not own:
                raise self.fail(f"it declares that it changes {name!r}, which it is not given", op)
            for other in own[1:]:
                self.check_repeated(op, own[0], other, pointwise=False)

    # -- outputs ----------------------------------------------------------------------------------------------------

    def check_outputs(self) -> None:
        for k, out in enumerate(self.program.outputs):
            if not isinstance(out, View):
                continue
            self.check_view(out, f"output {k}")
            b = self.program.buffers[out.buffer]
            if b.kind not in EXTERNAL_KINDS and b.kind not in (BufferKind.OUTPUT, BufferKind.SAVED):
                raise self.fail(f"output {k} is {b.name!r}, which is {b.kind.value}: it would not outlive the program")
            if b.kind not in EXTERNAL_KINDS and b.name not in self.written and not may_be_unwritten(b):
                raise self.fail(f"output {k} is {b.name!r}, which nothing writes")
