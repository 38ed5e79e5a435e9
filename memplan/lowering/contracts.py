"""What an ATen call does with memory, by operator and device.

The schema says which calls mutate and which return aliases, the operator's tags which results have a size that is
known only afterwards. Whether an ``out=`` overload writes into what it is given, or allocates its result and copies,
no schema says: about half of them do the latter (those are registered as composites), and some of the others take
scratch of the result's size. `NATIVE_OUT` is the list of those that were watched on the allocator and allocate
nothing; everything else returns a fresh allocation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..ir.program import Contract
from .call_site import resolve

#: operator -> its overload that writes into given buffers. Watched: see tests/lowering/test_contracts.py. Matrices
#: must be ones that BLAS can take as they lie (a stride of 1, the other at least the row): else a copy is made. On a
#: CPU with matrix units, oneDNN packs half operands into scratch of its own; on a GPU nothing is allocated (H100).
NATIVE_OUT: dict[str, str] = {
    "aten.mm.default": "aten.mm.out",
    "aten.addmm.default": "aten.addmm.out",
    "aten.bmm.default": "aten.bmm.out",
    "aten.baddbmm.default": "aten.baddbmm.out",
}

#: watched on the CPU only; on a GPU they take scratch
NATIVE_OUT_CPU: dict[str, str] = {
    "aten.addmv.default": "aten.addmv.out",
    "aten.cumsum.default": "aten.cumsum.out",
    "aten.cumprod.default": "aten.cumprod.out",
    "aten.igamma.default": "aten.igamma.out",
    "aten.igammac.default": "aten.igammac.out",
    "aten.polygamma.default": "aten.polygamma.out",
    "aten.bucketize.Tensor": "aten.bucketize.Tensor_out",
    "aten.searchsorted.Tensor": "aten.searchsorted.Tensor_out",
    "aten.max_pool3d_with_indices.default": "aten.max_pool3d_with_indices.out",
}

#: exist on a GPU only: half-precision factors, a float32 result
NATIVE_OUT_CUDA: dict[str, str] = {
    "aten.mm.dtype": "aten.mm.dtype_out",
    "aten.addmm.dtype": "aten.addmm.dtype_out",
}

#: collectives that write into a given buffer: what they return is still in flight
COMMUNICATION_OUT: dict[str, str] = {
    "_c10d_functional.all_gather_into_tensor.default": "_c10d_functional.all_gather_into_tensor_out.default",
    "_c10d_functional.reduce_scatter_tensor.default": "_c10d_functional.reduce_scatter_tensor_out.default",
}

#: views whose schemas do not say so
UNMARKED_ALIASES = frozenset({"aten._unsafe_view.default", "aten._reshape_alias.default", "aten.lift_fresh.default"})

#: results of unknown size whose tags do not say so
UNMARKED_DYNAMIC = frozenset({"aten._unique2.default", "aten.unique_consecutive.default", "aten.unique_dim.default"})


@dataclass(frozen=True, slots=True)
class ContractInfo:
    """The contract, and for OUT the overload to call."""

    contract: Contract
    out_target: str | None = None


FRESH = ContractInfo(Contract.FRESH)


@lru_cache(maxsize=8192)
def contract(target: str, device: str) -> ContractInfo:
    """What a call of ``target`` (``namespace.name.overload``) does with memory on ``device`` (``cpu``, ``cuda:0``).

    An operator that nobody knows (a higher-order one) is taken to return fresh allocations.
    """
    overload = resolve(target)
    if not isinstance(overload, torch._ops.OpOverload):
        return FRESH
    if target in UNMARKED_ALIASES:
        return ContractInfo(Contract.ALIAS)
    schema = overload._schema
    if schema.is_mutable:
        return ContractInfo(Contract.MUTATE)
    if schema.returns and all(r.alias_info is not None for r in schema.returns):
        return ContractInfo(Contract.ALIAS)
    dynamic = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    if target in UNMARKED_DYNAMIC or dynamic & set(overload.tags):
        return ContractInfo(Contract.DYNAMIC)
    out = NATIVE_OUT.get(target) or COMMUNICATION_OUT.get(target)
    if out is None and device.startswith("cpu"):
        out = NATIVE_OUT_CPU.get(target)
    if out is None and device.startswith("cuda"):
        out = NATIVE_OUT_CUDA.get(target)
    if out is None or resolve(out) is None:
        return FRESH
    return ContractInfo(Contract.OUT, out)


def is_composite_out(out_target: str) -> bool:
    """Whether the dispatcher's kernel for this ``out=`` overload is the generated one, which allocates and copies."""
    namespace, name, overload = out_target.split(".")
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        f"{namespace}::{name}.{overload}", "CompositeExplicitAutograd"
    )
