"""Gradients that keep logits whole: of another product, not linear in the tangent, or of what cannot be made twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.capture.test_chunked_loss import (
    SLICE,
    TOKENS,
    VOCABULARY,
    assert_whole,
    inputs,
    small_slices,  # noqa: F401
)
from tests.capture.test_loss_guards import BATCH, FEEDBACK, LENGTH, OTHERS, draw, sequences, whole
from tests.capture.tracing import traced


class Linear(torch.autograd.Function):
    """A product with gradients of its own."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(hidden, weight)
        return hidden @ weight.t()


class FeedbackAlignment(Linear):
    """Lillicrap et al. (2016): the gradient goes back through a matrix of its own."""

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def, override]
        hidden, _ = ctx.saved_tensors
        return dy @ FEEDBACK.to(dy.dtype), dy.t() @ hidden


class OtherActivations(Linear):
    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def, override]
        _, weight = ctx.saved_tensors
        return dy @ weight, dy.t() @ OTHERS.to(dy.dtype)


class OtherActivationsTurned(Linear):
    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def, override]
        _, weight = ctx.saved_tensors
        return dy @ weight, (OTHERS.to(dy.dtype).t() @ dy).t()


class ScaledActivations(Linear):
    """No product of two matrices."""

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def, override]
        hidden, weight = ctx.saved_tensors
        return dy @ weight, torch.addmm(weight, dy.t(), hidden, alpha=0.5)


@pytest.mark.parametrize("layer", [FeedbackAlignment, OtherActivations, OtherActivationsTurned])
def test_a_gradient_in_a_foreign_product_stays_whole(layer: type[Linear]) -> None:
    whole(lambda h, w, t: cross_entropy(layer.apply(h, w), t), "into another product")


def test_a_gradient_in_a_product_with_a_sum_stays_whole() -> None:
    whole(lambda h, w, t: cross_entropy(ScaledActivations.apply(h, w), t), "aten.addmm")


class OtherHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, both: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(both, weight)
        return both[:TOKENS] @ weight.t()

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def, override]
        both, weight = ctx.saved_tensors
        return torch.cat([dy @ weight, dy @ weight]), dy.t() @ both[TOKENS:]


def test_a_gradient_in_a_product_with_another_part_of_the_same_memory_stays_whole() -> None:
    def function(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(OtherHalf.apply(torch.cat([h, h * 2]), w), t)

    whole(function, "into another product")


# -- gradients that are not linear in the tangent, or go elsewhere ----


class Through(torch.autograd.Function):
    """The identity, with a gradient of its own: ``kind`` names one of `GRADIENTS`."""

    @staticmethod
    def forward(ctx, logits: Tensor, kind: str) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.kind = kind
        ctx.save_for_backward(logits)
        return logits * 1.0

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def, override]
        (logits,) = ctx.saved_tensors
        return GRADIENTS[ctx.kind](dy, logits), None


GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "clipped": lambda dy, x: dy.clamp(-1e-3, 1e-3),
    "squared": lambda dy, x: dy * dy,
    "times itself": lambda dy, x: dy * dy.neg(),
    "over itself": lambda dy, x: dy / dy,
    "over its size": lambda dy, x: dy / (dy.neg() + 2.0),
    "more by one": lambda dy, x: dy + 1.0,
    "less a known matrix": lambda dy, x: dy - x,
    "one where negative": lambda dy, x: torch.where(x > 0, dy, 1.0),
    "where itself is positive": lambda dy, x: torch.where(dy > 0, dy, 0.0),
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_gradient_that_is_not_linear_in_the_tangent_stays_whole(kind: str) -> None:
    whole(
        lambda h, w, t: cross_entropy(Through.apply(h @ w.t(), kind), t),
        "not one number times",
    )


class Bias(torch.autograd.Function):
    """A bias whose gradient is another one: ``kind`` names one of `BIAS_GRADIENTS`."""

    @staticmethod
    def forward(ctx, logits: Tensor, bias: Tensor, kind: str) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.kind = kind
        return logits + bias

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def, override]
        return dy, BIAS_GRADIENTS[ctx.kind](dy), None


BIAS_GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda dy: dy.amax(0),
    "all": lambda dy: dy.sum((0, 1)).expand(VOCABULARY),
    "of sequences": lambda dy: sequences(dy).sum(0).mean(0),
}


@pytest.mark.parametrize("kind", BIAS_GRADIENTS)
def test_a_gradient_that_is_reduced_otherwise_stays_whole(kind: str) -> None:
    def function(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(Bias.apply(h @ w.t(), w.sum(1), kind), t)  # type: ignore[no-untyped-call]

    whole(function, "aten.")


def test_a_bias_of_the_window_stays_whole() -> None:
    def function(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        logits = sequences(h @ w.t())[:, :-1].flatten(0, 1) + w.sum(1)
        return cross_entropy(logits, t.view(BATCH, LENGTH)[:, 1:].flatten())

    whole(function, "aten.sum")


# -- calls that cannot be repeated ----


@pytest.mark.parametrize("drawn", [lambda t: torch.rand(t.shape), draw], ids=["random", "of a user"])
def test_a_call_that_cannot_be_repeated_stays_after_the_losses(drawn: Callable[[Tensor], Tensor]) -> None:
    """It comes after the first reader of the losses, and slices would need its result before."""

    def function(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        losses = cross_entropy(h @ w.t(), t, reduction="none")
        first = losses.mean()
        weights = drawn(t)
        return first + (losses * weights).sum(), weights

    hidden, weight, _, target = inputs()
    compiled, found = traced(function, loss_chunk=SLICE)
    loss, weights = compiled(hidden, weight, target)  # type: ignore[misc]
    ours = torch.autograd.grad(loss, (hidden, weight))
    losses = cross_entropy(hidden @ weight.t(), target, reduction="none")
    eager = losses.mean() + (losses * weights).sum()
    torch.testing.assert_close(loss, eager)
    for a, b in zip(ours, torch.autograd.grad(eager, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert_whole(found)
    ((_, said),) = found.partitioned.whole_logits
    assert "cannot be made before them" in said, said
