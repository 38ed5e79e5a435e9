"""Launching a built Triton kernel with as little Python as possible.

A launch goes through the compiled handle's own launcher (`CompiledKernel.run`): no argument is inspected, pointers are
integers, the grid is a number that was worked out before.
"""

from __future__ import annotations

from collections.abc import Callable

from memplan.ir.errors import MemplanError

from .triton_build import Compiled

Grid = Callable[..., int]
"""Number of program instances from the kernel's integer arguments."""


class Launcher:
    """``launcher(stream, *arguments)``: pointers as integers, then the values of the size symbols.

    Parameters
    ----------
    compiled:
        The build; it is loaded onto the current device at the first call.
    grid:
        The number of program instances, or a function of the integer arguments after the pointers.
    pointers:
        How many of the arguments are pointers.
    """

    __slots__ = ("_extra", "_function", "_grid", "_grid_of", "_metadata", "_pointers", "_run", "compiled")

    def __init__(self, compiled: Compiled, grid: int | Grid, pointers: int) -> None:
        if compiled.scratch_bytes:
            raise MemplanError(f"{compiled.build.name} needs {compiled.scratch_bytes} bytes of global scratch an instance")
        self.compiled = compiled
        self._pointers = pointers
        self._extra = tuple(size for _, size in compiled.build.blocks)
        self._grid = grid if isinstance(grid, int) else 0
        self._grid_of = None if isinstance(grid, int) else grid
        self._run: Callable[..., None] | None = None
        self._function: int | None = None
        self._metadata: object = None

    def load(self) -> None:
        """Load the cubin onto the current device; the first call does it otherwise."""
        handle = self.compiled.handle
        run = handle.run  # type: ignore[attr-defined]  # makes the handles
        self._function = handle.function  # type: ignore[attr-defined]
        self._metadata = handle.packed_metadata  # type: ignore[attr-defined]
        self._run = run

    def __call__(self, stream: int, *arguments: int) -> None:
        if self._run is None:
            self.load()
        grid = self._grid
        if self._grid_of is not None:
            grid = self._grid_of(*arguments[self._pointers :])
            if grid == 0:
                return
        self._run(  # type: ignore[misc]
            grid, 1, 1, stream, self._function, self._metadata, None, None, None, *arguments, *self._extra
        )
