"""Triton text of matrix-product templates: tiles of sums on the tensor cores, then an epilogue from its kernel's data.

Four ways to spread the work (`memplan.ir.template.Method`). Where several instances share a tile each stores its
partial sums; the last to finish, by a counter of the tile, adds all of them up in a fixed order (so that the result is
the same in every run), runs the epilogue, and sets the counter back to zero. Many parts are added up in bunches first,
each by the last of the bunch to finish, or by a second launch in slices of a tile. Nobody waits for anybody. The
stream-K schedule is that of Osama et al., "Stream-K: work-centric parallel decomposition for dense matrix-matrix
multiplication on the GPU" (PPoPP 2023), its fix-up done by the last instance instead of the first.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from memplan.ir.early_launch import EarlyLaunch
from memplan.ir.errors import LoweringError
from memplan.ir.loops import Kernel, Load
from memplan.ir.program import View
from memplan.ir.template import ACCUMULATOR, Method, Product

from .row_schedule import schedule
from .triton_body import Body, Dims, Value
from .triton_configs import LaunchConfig
from .triton_kernel import TritonKernel, pointer_type
from .triton_loops import Axis, Loops
from .triton_printer import signature_name
from .triton_source import module_source

_LIMIT = 2**31
_TILE: Dims = frozenset({0, 1})


def emit_launches(product: Product, *, name: str, early: EarlyLaunch = EarlyLaunch.NEVER) -> tuple[TritonKernel, ...]:
    """All kernels of a product, named as `Product.launches` says, with the same arguments; else as `emit_product`."""
    config = product.config
    if config.method is not Method.STAGED:
        return (emit_product(product, name=name, early=early),)
    first, last = product.launches(name)
    warps = max(1, min(4, config.slice * config.columns // 128))
    finish = emit_finish(product, name=last, rows=config.slice, warps=warps, early=early)
    return emit_parts(product, name=first, early=early), finish


def emit_product(product: Product, *, name: str, early: EarlyLaunch = EarlyLaunch.NEVER) -> TritonKernel:
    """The kernel of a canonical product (buffers ``b0, b1, ...``), its sizes and its configuration written into it.

    STAGED products have two: `emit_launches`.
    Its arguments are the buffers in order, then the workspaces ``partials`` and ``counters`` where there are some.
    ``early``: what it does about the kernels before and after it.

    Raises
    ------
    LoweringError
        If Triton cannot express the epilogue, or an index needs more than 31 bits.
    """
    config = product.config
    _check_reach(product)
    epilogue = _Epilogue(product)
    lines = _METHODS[config.method](product, epilogue.print())
    spaces = tuple(w.role for w in product.workspaces())
    launch = LaunchConfig((("UNIT", 1),), config.warps, config.stages)
    return _kernel(product, name, lines, spaces, epilogue, launch, product.instances, early)


def emit_parts(product: Product, *, name: str, early: EarlyLaunch = EarlyLaunch.NEVER) -> TritonKernel:
    """The first of two launches: sums of every part, for `emit_finish`; arguments likewise."""
    _check_reach(product)
    epilogue = _Epilogue(product)
    launch = LaunchConfig((("UNIT", 1),), product.config.warps, product.config.stages)
    return _kernel(product, name, _parts(product), ("partials",), epilogue, launch, product.instances, early)


def emit_finish(
    product: Product, *, name: str, rows: int, warps: int, early: EarlyLaunch = EarlyLaunch.NEVER
) -> TritonKernel:
    """The second of two launches: adds up the parts of ``rows`` rows of a tile in order, and runs the epilogue."""
    config = product.config
    epilogue = _Epilogue(product)
    slices = config.rows // rows
    own = replace(product, config=replace(config, rows=rows, warps=warps))
    lines = [
        f"BM: tl.constexpr = {rows}",
        f"BN: tl.constexpr = {config.columns}",
        f"tile = tl.program_id(0) // {slices}",
        f"piece = tl.program_id(0) % {slices}",
        *(line.replace("row * BM", f"row * {config.rows} + piece * BM") for line in _place(product, "tile")),
        _LANES,
        f"slots = partials + tile * {config.parts * config.rows} * BN + piece * BM * BN + lanes",
        *_added(own, "slots", config.parts, slices),
        *_finish(product, epilogue.print()),
    ]
    launch = LaunchConfig((("UNIT", 1),), warps, 1)
    return _kernel(product, name, lines, ("partials",), epilogue, launch, product.tiles * slices, early)


def _kernel(
    product: Product,
    name: str,
    lines: list[str],
    spaces: tuple[str, ...],
    epilogue: _Epilogue,
    launch: LaunchConfig,
    instances: int,
    early: EarlyLaunch,
) -> TritonKernel:
    arguments = [(b, f"*{signature_name(t)}") for b, t in _types(product).items()]
    arguments += [(r, "*i32" if r == "counters" else "*fp32") for r in spaces]
    parameters = [*(n for n, _ in arguments), "UNIT: tl.constexpr"]
    body = "".join(f"    {line}\n" for line in lines)
    source = module_source(name, parameters, sorted(epilogue.functions), body, early)
    return TritonKernel(
        name,
        source,
        tuple(arguments),
        (),
        ("UNIT",),
        (launch,),
        ((instances, "UNIT"),),
        (True,) * len(arguments),
    )


def _types(product: Product) -> dict[str, torch.dtype]:
    found: dict[str, set[torch.dtype]] = {}
    for view in (product.a, product.b, *([] if product.bias is None else [product.bias])):
        found.setdefault(view.buffer, set()).add(view.dtype)
    for load in product.epilogue.loads:
        if load.buffer != ACCUMULATOR:
            found.setdefault(load.buffer, set()).add(load.dtype)
    for store in product.epilogue.stores:
        found.setdefault(store.buffer, set()).add(store.dtype)
    names = sorted(found, key=lambda b: int(b[1:]))
    return {n: pointer_type(found[n]) for n in names}


def _check_reach(product: Product) -> None:
    for view in (product.a, product.b, product.bias):
        if view is not None and sum(int(n) * int(s) for n, s in zip(view.sizes, view.strides, strict=True)) >= _LIMIT:
            raise LoweringError(f"a matrix of {view.sizes} elements is too large for 32-bit indices")
    batch, rows, columns, _ = product.sizes
    if batch * rows * columns >= _LIMIT or sum(w.count for w in product.workspaces()) // 4 >= _LIMIT:
        raise LoweringError("a product with more elements than 32 bits count")


class _Epilogue(Body):
    """The epilogue printed by the pointwise printer on a tile of rows and columns; the product is at hand."""

    def __init__(self, product: Product) -> None:
        kernel: Kernel = product.epilogue
        batch, rows, columns = kernel.outer
        axes = (Axis("m", (rows,)), Axis("n", (columns,)))
        loops = Loops(kernel, axes)
        super().__init__(loops, schedule(kernel), (), False, False)
        self.indent = ""
        _, m, n, _ = product.sizes
        if m % product.config.rows:
            self.masks[0] = "mmask"
        if n % product.config.columns:
            self.masks[1] = "nmask"
        self.batch = batch.symbol

    def shape(self, dims: Dims) -> str:
        return f"[{', '.join(b if k in dims else '1' for k, b in enumerate(('BM', 'BN')))}]"

    def load(self, k: int, node: Load) -> Value:
        return Value("acc", _TILE) if node.buffer == ACCUMULATOR else super().load(k, node)

    def print(self) -> list[str]:
        for section in self.plan.sections:
            self.section(section)
        self.last_stores()
        return self.lines


def _constants(product: Product) -> list[str]:
    c = product.config
    return [f"BM: tl.constexpr = {c.rows}", f"BN: tl.constexpr = {c.columns}", f"BK: tl.constexpr = {c.inner}"]


def _place(product: Product, tile: str) -> list[str]:
    """Which rows, columns and matrix of the batch a tile is; indices into what is stored."""
    c = product.config
    batch, m, n, _ = product.sizes
    down, across = -(-m // c.rows), -(-n // c.columns)
    lines = [f"x0 = {tile} // {down * across}", f"place = {tile} % {down * across}"] if batch > 1 else ["x0 = 0"]
    place = "place" if batch > 1 else tile
    group = min(c.group, down)
    if group > 1:
        lines += [
            f"first = {place} // {group * across} * {group}",
            f"height = tl.minimum({down} - first, {group})",
            f"row = first + {place} % {group * across} % height",
            f"column = {place} % {group * across} // height",
        ]
    else:
        lines += [f"row = {place} // {across}", f"column = {place} % {across}"]
    x, y, z = (r.symbol.name for r in product.epilogue.outer)
    assert (x, y, z) == ("x0", "x1", "x2")
    lines += ["x1 = (row * BM + tl.arange(0, BM))[:, None]", "x2 = (column * BN + tl.arange(0, BN))[None, :]"]
    if m % c.rows:
        lines.append(f"mmask = x1 < {m}")
    if n % c.columns:
        lines.append(f"nmask = x2 < {n}")
    return lines


def _sums(product: Product, start: str, steps: str) -> list[str]:
    """``acc``: the sums over ``steps`` steps of BK terms from step ``start`` on."""
    c = product.config
    _, m, n, k = product.sizes
    ragged = k % c.inner != 0
    first = f"{start} * BK + " if start != "0" else ""
    lines = [
        f"terms = {first}tl.arange(0, BK)",
        f"ap = {_pointer(product.a, 'x0', 'x1', 'terms[None, :]')}",
        f"bp = {_pointer(product.b, 'x0', 'terms[:, None]', 'x2')}",
        "acc = tl.zeros([BM, BN], tl.float32)",
        f"for step in range({steps}):",
    ]
    rest = f"{k} - ({start} + step) * BK" if start != "0" else f"{k} - step * BK"
    inside = f"tl.arange(0, BK){{}} < {rest}"
    masks = [
        [*(["mmask"] if m % c.rows else []), *([f"({inside.format('[None, :]')})"] if ragged else [])],
        [*([f"({inside.format('[:, None]')})"] if ragged else []), *(["nmask"] if n % c.columns else [])],
    ]
    # long sums over few rows read a matrix of weights once, which is not to push all else out of the cache
    once = ', eviction_policy="evict_first"' if c.method is Method.SPLIT else ""
    for value, pointer, mask, hint in (("left", "ap", masks[0], ""), ("right", "bp", masks[1], once)):
        given = (f", {' & '.join(mask)}, other=0.0" if mask else "") + hint
        lines.append(f"    {value} = tl.load({pointer}{given})")
    lines += [
        "    acc = tl.dot(left, right, acc)",
        f"    ap += BK * {int(product.a.strides[2])}",
        f"    bp += BK * {int(product.b.strides[1])}",
    ]
    return lines


def _pointer(view: View, batch: str, row: str, column: str) -> str:
    terms = []
    for index, stride, size in zip((batch, row, column), view.strides, view.sizes, strict=True):
        if int(stride) and (index != "x0" or int(size) > 1):
            terms.append(index if int(stride) == 1 else f"{index} * {int(stride)}")
    return f"{view.buffer} + ({' + '.join(terms)})" if terms else view.buffer


def _finish(product: Product, epilogue: list[str]) -> list[str]:
    """The bias, then the epilogue on ``acc``."""
    lines = []
    if product.bias is not None:
        _, m, n, _ = product.sizes
        _, down, across = product.bias.strides
        masks = [*(["mmask"] if m % product.config.rows and down else [])]
        masks += ["nmask"] if n % product.config.columns and across else []
        given = f", {' & '.join(masks)}" if masks else ""
        lines.append(f"acc += tl.load({_pointer(product.bias, 'x0', 'x1', 'x2')}{given}).to(tl.float32)")
    return [*lines, *epilogue]


def _indented(lines: list[str], depth: int = 1) -> list[str]:
    return ["    " * depth + line for line in lines]


def _tile(product: Product, epilogue: list[str]) -> list[str]:
    return [
        *_constants(product),
        "tile = tl.program_id(0)",
        *_place(product, "tile"),
        *_sums(product, "0", str(product.steps)),
        *_finish(product, epilogue),
    ]


_LANES = "lanes = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]"


def _split(product: Product, epilogue: list[str]) -> list[str]:
    last = _last_part if product.config.bunch == 1 else _last_bunch
    return [*_parts(product), *last(product, epilogue)]


def _parts(product: Product) -> list[str]:
    """The sums of one part of a tile, stored in its slot of the workspace."""
    parts, steps = product.config.parts, product.steps
    each = -(-steps // parts)
    count = str(each) if steps % parts == 0 else f"tl.maximum(tl.minimum({each}, {steps} - part * {each}), 0)"
    return [
        *_constants(product),
        f"tile = tl.program_id(0) // {parts}",
        f"part = tl.program_id(0) % {parts}",
        *_place(product, "tile"),
        f"begin = part * {each}",
        *_sums(product, "begin", count),
        _LANES,
        f"slots = partials + tile * {parts} * BM * BN + lanes",
        "tl.store(slots + part * BM * BN, acc)",
    ]


def _last_part(product: Product, epilogue: list[str]) -> list[str]:
    parts = product.config.parts
    return [
        *_arrive("counters + tile", parts),
        *_indented(_added(product, "slots", parts, 1)),
        *_indented(_finish(product, epilogue)),
        "    tl.store(counters + tile, 0)",
    ]


def _last_bunch(product: Product, epilogue: list[str]) -> list[str]:
    """The sum of a bunch takes the place of its first part, after all of its parts were read."""
    parts, bunch = product.config.parts, product.config.bunch
    bunches = parts // bunch
    inner = [
        *_added(product, "members", bunch, 1),
        "tl.store(own, 0)",
        "tl.debug_barrier()",
        "tl.store(members, acc)",
        *_arrive("counters + tile", bunches),
        *_indented(_added(product, "slots", bunches, bunch)),
        *_indented(_finish(product, epilogue)),
        "    tl.store(counters + tile, 0)",
    ]
    return [
        f"own = counters + {product.tiles} + tile * {bunches} + part // {bunch}",
        f"members = slots + part // {bunch} * {bunch} * BM * BN",
        *_arrive("own", bunch),
        *_indented(inner),
    ]


def _arrive(counter: str, count: int) -> list[str]:
    """What follows, indented, is done by the last of ``count`` arrivals, which sees what all of them stored."""
    return [
        "tl.debug_barrier()",
        f'arrived = tl.atomic_add({counter}, 1, sem="acq_rel")',
        f"if arrived == {count - 1}:",
        "    tl.debug_barrier()",
    ]


#: registers of a thread that may hold partial sums on their way
_IN_FLIGHT = 96


def _added(product: Product, slots: str, count: int, apart: int) -> list[str]:
    """``acc``: the sum of ``count`` slots in order, several on their way at once: one waits a microsecond for each."""
    config = product.config
    registers = -(-config.rows * config.columns // (32 * config.warps))
    together = max(d for d in range(1, count + 1) if count % d == 0 and (d == 1 or d * registers <= _IN_FLIGHT))
    step = f"{apart} * BM * BN" if apart > 1 else "BM * BN"
    load = f'tl.load({slots} + (other + {{}}) * {step}, cache_modifier=".cg")'
    return [
        "acc = tl.zeros([BM, BN], tl.float32)",
        f"for other in range(0, {count}, {together}):",
        *(f"    part{k} = {load.format(k)}" for k in range(together)),
        *(f"    acc += part{k}" for k in range(together)),
    ]


def _stream(product: Product, epilogue: list[str]) -> list[str]:
    """Instance ``p`` does steps ``[p * each, (p + 1) * each)`` of all; its partial tiles are its first and its last.

    Slot ``2 * p`` holds the sums of a tile that others began, slot ``2 * p + 1`` those of one that it began.
    """
    total, steps = product.tiles * product.steps, product.steps
    each = -(-total // product.instances)
    return [
        *_constants(product),
        f"at = tl.program_id(0) * {each}",
        f"end = tl.minimum(at + {each}, {total})",
        _LANES,
        "while at < end:",
        f"    tile = at // {steps}",
        f"    begin = at % {steps}",
        f"    count = tl.minimum({steps} - begin, end - at)",
        *_indented(_place(product, "tile")),
        *_indented(_sums(product, "begin", "count")),
        f"    finished = count == {steps}",
        f"    if count != {steps}:",
        "        slot = 2 * tl.program_id(0) + (begin == 0).to(tl.int32)",
        "        tl.store(partials + slot * BM * BN + lanes, acc)",
        "        tl.debug_barrier()",
        '        arrived = tl.atomic_add(counters + tile, count, sem="acq_rel")',
        f"        finished = arrived + count == {steps}",
        "        if finished:",
        "            tl.debug_barrier()",
        "            acc = tl.zeros([BM, BN], tl.float32)",
        f"            first_one = tile * {steps} // {each}",
        f"            last_one = (tile * {steps} + {steps - 1}) // {each}",
        "            for other in range(first_one, last_one + 1):",
        f"                began = (other * {each} <= tile * {steps}).to(tl.int32)",
        '                acc += tl.load(partials + (2 * other + began) * BM * BN + lanes, cache_modifier=".cg")',
        "            tl.store(counters + tile, 0)",
        "    if finished:",
        *_indented(_finish(product, epilogue), 2),
        "    at += count",
    ]


_METHODS = {Method.TILE: _tile, Method.SPLIT: _split, Method.STREAM: _stream}

__all__ = ["emit_launches", "emit_product"]
