"""What four ranks run on a mesh of two rows and two columns, as tensor and data parallelism make one."""

from __future__ import annotations

from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn

import memplan
from memplan import communicating
from memplan.ir.errors import CommunicationError
from memplan.runtime.arenas import arenas
from memplan.runtime.process_groups import in_common_order
from tests.distributed.shared_memory import shared_files
from tests.distributed.symmetric_cases import targets
from tests.tolerances import assert_near

ROWS, COLUMNS = ([0, 1], [2, 3]), ([0, 2], [1, 3])


def own_groups() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's row and column."""
    found = []
    for lines in (ROWS, COLUMNS):
        made = [dist.new_group(members) for members in lines]
        found.append(next(g for g, members in zip(made, lines, strict=True) if dist.get_rank() in members))
    return found[0], found[1]  # type: ignore[return-value]


class Sums(nn.Module):
    """A sum over each of two groups; neither waits for the other."""

    def __init__(self, *groups: dist.ProcessGroup) -> None:
        super().__init__()
        self.first, self.second = groups

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.sin(x), torch.cos(x)
        a = collectives.all_reduce(a, "sum", self.first)
        b = collectives.all_reduce(b, "sum", self.second)
        return a * 2 + b


def crossed(common: bool) -> str:
    """Neighbours name their groups in opposite orders; what the error says, "" if there is none.

    Without a ``common`` order ranks 0, 1, 3 and 2 each wait for the next in the group that they name first.
    """
    row, column = own_groups()
    groups = (row, column) if dist.get_rank() in (0, 3) else (column, row)
    x = torch.arange(8.0) + dist.get_rank()
    options = {"communication": {"timeout": 30.0 if common else 2.0, "overlap_bytes": 1 << 20}}
    compiled = torch.compile(Sums(*groups), backend="memplan", options=options)
    order = mock.patch.object(communicating, "in_common_order", in_common_order if common else tuple)
    try:
        with order, torch.no_grad():
            found = compiled(x)
    except CommunicationError as error:
        dist.barrier()
        return str(error)
    a, b = x.sin(), x.cos()
    for work in [dist.all_reduce(t, group=g, async_op=True) for t, g in zip((a, b), groups, strict=True)]:
        work.wait()
    assert_near(found, a * 2 + b, "sums over a row and a column")
    return ""


def two_arenas(folder: str) -> tuple[list[str], int]:
    """Symmetric memory in both groups, which grows in both: targets, and arenas with memory."""
    row, column = own_groups()
    with shared_files(folder), torch.no_grad(), memplan.record() as recording:
        options = {"communication": {"all_reduce": "one_shot"}, "poison": True}
        compiled = torch.compile(Sums(row, column), backend="memplan", dynamic=False, options=options)
        for count in (8, 512, 8):
            x = torch.arange(float(count)) + dist.get_rank()
            a, b = x.sin(), x.cos()
            dist.all_reduce(a, group=row)
            dist.all_reduce(b, group=column)
            assert_near(compiled(x), a * 2 + b, "sums over a row and a column")
        names = {row.group_name, column.group_name}
        held = sum(a.memory is not None and a.group in names for a in arenas())
        return targets(recording.plans[0]), held
