"""Saved tensors that share allocations: who owns them, through everything that autograd may do with them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import memplan
from memplan.recording import Recording
from tests.tolerances import assert_near

OPTIONS = {"pools": "always", "poison": True}


class Net(nn.Module):
    """Layers that each keep their input for the backward; the largest values are temporaries."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + nn.functional.gelu(layer(x))
        return x.square().mean(1)


@pytest.fixture(scope="module", params=["python", "cpp"])
def compiled(request: pytest.FixtureRequest) -> Iterator[tuple[Net, Callable[..., Tensor], Recording]]:
    """The model, compiled, and the plans; built once, with whatever runs first."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Net()
    with memplan.record() as recorded:
        function = torch.compile(model, backend="memplan", options={**OPTIONS, "wrapper": request.param})
        function(batch())
    yield model, function, recorded  # type: ignore[misc]
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def clean_dynamo() -> None:
    """The compiled model is shared by the tests of this file."""


def batch() -> Tensor:
    return torch.randn(16, 24, requires_grad=True)


Given = tuple[Net, Callable[..., Tensor], Recording]


def check(model: Net, x: Tensor, loss: Tensor, *, retain: bool = False) -> None:
    wanted = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
    found = torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=retain)
    for a, b in zip(found, wanted, strict=True):
        assert_near(a, b)


def test_the_plans_have_slabs(compiled: Given) -> None:
    forward, backward = compiled[2].plans
    assert backward.slabs
    assert {p.name for p in forward.pools} >= {s.name for s in backward.slabs}
    assert sum(len(s.members) for s in backward.slabs) >= 4


def test_a_step_and_a_retained_graph(compiled: Given) -> None:
    model, function, _ = compiled
    x = batch()
    loss = function(x).sum()
    for retain in (True, True, False):
        check(model, x, loss, retain=retain)


def test_several_forwards_before_their_backwards(compiled: Given) -> None:
    model, function, _ = compiled
    batches = [batch() for _ in range(3)]
    losses = [function(x).sum() for x in batches]
    for x, loss in [*zip(batches, losses, strict=True)][::-1]:
        check(model, x, loss)


def saved(loss: Tensor) -> list[Tensor]:
    """The tensors that the compiled forward saved."""
    node = loss.grad_fn
    while node is not None and not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    assert node is not None
    return list(node.saved_tensors)  # type: ignore[attr-defined]


def in_slabs(loss: Tensor) -> list[Tensor]:
    """Those of the saved tensors that have a part of their storage only."""
    found = [t for t in saved(loss) if t.untyped_storage().nbytes() > t.nbytes]
    assert found
    return found


def test_saved_tensors_look_like_any_other(compiled: Given) -> None:
    """As autograd and AOTAutograd see them: dense, no views of one another, each with a version of its own."""
    model, function, recorded = compiled
    x = batch()
    loss = function(x).sum()
    shared = in_slabs(loss)
    assert len(shared) == sum(len(s.members) for s in recorded.plans[1].slabs)
    versions = [t._version for t in shared]
    for t in shared:
        assert t.is_contiguous()
        assert not t._is_view()
        assert t.data_ptr() % 64 == 0
    check(model, x, loss, retain=True)
    assert [t._version for t in in_slabs(loss)] == versions


def test_a_backward_that_never_comes_holds_nothing(compiled: Given) -> None:
    _, function, _ = compiled
    loss = function(batch()).sum()
    storages = [StorageWeakRef(t.untyped_storage()) for t in in_slabs(loss)]
    assert not any(s.expired() for s in storages)
    del loss
    gc.collect()
    assert all(s.expired() for s in storages)


def test_an_exception_half_way_leaves_the_next_step_right(compiled: Given) -> None:
    model, function, _ = compiled
    x = batch()
    loss = function(x).sum()

    def fail(gradient: Tensor) -> Tensor:
        raise ValueError("half-way")

    handle = x.register_hook(fail)
    with pytest.raises(ValueError, match="half-way"):
        loss.backward()
    handle.remove()
    model.zero_grad()
    x = batch()
    check(model, x, function(x).sum())


def test_threads(compiled: Given) -> None:
    model, function, _ = compiled
    batches = [batch() for _ in range(4)]
    failures: list[BaseException] = []

    def run(x: Tensor) -> None:
        try:
            for _ in range(3):
                check(model, x, function(x).sum())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(x,)) for x in batches]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_hooks_get_tensors_of_their_own() -> None:
    """From the first call on: what a hook keeps must not hold a slab."""
    torch._dynamo.reset()
    model = Net()
    function = torch.compile(model, backend="memplan", options=OPTIONS)
    held: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        held.append(t)
        return t

    x = batch()
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = function(x).sum()  # type: ignore[operator]
        check(model, x, loss)
    assert held
    assert all(t.untyped_storage().nbytes() <= max(t.nbytes, 64) for t in held)
    check(model, x, function(x).sum())  # type: ignore[operator]
    torch._dynamo.reset()


def test_double_backward_says_that_it_cannot() -> None:
    """As with any compiled region; not a wrong number."""
    torch._dynamo.reset()
    model = Net()
    function = torch.compile(model, backend="memplan", options=OPTIONS)
    x = batch()
    (gradient,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)  # type: ignore[operator]
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
    torch._dynamo.reset()
