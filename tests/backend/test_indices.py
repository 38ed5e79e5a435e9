"""Indices out of range: an error like eager's, nothing read or written elsewhere, and no false alarm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memplan.backend import compile_with
from memplan.ir.config import Config
from memplan.ir.errors import IndexOutOfRangeError

Function = Callable[[Tensor, Tensor], Tensor]

OPERATORS: dict[str, Function] = {
    "gather": lambda x, i: torch.gather(x, 1, i).sin(),
    "index": lambda x, i: x[i[0]] * 2,
    "index_select": lambda x, i: x.index_select(0, i[0]),
    "embedding": lambda x, i: F.embedding(i, x) + 1,
    "take": lambda x, i: torch.take(x, i),
    "scatter": lambda x, i: x.scatter(1, i, 1.0),
    "index_put": lambda x, i: x.index_put((i[0],), x[0]),
    "index_add": lambda x, i: x.index_add(0, i[0], x[:1].expand(i.shape[1], -1)),
    "cross_entropy": lambda x, i: F.cross_entropy(x, i[0, :4]),
    "class weights": lambda x, i: F.nll_loss(x, i[0, :4], x[0], reduction="none"),
}


def _inputs(index: int) -> tuple[Tensor, Tensor]:
    x = torch.arange(24.0).reshape(4, 6)
    i = torch.tensor([[0, 1, 2, 3, 1], [1, 2, 3, 0, 2]])
    i[0, 1] = index
    return x, i


def _compiled(function: Function, *inputs: Tensor, **options: object) -> Callable[..., object]:
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(lambda *a: (function(*a),))(*inputs)
    return compile_with(traced, list(inputs), Config(**options))  # type: ignore[arg-type, return-value]


def _outcome(call: Callable[..., object], *inputs: Tensor) -> object:
    try:
        return call(*inputs)
    except (IndexError, RuntimeError) as error:
        return error


@pytest.mark.parametrize("wrapper", ["python", "cpp"])
@pytest.mark.parametrize("name", OPERATORS)
def test_as_eager(name: str, wrapper: str) -> None:
    function = OPERATORS[name]
    compiled = _compiled(function, *_inputs(1), wrapper=wrapper)
    for index in (1, -3, 70, -70):
        expected = _outcome(function, *_inputs(index))
        if isinstance(expected, Exception):
            with pytest.raises(type(expected), match=r"index -?\d+ is out of range for size \d+(.|\n)*at aten\..*"):
                compiled(*_inputs(index))
        else:
            (found,) = compiled(*_inputs(index))  # type: ignore[misc]
            torch.testing.assert_close(found, expected)


def test_the_users_line_is_named() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(OPERATORS["embedding"], backend="memplan", dynamic=False)
    with pytest.raises(IndexOutOfRangeError, match=r"index 70 is out of range for size 4\n.*test_indices\.py:\d+"):
        compiled(*_inputs(70))


def test_nothing_is_written_for_a_bad_index() -> None:
    """The tensor that is changed in place has what good indices wrote, or what was there."""

    def function(x: Tensor, i: Tensor) -> Tensor:
        x.index_put_((i[0],), x.new_full((), -1.0))
        return x + 1

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="memplan", dynamic=False)
    x, i = _inputs(70)
    i[0] = torch.tensor([2, 70, 3, -50, 2])
    with pytest.raises(IndexError):
        compiled(x, i)
    untouched = _inputs(1)[0]
    assert torch.equal(x[:2], untouched[:2])
    assert bool(((x == -1) | (x == untouched)).all())


def _memory(x: Tensor, i: Tensor, memory: Tensor) -> Tensor:
    memory.mul_(0.5).add_(x[i[0]].sum(0))
    return x + memory


def _slice(x: Tensor, i: Tensor, memory: Tensor) -> Tensor:
    memory[:5] = x[i[0]][:, 0]
    return x + 1


@pytest.mark.parametrize("function", [_memory, _slice])
def test_a_bad_index_leaves_what_is_the_callers(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """A value made of rows that were looked up is not written over the caller's before all indices are known."""
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="memplan", dynamic=False)
    memory, expected = torch.ones(6), torch.ones(6)
    torch.testing.assert_close(compiled(*_inputs(1), memory), function(*_inputs(1), expected))
    torch.testing.assert_close(memory, expected)
    with pytest.raises(IndexError):
        compiled(*_inputs(70), memory)
    assert torch.equal(memory, expected)


def test_ignored_targets_and_padding_are_no_errors() -> None:
    def function(x: Tensor, i: Tensor) -> Tensor:
        return F.cross_entropy(x, i[0, :4], ignore_index=-100)

    found = _compiled(function, *_inputs(1))(*_inputs(-100))
    torch.testing.assert_close(found[0], function(*_inputs(-100)))  # type: ignore[index]


def test_a_mask_around_an_index_is_no_error() -> None:
    """A concatenation reads its parts under masks: positions that a masked-off load gives are not the program's."""

    def function(x: Tensor, i: Tensor) -> Tensor:
        return torch.cat([F.embedding(i - 5, x), F.embedding(i - 4, x), x.new_zeros(2, 1, 6)], 1) * 2

    x, i = _inputs(1)
    found = _compiled(function, x, i * 0 + 5)(x, i * 0 + 5)
    torch.testing.assert_close(found[0], function(x, i * 0 + 5))  # type: ignore[index]


def test_unchecked_where_asked() -> None:
    """Without the option the kernel has no check: an index just behind a row reads the next one."""
    function = OPERATORS["gather"]
    compiled = _compiled(function, *_inputs(1), check_indices=False)
    (found,) = compiled(*_inputs(6))  # type: ignore[misc]
    torch.testing.assert_close(found[0, 1], torch.tensor(6.0).sin())
