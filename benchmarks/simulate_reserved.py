"""What the CUDA caching allocator would reserve for a training step, without a GPU.

    python -m benchmarks.simulate_reserved [model ...] [--pools auto|always|never] [--recompute-time F] [--json FILE]

The models are those of the GPU cases at their full size; image models are transformers' versions of the architectures.
They are traced on fake CPU tensors and planned for an H100 (option ``target``). The step is simulated three times
over, with parameters and batch resident. Convolutions are taken to be cuDNN's, as on an H100 in half
precision, and to write into planned buffers; their scratch, which only a GPU can tell, is not in it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memplan import convolutions
from memplan.analysis import analyze
from memplan.convolutions import Facts
from memplan.ir.config import Config
from memplan.ir.plan import Plan
from memplan.ir.program import BufferKind, Contract, Extern
from memplan.passes.reserved import StepMemory, optimizer_step_memory, step_memory
from memplan.target import DEVICE

from .models import BERT_LARGE, BF16, F32, LLAMA, Batch, Classifier, bert, gpt2, images, llama, tokens


def _vision(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Classifier(make(), amp=True, device="cpu")


def _resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return _channels_last(ResNetForImageClassification(ResNetConfig(num_labels=1000)))


def _channels_last(model: nn.Module) -> nn.Module:
    """What convolutions of half-precision networks get on a GPU, and not where they are traced on a CPU."""
    for module in model.modules():  # `to` cannot change fake parameters in place
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(module.weight.detach().contiguous(memory_format=torch.channels_last))
    return model


def _vit_large() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, num_labels=1000,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def _convnext_base() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[128, 256, 512, 1024], depths=[3, 3, 27, 3], num_labels=1000)
    return _channels_last(ConvNextForImageClassification(config))


def _efficientnet_b3() -> nn.Module:
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    config = EfficientNetConfig(
        width_coefficient=1.2, depth_coefficient=1.4, image_size=288, hidden_dim=1536, dropout_rate=0.0,
        drop_connect_rate=0.0, num_labels=1000,
    )  # fmt: skip
    return _channels_last(EfficientNetForImageClassification(config))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "gpt2": (gpt2(BF16), tokens(50257, 16, 1024)),
    "llama-0.9b": (llama(BF16, **LLAMA), tokens(32000, 4, 2048)),
    "bert-large": (bert(BF16, **BERT_LARGE), tokens(30522, 16, 512)),
    "vit-l16": (_vision(_vit_large), images(64, 224, dtype=F32)),
    "resnet50": (_vision(_resnet50), images(256, 224, channels_last=True)),
    "convnext-b": (_vision(_convnext_base), images(64, 224, channels_last=True)),
    "efficientnet-b3": (_vision(_efficientnet_b3), images(64, 288, channels_last=True)),
    "resnet50-inference": (_vision(_resnet50), images(256, 224, channels_last=True)),
    "vit-l16-inference": (_vision(_vit_large), images(256, 224, dtype=F32)),
}


@dataclass(frozen=True)
class Row:
    """One model's step in bytes, parameters and batch included: ``bound`` is the peak of live bytes and ``own`` what is
    reserved with every storage its own allocation; ``planned`` and ``reserved`` are those of the plans. The same for
    steps of two accumulated passes and AdamW, and ``once_*`` of one pass and AdamW, 0 for inference. ``fresh``: bytes
    of temporaries and saved tensors that calls allocate themselves, by operator, gradients and other results not among
    them."""

    model: str
    bound: int
    own: int
    planned: int
    reserved: int
    seconds: float
    updated_bound: int
    updated_planned: int
    updated_reserved: int
    once_bound: int
    once_reserved: int
    fresh: dict[str, int]

    @property
    def ratio(self) -> float:
        return self.reserved / self.bound


def cudnns(op: Extern, config: Config) -> Facts:
    """A convolution as if cuDNN took it and needed no scratch."""
    return Facts(convolutions.CUDNN, 0, True)


def plans_of(model: str, options: dict[str, object]) -> tuple[list[Plan], dict[str, str]]:
    """The forward's and the backward's plan, and what the backward takes over from the forward."""
    build, batch = MODELS[model]
    training = not model.endswith("-inference")
    with torch.device("meta"):
        module = build().train(training)  # a fake module could not be converted to another dtype or layout
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill(module)
        given = batch()
        with mock.patch.object(convolutions, "facts_of", cudnns):
            graphs = analyze(module, given, options={"target": "h100", **options}, backward=training)
    joins = {later: earlier for g in graphs for earlier, later in g.joins}
    return [g.plan for g in graphs], joins


def fill(module: nn.Module) -> None:
    """Put fake CPU tensors in the place of parameters and buffers on the meta device; shared ones stay shared."""
    made: dict[int, torch.Tensor] = {}

    def of(t: torch.Tensor) -> torch.Tensor:
        if id(t) not in made:
            empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")
            made[id(t)] = nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty
        return made[id(t)]

    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = of(tensor)  # type: ignore[assignment]


def unpooled(plan: Plan) -> Plan:
    """The plan with each storage its own allocation: the bound on what must be alive."""
    from memplan.ir.plan import InPlaceOf
    from memplan.passes.schedule import make_plan

    pairs = {b: p.buffer for b, p in plan.placements.items() if isinstance(p, InPlaceOf)}
    return make_plan(plan.program, plan.order, in_place=pairs)


def row(model: str, options: dict[str, object]) -> Row:
    started = time.perf_counter()
    plans, joins = plans_of(model, options)
    found: StepMemory = step_memory(plans, joins, device=DEVICE)
    bound = step_memory([unpooled(p) for p in plans], joins, device=DEVICE)
    updated = updated_bound = once = once_bound = StepMemory(0, 0, 0)
    if len(plans) > 1:
        own = [unpooled(p) for p in plans]
        updated, updated_bound = (optimizer_step_memory(p, joins, device=DEVICE) for p in (plans, own))
        once, once_bound = (optimizer_step_memory(p, joins, device=DEVICE, passes=1) for p in (plans, own))
    return Row(
        model, bound.live, bound.reserved, found.live, found.reserved, time.perf_counter() - started,
        updated_bound.live, updated.live, updated.reserved, once_bound.live, once.reserved, fresh_bytes(plans),
    )  # fmt: skip


def fresh_bytes(plans: Sequence[Plan]) -> dict[str, int]:
    """Bytes that calls allocate themselves though no result of the program lies there, by operator."""
    found: Counter[str] = Counter()
    for plan in plans:
        leaving = {plan.storage_of(b) for b in plan.program.output_buffers if b in plan.placements}
        saved = {n for n, b in plan.program.buffers.items() if b.kind is BufferKind.SAVED}
        for op in plan.program.operations:
            if isinstance(op, Extern) and op.contract in (Contract.FRESH, Contract.DYNAMIC):
                for name in dict.fromkeys(v.buffer for v in op.results if v is not None):
                    if plan.storage_of(name) not in leaving or name in saved:
                        found[op.target] += plan.program.nbytes(name)
    return dict(found.most_common())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--pools", default="auto", choices=("auto", "always", "never"))
    parser.add_argument("--recompute-time", type=float, help="the option's value, where not the default")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    rows = []
    print("GB; the live bound and the first column of reserved bytes are those of own allocations")
    print()
    columns = ("own allocations / bound", "chosen live / bound", "chosen reserved / bound")
    updated_columns = ("with AdamW: bound", "live / bound", "reserved / bound", "one pass: reserved / bound", "s")
    print(f"| {' | '.join(('model', 'max-live bound', *columns, *updated_columns))} |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for model in given.models:
        share = {} if given.recompute_time is None else {"recompute_time": given.recompute_time}
        r = row(model, {"pools": given.pools, **share})
        rows.append(r)
        cells = [f"{r.bound / 1e9:.3f}", *(f"{n / r.bound:.3f}" for n in (r.own, r.planned, r.reserved))]
        updated = [f"{n / r.updated_bound:.3f}" for n in (r.updated_planned, r.updated_reserved) if r.updated_bound]
        updated += [f"{r.once_reserved / r.once_bound:.3f}"] if r.once_bound else []
        cells += [f"{r.updated_bound / 1e9:.3f}", *updated] if updated else ["", "", "", ""]
        print(f"| {' | '.join([model, *cells, f'{r.seconds:.0f}'])} |", flush=True)
    print()
    for r in rows:
        texts = [f"{target} {nbytes / 1e9:.3f}" for target, nbytes in r.fresh.items() if nbytes > 1e6]
        print(f"- {r.model}, allocated by calls themselves, GB in all: {', '.join(texts) or 'nothing'}")
    if given.json:
        given.json.write_text(json.dumps([asdict(r) | {"ratio": r.ratio} for r in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
