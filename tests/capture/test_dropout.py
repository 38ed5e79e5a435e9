"""Random numbers from seeds: the same again in the backward, of the right distribution, equal in every form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from memplan.capture import operators
from memplan.capture.dropout import seed_random
from memplan.ir.program import Phase
from memplan.lowering.lower import lower_program
from tests.capture.tracing import traced
from tests.program_runner import run_program


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


# -- the generator ------------------------------------------------------------------------------------------------


def test_known_answers_of_philox() -> None:
    """The vectors published with Random123 for philox2x32-10: zeros, all ones, and digits of pi."""
    for key, low, high, word in (
        (0, 0, 0, 0xFF1DAE59),
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0x2C3F628B),
        (0x13198A2E, 0x243F6A88, 0x85A308D3, 0xDD7CE038),
    ):
        # an offset has no sign, so that the counter's high word comes from the seed's here
        seed = key | (high << 32)
        seed -= (seed >> 63) << 64
        assert operators.philox(torch.tensor(seed), torch.tensor([low])).tolist() == [word]


def plain_philox(seed: int, offset: int) -> int:
    """Philox 2x32-10 as its paper has it, in Python's integers."""
    first, second, key = offset & 0xFFFFFFFF, (offset ^ seed) >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF
    for _ in range(10):
        product = first * 0xD256D193
        first, second = product >> 32 ^ key ^ second, product & 0xFFFFFFFF
        key = (key + 0x9E3779B9) & 0xFFFFFFFF
    return first


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 7, 2**63 - 1, -1, -(2**63)])
def test_philox_is_philox(seed: int) -> None:
    offsets = [0, 1, 2, 1000, 2**31, 2**32 - 1, 2**32, 2**40 + 3]
    found = operators.philox(torch.tensor(seed), torch.tensor(offsets))
    assert found.tolist() == [plain_philox(seed % 2**64, o) for o in offsets]


def test_numbers_lie_in_the_unit_interval() -> None:
    words = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
    found = operators.uniform(words)
    assert found.dtype is torch.float32
    assert bool(((found >= 0) & (found < 1)).all())


def test_numbers_are_uniform() -> None:
    """A chi-square test over 100 bins, and no correlation of neighbours."""
    seeds = torch.ops.memplan.seeds(2, device=torch.device("cpu"))
    x, y = (torch.ops.memplan.rand(seeds, k, [100_000]) for k in range(2))
    for values in (x, y):
        counts = torch.histc(values, 100, 0.0, 1.0)
        assert float(((counts - 1000) ** 2 / 1000).sum()) < 99 + 5 * math.sqrt(2 * 99)
    for a, b in ((x, y), (x[1:], x[:-1])):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.02


def test_seeds_follow_the_generator() -> None:
    cpu = torch.device("cpu")
    torch.manual_seed(3)
    first, second = torch.ops.memplan.seeds(4, device=cpu), torch.ops.memplan.seeds(4, device=cpu)
    torch.manual_seed(3)
    assert torch.equal(first, torch.ops.memplan.seeds(4, device=cpu))
    assert not torch.equal(first, second)
    assert len(set(torch.cat([first, second]).tolist())) == 8


# -- dropout on the joint graph -----------------------------------------------------------------------------------


def check_gradient(p: float, x: Tensor, out: Tensor) -> Tensor:
    """The gradient of a sum is the mask over what is kept; returns the mask."""
    (gradient,) = torch.autograd.grad(out.sum(), x)
    kept = out.detach() != 0
    torch.testing.assert_close(gradient, kept / (1 - p), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.detach(), x.detach() * kept / (1 - p), rtol=1e-6, atol=0)
    return kept


def test_the_backward_repeats_the_forwards_mask() -> None:
    compiled, found = traced(lambda x: nn.functional.dropout(x, 0.3, True))
    x = torch.ones(64, 100, requires_grad=True)
    kept = check_gradient(0.3, x, compiled(x))  # type: ignore[arg-type]
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=5 * math.sqrt(0.21 / 6400))
    # what is kept is a seed, not the mask
    assert found.saved_bytes <= 16
    again = compiled(x)
    assert isinstance(again, Tensor)
    assert not torch.equal(again.detach() != 0, kept)


def test_each_dropout_has_numbers_of_its_own() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.dropout(x, 0.5, True), nn.functional.dropout(x, 0.5, True)

    a, b = traced(function)[0](torch.ones(1000, requires_grad=True))  # type: ignore[misc]
    assert 0.4 < float(((a != 0) == (b != 0)).float().mean()) < 0.6


