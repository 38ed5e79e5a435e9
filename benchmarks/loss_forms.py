"""Forms of loss over logits of GPT-2's size on a GPU: memplan, which makes them in slices, beside eager.

    python -m benchmarks.loss_forms

For each form: milliseconds of forward and backward, the peak of live bytes above inputs and weight, the loss, and how
far the gradients of hidden states and weight are from eager's, as a part of their norm.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

TOKENS, FEATURES, WORDS = 16384, 768, 50257
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def policy(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """A clipped policy gradient."""
    taken = log_softmax(logits, -1).gather(-1, target[:, None]).squeeze(-1)
    ratio = (taken + 10.8).exp()
    return -torch.min(ratio * mask, ratio.clamp(0.8, 1.2) * mask).sum() / mask.sum()


FORMS: dict[str, Form] = {
    "cross entropy": lambda logits, target, _: cross_entropy(logits, target),
    "label smoothing": lambda logits, target, _: cross_entropy(logits, target, label_smoothing=0.1),
    "z-loss": lambda logits, target, _: cross_entropy(logits, target) + 1e-4 * logits.logsumexp(-1).square().mean(),
    "masked, per token": lambda logits, target, mask: (
        (cross_entropy(logits, target, reduction="none") * mask).sum() / mask.sum()
    ),
    "policy gradient": policy,
}


def measured(step: Callable[[], Tensor], leaves: tuple[Tensor, Tensor], count: int) -> tuple[float, float, float]:
    """Milliseconds, megabytes at the peak, and the loss; the last step's gradients stay."""

    def run() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        loss = step()
        loss.backward()
        return loss

    for _ in range(3):
        loss = run()
    torch.cuda.synchronize()
    for leaf in leaves:
        leaf.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    for _ in range(count):
        loss = run()
    torch.cuda.synchronize()
    spent = (time.perf_counter() - begin) / count * 1e3
    return spent, (torch.cuda.max_memory_allocated() - before) / 1e6, float(loss)


def main() -> None:
    torch.manual_seed(0)
    hidden = (torch.randn(TOKENS, FEATURES, device="cuda") * 0.5).bfloat16().requires_grad_()
    weight = (torch.randn(WORDS, FEATURES, device="cuda") * 0.05).bfloat16().requires_grad_()
    target = torch.randint(0, WORDS, (TOKENS,), device="cuda")
    mask = (torch.rand(TOKENS, device="cuda") > 0.3).float()
    print("| form | memplan ms | MB | eager ms | MB | loss | eager's | gradients off, hidden | weight |")
    print("|---" * 9 + "|")
    for name, form in FORMS.items():

        def loss_of(h: Tensor, w: Tensor, form: Form = form) -> Tensor:
            return form((h @ w.t()).float(), target, mask)

        torch._dynamo.reset()
        compiled = torch.compile(loss_of, backend="memplan")
        found, gradients = [], []
        for call, count in ((compiled, 10), (loss_of, 3)):
            found.append(measured(lambda call=call: call(hidden, weight), (hidden, weight), count))  # type: ignore[misc]
            gradients.append([leaf.grad.float() for leaf in (hidden, weight) if leaf.grad is not None])
        ours, eager = found
        off = [float((a - b).norm() / b.norm()) for a, b in zip(*gradients, strict=True)]
        steps = f"{ours[0]:.2f} | {ours[1]:.0f} | {eager[0]:.2f} | {eager[1]:.0f}"
        print(f"| {name} | {steps} | {ours[2]:.6f} | {eager[2]:.6f} | {off[0]:.1e} | {off[1]:.1e} |")


if __name__ == "__main__":
    main()
