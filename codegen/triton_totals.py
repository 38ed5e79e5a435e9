"""Kernels over rows that sum their columns: the loop over an instance's rows, and the sums in its registers.

The rest of the body is printed as ever, inside of the loop (`triton_body`); see `memplan.ir.totals` on what is stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.ir.loops import Load, Reduce, Store, StoreMode, index_symbols, operands
from memplan.ir.totals import GROUP, by_group

from .triton_configs import divisible
from .triton_printer import compute_type, convert, texpr, type_name

if TYPE_CHECKING:
    from .triton_body import Body


def open_rows(body: Body, wide: str) -> None:
    """The loop over the rows of an instance. What is the same for all of them is loaded before it."""
    x = body.loops.axes[0]
    body.line(f"{GROUP.name} = tl.program_id(0){wide}")
    body.line(f"rindex = tl.arange(0, RBLOCK)[None, :]{wide}")
    body.decompose(1)
    for k, node in enumerate(body.kernel.nodes):
        if isinstance(node, Load) and not _by_row(body, k) and node.buffer not in body.kernel.written_buffers:
            body.need(k)
    for k, store in _totals(body):
        body.line(f"total{k} = tl.zeros({body.shape(body.all_dims)}, {type_name(store.dtype)})")
    body.line("for xoffset in range(0, XGROUP, XBLOCK):")
    body.indent += "    "
    body.line("xlane = xoffset + tl.arange(0, XBLOCK)[:, None]")
    body.line(f"xindex = {GROUP.name} * XGROUP + xlane")
    bounds = []
    if not divisible(body.together, "XBLOCK", body.configs):
        bounds.append("(xlane < XGROUP)")
    if not divisible(x.numel, "XGROUP", body.configs):
        bounds.append(f"(xindex < {body.size(x.numel)})")
    if bounds:
        body.line(f"xmask = {' & '.join(bounds)}")
        body.masks[0] = "xmask"
    for r in x.ranges:
        body.line(f"{r.symbol.name} = xindex")


def add(body: Body, k: int, store: Store) -> None:
    """Add the rows of a block to total ``k``."""
    text, source = body.tile(store.value), body.kernel.nodes[store.value].dtype
    if compute_type(source) != store.dtype:
        text = convert(text, source, store.dtype, keep=False)
    mask = body.mask(body.all_dims)
    if mask:
        text = f"tl.where({mask}, {text}, tl.full([1, 1], 0, {type_name(store.dtype)}))"
    body.line(f"total{k} += {text}")


def close_rows(body: Body) -> None:
    """After the loop the sums are stored; nothing in a kernel without any."""
    if not body.together:
        return
    body.indent = "    "
    for k, store in _totals(body):
        index = texpr(by_group(store, body.together), body.printer)
        arguments = [f"{store.buffer} + ({index})", f"tl.sum(total{k}, 0)[None, :]"]
        if 1 in body.masks:
            arguments.append(body.masks[1])
        body.line(f"tl.store({', '.join(arguments)})")


def _totals(body: Body) -> list[tuple[int, Store]]:
    return [(k, s) for k, s in enumerate(body.kernel.stores) if s.mode is StoreMode.TOTAL]


def _by_row(body: Body, k: int) -> bool:
    """Whether a node differs from row to row."""
    symbols = {r.symbol for r in body.kernel.outer}
    pending = [k]
    while pending:
        node = body.kernel.nodes[pending.pop()]
        if isinstance(node, Reduce) or symbols & index_symbols(node):
            return True
        pending.extend(operands(node))
    return False
