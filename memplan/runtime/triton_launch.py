"""Launching a built Triton kernel with as little Python as possible.

A launch goes straight to the driver (`cuda_launch`), or through the compiled handle's own launcher where there is no
C++ compiler: no argument is inspected, pointers are integers, the grid is a number that was worked out before.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Protocol

import sympy
import torch

from memplan.ir.errors import CompilerError, MemplanError
from memplan.ir.index import FloorDiv
from memplan.ir.loops import Size

from .cuda_launch import native_launch
from .triton_build import Compiled

_INT32_LIMIT = 2**31 - 1


class IndexLimitError(MemplanError):
    """The sizes of a launch are more than the kernel can count; build it to count in 64 bits."""


class GridKernel(Protocol):
    """What launching needs to know of an emitted kernel."""

    @property
    def arguments(self) -> tuple[tuple[str, str], ...]: ...
    @property
    def symbols(self) -> tuple[sympy.Symbol, ...]: ...
    @property
    def axes(self) -> tuple[tuple[Size, str], ...]: ...
    @property
    def index_limit(self) -> tuple[sympy.Expr, ...]: ...


class Launcher:
    """``launcher(stream, *arguments)``: pointers as integers, then the values of the size symbols.

    Parameters
    ----------
    compiled:
        The build; it is loaded onto the current device at the first call, or by `load`.
    grid:
        The number of program instances, or a function of the integer arguments after the pointers; where that gives
        zero nothing is launched.
    pointers:
        How many of the arguments are pointers.
    blocks:
        What `row` says a grid is computed from: a block size for each of the grid's axes.
    device:
        Index of the GPU that it runs on; None for the one that is current when it is loaded.

    Raises
    ------
    MemplanError
        If the kernel needs global scratch, which nobody would give it.
    """

    __slots__ = ("_blocks", "_device", "_fixed", "_grid_of", "_loaded", "_pointers", "_start", "compiled")

    def __init__(
        self,
        compiled: Compiled,
        grid: int | Callable[..., int],
        pointers: int,
        *,
        blocks: tuple[int, ...] = (),
        device: int | None = None,
    ) -> None:
        if compiled.scratch_bytes:
            raise MemplanError(
                f"{compiled.build.name} needs {compiled.scratch_bytes} bytes of global scratch an instance"
            )
        self.compiled = compiled
        self._pointers = pointers
        self._fixed = grid if isinstance(grid, int) else 0
        self._grid_of = None if isinstance(grid, int) else grid
        self._start: Callable[..., None] | None = None
        self._loaded: tuple[int, int] | None = None  # function, context
        self._blocks = blocks
        self._device = device

    def load(self) -> None:
        """Load the cubin onto its GPU; the first call does it otherwise.

        Raises
        ------
        RuntimeError
            If the driver refuses it, with the driver's own text.
        """
        native = native_launch()
        if native is None:
            self._start = self._through_triton()
            return
        function, context = self.function()
        threads, shared, early = self.threads, self.compiled.shared_bytes, self.early
        if self._grid_of is None:
            self._start = native.bind(function, context, self._fixed, threads, shared, early)
        else:
            launch, grid_of, pointers = native.launch, self._grid_of, self._pointers

            def start(stream: int, *arguments: int) -> None:
                launch(function, context, grid_of(*arguments[pointers:]), threads, shared, early, stream, *arguments)

            self._start = start

    @property
    def index(self) -> int:
        """Index of the GPU that it runs on."""
        return self._device or 0

    @property
    def threads(self) -> int:
        """Threads of one program instance."""
        return 32 * self.compiled.build.num_warps

    @property
    def early(self) -> bool:
        """Whether it is started before the kernel in front of it has ended: it waits itself, and the driver can."""
        native = native_launch()
        return self.compiled.early and native is not None and bool(native.launches_early())

    def function(self) -> tuple[int, int]:
        """The loaded kernel as the driver knows it: function and context.

        Raises
        ------
        CompilerError
            Where there is no compiler for the module that loads it.
        RuntimeError
            If the driver refuses it.
        """
        if self._loaded is None:
            native = native_launch()
            if native is None:
                raise CompilerError("kernels cannot be loaded through the driver without a C++ compiler")
            device = torch.cuda.current_device() if self._device is None else self._device
            entry = self.compiled.handle.name  # type: ignore[attr-defined]
            self._loaded = native.load(self.compiled.cubin, entry, self.compiled.shared_bytes, device)
        return self._loaded

    def row(self) -> tuple[int, int, int, int, int, int, int, int, int]:
        """What a C++ wrapper has to know: function, threads, bytes of shared memory, whether it is started early, grid
        (zero where it depends on sizes), three block sizes, context."""
        function, context = self.function()
        first, second, third, *_ = (*self._blocks, 0, 0, 0)
        threads, shared, early = self.threads, self.compiled.shared_bytes, int(self.early)
        return (function, threads, shared, early, self._fixed, first, second, third, context)

    def _through_triton(self) -> Callable[..., None]:
        """The handle's own launcher, where there is no native one; nothing is started early."""
        handle = self.compiled.handle
        run = handle.run  # type: ignore[attr-defined]  # makes the function
        function, metadata = handle.function, handle.packed_metadata  # type: ignore[attr-defined]
        extra = tuple(size for _, size in self.compiled.build.blocks)

        def start(stream: int, *arguments: int) -> None:
            grid = self._fixed if self._grid_of is None else self._grid_of(*arguments[self._pointers :])
            if grid:
                run(grid, 1, 1, stream, function, metadata, None, None, None, *arguments, *extra)

        return start

    def bound(self) -> Callable[..., None]:
        """The bare function behind this launcher, loaded onto the current device: the quickest thing to call."""
        if self._start is None:
            self.load()
        assert self._start is not None
        return self._start

    def __call__(self, stream: int, *arguments: int) -> None:
        if self._start is None:
            self.load()
        self._start(stream, *arguments)  # type: ignore[misc]


