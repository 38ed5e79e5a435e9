"""What is kept between forward and backward: the user's word first, then fewer bytes than torch's own choice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from memplan.capture.joint import is_view, keep_bytes, must_save
from memplan.ir.config import Config
from memplan.ir.program import Phase
from memplan.lowering.decompositions import decomposition_table
from tests.capture.tracing import Traced, traced
from tests.tolerances import assert_near


def run(function: Callable[..., object], *inputs: Tensor, **options: object) -> Traced:
    """Forward and backward; results and gradients are compared with eager's."""
    compiled, found = traced(function, **options)
    leaves = [t for t in inputs if t.requires_grad]
    answers = []
    for f in (compiled, function):
        out = f(*inputs)
        assert isinstance(out, Tensor)
        answers.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    for a, b in zip(*answers, strict=True):
        assert_near(a, b)
    return found


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def counted(found: Traced, phase: Phase, operator: str) -> int:
    return sum(operator in t for t in found.targets(phase))


def test_a_pointwise_chain_is_computed_again() -> None:
    """From the input, which is alive anyway: nothing is kept."""
    found = run(lambda x: x.sin().exp().tanh().cos(), leaf(16, 16))
    assert found.saved_bytes == 0
    assert found.targets(Phase.BACKWARD).count("aten.tanh.default") == 1


def test_products_are_kept_and_never_done_twice() -> None:
    found = run(lambda x, w, v: torch.tanh((x @ w).exp() @ v), leaf(16, 8), leaf(8, 12), leaf(12, 4))
    # the first product (16 x 12) and the second (16 x 4), or what is made of them
    assert found.saved_bytes == 4 * 16 * (12 + 4)
    assert counted(found, Phase.FORWARD, "aten.mm") == 2
    assert counted(found, Phase.BACKWARD, "aten.mm") == 4


def test_a_normalisation_keeps_its_statistics() -> None:
    norm = nn.LayerNorm(64)
    found = run(lambda x: norm(x).sin(), leaf(32, 64))
    assert found.saved_bytes <= 2 * 32 * 4


def test_the_sum_of_a_residual_is_kept_once() -> None:
    found = run(lambda x, w: (x + x @ w).square() * (x + x @ w).sin(), leaf(16, 16), leaf(16, 16))
    assert found.saved_bytes <= 16 * 16 * 4 * 2


def test_without_recomputation_torchs_own_choice() -> None:
    """``recompute_time=0`` and a disabled pass leave the choice to torch; the numbers stay."""
    for options in ({"recompute_time": 0}, {"disable": ["rematerialize"]}):
        torch._dynamo.reset()
        run(lambda x, w: torch.softmax(x @ w, 1).exp(), leaf(8, 8), leaf(8, 8), **options)


def test_checkpointed_parts_are_computed_again() -> None:
    weights = [leaf(16, 16) for _ in range(3)]

    def block(x: Tensor) -> Tensor:
        for w in weights:
            x = torch.tanh(x @ w)
        return x

    def function(x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False) * 2  # type: ignore[no-any-return]

    found = run(function, leaf(8, 16))
    # products of a checkpointed part are computed again (the last one's result is in the output's hand)
    assert counted(found, Phase.FORWARD, "aten.mm") == 3
    assert counted(found, Phase.BACKWARD, "aten.mm") >= 3 + 2
    assert found.saved_bytes <= 8 * 16 * 4


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE])
def test_a_policy_that_saves_products(policy: CheckpointPolicy) -> None:
    weights = [leaf(16, 16) for _ in range(3)]

    def block(x: Tensor) -> Tensor:
        for w in weights:
            x = torch.tanh(x @ w)
        return x

    def choose(context: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return policy if operator is torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, choose)

    def function(x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False, context_fn=contexts) * 2  # type: ignore[no-any-return]

    found = run(function, leaf(8, 16))
    assert counted(found, Phase.BACKWARD, "aten.mm") == 6
    assert found.saved_bytes == 3 * 8 * 16 * 4