def test_the_same_seed_gives_the_same_step() -> None:
    compiled, _ = traced(lambda x: nn.functional.dropout(x, 0.5, True))
    x = leaf(100)
    outs = []
    for _ in range(2):
        torch.manual_seed(11)
        outs.append(compiled(x))
    assert torch.equal(outs[0], outs[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_probabilities_at_the_ends(p: float) -> None:
    compiled, _ = traced(lambda x: nn.functional.dropout(x, p, True))
    x = leaf(50)
    out = compiled(x)
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out, nn.functional.dropout(x, p, True))


def test_half_precision_and_symbolic_sizes() -> None:
    compiled, _ = traced(lambda x: nn.functional.dropout(x, 0.25, True), dynamic=True)
    for rows in (30, 47):
        x = torch.ones(rows, 20, dtype=torch.bfloat16, requires_grad=True)
        out = compiled(x)
        assert isinstance(out, Tensor)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(gradient != 0, out != 0)
        assert out.dtype is torch.bfloat16


def test_under_user_checkpointing_the_mask_is_the_same() -> None:
    def block(x: Tensor) -> Tensor:
        return nn.functional.dropout(x.square(), 0.4, True)

    def function(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)  # type: ignore[no-any-return]

    compiled, _ = traced(function)
    x = torch.ones(40, 50, requires_grad=True)
    out = compiled(x)
    assert isinstance(out, Tensor)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, 2 * (out.detach() != 0) / 0.6, rtol=1e-6, atol=0)


def test_eagers_numbers_and_generator() -> None:
    """``random="eager"``: the same numbers, and the generator is left where eager leaves it."""

    def function(x: Tensor) -> Tensor:
        y = nn.functional.dropout(x, 0.3, True) + torch.rand_like(x)
        return nn.functional.dropout(y * torch.randn(7), 0.6, True)

    compiled, _ = traced(function, random="eager")
    x = leaf(9, 7)
    results = []
    for f in (function, compiled):
        torch.manual_seed(5)
        out = f(x)
        assert isinstance(out, Tensor)
        results.append((out, torch.autograd.grad(out.square().sum(), x)[0], torch.rand(3)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_graphs_without_dropout_are_untouched() -> None:
    graph = torch.fx.Graph()
    graph.output(graph.placeholder("x"))
    assert seed_random(torch.fx.GraphModule(torch.nn.Module(), graph)) == 0


def test_the_order_of_random_calls_is_kept() -> None:
    """They are effects: one stays after the other in every graph."""
    compiled, found = traced(lambda x: (torch.rand(3) * x, torch.randn(3), torch.rand(3)), random="eager")
    torch.manual_seed(1)
    ours = compiled(torch.ones(3))
    torch.manual_seed(1)
    expected = (torch.rand(3), torch.randn(3), torch.rand(3))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))  # type: ignore[call-overload]
    program = found.programs[Phase.INFERENCE]
    effects = [op.name for op in program.operations if getattr(op, "effect", False)]
    assert len(effects) == 3
    for before, after in itertools.pairwise(effects):
        assert before in program.dependencies[after]


def test_kernels_give_the_operators_numbers() -> None:
    """What the lowering makes of ``memplan::rand`` gives, element for element, what the operator gives."""
    compiled, found = traced(lambda x: nn.functional.dropout(x, 0.3, True))
    x = torch.ones(6, 5, requires_grad=True)
    compiled(x)
    program = found.programs[Phase.FORWARD]
    lowered = lower_program(program, found.config)
    assert "memplan.rand.default" not in [getattr(op, "target", "") for op in lowered.operations]
    results = []
    for form in (program, lowered):
        torch.manual_seed(2)
        results.append(run_program(form, [x.detach()])[0])
    assert torch.equal(*results)  # type: ignore[arg-type]


# -- the user's own random numbers ----------------------------------------------------------------------------------


def drawn(kind: str, x: Tensor, p: float) -> Tensor:
    match kind:
        case "rand":
            return (torch.rand(x.shape[0], x.shape[1]) < p).to(x.dtype)
        case "rand_like":
            return (torch.rand_like(x, dtype=torch.float32) < p).to(x.dtype)
        case _:
            return torch.empty_like(x).bernoulli_(p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rand", "rand_like", "bernoulli_"])
def test_masks_of_the_users_own_are_made_again_from_a_seed(kind: str, dtype: torch.dtype) -> None:
    compiled, found = traced(lambda x: x * drawn(kind, x, 0.7))
    x = torch.ones(64, 100, dtype=dtype, requires_grad=True)
    out = compiled(x)
    assert isinstance(out, Tensor)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, out.detach())
    assert set(out.detach().unique().tolist()) == {0.0, 1.0}
    assert float(out.detach().float().mean()) == pytest.approx(0.7, abs=5 * math.sqrt(0.21 / 6400))
    assert found.saved_bytes <= 16
    assert not torch.equal(compiled(x).detach(), out.detach())  # type: ignore[attr-defined]


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_bernoulli_at_the_ends(p: float) -> None:
    compiled, _ = traced(lambda x: x * torch.empty_like(x).bernoulli_(p))
    assert bool((compiled(torch.ones(1000, requires_grad=True)) == p).all())  # type: ignore[union-attr]


def test_numbers_that_seeds_do_not_give_stay_torchs() -> None:
    """Half precision, float64, another order of elements."""
    for function in (
        lambda x: x * torch.rand_like(x, dtype=torch.bfloat16),
        lambda x: x * torch.rand_like(x, dtype=torch.float64),
        lambda x: x * torch.rand_like(x.t()).t(),
    ):
        compiled, found = traced(function)
        compiled(leaf(8, 16))
        targets = {str(n.target) for n in found.forward.graph.nodes}
        assert "memplan.rand.default" not in targets
