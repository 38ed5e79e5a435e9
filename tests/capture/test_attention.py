"""Masks that say nothing are dropped, causal ones become a flag, and whatever depends on data is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attention

from memplan.capture.attention import Simplified, simplify_masks
from tests.tolerances import assert_near

L, D = 8, 4
NOTHING = Simplified(0, 0)


def simplified(function: Callable[..., object], *inputs: Tensor) -> tuple[Simplified, torch.fx.GraphModule]:
    """What was made of the masks in the Dynamo graph; its results are compared with eager's."""
    found: list[tuple[Simplified, torch.fx.GraphModule]] = []

    def backend(module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        found.append((simplify_masks(module), module))
        return module

    ours = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    expected = function(*inputs)
    assert isinstance(ours, Tensor)
    assert isinstance(expected, Tensor)
    assert_near(ours, expected)
    assert len(found) == 1
    return found[0]


def qkv(rows: int = L) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 3, rows, D), torch.randn(2, 3, L, D), torch.randn(2, 3, L, D)


def calls(module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [n for n in module.graph.nodes if "scaled_dot_product" in str(n.target)]


def test_a_mask_that_is_all_true_is_dropped() -> None:
    found, module = simplified(lambda q, k, v: attention(q, k, v, torch.ones(L, L, dtype=torch.bool)), *qkv())
    assert found == Simplified(1, 0)
    assert [(n.kwargs.get("attn_mask"), n.kwargs.get("is_causal")) for n in calls(module)] == [(None, False)]
    # nothing of the mask is left
    assert not [n for n in module.graph.nodes if n.target is torch.ones]


def test_what_changes_its_argument_stays_when_a_mask_is_dropped() -> None:
    """Nothing reads the results of these calls, yet each has an effect: a wrong answer if one went."""

    def function(q: Tensor, k: Tensor, v: Tensor, held: Tensor) -> Tensor:
        held, chosen = held.clone(), torch.zeros(L, L)
        chosen.scatter_(1, held[:, None], 1.0)
        chosen[0] = 2.0
        torch.add(chosen, 1.0, out=chosen)
        held.add_(1)
        torch.func.vmap(lambda row: row.mul_(2.0))(chosen)
        return attention(q, k, v, torch.ones(L, L, dtype=torch.bool)).sum() + chosen.cumsum(0) + held

    found, _ = simplified(function, *qkv(), torch.arange(L).flip(0) // 2)
    assert found == Simplified(1, 0)


def test_a_causal_mask_becomes_a_flag() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(L, L, dtype=torch.bool).tril()
        return attention(q, k, v, attn_mask=mask[None, None], scale=0.3)

    found, module = simplified(function, *qkv())
    assert found == Simplified(0, 1)
    assert [(n.kwargs["is_causal"], n.kwargs["scale"]) for n in calls(module)] == [(True, 0.3)]


def test_a_causal_mask_by_comparing_positions() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(L, device=q.device)
        return attention(q, k, v, at[None, :] <= at[:, None])

    assert simplified(function, *qkv())[0] == Simplified(0, 1)


def test_one_mask_for_several_calls() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(L, L, dtype=torch.bool).tril()
        return attention(attention(q, k, v, mask), k, v, mask)

    assert simplified(function, *qkv())[0] == Simplified(0, 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(L, L, dtype=torch.bool).tril(-1) | torch.eye(L, dtype=torch.bool).roll(1, 0),
        lambda: torch.ones(L, L, dtype=torch.bool).tril(1),
        lambda: torch.ones(L, L, dtype=torch.bool).triu(),
        lambda: torch.ones(L, L, dtype=torch.bool).tril() & torch.ones(L, L, dtype=torch.bool).triu(-3),
    ],
    ids=["rolled", "one ahead", "upper", "window"],
)
def test_other_constant_masks_are_left(make: Callable[[], Tensor]) -> None:
    assert simplified(lambda q, k, v: attention(q, k, v, make()), *qkv())[0] == NOTHING


def test_a_float_mask_is_left() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.zeros(L, L).masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), float("-inf"))
        return attention(q, k, v, mask)

    assert simplified(function, *qkv())[0] == NOTHING


def test_a_mask_that_is_causal_over_fewer_queries_is_left() -> None:
    """``is_causal`` counts from the first key; one query of a cache is the last."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(L)
        return attention(q, k, v, at[None, :] <= at[-3:, None])

    assert simplified(function, *qkv(3))[0] == NOTHING


def test_a_mask_of_the_data_is_left() -> None:
    """All true for this input, not for the next."""

    def function(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        return attention(q, k, v, padding[:, None, None, :].expand(2, 1, L, L))

    padding = torch.ones(2, L, dtype=torch.bool)
    assert simplified(function, *qkv(), padding)[0] == NOTHING


def test_a_mask_that_is_an_input_itself_is_left() -> None:
    """Nothing stands between the input, or an attribute of the module, and the call."""
    mask = torch.ones(L, L, dtype=torch.bool)
    assert simplified(lambda q, k, v, m: attention(q, k, v, m), *qkv(), mask)[0] == NOTHING

    class Held(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, self.mask)

    assert simplified(Held(), *qkv())[0] == NOTHING


def test_a_mask_that_is_changed_in_place_is_left() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(L, L, dtype=torch.bool)
        mask[2:, 5] = False
        return attention(q, k, v, mask)

    assert simplified(function, *qkv())[0] == NOTHING


def test_a_mask_changed_through_a_view_is_left() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(L, L, dtype=torch.bool)
        mask.view(-1)[3:9].logical_not_()
        return attention(q, k, v, mask)

    assert simplified(function, *qkv())[0] == NOTHING


def test_a_random_mask_is_left() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, torch.rand(L, L) >= 0.0)

    assert simplified(function, *qkv())[0] == NOTHING


def test_attention_without_a_mask_is_untouched() -> None:
    found, module = simplified(lambda q, k, v: attention(q, k, v, is_causal=True), *qkv())
    assert found == NOTHING
    assert len(calls(module)) == 1


def transformer(name: str) -> tuple[torch.nn.Module, Tensor]:
    """A small model whose masks transformers builds with vmap."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 31,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    if name == "llama":
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=32, use_cache=False)
        return transformers.LlamaModel(config), torch.randint(0, 31, (2, 9))
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=31, n_positions=32, use_cache=False)
        return transformers.GPT2Model(config), torch.randint(0, 31, (2, 9))
    return transformers.BertModel(transformers.BertConfig(**sizes)), torch.randint(0, 31, (2, 9))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_masks_of_transformers_say_nothing(name: str) -> None:
    """Two layers: no mask is left in the graph, and the two calls are causal where the model is."""
    model, ids = transformer(name)
    model.eval()
    with torch.no_grad():
        _, module = simplified(lambda i: model(input_ids=i).last_hidden_state, ids)
    found = calls(module)
    assert len(found) == 2
    for node in found:
        assert node.kwargs.get("attn_mask") is None
        assert bool(node.kwargs.get("is_causal")) == (name != "bert")


def test_padding_of_transformers_is_kept() -> None:
    """Padded rows mask by data: the mask stays, and so do the numbers."""
    model, ids = transformer("llama")
    padding = torch.ones_like(ids)
    padding[0, :4] = 0

    def function(i: Tensor, mask: Tensor) -> Tensor:
        return model.eval()(input_ids=i, attention_mask=mask).last_hidden_state  # type: ignore[no-any-return]

    with torch.no_grad():
        found, module = simplified(function, ids, padding)
    assert found == NOTHING
    assert all(n.kwargs.get("attn_mask") is not None for n in calls(module))
