"""A Triton kernel as data: source text, signature, grid, and the configurations it may be built with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import sympy
import torch

from memplan.ir.canonical import CanonicalKernel
from memplan.ir.early_launch import EarlyLaunch
from memplan.ir.errors import LoweringError
from memplan.ir.index import FloorDiv
from memplan.ir.loops import Kernel, Level, Load, Size, StoreMode
from memplan.ir.program import evaluate
from memplan.ir.totals import rows_together

from .row_schedule import schedule
from .triton_body import emit_body
from .triton_configs import LaunchConfig, Shape, choose
from .triton_loops import Loops, arrange, duplicates, extents
from .triton_online import with_online_softmax
from .triton_printer import signature_name
from .triton_source import module_source

_INT32_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class TritonKernel:
    """One emitted kernel.

    Attributes
    ----------
    name:
        The ``@triton.jit`` function in ``source``.
    source:
        Text of a whole module.
    arguments:
        (name, type) in order: pointers ``*fp32`` for the buffers, then size symbols ``i64``.
    symbols:
        The size symbols of the arguments after the pointers.
    blocks:
        Names of the constexpr parameters, after the arguments.
    configs:
        Candidates, best guess first; one alone where determinism was asked for.
    axes:
        (elements, name of the block) for each axis of the grid.
    aligned:
        For each pointer, whether it is a multiple of 16 bytes.
    index_limit:
        Sizes that must all be below 2**31, since the kernel counts in 32 bits; empty if they always are.
    checks:
        Whether it asserts that indices are in range: Triton leaves that out unless it builds for debugging.
    """

    name: str
    source: str
    arguments: tuple[tuple[str, str], ...]
    symbols: tuple[sympy.Symbol, ...]
    blocks: tuple[str, ...]
    configs: tuple[LaunchConfig, ...]
    axes: tuple[tuple[Size, str], ...]
    aligned: tuple[bool, ...]
    index_limit: tuple[sympy.Expr, ...] = ()
    checks: bool = False

    def grid(self, config: LaunchConfig) -> Size:
        """Number of program instances; the grid is one-dimensional."""
        out: Size = 1
        for numel, block in self.axes:
            size = config.block(block)
            if isinstance(numel, int) or numel.is_Integer:
                out = out * (-(-int(numel) // size))
            else:
                out = out * FloorDiv(numel + size - 1, size)
        return out

    @property
    def pointers(self) -> int:
        return sum(kind.startswith("*") for _, kind in self.arguments)


def emit_triton(
    kernel: CanonicalKernel,
    *,
    name: str,
    hints: Mapping[sympy.Symbol, int],
    aligned: tuple[bool, ...] | None = None,
    deterministic: bool = False,
    wide: bool = False,
    early: EarlyLaunch = EarlyLaunch.NEVER,
) -> TritonKernel:
    """Triton source of a kernel.

    Parameters
    ----------
    name:
        Name of the function.
    hints:
        Values of the size symbols; choices are made for these sizes, answers are right for all.
    aligned:
        For each buffer, whether its pointer is always a multiple of 16 bytes; None says that all are.
    deterministic:
        One configuration only, and no floating-point atomics.
    wide:
        Count in 64 bits even if the hinted sizes do not need it.
    early:
        What it does about the kernels before and after it.

    Raises
    ------
    LoweringError
        If Triton cannot express it: a dtype, a function, an atomic of a type.
    """
    body = kernel.kernel
    _check(body, deterministic)
    loops = arrange(body, hints)
    limits = extents(loops)
    hinted = [] if limits is None else [evaluate(e, hints) for e in limits]
    is_wide = wide or limits is None or any(h > _INT32_LIMIT for h in hinted)
    shape = Shape.of(loops, hints)
    plan = schedule(loops.kernel)
    configs, persistent = choose(shape, plan, loops)
    if loops.reduces and not persistent:
        loops = replace(loops, kernel=with_online_softmax(loops.kernel))
        plan = schedule(loops.kernel)
    if deterministic:
        configs = configs[:1]
    emitted = emit_body(loops, plan, configs=configs, persistent=persistent, wide=is_wide)
    arguments = _arguments(kernel, body)
    blocks = tuple(n for n, _ in configs[0].blocks)
    parameters = [n for n, _ in arguments] + [f"{b}: tl.constexpr" for b in blocks]
    source = module_source(name, parameters, emitted.functions, emitted.text, early)
    taken = "GROUP" if rows_together(loops.kernel) else "BLOCK"
    grid_axes = tuple((a.numel, f"{a.name.upper()}{taken}") for a in loops.axes if a.name != "r")
    guard = () if is_wide or limits is None else tuple(e for e in limits if not isinstance(e, int) and not e.is_Integer)
    pointers = sum(kind.startswith("*") for _, kind in arguments)
    if aligned is not None and len(aligned) != pointers:
        raise ValueError(f"aligned names {len(aligned)} buffers, the kernel has {pointers}")
    return TritonKernel(
        name,
        source,
        arguments,
        kernel.symbols,
        blocks,
        configs,
        grid_axes,
        aligned or (True,) * pointers,
        guard,
        body.checks_indices,
    )


def _arguments(kernel: CanonicalKernel, body: Kernel) -> tuple[tuple[str, str], ...]:
    types: dict[str, set[torch.dtype]] = {f"b{k}": set() for k in range(len(kernel.buffers))}
    for load in body.loads:
        types[load.buffer].add(load.dtype)
    for store in body.stores:
        types[store.buffer].add(store.dtype)
    found = []
    for buffer, dtypes in types.items():
        # bytes seen as several types: the first by name is the pointer's, the others are casts
        found.append((buffer, f"*{signature_name(pointer_type(dtypes))}"))
    return (*found, *((s.name, "i64") for s in kernel.symbols))


def pointer_type(dtypes: set[torch.dtype]) -> torch.dtype:
    """The type of a buffer's pointer where it is accessed as several."""
    if not dtypes:
        raise LoweringError("a buffer of the kernel is neither loaded nor stored")
    return min(dtypes, key=str)


