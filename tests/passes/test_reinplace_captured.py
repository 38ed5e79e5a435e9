"""Clone elimination on graphs as torch functionalises them: caches, slices, statistics, custom operators, foreach."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from memplan.capture.fx import capture
from memplan.ir.config import Config
from memplan.ir.program import BufferKind, Copy, Extern, Phase, Program
from memplan.ir.verify import verify_program
from memplan.lowering.decompositions import decomposition_table
from memplan.lowering.lower import lower_program
from memplan.passes.pipeline import run_pipeline
from tests.passes.reinplaced import names, notes, reinplaced
from tests.program_runner import copy_inputs, run_program


def captured(function: Callable[..., object], *inputs: torch.Tensor, lower: bool) -> tuple[Program, list[object]]:
    """The one inference graph of a function, as torch functionalises it, and the inputs that it is given."""
    found: list[Program] = []
    given: list[list[object]] = []

    def compiler(module: torch.fx.GraphModule, examples: Sequence[object]) -> Callable[..., object]:
        found.append(capture(module, Phase.INFERENCE, name="captured"))

        def boxed(args: list[object]) -> object:
            given.append(copy_inputs(args))
            return module.forward(*args)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    table = decomposition_table(Config()) if lower else None
    backend = aot_autograd(
        fw_compiler=compiler, inference_compiler=compiler, decompositions=table, keep_inference_input_mutations=True
    )
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*copy_inputs(inputs))
    (program,) = found
    return lower_program(program, Config()) if lower else program, given[0]


def memory(program: Program) -> int:
    """Bytes of everything that the program makes."""
    kinds = {BufferKind.TEMPORARY, BufferKind.OUTPUT}
    return sum(program.nbytes(b.name) for b in program.buffers.values() if b.kind in kinds)


def fill_cache(cache: torch.Tensor, position: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    cache[:, position] = new
    return cache.sum(1)


def assign_slice(cache: torch.Tensor, position: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    cache[:, 2:3].copy_(new)
    cache[:, 5:6] = new * 2
    return cache * position


def scatter(cache: torch.Tensor, position: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    cache.scatter_add_(1, position.view(1, 1, 1).expand(2, 1, 4), new)
    return cache.clone()


def statistics(cache: torch.Tensor, position: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    mean, variance = cache[0, 0], cache[1, 0]
    out = torch.nn.functional.batch_norm(new.reshape(2, 4), mean, variance, training=True)
    return out + position


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("function", [fill_cache, assign_slice, scatter, statistics])
def test_functionalised_graphs(function: Callable[..., object], lower: bool) -> None:
    inputs = (torch.zeros(2, 8, 4), torch.tensor([3]), torch.randn(2, 1, 4))
    program, given = captured(function, *inputs, lower=lower)
    after = reinplaced(program, inputs=given)
    cache = program.nbytes("arg0_1")
    copies = sum(b.nbytes == cache for b in program.buffers.values())
    left = sum(b.nbytes == cache for b in after.buffers.values())
    if function is fill_cache or (lower and function in (assign_slice, scatter)):
        assert copies > left, "no clone of the cache was avoided"
        assert "arg0_1" in {b for op in after.operations for b in op.mutates}
        assert memory(after) <= memory(program) - cache


def test_a_cache_is_filled_without_a_copy_of_it() -> None:
    """index_put into an input: no clone, no copy back, however the graph is captured."""
    inputs = (torch.zeros(2, 8, 4), torch.tensor([3]), torch.randn(2, 1, 4))
    for lower in (False, True):
        program, given = captured(fill_cache, *inputs, lower=lower)
        after = reinplaced(program, inputs=given)
        assert len(after.operations) == 2
        assert after.operations[0].mutates == ("arg0_1",)


def test_slices_are_copied_alone() -> None:
    """Lowered slice assignment writes the slice, not the whole cache."""
    inputs = (torch.zeros(2, 8, 4), torch.tensor([3]), torch.randn(2, 1, 4))
    program, given = captured(assign_slice, *inputs, lower=True)
    after = reinplaced(program, inputs=given)
    changing = [op for op in after.operations if "arg0_1" in op.mutates]
    assert len(changing) == 2
    for op in changing:
        points = 1
        for r in op.kernel.outer:  # type: ignore[union-attr]
            points *= int(r.size)
        assert points == 8


@torch.library.custom_op("memplan_tests::scale_both_", mutates_args={"x", "y"})
def scale_both_(x: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> None:
    x.mul_(s)
    y.add_(s)


@torch.library.custom_op("memplan_tests::fill_and_double", mutates_args={"out"})
def fill_and_double(out: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    out.copy_(s)
    return s * 2


@fill_and_double.register_fake
def _(out: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(s)


def custom_operators(x: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, ...]:
    t = x + 1
    scale_both_(t, y[1], s)
    r = fill_and_double(y[2], s)
    return t, r


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_custom_operators_change_their_arguments(version: int, lower: bool) -> None:
    import torch._inductor.config as switches

    inputs = (torch.randn(4), torch.randn(3, 4), torch.randn(4))
    with switches.patch(enable_auto_functionalized_v2=version == 2):
        program, given = captured(custom_operators, *inputs, lower=lower)
    kind = "auto_functionalized_v2" if version == 2 else "auto_functionalized"
    assert any(isinstance(op, Extern) and op.target.startswith(f"callable:{kind}") for op in program.operations)
    after = reinplaced(program, inputs=given)
    targets = [op.target for op in after.operations if isinstance(op, Extern)]
    assert "memplan_tests.scale_both_.default" in targets
    assert "memplan_tests.fill_and_double.default" in targets
    if version == 2:
        assert not any(isinstance(op, Copy) for op in after.operations)
        assert not any(b.nbytes == 48 and b.kind is BufferKind.TEMPORARY for b in after.buffers.values())


def test_foreach_updates_its_list() -> None:
    def update(a: torch.Tensor, b: torch.Tensor, g: torch.Tensor) -> None:
        torch._foreach_add_([a, b], [g, g], alpha=-0.5)

    inputs = (torch.randn(4), torch.randn(4), torch.randn(4))
    program, given = captured(update, *inputs, lower=False)
    after = reinplaced(program, inputs=given)
    (op,) = after.operations
    assert isinstance(op, Extern)
    assert op.target == "aten._foreach_add_.List"
    assert op.mutates == ("arg0_1", "arg1_1")


def test_the_source_of_a_clone_read_by_the_operation_that_changes_it() -> None:
    """``y = x.clone(); op(y, x)`` must not become ``op(x, x)``."""

    def put(x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x * 1.5
        y = x.clone()
        y.index_put_((index,), x[2:4])
        return (y,)  # type: ignore[return-value]

    inputs = (torch.randn(4, 4), torch.tensor([2, 3]).flip(0))
    for lower in (False, True):
        program, given = captured(put, *inputs, lower=lower)
        after = reinplaced(program, inputs=given)
        assert "clone" in names(after)
        assert "'index_put'" in notes(after)
        assert "uses 'mul' as it was" in notes(after)


@pytest.mark.parametrize("function", [fill_cache, assign_slice, scatter, statistics])
def test_with_the_passes_that_follow(function: Callable[..., object]) -> None:
    """Fusion meets mutation of inputs in the middle of a program: values stay the same."""
    inputs = (torch.zeros(2, 8, 4), torch.tensor([3]), torch.randn(2, 1, 4))
    program, given = captured(function, *inputs, lower=True)
    after = run_pipeline(program, Config(), verify_program)
    first, second = copy_inputs(given), copy_inputs(given)
    expected, found = run_program(program, first), run_program(after, second)
    for a, b in zip([*expected, *first], [*found, *second], strict=True):
        torch.testing.assert_close(b, a)
