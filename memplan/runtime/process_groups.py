"""Process groups by name, and the one order in which all ranks go through several of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist


def resolve(group: str) -> dist.ProcessGroup | None:
    """The process group of this name, None if there is none (any more)."""
    from torch.distributed import distributed_c10d

    if not dist.is_initialized():
        return None
    try:
        return distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type]
    except (RuntimeError, ValueError, KeyError):
        return None


def in_common_order(groups: Iterable[str]) -> tuple[str, ...]:
    """Names of groups, sorted so that ranks which wait for one another in group after group never wait in a cycle.

    The order is by the members' global ranks and then by name, which all members know alike, so it is a part of one
    total order of all groups. A rank that waits in group ``g`` for rank ``s`` waits for one that has not come to ``g``,
    so that waits, if at all, in a group before ``g``; along a chain of waiting ranks the groups fall, and no chain
    closes. (Across programs the same holds of pairs of program and group, as all ranks run programs in one order.) In
    the order in which a rank's program names them it would not: with meshes of tensor and data parallelism, four ranks
    can each wait in one's row for who waits in its column. Groups that do not exist come first.
    """

    def place(name: str) -> tuple[tuple[int, ...], str]:
        group = resolve(name)
        return () if group is None else tuple(sorted(dist.get_process_group_ranks(group))), name

    return tuple(sorted(groups, key=place))


def group_timeout(group: dist.ProcessGroup) -> float:
    """Seconds until torch gives up a collective of the group."""
    from torch.distributed.distributed_c10d import _get_default_timeout, default_pg_timeout

    for name in ("cuda", "cpu"):
        try:
            options = group._get_backend(torch.device(name)).options
            return float(options._timeout.total_seconds())
        except (RuntimeError, AttributeError):
            continue
    try:
        return float(_get_default_timeout(dist.get_backend(group)).total_seconds())
    except (RuntimeError, ValueError):
        return float(default_pg_timeout.total_seconds())