def make_launcher(kernel: GridKernel, compiled: Compiled, device: int | None = None) -> Launcher:
    """The launcher of an emitted kernel in the configuration that it was built in; ``device`` as `Launcher` has it."""
    blocks = dict(compiled.build.blocks)
    grid: sympy.Expr = sympy.Integer(1)
    for numel, block in kernel.axes:
        grid = grid * _ceiling(numel, blocks[block])
    pointers = len(kernel.arguments) - len(kernel.symbols)
    sizes = tuple(blocks[block] for _, block in kernel.axes)
    count = int(grid) if grid.is_Integer else _function(grid, kernel.symbols, kernel.index_limit, compiled.build.name)
    return Launcher(compiled, count, pointers, blocks=sizes, device=device)


def widening(narrow: Launcher, make_wide: Callable[[], Launcher]) -> Callable[..., None]:
    """A launcher of a kernel that counts in 32 bits, until sizes come for which one has to count in 64."""
    wide = functools.cache(make_wide)

    def launch(stream: int, *arguments: int) -> None:
        try:
            narrow(stream, *arguments)
        except IndexLimitError:
            wide()(stream, *arguments)

    return launch


def _ceiling(numel: Size, block: int) -> sympy.Expr:
    if isinstance(numel, int) or numel.is_Integer:
        return sympy.Integer(-(-int(numel) // block))
    return FloorDiv(numel + (block - 1), block)


def _function(
    grid: sympy.Expr, symbols: tuple[sympy.Symbol, ...], limits: tuple[sympy.Expr, ...], name: str
) -> Callable[..., int]:
    """The grid as a Python function of the size symbols; it refuses sizes that the kernel cannot count."""

    def too_large(*values: int) -> int:
        raise IndexLimitError(f"{name} counts in 32 bits, which is too little for the sizes {values}; build it wide")

    known = {"FloorDiv": operator.floordiv, "Mod": operator.mod, "too_large": too_large}
    names = ", ".join(s.name for s in symbols)
    text = str(grid)
    if limits:
        fits = " and ".join(f"{e} <= {_INT32_LIMIT}" for e in limits)
        text = f"({text}) if {fits} else too_large({names})"
    function: Callable[..., int] = eval(f"lambda {names}: {text}", {**known, "Max": max, "Min": min})
    return function


def tune(
    candidates: Sequence[Launcher], make_arguments: Callable[[], Sequence[int]], stream: int, *, repeats: int = 5
) -> int:
    """Position of the fastest candidate, by device time; the first one wins by being within 2 %.

    Parameters
    ----------
    make_arguments:
        Gives the arguments of a launch: pointers into scratch memory of the caller's (what the kernel writes is lost;
        index buffers must hold valid indices), and sizes. It is called once.
    stream:
        The current stream, on which everything runs.
    """
    arguments = tuple(make_arguments())
    times: list[float] = []
    for launcher in candidates:
        launcher(stream, *arguments)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(repeats):
            launcher(stream, *arguments)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    best = min(range(len(times)), key=lambda k: times[k])
    return best if times[best] < 0.98 * times[0] else 0
