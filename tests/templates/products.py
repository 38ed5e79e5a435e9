"""Products with epilogues as data, and what they should give."""

from __future__ import annotations

from collections.abc import Callable

import torch

from memplan.ir.loops import Call, Cast, Constant, Kernel, Load, Node, Range, Store, outer_symbol
from memplan.ir.program import View
from memplan.ir.template import ACCUMULATOR, Method, Product, ProductConfig

X, Y, Z = (outer_symbol(k) for k in range(3))
HALF = torch.float16


def product(
    sizes: tuple[int, int, int, int],
    config: ProductConfig,
    *,
    transposed: tuple[bool, bool] = (False, False),
    bias: bool = False,
    epilogue: str = "none",
) -> Product:
    """A canonical product of ``batch x rows x inner`` and ``batch x inner x columns`` in float16.

    ``epilogue``: ``none``; ``relu`` with a cast to float32; ``residual``, which adds a matrix and keeps the product.
    """
    batch, m, n, k = sizes
    a = _matrix("b0", batch, m, k, transposed[0])
    b = _matrix("b1", batch, k, n, transposed[1])
    names = ["b0", "b1"]
    row: View | None = None
    if bias:
        row = View("b2", HALF, (batch, m, n), (0, 0, 1))
        names.append("b2")

    def fresh() -> str:
        names.append(f"b{len(names)}")
        return names[-1]

    flat = X * m * n + Y * n + Z
    nodes: list[Node] = [Load(ACCUMULATOR, flat, HALF)]
    stores = []
    match epilogue:
        case "none":
            stores.append(Store(fresh(), flat, 0, HALF))
        case "relu":
            nodes += [Cast(0, torch.float32), Call("relu", (1,), torch.float32)]
            stores.append(Store(fresh(), flat, 2, torch.float32))
        case "residual":
            nodes += [Load(fresh(), flat, HALF), Call("add", (0, 1), HALF)]
            nodes += [Constant(2.0, HALF), Call("mul", (2, 3), HALF)]
            stores += [Store(fresh(), flat, 4, HALF), Store(fresh(), X * m * n + Z * m + Y, 0, HALF)]
    ranges = (Range(X, batch), Range(Y, m), Range(Z, n))
    return Product(a, b, row, Kernel(ranges, (), tuple(nodes), tuple(stores)), config)


def _matrix(name: str, batch: int, rows: int, columns: int, transposed: bool) -> View:
    strides = (rows * columns, 1, rows) if transposed else (rows * columns, columns, 1)
    return View(name, HALF, (batch, rows, columns), strides)


def buffers(p: Product) -> tuple[list[torch.Tensor], Callable[[], list[torch.Tensor]]]:
    """Flat tensors for the arguments (results poisoned, workspaces last), and what they should hold in the end."""
    torch.manual_seed(0)
    batch, m, n, k = p.sizes
    written = {s.buffer: s.dtype for s in p.epilogue.stores}
    count = max(int(name[1:]) for name in written) + 1
    made: list[torch.Tensor] = []
    for position in range(count):
        name = f"b{position}"
        if name in written:
            made.append(torch.full((batch * m * n,), float("nan"), dtype=written[name]))
        else:
            size = {"b0": batch * m * k, "b1": batch * k * n}.get(name, n if p.bias and name == "b2" else batch * m * n)
            made.append(torch.randn(size).to(HALF))
    for w in p.workspaces():
        made.append(
            torch.zeros(w.count // 4, dtype=torch.int32) if w.zero_fill else torch.full((w.count // 4,), float("nan"))
        )

    def expected() -> list[torch.Tensor]:
        a, b = (made[k].as_strided(v.sizes, v.strides).float() for k, v in enumerate((p.a, p.b)))
        out = a @ b
        if p.bias is not None:
            out = out + made[2].float()
        wanted = [t.clone() for t in made[:count]]
        results = sorted(written)
        if written[results[0]] is torch.float32:
            wanted[int(results[0][1:])] = out.relu().flatten()
        elif len(results) == 1:
            wanted[int(results[0][1:])] = out.half().flatten()
        else:
            residual = made[int(results[0][1:]) - 1].view(batch, m, n).float()
            wanted[int(results[0][1:])] = ((out + residual) * 2).half().flatten()
            wanted[int(results[1][1:])] = out.half().transpose(1, 2).flatten()
        return wanted

    return made, expected


CONFIGS = {
    "tile": ProductConfig(32, 16, 16, warps=2, group=2),
    "split": ProductConfig(16, 32, 16, Method.SPLIT, parts=3, warps=2),
    "split in bunches": ProductConfig(16, 16, 16, Method.SPLIT, parts=4, warps=2, bunch=2),
    "staged": ProductConfig(16, 32, 16, Method.STAGED, parts=3, warps=2, slice=4),
    "stream": ProductConfig(16, 16, 16, Method.STREAM, parts=5, warps=2, group=1),
}
