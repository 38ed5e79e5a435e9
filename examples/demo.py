"""The main job: GPT-2 (random weights, nothing is downloaded) compiled, trained, checked against eager, reported.

Run it with ``make demo``. On a GPU it is the 124M model at full size; on a CPU a smaller one of the same architecture.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

import memplan

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
BATCH, LENGTH = (8, 1024) if GPU else (4, 128)
STEPS = 5


def make_model() -> nn.Module:
    """GPT-2 without dropout, so that two runs can be compared number by number."""
    torch.manual_seed(0)
    size = {} if GPU else {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 8192, "n_positions": 256}
    config = GPT2Config(
        **size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    return model.to(DEVICE, DTYPE).train()


def loss_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What is compiled: a function that returns the loss alone, so that the logits can die inside."""
    return lambda tokens: model(input_ids=tokens, labels=tokens).loss


def train(model: nn.Module, loss_function: Callable[[Tensor], Tensor], tokens: Tensor) -> list[float]:
    """A few steps of AdamW; returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(STEPS):
        loss = loss_function(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def peak_of(
    model: nn.Module, loss_function: Callable[[Tensor], Tensor], tokens: Tensor
) -> tuple[int, int | None, float]:
    """(live peak above what was there before, reserved, milliseconds) of one forward and backward."""

    def step() -> None:
        loss_function(tokens).backward()
        model.zero_grad(set_to_none=True)

    step()
    begin = time.perf_counter()
    step()
    if GPU:
        torch.cuda.synchronize()
    milliseconds = (time.perf_counter() - begin) * 1e3
    if GPU:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved(), milliseconds
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as seen:
        step()
    live = peak = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak, None, milliseconds


def main() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    eager_model, model = make_model(), make_model()
    tokens = torch.randint(0, eager_model.config.vocab_size, (BATCH, LENGTH), device=DEVICE)  # type: ignore[union-attr, arg-type]
    count = sum(p.numel() for p in model.parameters())
    print(f"GPT-2, {count / 1e6:.1f} million parameters, {DTYPE}, {BATCH} x {LENGTH} tokens on {DEVICE}")

    begin = time.perf_counter()
    with memplan.record() as recording:
        compiled = torch.compile(loss_of(model), backend="memplan")
        compiled(tokens).backward()
        model.zero_grad(set_to_none=True)
    print(f"compiled in {time.perf_counter() - begin:.1f} s (forward and backward)\n")

    expected = train(eager_model, loss_of(eager_model), tokens)
    losses = train(model, compiled, tokens)
    print("step   eager loss   memplan loss")
    for step, (a, b) in enumerate(zip(expected, losses, strict=True)):
        print(f"{step:4d}   {a:10.5f}   {b:12.5f}")
    off = max(abs(a - b) / abs(a) for a, b in zip(expected, losses, strict=True))
    allowed = 2e-2 if DTYPE is torch.bfloat16 else 1e-3
    if off > allowed:
        raise SystemExit(f"the losses differ by {off:.1e}, more than {allowed:.0e}")
    print(f"largest relative difference {off:.1e} (at most {allowed:.0e} allowed)\n")

    report = memplan.report(recording)
    rows = [
        ("eager", *peak_of(eager_model, loss_of(eager_model), tokens)),
        ("memplan", *peak_of(model, compiled, tokens)),
    ]
    print("one forward and backward   live peak, MB   reserved, MB       ms")
    for name, peak, reserved, milliseconds in rows:
        held = f"{reserved / 1e6:.1f}" if reserved is not None else "(no GPU)"
        print(f"{name:24}   {peak / 1e6:13.1f}   {held:>12}   {milliseconds:6.1f}")
    print(f"predicted before the run   {max(report.report.predicted.values()) / 1e6:13.1f}\n")
    print(report)


if __name__ == "__main__":
    main()
