"""Budgets of a training step on an H100, by simulation: which are met, how much of each is used, and what is the least.

    python -m benchmarks.simulate_budgets [model ...] [--count 20] [-o FILE.md]

Each model is planned for an H100 that need not be there (option ``target``) under ``--count`` budgets, at equal ratios
from the least that a plan of its step needs to what the fastest one needs, and under half of the least. A budget's
bytes are those that the caching allocator reserves beyond parameters and batch, three steps through the simulated
allocator; nothing is measured. "With AdamW": the same of steps that update the parameters after one pass or after two
accumulated ones, beyond the optimiser's states and the gradients that are held besides: a budget does not promise
those. Searches share the plans of the rungs that they try, as they would make the same ones; what each tries and takes
is as if it were alone.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
from memplan.ir.program import View
from memplan.passes.reserved import optimizer_step_memory
from memplan.target import DEVICE

from .budget_table import DISTINCT
from .models import BF16, F32, LLAMA, Batch, Classifier, bert, gpt2, images, llama, tokens
from .simulate_reserved import MODELS as FULL
from .simulate_reserved import cudnns, fill

#: Part of the budget that should be used where there is something to use it for.
USED = 0.95
HEAD = "| model | budgets | over | falling | distinct | >= 95 % used | less, next is over | less, others | least used |"
SEARCH_HEAD = (
    "| budget MB | needed MB | used | live MB | rung | next MB | added us | of the step | AdamW | two passes | plans |"
)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "intermediate_size": 4096}
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return Classifier(ViTForImageClassification(ViTConfig(num_labels=1000, **shape, **plain)), amp=True)


def _convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    shape = ConvNextConfig(hidden_sizes=[128, 256, 512, 1024], depths=[2, 2, 6, 2], num_labels=1000)
    return Classifier(ConvNextForImageClassification(shape), amp=True)


#: The architectures of the GPU cases; of those whose planning takes long, fewer or smaller layers.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "llama, 8 of 16 layers": (llama(BF16, **{**LLAMA, "num_hidden_layers": 8}), tokens(32000, 4, 2048)),
    "gpt2, 6 of 12 layers, no dropout": (
        gpt2(BF16, n_layer=6, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0),
        tokens(50257, 16, 1024),
    ),
    "bert, 4 of 24 layers": (
        bert(BF16, hidden_size=1024, num_hidden_layers=4, num_attention_heads=16, intermediate_size=4096),
        tokens(30522, 16, 512),
    ),
    "vit, 8 of 24 layers": (_vit, images(64, 224, dtype=F32)),
    "convnext, 12 of 36 blocks": (_convnext, images(64, 224)),
    "resnet50": FULL["resnet50"],
}


@dataclass(frozen=True)
class Found:
    """One search: its limit, the rung that it took and what that needs, and the time that recomputation adds in it.

    ``above``: what the first rung above it that was tried and does not fit needs; ``between``: rungs between the two.
    """

    limit: int
    rung: int
    needed: int
    live: int
    microseconds: float
    above: int | None
    between: int
    planned: int
    updated: tuple[int, int]

    @property
    def used(self) -> float:
        return self.needed / self.limit

    @property
    def explained(self) -> bool:
        """Whether enough is used, or there is no plan to use the rest with: the next one does not fit."""
        return self.used >= USED or self.above is None or self.between == 0


@dataclass
class Shared:
    """What came of a model's searches."""

    found: list[Found] = field(default_factory=list)
    error: str = ""
    #: microseconds of the step without recomputation
    step: float = 0.0


