"""Products that become templates: found, rewritten without a change of meaning, planned, verified, printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import memplan
import memplan.kernels
from memplan.codegen.python_wrapper import print_python
from memplan.codegen.wrapper_lines import Launch, wrapper_lines
from memplan.ir.early_launch import EarlyLaunch
from memplan.ir.errors import VerificationError
from memplan.ir.plan import InPool, Pool
from memplan.ir.program import BufferKind, Copy, Extern, KernelOp, Program, View
from memplan.ir.template import ACCUMULATOR, Method, Product, ProductConfig, Template
from memplan.ir.verify import verify_program
from memplan.ir.verify_plan import verify_plan
from memplan.ir.verify_template import check_template
from memplan.passes.schedule import make_plan
from memplan.passes.templates import Candidate, Templates, candidates
from memplan.runtime.python_runtime import left_zero, zero_workspace
from memplan.runtime.triton_build import Build, Compiled, Target, compile_builds
from memplan.saving_encoding import decode as decode_plan
from memplan.saving_encoding import encode as encode_plan
from memplan.template_tuning import Measured, beyond_rounding, contenders, decode, encode
from memplan.templates import collect_templates, emitted_templates
from tests.program_runner import ProgramRunner, copy_inputs, make_inputs
from tests.reference_kernel import run_reference

SPLIT = ProductConfig(32, 32, 32, Method.SPLIT, parts=2)
STAGED = ProductConfig(32, 32, 32, Method.STAGED, parts=2, slice=4)
HALF = torch.bfloat16
Shapes = Sequence[tuple[int, ...]]


def analyzed(function: Callable[..., object], shapes: Shapes) -> Program:
    torch._dynamo.reset()
    with FakeTensorMode():
        arguments = tuple(torch.empty(s, device="cuda", dtype=HALF) for s in shapes)
        (graph,) = memplan.analyze(function, arguments, backward=False)
    return graph.plan.program


def all_in(config: ProductConfig) -> Templates:
    def choose(found: Sequence[Candidate], program: Program) -> Mapping[Product, ProductConfig]:
        return {c.key: config for c in found}

    return Templates(choose)


class Runner(ProgramRunner):
    """Templates are computed as their data says: the product, then the epilogue by the reference evaluator."""

    def call(self, op: Extern) -> None:
        if not isinstance(op, Template):
            super().call(op)
            return
        assert op.product is not None
        p = op.product
        result = self.view(p.a).float() @ self.view(p.b).float()
        if p.bias is not None:
            result = result + self.view(p.bias).float()
        for name in p.epilogue.written_buffers:
            self.storage(name)
        dtype = next(n.dtype for n in p.epilogue.loads if n.buffer == ACCUMULATOR)
        run_reference(p.epilogue, {**self.buffers, ACCUMULATOR: result.to(dtype).flatten()}, self.symbols)


def gelu_mlp(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return x + F.gelu(F.linear(x, w, b)) @ v


def two_heads(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x @ w
    return y, y.relu() * 2


def attention_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(1, 2)) * 0.125


MODELS: list[tuple[Callable[..., object], Shapes, int]] = [
    (gelu_mlp, [(64, 32), (128, 32), (128,), (128, 32)], 2),
    (two_heads, [(48, 32), (32, 80)], 1),
    (attention_scores, [(3, 32, 16), (3, 48, 16)], 1),
]


@pytest.mark.parametrize(("model", "shapes", "count"), MODELS, ids=lambda m: getattr(m, "__name__", ""))
@pytest.mark.parametrize("config", [ProductConfig(32, 32, 32), SPLIT, STAGED], ids=lambda c: c.method.value)
def test_the_meaning_stays(model: Callable[..., object], shapes: Shapes, count: int, config: ProductConfig) -> None:
    before = analyzed(model, shapes)
    after = all_in(config).run(before)
    verify_program(after)
    templates = [op for op in after.operations if isinstance(op, Template)]
    if config.method is Method.TILE:
        assert len(templates) == count
        assert not any(isinstance(op, KernelOp) for op in after.operations)
    inputs = make_inputs(before)
    wanted = Runner(before, copy_inputs(inputs)).run()
    found = Runner(after, copy_inputs(inputs)).run()
    for a, b in zip(found, wanted, strict=True):
        assert isinstance(a, torch.Tensor)
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def with_workspace(config: ProductConfig = SPLIT) -> Program:
    """A small product with workspaces, in a program whose peak is elsewhere."""

    def model(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return ((x @ w).relu() @ v) @ u

    def choose(found: Sequence[Candidate], program: Program) -> Mapping[Product, ProductConfig]:
        return {found[0].key: config}

    return Templates(choose).run(analyzed(model, [(64, 64), (64, 32), (32, 4096), (4096, 32)]))


def test_workspaces_are_planned_as_buffers_and_declared() -> None:
    program = with_workspace()
    verify_program(program)
    spaces = [b for b in program.buffers.values() if b.kind is BufferKind.WORKSPACE]
    assert [(b.nbytes, b.zero_fill) for b in spaces] == [(2 * 2 * 32 * 32 * 4, False), (2 * 4, True)]
    order = tuple(op.name for op in program.operations)
    plan = make_plan(program, order, in_place={})
    verify_plan(plan)
    template = next(op for op in program.operations if isinstance(op, Template))
    for b in spaces:
        step = order.index(template.name)
        assert (plan.lifetimes[b.name].start, plan.lifetimes[b.name].stop) == (step, step + 1)
    kernels = memplan.kernels.collect(program)
    found = {**kernels.arguments, **collect_templates(program).arguments}
    arguments = {n: (a.source, a.buffers, a.symbols) for n, a in found.items()}
    lines = wrapper_lines(plan, arguments, {n: a.offsets for n, a in found.items()})
    text = print_python(lines, poison=True).source
    counters = spaces[1].name
    assert f"{counters} = zero_workspace(8, 'cuda:0', stream0)" in text
    assert f"left_zero({counters}, {counters!r})" in text
    assert f"{counters}.zero_()" not in text
    assert f"poison_tensor({counters})" not in text


def test_two_launches_are_one_step_with_the_same_arguments() -> None:
    program = with_workspace(STAGED)
    verify_program(program)
    spaces = [b for b in program.buffers.values() if b.kind is BufferKind.WORKSPACE]
    assert [(b.nbytes, b.zero_fill) for b in spaces] == [(2 * 2 * 32 * 32 * 4, False)]
    plan = make_plan(program, tuple(op.name for op in program.operations), in_place={})
    verify_plan(plan)
    kernels, templates = memplan.kernels.collect(program), collect_templates(program)
    found = {**kernels.arguments, **templates.arguments}
    arguments = {n: (a.source, a.buffers, a.symbols) for n, a in found.items()}
    lines = wrapper_lines(plan, arguments, {n: a.offsets for n, a in found.items()})
    first, last = (x for x in lines.lines if isinstance(x, Launch) and x.kernel.startswith("t0"))
    assert (first.kernel, last.kernel) == ("t0_staged_product", "t0_staged_product_finish")
    assert replace(last, kernel=first.kernel) == first
    assert first.buffers[-1] == spaces[0].name
    emitted = emitted_templates(templates, EarlyLaunch.END)
    assert list(emitted) == [first.kernel, last.kernel]
    assert [len(k.arguments) for k in emitted.values()] == [len(first.buffers)] * 2
    assert [int(k.axes[0][0]) for k in emitted.values()] == [2 * 2, 2 * 8]
    builds = [Build.of(k, k.configs[0]) for k in emitted.values()]
    assert all(isinstance(b, Compiled) for b in compile_builds(builds, Target()))
    text = print_python(lines, poison=True).source
    assert text.index("t0_staged_product(") < text.index("t0_staged_product_finish(")


def test_a_workspace_that_would_raise_the_peak_is_not_taken() -> None:
    program = analyzed(two_heads, [(48, 32), (32, 80)])
    huge = ProductConfig(64, 128, 32, Method.SPLIT, parts=8)
    assert all_in(huge).run(program) is program


def changed(program: Program, **fields: object) -> Program:
    operations = tuple(
        replace(op, **fields) if isinstance(op, Template) else op
        for op in program.operations  # type: ignore[arg-type]
    )
    return replace(program, operations=operations)


def test_the_verifier_rejects_wrong_workspaces() -> None:
    program = with_workspace()
    template = next(op for op in program.operations if isinstance(op, Template))
    partials, counters = template.workspace_buffers
    assert template.product is not None

    with pytest.raises(VerificationError, match="its configuration needs"):
        verify_program(changed(program, workspaces=()))
    buffers = dict(program.buffers)
    buffers[partials] = replace(buffers[partials], nbytes=64)
    with pytest.raises(VerificationError, match="has 64"):
        verify_program(replace(program, buffers=buffers))
    buffers = dict(program.buffers)
    buffers[counters] = replace(buffers[counters], zero_fill=False)
    with pytest.raises(VerificationError, match="filled with zeros"):
        verify_program(replace(program, buffers=buffers))
    out = program.outputs[0]
    assert isinstance(out, View)
    source = View(partials, torch.float32, (32, 32), (32, 1))
    target = View(out.buffer, out.dtype, (32, 32), (32, 1))
    other = Copy("other", source, target, template.device, mutates=(out.buffer,))
    with pytest.raises(VerificationError, match="not its own"):
        verify_program(replace(program, operations=(*program.operations, other)))


def _product_with(change: Callable[[Product], Product]) -> Callable[[Template], Template]:
    def apply(op: Template) -> Template:
        assert op.product is not None
        return replace(op, product=change(op.product))

    return apply


def _read_elsewhere(product: Product) -> Product:
    """Its epilogue loads something that the operation does not declare."""
    nodes = (*product.epilogue.nodes, replace(product.epilogue.loads[0], buffer="elsewhere"))
    return replace(product, epilogue=replace(product.epilogue, nodes=nodes))


def _stored_elsewhere(product: Product) -> Product:
    stores = tuple(replace(s, buffer="elsewhere") for s in product.epilogue.stores)
    return replace(product, epilogue=replace(product.epilogue, stores=stores))


def _transposed(view: View) -> View:
    return replace(view, sizes=tuple(reversed(view.sizes)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda op: replace(op, product=None), "a template of nothing"),
        (_product_with(lambda p: replace(p, a=_transposed(p.a))), "its factors have the shapes"),
        (_product_with(lambda p: replace(p, a=replace(p.a, sizes=(1, 16, 64)))), "its epilogue runs over"),
        (lambda op: replace(op, args=tuple(reversed(op.args))), "not its first arguments"),
        (_product_with(_stored_elsewhere), "its epilogue writes"),
        (_product_with(_read_elsewhere), "which it does not declare"),
    ],
)
def test_the_verifier_rejects_a_template_that_is_not_what_it_declares(
    change: Callable[[Template], Template], message: str
) -> None:
    program = with_workspace()
    verify_program(program)
    operations = tuple(change(op) if isinstance(op, Template) else op for op in program.operations)
    with pytest.raises(VerificationError, match=message):
        verify_program(replace(program, operations=operations))


def test_a_template_reads_nothing_that_it_writes() -> None:
    program = with_workspace()
    template = next(op for op in program.operations if isinstance(op, Template))
    result = template.results[0]
    assert result is not None
    both = replace(template, args=(*template.args, result))
    with pytest.raises(VerificationError, match="in one tile while another writes it"):
        check_template(both, program, lambda message, op: VerificationError(f"{op.name}: {message}"), "")


def test_the_verifier_rejects_workspaces_of_another_size_and_those_that_leave() -> None:
    program = with_workspace()
    template = next(op for op in program.operations if isinstance(op, Template))
    partials = template.workspace_buffers[0]
    buffers = dict(program.buffers)
    buffers[partials] = replace(buffers[partials], nbytes=buffers[partials].nbytes * 2)
    with pytest.raises(VerificationError, match="its partials need"):
        verify_program(replace(program, buffers=buffers))
    space = next(v for v in template.results if v is not None and v.buffer == partials)
    with pytest.raises(VerificationError, match=f"workspace '{partials}' leaves|would not outlive"):
        verify_program(replace(program, outputs=(*program.outputs, space)))


def test_the_verifier_rejects_a_zero_filled_workspace_in_a_pool() -> None:
    program = with_workspace()
    order = tuple(op.name for op in program.operations)
    plan = make_plan(program, order, in_place={})
    counters = next(b for b in program.buffers.values() if b.zero_fill)
    life = plan.lifetimes[counters.name]
    pool = Pool("pool0", counters.device, 512, life)
    wrong = replace(plan, pools=(pool,), placements={**plan.placements, counters.name: InPool("pool0", 0)})
    with pytest.raises(VerificationError, match="filled with zeros once"):
        verify_plan(wrong, check_program=False)


def test_what_is_left_dirty_is_found() -> None:
    space = zero_workspace(16, "cpu", 1)
    assert zero_workspace(8, "cpu", 1) is space
    assert zero_workspace(8, "cpu", 2) is not space
    left_zero(space, "w")
    space[3] = 1
    with pytest.raises(RuntimeError, match="left its workspace w dirty"):
        left_zero(space, "w")
    left_zero(space, "w")


def test_layers_share_a_template_and_it_builds() -> None:
    def model(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ((x @ w).relu() @ v).relu()

    program = all_in(ProductConfig(32, 32, 32)).run(analyzed(model, [(64, 32), (32, 32), (32, 32)]))
    assert sum(isinstance(op, Template) for op in program.operations) == 2
    (kernel,) = emitted_templates(collect_templates(program), EarlyLaunch.START).values()
    (built,) = compile_builds([Build.of(kernel, kernel.configs[0])], Target())
    assert isinstance(built, Compiled)


def test_a_plan_with_templates_can_be_kept() -> None:
    program = with_workspace()
    assert decode_plan(encode_plan(program.operations)) == program.operations


def test_measurements_are_kept_as_text() -> None:
    measured = Measured(SPLIT, 10.0, 5.0)
    assert decode(encode(measured)) == SPLIT
    assert decode(encode(replace(measured, config=None))) is None


@pytest.mark.parametrize(
    "sizes", [(16, 4096, 4096), (4096, 4096, 1024), (64, 64, 16384), (1000, 768, 768), (17, 33, 65)]
)
def test_contenders_fit_the_device(sizes: tuple[int, int, int]) -> None:
    from tests.templates.products import product

    m, n, k = sizes
    base = product((1, m, n, k), ProductConfig(0, 0, 0))
    found = contenders(base, 132)
    assert found
    assert len(found) == len(set(found))
    for config in found:
        sized = replace(base, config=config)
        assert config.rows * config.columns <= 128 * 256
        assert config.method is Method.TILE or sized.steps > 1
        assert config.parts % config.bunch == 0
        assert sum(w.count for w in sized.workspaces()) < 64 << 20
    methods = {c.method for c in found}
    if k >= 4096 and min(m, n) <= 64:
        assert Method.SPLIT in methods
    if m * n >= 4096 * 4096:
        assert Method.SPLIT not in methods


@pytest.mark.parametrize(
    ("sizes", "tile", "parts", "bunch"),
    [
        ((16, 4096, 4096), (16, 128, 128), 4, 1),
        ((32, 4096, 11008), (16, 128, 128), 2, 1),
        ((64, 64, 16384), (16, 32, 64), 32, 4),
        ((128, 128, 8192), (32, 32, 64), 8, 1),
        ((16, 1024, 8192), (16, 32, 64), 4, 1),
        ((64, 256, 32768), (64, 64, 128), 32, 8),
        ((256, 256, 16384), (64, 64, 64), 8, 1),
        ((96, 768, 12288), (64, 64, 64), 5, 1),
    ],
)
def test_what_won_a_wide_grid_on_an_h100_is_tried(
    sizes: tuple[int, int, int], tile: tuple[int, int, int], parts: int, bunch: int
) -> None:
    from tests.templates.products import product

    m, n, k = sizes
    found = contenders(product((1, m, n, k), ProductConfig(0, 0, 0)), 132)
    splits = {((c.rows, c.columns, c.inner), c.parts, c.bunch) for c in found if c.method is Method.SPLIT}
    assert (tile, parts, bunch) in splits
    assert len(found) <= 120  # some ten seconds of building


@pytest.mark.parametrize(
    ("sizes", "tile", "parts", "rows"),
    [
        ((64, 64, 16384), (32, 32, 128), 32, 2),
        ((64, 256, 32768), (64, 64, 64), 32, 1),
        ((256, 256, 16384), (64, 64, 64), 8, 4),
    ],
)
def test_what_won_in_two_launches_is_tried(
    sizes: tuple[int, int, int], tile: tuple[int, int, int], parts: int, rows: int
) -> None:
    from tests.templates.products import product

    m, n, k = sizes
    found = contenders(product((1, m, n, k), ProductConfig(0, 0, 0)), 132)
    staged = {((c.rows, c.columns, c.inner), c.parts, c.slice) for c in found if c.method is Method.STAGED}
    assert (tile, parts, rows) in staged
    assert all(c.rows % c.slice == 0 and c.slice * c.columns >= 64 for c in found if c.method is Method.STAGED)


def test_only_what_was_chosen_is_taken() -> None:
    program = analyzed(gelu_mlp, [(64, 32), (128, 32), (128,), (128, 32)])
    assert Templates().run(program) is program
    assert len(candidates(program)) == 2


def test_rounding_of_the_product_is_told_from_a_wrong_answer() -> None:
    """ATen rounds the product before the gate, a template after it: far apart in the mean, right all the same."""
    torch.manual_seed(0)
    a, b, gate = torch.randn(64, 2048), torch.randn(2048, 1024), torch.randn(64, 1024)
    product = (a.to(HALF).float() @ b.to(HALF).float()) * 4
    aten = (F.silu(product.to(HALF).float()) * gate).to(HALF)
    template = (F.silu(product) * gate).to(HALF)
    mean = float(aten.float().abs().mean())
    assert float((aten.float() - template.float()).abs().max()) > 0.1 * mean
    assert beyond_rounding(template, aten, mean, HALF) < 1

    wrong = template.clone()
    wrong[3, 5] += 0.3 * mean
    assert beyond_rounding(wrong, aten, mean, HALF) > 1
    wrong[3, 5] = float("nan")
    assert not beyond_rounding(wrong, aten, mean, HALF) <= 1
    both = aten.clone()
    both[3, 5] = float("nan")
    assert beyond_rounding(wrong, both, mean, HALF) < 1
    short = (F.silu(product - a[:, :1] * b[:1] * 16) * gate).to(HALF)  # some terms of the sums are missing
    assert beyond_rounding(short, aten, mean, HALF) > 1

    decisions = product > 0
    assert beyond_rounding(decisions, decisions, 0.5, HALF) == 0
    assert beyond_rounding(~decisions, decisions, 0.5, HALF) > 1
