"""Random numbers from seeds: a function of the seed and of the element's position, so recomputation repeats them."""

from __future__ import annotations

import sympy

from ..ir.index import flat_index
from ..ir.loops import RandomKind
from ..ir.program import View
from .builder import KernelBuilder, Value
from .call_site import CallSite, Operations, lowers
from .pointwise import pointwise_kernel
from .shapes import contiguous_strides


def random_value(builder: KernelBuilder, site: CallSite, kind: RandomKind) -> Value:
    """The number at the current point: seed ``seeds[index]``, offset the row-major position."""
    result, seeds = site.result, site.view("seeds")
    assert isinstance(seeds, View)
    seed = builder.load(seeds, (sympy.sympify(site.size("index")),))
    position = flat_index(builder.outer_coordinates, contiguous_strides(result.sizes))
    return builder.random(kind, seed, builder.index(position), result.dtype)


@lowers("memplan.rand.default")
def _rand(site: CallSite) -> Operations | None:
    return pointwise_kernel(site, site.result, lambda b: random_value(b, site, "rand"))


@lowers("memplan.randn.default")
def _randn(site: CallSite) -> Operations | None:
    return pointwise_kernel(site, site.result, lambda b: random_value(b, site, "randn"))
