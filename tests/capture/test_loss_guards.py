"""What keeps logits whole, or a call out of their slices: for each condition a model that is wrong without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, nll_loss, pad

import memplan.capture.loss_rewriting as loss_rewriting
from memplan.capture.loss_operators import constant, is_linear, is_pointwise, is_repeatable
from tests.capture.test_chunked_loss import (
    FEATURES,
    TOKENS,
    VOCABULARY,
    assert_sliced,
    assert_whole,
    compare,
    evaluated,
    inputs,
    left_whole,
    small_slices,  # noqa: F401
)
from tests.capture.tracing import traced

aten = torch.ops.aten
BATCH, LENGTH = 4, TOKENS // 4
GENERATOR = torch.Generator().manual_seed(0)
FEEDBACK = torch.rand(VOCABULARY, FEATURES, generator=GENERATOR)
OTHERS = torch.rand(TOKENS, FEATURES, generator=GENERATOR)
MATRIX = torch.rand(TOKENS, VOCABULARY, generator=GENERATOR)
Form = Callable[[Tensor, Tensor], Tensor]


def sequences(logits: Tensor) -> Tensor:
    return logits.view(BATCH, LENGTH, VOCABULARY)


def whole(function: Callable[..., Tensor], why: str) -> None:
    left_whole(function, lambda loss: loss, why)  # type: ignore[arg-type, return-value]


@torch.library.custom_op("memplan_tests::draw", mutates_args=())
def draw(like: Tensor) -> Tensor:
    """Other numbers at each call."""
    return torch.rand(like.shape)


@draw.register_fake
def _(like: Tensor) -> Tensor:
    return torch.empty_like(like, dtype=torch.float32)


# -- tokens that are moved, or mixed ----


def shifted(logits: Tensor, target: Tensor) -> Tensor:
    """RWKV's shift of time: as many tokens, each with what another had."""
    return cross_entropy(pad(sequences(logits), (0, 0, 1, -1)).flatten(0, 1), target)


def largest(logits: Tensor, target: Tensor, other: Tensor) -> Tensor:
    """A figure beside the loss, without a gradient."""
    return cross_entropy(logits, target) + other.detach().amax(-1).mean()


def largest_shifted(logits: Tensor, target: Tensor) -> Tensor:
    return largest(logits, target, pad(sequences(logits), (0, 0, 1, -1)))


def largest_shifted_the_other_way(logits: Tensor, target: Tensor) -> Tensor:
    return largest(logits, target, pad(sequences(logits), (0, 0, -1, 1)))


def largest_of_shifted_words(logits: Tensor, target: Tensor) -> Tensor:
    return largest(logits, target, pad(logits, (1, -1)))


def largest_of_other_padding(logits: Tensor, target: Tensor) -> Tensor:
    return largest(logits, target, pad(sequences(logits)[:, 1:], (0, 0, 1, 0), value=9.0))


def largest_of_padding_elsewhere(logits: Tensor, target: Tensor) -> Tensor:
    """The window's length again, but after it."""
    return largest(logits, target, pad(sequences(logits)[:, 1:], (0, 0, 0, 1)))


def largest_of_shifted_words_in_a_window(logits: Tensor, target: Tensor) -> Tensor:
    return largest(logits, target, pad(sequences(logits)[:, 1:], (1, -1, 1, 0)))