class Sweeping(Budget):
    """A search that goes through all budgets when it is asked for one."""

    count = 20
    shared = Shared()

    @cached_property
    def updates(self) -> dict[int, tuple[int, int]]:
        """`updated` of rungs that were taken."""
        return {}

    def search(self) -> tuple[Modules, Planned]:
        shared = self.shared
        most = self.peak(RUNGS)
        least = self.peak(0)
        for share in range(self.count):
            limit = math.ceil(least * (max(most, least) / least) ** (share / (self.count - 1)))
            shared.found.append(self.one(limit))
        try:
            self.one(least // 2)
        except PlanningError as error:
            shared.error = str(error)
        shared.step = self._choices[self.cut.loss_chunks[0]].menus.segments.graph.microseconds
        return self._tried[RUNGS]

    def one(self, limit: int) -> Found:
        """Search as if nothing had been planned before."""
        alone = Alone(limit, self.figures, self.cut, self.plan, self._choices, self._chunks, self._chosen, self._kept)
        alone.known = self._tried
        taken, _ = alone.search()
        needs = {n: p.peak.needed for n, (_, p) in alone._tried.items()}
        rung = next(n for n, (modules, _) in alone._tried.items() if modules is taken)
        over = min((n for n, size in needs.items() if size > limit and n > rung), default=None)
        above, between = (None, 0) if over is None else (needs[over], over - rung - 1)
        planned = alone._tried[rung][1]
        time_added = self.choice(rung).microseconds
        peak, after = planned.peak, self.updates.setdefault(rung, (0, 0))
        if after == (0, 0):
            after = self.updates[rung] = (updated(planned, 1), updated(planned, 2))
        made = len({id(planned) for _, planned in alone._tried.values()})
        return Found(limit, rung, peak.needed, peak.nbytes, time_added, above, between, made, after)


class Alone(Budget):
    """A search that takes plans that another has made already."""

    known: dict[int, tuple[Modules, Planned]]

    def tried(self, rung: int) -> tuple[Modules, Planned]:
        if rung in self.known:
            self.choice(rung)
            self._tried[rung] = self.known[rung]
        self.known[rung] = super().tried(rung)
        return self.known[rung]


def updated(planned: Planned, passes: int) -> int:
    """Bytes reserved in steps of some passes and AdamW, beyond parameters, batch, states and gradients held besides."""
    program = planned.plans[-1].program
    made = {v.buffer for v in program.outputs if isinstance(v, View) and v.buffer in planned.plans[-1].lifetimes}
    gradients = sum(map(program.nbytes, made))
    found = optimizer_step_memory(planned.plans, planned.joins, device=DEVICE, passes=passes)
    return found.reserved - found.resident - (2 + passes - 1) * gradients


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


def verdict(model: str, found: Sequence[Found]) -> str:
    """What a model's budgets say of the promises."""
    over = sum(f.needed > f.limit for f in found)
    used = sum(f.used >= USED for f in found)
    open_ = [f for f in found if not f.explained]
    return (
        f"| {model} | {len(found)} | {over} | {len(falls(found))} | {distinct(found)} | {used} | "
        f"{len(found) - used - len(open_)} | {len(open_)} | {min(f.used for f in found):.3f} |"
    )


def details(model: str, shared: Shared, seconds: float) -> list[str]:
    """A model's searches, and the error below the least."""
    columns = [
        *("budget MB", "needed MB", "used", "live MB", "rung", "next MB"),
        *("added us", "of the step", "AdamW", "two passes", "plans"),
    ]
    lines = [f"## {model}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for f in shared.found:
        above = "" if f.above is None else f"{f.above / 1e6:.1f}" + (f", {f.between} between" if f.between else "")
        lines.append(
            f"| {f.limit / 1e6:.1f} | {f.needed / 1e6:.1f} | {f.used:.3f} | {f.live / 1e6:.1f} | {f.rung} | {above} "
            f"| {f.microseconds:.0f} | {f.microseconds / shared.step:.3f} "
            f"| {f.updated[0] / f.limit:.3f} | {f.updated[1] / f.limit:.3f} | {f.planned} |"
        )
    said = [re.sub(r"\S*/site-packages/", "", line) for line in shared.error.splitlines()]
    return [*lines, "", f"Half of the least ({seconds:.0f} s for all of this model):", "", "```", *said, "```", ""]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args(arguments)
    summary, pages = [HEAD, "|---" * 9 + "|"], []
    for model in given.models:
        shared, seconds = sweep(model, given.count)
        summary.append(verdict(model, shared.found))
        pages += details(model, shared, seconds)
        print("\n".join(details(model, shared, seconds)), flush=True)
        if given.output:
            title = ["# Budgets on an H100, simulated", "", (__doc__ or "").strip().split("\n\n", 2)[2], ""]
            given.output.write_text("\n".join([*title, *summary, "", *pages]))
    print("\n".join(summary))


if __name__ == "__main__":
    main()
