"""The wrapper's text for launches of user kernels, and the launcher's own rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import memplan
import memplan.kernels
from memplan.codegen.python_wrapper import print_python
from memplan.codegen.wrapper_lines import wrapper_lines
from memplan.ir.errors import CompilerError
from memplan.ir.plan import Plan
from memplan.ir.printing import format_program
from memplan.ir.program import UserKernel
from memplan.runtime.user_kernel_launch import UserLauncher
from memplan.runtime.user_kernel_tuning import Changed, choose_config
from memplan.user_kernels import build_user_kernels
from tests.user_kernels.pretended_gpu import pretended_gpu

with pretended_gpu():
    from tests.user_kernels import own_kernels
    from tests.user_kernels.cases import CASES


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with pretended_gpu():
        yield


def planned(function: Callable[..., object], *shapes: tuple[int, ...], dynamic: bool = False) -> Plan:
    torch._dynamo.reset()
    with FakeTensorMode():
        arguments = tuple(torch.empty(s, device="cuda") for s in shapes)
        (graph,) = memplan.analyze(function, arguments, dynamic=dynamic, backward=False, options={"pools": "always"})
    return graph.plan


def wrapper(plan: Plan) -> str:
    found = memplan.kernels.collect(plan.program)
    arguments = {n: (a.source, a.buffers, a.symbols) for n, a in found.arguments.items()}
    user = build_user_kernels(plan.program)
    arguments.update((n, (kernel, (), ())) for n, kernel in user.names.items())
    return print_python(wrapper_lines(plan, arguments, {n: a.offsets for n, a in found.arguments.items()})).source


def case(name: str) -> Callable[..., object]:
    return next(c.function for c in CASES if c.name == name)


def without_paths(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.strip().startswith("#")) + "\n"


@pytest.mark.parametrize(
    ("file", "name", "shapes", "dynamic"),
    [
        ("one_launch.txt", "mul2_inplace_kernel", [(512,)], False),
        ("timed_sizes_that_change.txt", "restore_value", [(512,)], True),
        ("descriptors.txt", "add_kernel_with_tma_2d_new_api", [(32, 64), (32, 64)], False),
    ],
)
def test_text(
    golden: Callable[[str, str], None], file: str, name: str, shapes: list[tuple[int, ...]], dynamic: bool
) -> None:
    plan = planned(case(name), *shapes, dynamic=dynamic)
    lines = format_program(plan.program).splitlines()[1:]  # without the program's number
    program = "\n".join(line.partition("  # ")[0] for line in lines)
    golden(file, without_paths(program) + "\n" + without_paths(wrapper(plan)))


def test_a_kernel_that_does_not_compile_shows_the_users_lines() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        own_kernels.does_not_compile[(1,)](x, BLOCK=16)
        return x

    torch._dynamo.reset()
    with FakeTensorMode():
        (graph,) = memplan.analyze(function, (torch.empty(16),), backward=False)
    plan = graph.plan
    with pytest.raises(CompilerError) as error:
        build_user_kernels(plan.program)
    assert "no_such_name" in str(error.value)
    assert "own_kernels.py" in str(error.value)
    assert "test_wrapper.py" in error.value.where


def test_equal_launches_share_a_launcher() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return own_kernels.scaled(x), own_kernels.scaled(y)

    user = build_user_kernels(planned(function, (128,), (128,)).program)
    assert len(user.names) == 2
    assert len(user.launchers) == 1


def test_helpers_and_constants_of_other_modules_are_in_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    import triton.language as tl

    from memplan.capture.kernel_closure import kernel_source
    from tests.user_kernels import helper_kernels

    def digest() -> str:
        return kernel_source(own_kernels.through_a_module)[0].digest()

    before = digest()
    assert digest() == before
    monkeypatch.setattr(helper_kernels, "FACTOR", tl.constexpr(4))
    assert digest() != before
    monkeypatch.undo()

    @triton.jit
    def scale_and_shift(x, shift):  # type: ignore[no-untyped-def]
        return x - shift

    assert digest() == before
    monkeypatch.setattr(helper_kernels, "scale_and_shift", scale_and_shift)
    assert digest() != before


def test_the_autotuners_fields_are_in_the_digest() -> None:
    from dataclasses import replace

    from memplan.capture.kernel_closure import kernel_source

    source, _ = kernel_source(own_kernels.increment)
    assert (source.key, source.restore_value, source.reset_to_zero) == (("n",), ("x_ptr",), ())
    for changed in ({"key": ()}, {"restore_value": ()}, {"reset_to_zero": ("x_ptr",)}, {"configs": source.configs[:1]}):
        assert replace(source, **changed).digest() != source.digest()  # type: ignore[arg-type]


def test_timed_runs_start_from_the_same_values() -> None:
    x, total = torch.arange(4.0), torch.full((2,), 7.0)
    seen: list[tuple[list[float], list[float]]] = []

    def run(number: int) -> None:
        seen.append((x.tolist(), total.tolist()))
        x.add_(1)
        total.add_(1)

    times = iter([9.0, 3.0, 3.0, 3.0, 3.0, 3.0, 9.0, 2.0, 2.0, 2.0, 2.0, 2.0])

    def timer(run: Callable[[], None]) -> float:
        run()
        return next(times)

    changed = [Changed(0, "x", zeroed=False, saved=True), Changed(1, "total", zeroed=True, saved=True)]
    assert choose_config(2, run, changed, (x, total), timer) == 1
    assert all(s == ([0.0, 1.0, 2.0, 3.0], [0.0, 0.0]) for s in seen)
    assert x.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert total.tolist() == [0.0, 0.0]


def test_a_configuration_that_cannot_run_is_left_out_and_all_of_them_is_an_error() -> None:
    x = torch.arange(4.0)

    def run(number: int) -> None:
        x.add_(1)
        if number == 0:
            raise CompilerError("too much shared memory")

    def timer(run: Callable[[], None]) -> float:
        run()
        return 1.0

    changed = [Changed(0, "x", zeroed=False, saved=True)]
    assert choose_config(2, run, changed, (x,), timer) == 1
    assert x.tolist() == [0.0, 1.0, 2.0, 3.0]
    with pytest.raises(CompilerError, match="shared memory"):
        choose_config(1, run, changed, (x,), timer)
    assert x.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_grid_of_nothing_launches_nothing() -> None:
    plan = planned(case("mul2_inplace_kernel"), (512,))
    (op,) = (o for o in plan.program.operations if isinstance(o, UserKernel))
    launcher = UserLauncher(op, frozenset())
    launcher(0, ((0, 1, 1),), 16)  # would load a cubin onto a GPU
    assert not launcher.handles
