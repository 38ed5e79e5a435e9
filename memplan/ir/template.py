"""Templates: matrix products with an epilogue and declared workspaces, as data.

A template replaces an ATen call and the kernel after it. What it computes is the same; in which tiles, and with which
workspaces, its configuration says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import torch

from .loops import Kernel, Load
from .program import Buffer, BufferKind, Extern, View

#: What the epilogue calls the product (no buffer has such a name): ``batch x rows x columns``, row-major.
ACCUMULATOR = "<product>"


class Method(Enum):
    """How the terms of the sums are spread over program instances."""

    TILE = "tile"  # an instance computes a tile
    SPLIT = "split"  # several instances compute parts of a tile's sums, the last one to finish adds them up
    STAGED = "staged"  # the same in two launches, the second of which adds the parts up on all of the GPU
    STREAM = "stream"  # a fixed number of instances share all steps of all tiles evenly


@dataclass(frozen=True, slots=True)
class ProductConfig:
    """Tile sizes in elements, and how work is spread.

    ``parts``: for SPLIT and STAGED the instances that share a tile, for STREAM the instances in all. ``group``: rows of
    tiles that are walked together, so that what they read is still in the cache. ``bunch``: for SPLIT a divisor of
    ``parts``: so many parts are added up by the last of them to finish, and the sums of bunches by the last bunch; 1
    for all at once.
    ``slice``: for STAGED the rows of a tile that an instance of the second launch adds up, a divisor of ``rows``.
    """

    rows: int
    columns: int
    inner: int
    method: Method = Method.TILE
    parts: int = 1
    warps: int = 4
    stages: int = 3
    group: int = 8
    bunch: int = 1
    slice: int = 0


@dataclass(frozen=True, slots=True)
class Product:
    """``epilogue(a @ b + bias)``.

    Attributes
    ----------
    a, b:
        ``batch x rows x inner`` and ``batch x inner x columns``.
    bias:
        ``batch x rows x columns``, with strides of 0 where it is broadcast; None for none.
    epilogue:
        A kernel over (batch, rows, columns) without a row, which loads the product from `ACCUMULATOR`.
    """

    a: View
    b: View
    bias: View | None
    epilogue: Kernel
    config: ProductConfig

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """batch, rows, columns, inner."""
        batch, rows, inner = (int(s) for s in self.a.sizes)
        return batch, rows, int(self.b.sizes[2]), inner

    @property
    def tiles(self) -> int:
        batch, rows, columns, _ = self.sizes
        return batch * -(-rows // self.config.rows) * -(-columns // self.config.columns)

    @property
    def steps(self) -> int:
        """Steps of ``config.inner`` terms for each tile."""
        return -(-self.sizes[3] // self.config.inner)

    @property
    def instances(self) -> int:
        """Program instances of a launch, of STAGED the first one."""
        match self.config.method:
            case Method.TILE:
                return self.tiles
            case Method.SPLIT | Method.STAGED:
                return self.tiles * self.config.parts
            case Method.STREAM:
                return min(self.config.parts, self.tiles * self.steps)

    def launches(self, name: str) -> tuple[str, ...]:
        """The names of the kernels that a template called ``name`` launches, in order, with the same arguments."""
        return (name, f"{name}_finish") if self.config.method is Method.STAGED else (name,)

    def workspaces(self) -> tuple[Workspace, ...]:
        """Partial sums (any bytes before), and a counter for each tile and each bunch (zero before and after) where
        instances of one launch share a tile."""
        counters = self.tiles
        tile = self.config.rows * self.config.columns * 4
        match self.config.method:
            case Method.TILE:
                return ()
            case Method.STAGED:
                return (Workspace("partials", self.tiles * self.config.parts * tile),)
            case Method.SPLIT:
                slots = self.tiles * self.config.parts
                counters += slots // self.config.bunch if self.config.bunch > 1 else 0
            case Method.STREAM:
                slots = 2 * self.instances
        return Workspace("partials", slots * tile), Workspace("counters", 4 * counters, zero_fill=True)


@dataclass(frozen=True, slots=True)
class Workspace:
    """``count`` bytes that a kernel needs while it runs.

    ``zero_fill``: they must be zero when it starts, and it leaves them zero, so that they are filled once, when they
    are made, and then serve every kernel of their stream.
    """

    role: str
    count: int
    zero_fill: bool = False

    def buffer(self, operation: str, device: str) -> Buffer:
        """The buffer that the plan knows it by."""
        dtype = torch.int32 if self.zero_fill else torch.float32
        name = f"{operation}_{self.role}"
        return Buffer(name, self.count, dtype, device, BufferKind.WORKSPACE, zero_fill=self.zero_fill)


@dataclass(frozen=True, slots=True)
class Template(Extern):
    """A launch of a template: writes its results and scribbles in its workspaces, and allocates nothing.

    ``args`` are what it reads, ``results`` what it writes; the workspaces come last.
    """

    product: Product | None = None
    workspaces: tuple[Workspace, ...] = ()

    @property
    def workspace_buffers(self) -> tuple[str, ...]:
        count = len(self.workspaces)
        return tuple(v.buffer for v in self.results[len(self.results) - count :] if v is not None) if count else ()


@dataclass(frozen=True, slots=True)
class CanonicalProduct:
    """A product over buffers ``b0, b1, ...``: equal ones are one kernel, and one entry among what was measured.

    ``buffers[k]`` is what ``b<k>`` was called, ``offsets[k]`` the bytes that are added to its address.
    """

    product: Product
    buffers: tuple[str, ...]
    offsets: tuple[int, ...]


def canonical_product(product: Product) -> CanonicalProduct:
    """Buffers renamed in the order: factors, bias, what the epilogue reads, what it writes."""
    names: dict[str, str] = {}
    offsets: dict[str, int] = {}

    def view(v: View) -> View:
        offset = int(v.offset) * v.dtype.itemsize
        # one buffer seen twice at different places is two arguments
        key = f"{v.buffer}@{offset}" if offset else v.buffer
        offsets.setdefault(key, offset)
        return replace(v, buffer=names.setdefault(key, f"b{len(names)}"), offset=0)

    a, b = view(product.a), view(product.b)
    bias = None if product.bias is None else view(product.bias)
    for name in (*product.epilogue.read_buffers, *product.epilogue.written_buffers):
        if name != ACCUMULATOR:
            names.setdefault(name, f"b{len(names)}")
            offsets.setdefault(name, 0)
    renamed = {**names, ACCUMULATOR: ACCUMULATOR}
    nodes = tuple(replace(n, buffer=renamed[n.buffer]) if isinstance(n, Load) else n for n in product.epilogue.nodes)
    stores = tuple(replace(s, buffer=renamed[s.buffer]) for s in product.epilogue.stores)
    epilogue = Kernel(product.epilogue.outer, (), nodes, stores)
    return CanonicalProduct(
        Product(a, b, bias, epilogue, product.config),
        tuple(n.partition("@")[0] for n in names),
        tuple(offsets[n] for n in names),
    )