def test_recompute_policies_are_followed() -> None:
    """Everything is recomputed, products too; what enters is what is kept."""
    w = leaf(16, 16)

    def choose(context: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, choose)

    def function(x: Tensor) -> Tensor:
        block = lambda t: torch.tanh(torch.tanh(t @ w) @ w)  # noqa: E731
        return checkpoint(block, x.exp(), use_reentrant=False, context_fn=contexts) * 2  # type: ignore[no-any-return]

    found = run(function, leaf(8, 16))
    assert found.saved_bytes <= 8 * 16 * 4
    assert counted(found, Phase.BACKWARD, "aten.mm") >= 4 + 1


def test_dynamic_sizes_are_kept_too() -> None:
    compiled, found = traced(lambda x, w: torch.softmax(x @ w, 1).view(-1, 2).exp(), dynamic=True)
    w = leaf(4, 6)
    for rows in (5, 9):
        x = leaf(rows, 4)
        out = compiled(x, w)
        assert isinstance(out, Tensor)
        ours = torch.autograd.grad(out.sum(), (x, w))
        expected = torch.autograd.grad(torch.softmax(x @ w, 1).exp().sum(), (x, w))
        for a, b in zip(ours, expected, strict=True):
            assert_near(a, b)
    assert found.saved_bytes > 0


def node(function: Callable[..., object], *inputs: Tensor) -> torch.fx.Node:
    """The last call of a traced function."""
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function, tracing_mode="fake")(*inputs).graph
    return [n for n in graph.nodes if n.op == "call_function"][-1]


def test_views_take_no_bytes_of_their_own() -> None:
    view = node(lambda x: x.view(-1), torch.randn(4, 4))
    assert is_view(view)
    assert keep_bytes(view) is None
    view.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    assert must_save(view)
    assert keep_bytes(view) == 64.0
    assert not is_view(node(lambda x: x.add_(1), torch.randn(4)))
    part = node(lambda x: x.split(2)[1], torch.randn(4))
    assert is_view(part)


def default_saved_bytes(function: Callable[..., Tensor], *inputs: Tensor) -> int:
    """Bytes of distinct storages that torch's default partitioner keeps, parameters and inputs aside."""
    found: list[torch.fx.GraphModule] = []
    outputs: list[int] = []

    def forward(module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        found.append(module)
        return module

    def partition(joint: torch.fx.GraphModule, args: object, *, num_fwd_outputs: int, **kwargs: object) -> object:
        outputs.append(num_fwd_outputs)
        return torch._functorch.partitioners.default_partition(joint, args, num_fwd_outputs=num_fwd_outputs, **kwargs)

    backend = aot_autograd(
        fw_compiler=forward, bw_compiler=lambda m, _: m, partition_fn=partition,
        decompositions=decomposition_table(Config()),
    )  # fmt: skip
    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=False)(*inputs)
    given = {n.meta["val"].untyped_storage()._cdata for n in found[0].graph.find_nodes(op="placeholder")}
    kept = {}
    for n in found[0].graph.output_node().args[0][outputs[0] :]:  # type: ignore[union-attr, index]
        value = n.meta["val"] if isinstance(n, torch.fx.Node) else None
        if isinstance(value, Tensor) and value.untyped_storage()._cdata not in given:
            kept[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    return sum(kept.values())


def test_gpt2_keeps_at_most_six_tenths_of_torchs_default() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=64, n_head=4, vocab_size=97, n_positions=32, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.0,
        use_cache=False,
    )  # fmt: skip
    model = transformers.GPT2Model(config).train()
    ids = torch.randint(0, 97, (4, 32))

    def function(i: Tensor) -> Tensor:
        return model(input_ids=i).last_hidden_state  # type: ignore[no-any-return]

    theirs = default_saved_bytes(function, ids)
    torch._dynamo.reset()
    compiled, found = traced(function)
    compiled(ids)
    assert found.saved_bytes <= 0.6 * theirs, f"{found.saved_bytes} of {theirs}"


def test_results_of_equal_calls_are_tensors_of_their_own() -> None:
    """Torch makes one of two equal calls; parts of what it returns are two results all the same."""

    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sorted_rows = x.sort(1).values
        return sorted_rows, x.sort(1).values, sorted_rows[1:]

    x = torch.randn(3, 4, requires_grad=True)
    torch._dynamo.reset()
    first, second, part = torch.compile(function, backend="memplan")(x)
    assert first.data_ptr() != second.data_ptr()
    assert part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    (first * second).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())