_ATOMIC = {
    StoreMode.ADD: {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64},
    StoreMode.MAX: {torch.float32, torch.float64, torch.int32, torch.int64},
    StoreMode.MIN: {torch.float32, torch.float64, torch.int32, torch.int64},
}
_TOTALS = (torch.float32, torch.float64)


def _check(kernel: Kernel, deterministic: bool) -> None:
    for store in kernel.stores:
        if store.mode is StoreMode.SET:
            continue
        if store.mode is StoreMode.TOTAL:
            if store.dtype not in _TOTALS:
                raise LoweringError(f"no totals of {store.dtype} in Triton")
            continue
        if store.dtype not in _ATOMIC[store.mode]:
            raise LoweringError(f"no atomic {store.mode.value} of {store.dtype} in Triton")
        if deterministic and store.mode is StoreMode.ADD and store.dtype.is_floating_point:
            raise LoweringError(f"an atomic add of {store.dtype} is not deterministic")


def safe_in_place(kernel: Kernel, load_buffer: str, store_buffer: str) -> bool:
    """Whether the store may take the memory of the load.

    True only if the emitted kernel reads each element of ``load_buffer`` in the program instance that overwrites it
    and before it does so: one store, equal item size, every load of the buffer at the store's index, the store at
    every point of the loops exactly once, and (in kernels that pass over the row several times) no pass after the
    store's that reads the buffer again.
    """
    stores = [s for s in kernel.stores if s.buffer == store_buffer]
    loads = [k for k, n in enumerate(kernel.nodes) if isinstance(n, Load) and n.buffer == load_buffer]
    if len(stores) != 1 or not loads or any(s.buffer == load_buffer for s in kernel.stores):
        return False
    if store_buffer in kernel.read_buffers:
        return False
    store = stores[0]
    point = kernel.store_level(store) is Level.POINT
    if duplicates(store, kernel, point or not kernel.row) or any(
        getattr(kernel.nodes[k], "index", None) != store.index
        or getattr(kernel.nodes[k], "dtype", torch.bool).itemsize != store.dtype.itemsize
        for k in loads
    ):
        return False
    if not kernel.row:
        return True
    # what is read once a row is read by every warp of the instance, and another warp may be ahead
    if not point or any(kernel.levels[k] is not Level.POINT for k in loads):
        return False
    position = kernel.stores.index(store)
    return all(
        section <= plan.section_of_store[position]
        for plan in (schedule(kernel), schedule(with_online_softmax(kernel)))
        for k in loads
        for section in plan.sections_of_node(k)
    )


__all__ = ["LaunchConfig", "Loops", "TritonKernel", "emit_triton", "safe_in_place"]
