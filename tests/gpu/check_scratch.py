"""On a GPU: what library calls take beside their results, as plans count it. ``python -m tests.gpu.check_scratch``.

Each case is compiled, forward and backward, and each of its calls is run alone: what the plan says it takes against the
peak that the allocator counts. Then whole steps in which the call stands at the peak: predicted against measured. About
half a minute. Exits with 1 if a row is off by more than a block for each result, or a step by more than 1 %.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import embedding, scaled_dot_product_attention

import memplan
from benchmarks.prediction import predicted_bytes
from memplan.call_scratch import watched
from memplan.ir.program import Extern
from memplan.lowering.call_site import resolve
from memplan.sampled_calls import sample

BLOCK = 512


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[..., Tensor]
    sizes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.bfloat16


def attention(backend: SDPBackend, *, causal: bool = False, dropout: float = 0.0) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)

    return run


HEADS, ODD = ((4, 16, 2048, 128),) * 3, ((3, 7, 1000, 80),) * 3
CASES = (
    *(
        Case(f"{backend.name.lower()} {name}", attention(backend, causal=causal, dropout=dropout), sizes)
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
        for name, causal, dropout, sizes in (
            ("causal", True, 0.0, HEADS),
            ("odd sizes", False, 0.0, ODD),
            ("dropout", False, 0.1, HEADS),
        )
    ),
    Case("sort", lambda x: x.sort(-1)[0], ((512, 20000),), torch.float32),
    Case("topk", lambda x: x.topk(50, -1)[0], ((512, 20000),), torch.float32),
    Case("cumsum", lambda x: x.cumsum(0), ((4096, 4096),), torch.float32),
    Case("fft", lambda x: torch.fft.fft(x).abs(), ((512, 5000),), torch.float32),
    Case("embedding", lambda w: embedding(torch.arange(65536, device=w.device) % 5000, w), ((5000, 1024),)),
)


def calls(case: Case) -> tuple[list[str], list[str]]:
    """What each watched call is said to take and takes, and what is wrong."""
    torch._dynamo.reset()
    inputs = [torch.randn(s, device="cuda", dtype=case.dtype, requires_grad=True) for s in case.sizes]
    step = torch.compile(lambda *tensors: case.run(*tensors).float().square().sum(), backend="memplan")

    def once() -> None:
        step(*inputs).backward()
        for x in inputs:
            x.grad = None

    with memplan.record() as recording:
        once()
    said, wrong = [], []
    for plan in recording.plans:
        for op in plan.program.operations:
            if isinstance(op, Extern) and watched(op):
                took = alone(op)
                said.append(f"{op.target.split('.')[1]}: {op.scratch} ({took})")
                if isinstance(op.scratch, int) and abs(op.scratch - took) > BLOCK * len(op.results):
                    wrong.append(f"{op.target} is said to take {op.scratch} bytes and takes {took}")
    for name, note in (n for p in recording.plans for n in p.notes):
        if "not counted" in note:
            wrong.append(f"{name}: {note}")
    once()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    once()
    torch.cuda.synchronize()
    measured, predicted = torch.cuda.max_memory_allocated() - before, predicted_bytes(recording.graphs)["predicted"]
    assert isinstance(predicted, int)
    said.append(f"step: predicted {predicted / 1e6:.2f} MB, measured {measured / 1e6:.2f}")
    if abs(predicted - measured) > 0.01 * measured:
        wrong.append("the step's prediction is off")
    return said, wrong


def alone(op: Extern) -> int:
    """The peak of the call beside its results."""
    call, device = resolve(op.target), torch.device(op.device)
    assert call is not None
    args, kwargs = [sample(a, device) for a in op.args], {n: sample(a, device) for n, a in op.kwargs}
    names = [a.name for a in call._schema.arguments]
    args = [0.0 if n == "dropout_p" else a for n, a in zip(names, args, strict=False)]
    with torch.no_grad():
        call(*args, **kwargs)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        torch.cuda.reset_peak_memory_stats()
        results = call(*args, **kwargs)
        peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    flat = results if isinstance(results, tuple) else (results,)
    storages = [r.untyped_storage() for r in flat if isinstance(r, Tensor) and r.is_cuda]
    return int(peak - sum({s.data_ptr(): s.nbytes() for s in storages}.values()))


def main() -> int:
    bad = 0
    for case in CASES:
        try:
            said, wrong = calls(case)
        except Exception as error:  # one case that this card or torch refuses is not to hide the others
            said, wrong = [], [f"{type(error).__name__}: {error}"]
        bad += bool(wrong)
        print(f"{case.name:32} {'WRONG' if wrong else 'ok':6} {'; '.join(said)}")
        for text in wrong:
            print(f"    {text}")
    print(f"{len(CASES)} cases, {bad} wrong")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
