"""The tuning block: Python text that times kernels in their configurations, printed from the wrapper's own lines.

Kernels, model code and tuning come from one walk: a kernel is tuned as its first launch in the wrapper runs it, with
the same name, the same buffers in the same order, the same offsets and the sizes at their hinted values. The block only
chooses block sizes, warps and stages, which stand in no wrapper's text (they are in the table that a call comes with).

What it runs on is made for it: one arena of bytes, of which each kernel takes what it needs in turn; buffers that share
a storage in the plan share it here. A kernel that needs more than the plan leaves free keeps its first configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from ..ir.canonical import CanonicalKernel
from ..ir.program import KernelOp, evaluate
from .cpp_frame import identifier
from .triton_kernel import TritonKernel
from .tuning_values import index_limits
from .wrapper_lines import Launch, WrapperProgram

_ALIGNMENT = 512


@dataclass(frozen=True)
class TuningBlock:
    """Source of ``tune(bench)``; see `memplan.kernel_tuning.Bench` for what it calls.

    ``kernels``: those that it times, in order. ``nbytes``: of its arena. ``left_out``: why others are not timed.
    """

    source: str
    kernels: tuple[str, ...]
    nbytes: int
    left_out: Mapping[str, str]


def print_tuning(
    program: WrapperProgram,
    kernels: Mapping[str, CanonicalKernel],
    emitted: Mapping[str, TritonKernel],
    limit: int,
) -> TuningBlock:
    """The block for a program's kernels.

    Parameters
    ----------
    kernels, emitted:
        By the name that a launch calls them by: as data, and as text with configurations. Those with one configuration
        have nothing to choose.
    limit:
        Most bytes of its arena.
    """
    bodies: dict[str, list[str]] = {}
    largest: dict[str, int] = {}
    timed: list[str] = []
    left_out: dict[str, str] = {}
    for line in program.lines:
        if not isinstance(line, Launch) or line.kernel in timed or line.kernel in left_out:
            continue
        if line.kernel not in kernels or len(emitted[line.kernel].configs) < 2:
            continue
        printed = _Kernel(program, line, kernels[line.kernel])
        body = bodies.setdefault(line.device, [])
        if printed.limits is None:
            left_out[line.kernel] = "where it reads or writes depends on values that are not known to be in range"
        elif printed.nbytes > limit:
            left_out[line.kernel] = f"it needs {printed.nbytes} bytes, and the plan leaves {limit}"
        else:
            timed.append(line.kernel)
            largest[line.device] = max(largest.get(line.device, 0), printed.nbytes)
            body += printed.lines(len(emitted[line.kernel].configs))
            continue
        body += ["", f"# {line.kernel} keeps its first configuration: {left_out[line.kernel]}"]
    text = [x for d, body in bodies.items() for x in (f'bench.reserve("{d}", {largest.get(d, 0)})', *body, "")]
    source = "def tune(bench):\n" + "".join(f"    {x}".rstrip() + "\n" for x in text[:-1] or ["pass"])
    return TuningBlock(source, tuple(timed), max(largest.values(), default=0), left_out)


class _Kernel:
    """One kernel at its first launch: its storages and their places in the arena."""

    def __init__(self, program: WrapperProgram, line: Launch, kernel: CanonicalKernel) -> None:
        self.program, self.line = program, line
        plan = program.plan
        hints = plan.program.hints
        self.limits = index_limits(kernel.kernel, hints)
        op = plan.program.by_name[line.operation]
        assert isinstance(op, KernelOp)
        storage = [plan.storage_of(b) for b in line.buffers]
        self.storages = list(dict.fromkeys(storage))
        self.sizes = dict.fromkeys(self.storages, 0)
        self.below: dict[str, int] = {}
        for k, (name, at) in enumerate(zip(line.buffers, storage, strict=True)):
            self.sizes[at] = max(self.sizes[at], evaluate(plan.program.buffers[name].nbytes, hints))
            if self.limits and f"b{k}" in self.limits:
                self.below[at] = min(self.below.get(at, 1 << 62), self.limits[f"b{k}"])
        read, written = ({plan.storage_of(b) for b in names} for names in (op.reads, (*op.writes, *op.mutates)))
        self.restored = [s for s in self.storages if s in read and s in written]
        self.arguments = storage
        self.symbols: dict[sympy.Symbol, int] = {s: hints[s] for s in line.symbols}
        self.nbytes = sum(map(self._room, (*self.storages, *self.restored)))

    def _room(self, storage: str) -> int:
        return -(-self.sizes[storage] // _ALIGNMENT) * _ALIGNMENT

    def lines(self, configurations: int) -> list[str]:
        origins = self.program.plan.program.by_name[self.line.operation].origins
        where = next((o.location for o in origins if o.location), self.line.operation)
        out = ["", f"# {self.line.kernel}: {configurations} configurations, first launched at {where}"]
        offset = 0
        names = {s: identifier(s) for s in self.storages}
        for storage in self.storages:
            dtype = str(self.program.plan.program.buffers[storage].dtype).removeprefix("torch.")
            below = f", below={self.below[storage]}" if storage in self.below else ""
            out.append(f'{names[storage]} = bench.buffer({offset}, {self.sizes[storage]}, "{dtype}"{below})')
            offset += self._room(storage)
        for storage in self.restored:
            out.append(f'{names[storage]}_before = bench.buffer({offset}, {self.sizes[storage]}, "uint8")')
            offset += self._room(storage)
        arguments = "".join(f"{names[s]}, " for s in self.arguments)
        more = f", offsets={self.line.offsets}" if any(self.line.offsets) else ""
        if self.symbols:
            more += f", sizes={ {s.name: v for s, v in self.symbols.items()} }"
        if self.restored:
            more += f", restored=({''.join(f'({names[s]}, {names[s]}_before), ' for s in self.restored)})"
        out.append(f'bench.choose("{self.line.kernel}", ({arguments}){more})')
        return out
