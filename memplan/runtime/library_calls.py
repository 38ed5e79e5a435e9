"""Calls of a group's library that torch has in one form only: an all-to-all into a given buffer, waited for later.

``memplan.library_all_to_all.out(input, group, out=)`` takes dense tensors in as many equal parts as there are ranks;
``_c10d_functional.wait_tensor(out)`` waits for it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..ir.errors import CommunicationError
from .peers import LIBRARY
from .process_groups import resolve


def _all_to_all(input: Tensor, group_name: str, *, out: Tensor) -> Tensor:
    group = resolve(group_name)
    if group is None:
        raise CommunicationError(f"process group {group_name!r} does not exist (any more): compile again")
    work = dist.all_to_all_single(out, input, group=group, async_op=True)
    torch._C._distributed_c10d._register_work(out, work)
    return out


if not hasattr(torch.ops.memplan, "library_all_to_all"):
    _schema = "library_all_to_all.out(Tensor input, str group_name, *, Tensor(a!) out) -> Tensor(a!)"
    LIBRARY.define(_schema)  # type: ignore[no-untyped-call]
    LIBRARY.impl("library_all_to_all.out", _all_to_all, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
