"""All ranks of a process group compare what they are about to do, through the group's store.

Not by a collective: a rank that has other plans, or none, must not be met with data. Each rank writes its text under a
number that counts the agreements of the group, and reads the others'. The wait for them has an end.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import weakref
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from ..ir.errors import CommunicationError
from .process_groups import group_timeout

#: in place of the text of a rank that waits no more
_GONE = "gave up"
_counts: weakref.WeakKeyDictionary[dist.ProcessGroup, itertools.count[int]] = weakref.WeakKeyDictionary()


def store_of(group: dist.ProcessGroup) -> PrefixStore:
    """The group's store under a prefix of ours."""
    from torch.distributed.distributed_c10d import _get_process_group_store

    return PrefixStore("memplan", _get_process_group_store(group))


def exchange(group: dist.ProcessGroup, what: str, text: str, seconds: float | None = None) -> list[str]:
    """The texts of all ranks, by rank.

    Raises
    ------
    CommunicationError
        If a rank does not come in time, naming it.
    """
    return _gather(group, next(_counts.setdefault(group, itertools.count())), what, text, seconds)


def agree(
    group: dist.ProcessGroup, what: str, lines: Sequence[str], extra: str, seconds: float | None, hint: str = ""
) -> list[str]:
    """Compare ``lines`` with those of all ranks; the ranks' ``extra`` by rank.

    The lines themselves are read only where the hashes differ.

    Parameters
    ----------
    hint:
        What else to say to the user if a rank does not come.

    Raises
    ------
    CommunicationError
        Naming the first rank that differs from rank 0 and the first line.
    """
    text = "\n".join(lines)
    number = next(_counts.setdefault(group, itertools.count()))
    store_of(group).set(f"{number}/text/{group.rank()}", text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    found = [json.loads(t) for t in _gather(group, number, what, json.dumps([digest, extra]), seconds, hint)]
    for rank, (other, _) in enumerate(found):
        if other != found[0][0]:
            raise CommunicationError(_difference(group, number, rank, what))
    return [str(e) for _, e in found]


def _gather(
    group: dist.ProcessGroup, number: int, what: str, text: str, seconds: float | None, hint: str = ""
) -> list[str]:
    seconds = group_timeout(group) if seconds is None else seconds
    store, mine = store_of(group), group.rank()
    store.set(f"{number}/{mine}", text)
    found = []
    for rank in range(group.size()):
        key = f"{number}/{rank}"
        try:
            store.wait([key], timedelta(seconds=seconds))
        except (RuntimeError, ValueError) as error:
            with contextlib.suppress(RuntimeError):  # the store itself may have gone: then nobody reads there
                store.set(f"{number}/{mine}", _GONE)
            raise CommunicationError(
                f"rank {rank} of process group {group.group_name!r} did not come to {what} within {seconds:g} s; rank "
                f"{mine} waits for it. Every rank of a group has to compile and call the same programs in the same "
                "order; options={'communication': {'timeout': ...}} waits longer, {'agree': False} does not compare"
                f"{hint}"
            ) from error
        told = store.get(key).decode()
        if told == _GONE:
            raise CommunicationError(
                f"rank {rank} of process group {group.group_name!r} waited for the others and gave up before rank "
                f"{mine} came to {what}. It has said which rank it missed, and in which program"
            )
        found.append(told)
    return found


def _difference(group: dist.ProcessGroup, number: int, rank: int, what: str) -> str:
    store = store_of(group)
    first, other = (store.get(f"{number}/text/{k}").decode().split("\n") for k in (0, rank))
    place = next((k for k, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), min(len(first), len(other)))
    here, there = (t[place] if place < len(t) else "nothing more" for t in (first, other))
    return (
        f"rank {rank} of process group {group.group_name!r} has other plans than rank 0 for {what}: rank 0 has "
        f"{here!r}, rank {rank} has {there!r} (line {place}). Nothing has been sent. The ranks must run the same model "
        "on the same shapes, with the same options and versions"
    )