def all_but_a_sequence(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(sequences(logits)[1:].flatten(0, 1), target[LENGTH:])


def every_other_token(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(sequences(logits)[:, ::2].flatten(0, 1), target[::2])


def window_of_blocks(logits: Tensor, target: Tensor) -> Tensor:
    """The second dimension is not that of single tokens."""
    blocks, labels = logits.view(2, 3, 16, VOCABULARY)[:, 1:], target.view(2, 3, 16)[:, 1:]
    return cross_entropy(blocks.flatten(0, 2), labels.flatten())


def less_the_first_of_two(logits: Tensor, target: Tensor) -> Tensor:
    """A window of one token that is broadcast to tokens outside of it."""
    pairs = logits.view(TOKENS // 2, 2, VOCABULARY)
    return cross_entropy((pairs - 0.5 * pairs[:, :1]).flatten(0, 1), target)


def rows_gathered(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target) + logits.gather(0, target.unsqueeze(-1)).square().mean()


def all_summed(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target) + logits.exp().sum((-1, 0)).log()


def largest_of_all(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target) + logits.amax()


def summed_over_tokens(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target) + logits.sum(0).square().mean()


def summed_in_another_type(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target) + logits.square().sum(dtype=torch.float64).float()


def normalized_by_all(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits / logits.detach().square().mean().sqrt(), target)


def normalized_by_the_sequence(logits: Tensor, target: Tensor) -> Tensor:
    losses = cross_entropy(logits, target, reduction="none").view(BATCH, LENGTH)
    return (losses / losses.detach().sum(1, keepdim=True)).mean()


def pseudo_labels(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, logits.argmax(-1))


def matrix_of_a_sequence(logits: Tensor, target: Tensor) -> Tensor:
    """One row of words for all tokens of a sequence."""
    return cross_entropy((sequences(logits) + MATRIX[:BATCH].view(BATCH, 1, VOCABULARY)).flatten(0, 1), target)


def soft_targets_in_a_window(logits: Tensor, target: Tensor) -> Tensor:
    return -(log_softmax(sequences(logits)[:, :-1], -1) * sequences(MATRIX)[:, 1:]).sum(-1).mean()


WHOLE: dict[Form, str] = {
    shifted: "aten.constant_pad_nd",
    largest_shifted: "aten.constant_pad_nd",
    largest_shifted_the_other_way: "aten.constant_pad_nd",
    largest_of_shifted_words: "aten.constant_pad_nd",
    largest_of_other_padding: "aten.constant_pad_nd",
    largest_of_padding_elsewhere: "aten.constant_pad_nd",
    largest_of_shifted_words_in_a_window: "aten.constant_pad_nd",
    all_but_a_sequence: "aten.slice",
    every_other_token: "aten.slice",
    window_of_blocks: "aten.slice",
    less_the_first_of_two: "aten.sub",
    rows_gathered: "aten.gather",
    all_summed: "aten.sum",
    largest_of_all: "aten.amax",
    summed_over_tokens: "aten.sum",
    summed_in_another_type: "aten.sum",
    normalized_by_all: "what all tokens give",
    normalized_by_the_sequence: "not one number times",
    pseudo_labels: "aten.nll_loss_forward",
    matrix_of_a_sequence: "aten.add",
    soft_targets_in_a_window: "aten.mul",
}


@pytest.mark.parametrize("form", WHOLE, ids=lambda f: f.__name__)
def test_whole(form: Form) -> None:
    whole(lambda h, w, t: form(h @ w.t(), t), WHOLE[form])


# -- products ----


def test_a_product_that_scales_what_it_adds_stays_whole() -> None:
    bias = FEEDBACK[:, 0].clone()
    whole(
        lambda h, w, t: cross_entropy(torch.addmm(bias, h, w.t(), beta=0.5, alpha=2.0), t),
        "is scaled",
    )


def test_a_product_that_adds_a_matrix_stays_whole() -> None:
    whole(lambda h, w, t: cross_entropy(torch.addmm(MATRIX, h, w.t()), t), "no bias")


def test_a_product_that_adds_one_number_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not padded as a bias is."""
    monkeypatch.setattr(loss_rewriting, "PADDED_PRODUCTS", ("cpu",))
    one = torch.tensor([0.5])
    whole(lambda h, w, t: cross_entropy(torch.addmm(one, h, w.t()), t), "no bias")


def test_the_products_of_a_matrix_with_itself() -> None:
    """As contrastive losses make them: both of a gradient's products are with the same matrix."""
    hidden = inputs()[0]
    assert_sliced(
        compare(lambda h, t: cross_entropy(h @ h.t(), t), (hidden, torch.arange(TOKENS))), TOKENS * TOKENS * 4
    )


def test_logits_of_one_word_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """One number for each token and one for each word are the same shape, and the padding is no word."""
    monkeypatch.setattr(loss_rewriting, "PADDED_PRODUCTS", ("cpu",))
    hidden = inputs()[0]
    weight, target = FEEDBACK[:1].clone().requires_grad_(), OTHERS[:, 0].clone()
    compiled, found = traced(lambda h, w, t: ((h @ w.t()).squeeze(-1) - t).square().mean(), loss_chunk=64)
    function = lambda h, w, t: ((h @ w.t()).squeeze(-1) - t).square().mean()  # noqa: E731
    for a, b in zip(
        evaluated(compiled, (hidden, weight, target)),  # type: ignore[arg-type]
        evaluated(function, (hidden, weight, target)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len([n for n in found.forward.graph.nodes if n.target is aten.mm.default]) <= 1
    assert found.partitioned.whole_logits == ()


# -- as many words as tokens: what is one for each token has the shape of what is one for each word ----


def less_other_tokens_norm(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits - 0.5 * logits.logsumexp(-1), target)


def less_other_tokens_norm_written_out(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits - 0.5 * logits.logsumexp(-1).expand(TOKENS, TOKENS).clone(), target)


def weighted_by_other_tokens(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target, weight=logits.detach().logsumexp(-1).exp())


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (less_other_tokens_norm, "aten.sub"),
        (less_other_tokens_norm_written_out, "gradient"),
        (weighted_by_other_tokens, "aten.nll_loss_forward"),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_square_logits(form: Form, why: str) -> None:
    hidden, other = OTHERS.clone().requires_grad_(), inputs()[0]
    target = torch.arange(TOKENS).flip(0)
    found = compare(lambda h, w, t: form(h @ w.t(), t), (hidden, other, target))
    assert_whole(found, TOKENS * TOKENS * 4)
    ((_, said),) = found.partitioned.whole_logits
    assert why in said, said


# -- sliced, but for what is made outside ----


def one_hot(logits: Tensor, target: Tensor, base: Tensor, dim: int, index: Tensor, value: float) -> Tensor:
    return -(log_softmax(logits, -1) * base.scatter(dim, index, value)).sum(-1).mean()


def smoothed_by_hand(logits: Tensor, target: Tensor) -> Tensor:
    """Scattered into what is not zero."""
    return one_hot(logits, target, torch.full_like(logits, 0.1 / VOCABULARY), 1, target.unsqueeze(-1), 0.9)


def several_hot(logits: Tensor, target: Tensor) -> Tensor:
    return one_hot(logits, target, torch.zeros_like(logits), 1, torch.stack([target, target.flip(0)], 1), 0.5)


def rows_hot(logits: Tensor, target: Tensor) -> Tensor:
    """Scattered along the tokens."""
    return one_hot(logits, target, torch.zeros_like(logits), 0, target.unsqueeze(-1), 1.0)


def wider_source(logits: Tensor, target: Tensor) -> Tensor:
    """Of the source only the first column is read."""
    source = MATRIX[:, :3].to(logits.dtype)
    weights = torch.zeros_like(logits).scatter_add(1, target.unsqueeze(-1), source)
    return -(log_softmax(logits, -1) * weights).sum(-1).mean()


def flat_targets(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, MATRIX.to(logits.dtype).flatten().square().view(TOKENS, VOCABULARY))


def all_but_the_first(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target, reduction="none")[1:].square().mean()


def losses_as_scores(logits: Tensor, target: Tensor) -> Tensor:
    """A likelihood of what is one number for each token."""
    losses = cross_entropy(logits, target, reduction="none").view(BATCH, LENGTH)
    return nll_loss(losses, target[:BATCH] % LENGTH) + losses.mean()


SLICED: tuple[Form, ...] = (
    smoothed_by_hand,
    several_hot,
    rows_hot,
    wider_source,
    flat_targets,
    all_but_the_first,
    losses_as_scores,
)


@pytest.mark.parametrize("form", SLICED, ids=lambda f: f.__name__)
def test_sliced(form: Form) -> None:
    hidden, weight, _, target = inputs()
    compare(lambda h, w, t: form(h @ w.t(), t), (hidden, weight, target), allowance=16.0)


# -- what operators are ----


def test_operators() -> None:
    """One rejected for each condition, beside what is accepted."""
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    call = graph.call_function
    assert is_pointwise(call(aten.add.Tensor, (x, y)))
    assert not is_pointwise(call(aten.clamp.Tensor, (x,), {"min": y}))  # (operands are looked for in the arguments)
    assert not is_pointwise(call(torch.add, (x, y)))
    assert is_repeatable(call(aten.mm.default, (x, y)))
    assert not is_repeatable(call(aten.rand_like.default, (x,)))
    assert not is_repeatable(call(aten.add_.Tensor, (x, y)))
    assert not is_repeatable(call(torch.ops.memplan_tests.draw.default, (x,)))
    assert not is_repeatable(call(torch.add, (x, y)))
    assert constant(call(aten.full.default, ([2], 3.0))) == 3.0
    assert constant(call(aten.full.default, ([2], x))) is None
    zeros, ones = call(aten.zeros.default, ([2],)), call(aten.ones.default, ([2],))
    assert is_linear(call(aten.constant_pad_nd.default, (x, [0, 1])), [x])
    assert not is_linear(call(aten.constant_pad_nd.default, (x, [0, 1], 1.0)), [x])
    assert is_linear(call(aten.masked_fill.Scalar, (x, y, 0)), [x])
    assert not is_linear(call(aten.masked_fill.Scalar, (x, y, 1)), [x])
    assert not is_linear(call(aten.masked_fill.Scalar, (y, x, 0)), [x])
    for base, source, linear in ((zeros, x, True), (ones, x, False), (x, zeros, False)):
        node = call(aten.scatter_add.default, (base, 1, y, source))
        assert is_linear(node, [x]) is linear
