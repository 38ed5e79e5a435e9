"""Budgets of a training step on an H100, by simulation: which are met, how much of each is used, what stands at the least.

    python -m benchmarks.simulate_budgets [model ...] [--count 20] [-o FILE.md]

Each model is planned for an H100 that need not be there (option ``target``) under ``--count`` budgets, at equal ratios
from the least that a plan of its step needs to what the fastest one needs, and under half of the least. A budget's bytes
are those that the caching allocator reserves beyond parameters and batch, three steps through the simulated allocator;
nothing is measured. Searches share the plans of the rungs that they try, as they would make the same ones; what each
tries and takes is as if it were alone.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import memplan
import memplan.backend
from memplan import convolutions
from memplan.budget import RUNGS, Budget, Modules, Planned
from memplan.ir.errors import PlanningError

from .budget_table import DISTINCT
from .models import BF16, F32, LLAMA, Batch, bert, gpt2, images, llama, tokens
from .simulate_reserved import MODELS as FULL
from .simulate_reserved import cudnns, fill

#: Part of the budget that should be used where there is something to use it for.
USED = 0.95

#: The architectures of the GPU cases; of those whose planning takes long, fewer or smaller layers.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "gpt2": FULL["gpt2"],
    "gpt2, no dropout": (gpt2(BF16, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0), tokens(50257, 16, 1024)),
    "llama, 8 of 16 layers": (llama(BF16, **{**LLAMA, "num_hidden_layers": 8}), tokens(32000, 4, 2048)),
    "bert, 8 of 24 layers": (
        bert(BF16, hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, intermediate_size=4096),
        tokens(30522, 16, 512),
    ),
    "vit-l16": (FULL["vit-l16"][0], images(64, 224, dtype=F32)),
    "resnet50": FULL["resnet50"],
    "convnext-b": FULL["convnext-b"],
}


@dataclass(frozen=True)
class Found:
    """One search: its limit, the rung that it took and what that needs, and the time that recomputation adds in it.

    ``above``: the least bytes of a rung that does not fit, and how many rungs lie between it and the one taken.
    """

    limit: int
    rung: int
    needed: int
    live: int
    microseconds: float
    above: int | None
    between: int
    planned: int

    @property
    def used(self) -> float:
        return self.needed / self.limit

    @property
    def explained(self) -> bool:
        """Whether enough is used, or there is no plan to use the rest with: the next one does not fit."""
        return self.used >= USED or self.above is None or self.between == 0


@dataclass
class Shared:
    """What searches over one graph share: the plans of rungs, by rung."""

    tried: dict[int, tuple[Modules, Planned]] = field(default_factory=dict)
    found: list[Found] = field(default_factory=list)
    ends: tuple[int, int, float] | None = None
    error: str = ""
    #: microseconds of the step without recomputation
    step: float = 0.0


class Sweeping(Budget):
    """A search that goes through all budgets when it is asked for one."""

    count = 20
    shared = Shared()

    def search(self) -> Modules:
        shared = self.shared
        most = self.peak(RUNGS)
        least = self.peak(0)
        for share in range(self.count):
            # halving reaches every rung or its neighbours, so a search finds less than rung 0 where there is any
            limit = math.ceil(least * (max(most, least) / least) ** (share / (self.count - 1)))
            shared.found.append(self.one(limit))
        try:
            self.one(least // 2)
        except PlanningError as error:
            shared.error = str(error)
        assert self._choices is not None
        shared.step = self._choices.menus.segments.graph.microseconds
        return self._tried[RUNGS][0]

    def one(self, limit: int) -> Found:
        """Search as if nothing had been planned before."""
        alone = Alone(limit, self.figures, self.cut, self.plan, self._choices)
        alone.known = self._tried
        taken = alone.search()
        needs = {n: p.peak.needed for n, (_, p) in alone._tried.items()}
        rung = next(n for n, (modules, _) in alone._tried.items() if modules is taken)
        over = {n: size for n, size in needs.items() if size > limit}
        above = min(over.values(), default=None)
        between = 0
        if over:
            next_rung = min(over, key=lambda n: (over[n], n))
            between = max(0, next_rung - max(n for n in needs if needs[n] == needs[rung]) - 1)
        planned = alone._tried[rung][1].peak
        time_added = self.choice(rung).microseconds
        return Found(limit, rung, planned.needed, planned.nbytes, time_added, above, between, len(needs))


class Alone(Budget):
    """A search that takes plans that another has made already."""

    known: dict[int, tuple[Modules, Planned]]

    def peak(self, rung: int) -> int:
        if rung in self.known:
            self._tried[rung] = self.known[rung]
        needed = super().peak(rung)
        self.known[rung] = self._tried[rung]
        return needed


def sweep(model: str, count: int) -> tuple[Shared, float]:
    """All budgets of a model, and the seconds that they took."""
    build, batch = MODELS[model]
    begin = time.perf_counter()
    Sweeping.shared, Sweeping.count = Shared(), count
    with torch.device("meta"):
        module = build().train()
    patch = mock.patch.object
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill(module)
        given = batch()
        with patch(memplan.backend, "Budget", Sweeping), patch(convolutions, "facts_of", cudnns):
            memplan.analyze(module, given, options={"target": "h100", "budget": 2**60})
    return Sweeping.shared, time.perf_counter() - begin


def distinct(found: Sequence[Found]) -> int:
    """Peaks that differ by more than `DISTINCT`."""
    peaks = sorted({f.needed for f in found})
    groups = 0
    last = 0.0
    for peak in peaks:
        if peak > last * (1 + DISTINCT):
            groups, last = groups + 1, peak
    return groups


def falls(found: Sequence[Found]) -> list[Found]:
    """Budgets whose plan needs less than that of a smaller one."""
    ordered = sorted(found, key=lambda f: f.limit)
    return [b for a, b in itertools.pairwise(ordered) if b.needed < a.needed]
