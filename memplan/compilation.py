"""One program from capture to a callable: lowering, passes, planning, emission, build."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from . import kernels as kernel_sets
from .artifact import Artifact, GpuKernel, Linked, cached, load_cached, load_gpu
from .calibration import figures_for
from .calls import below_autograd, made_once
from .codegen import cpp_kernel, triton_kernel
from .codegen.cpp_wrapper import CppWrapper
from .codegen.python_wrapper import print_python
from .codegen.triton_kernel import TritonKernel
from .codegen.wrapper_lines import WrapperProgram, wrapper_lines
from .communicating import Communicating, facts_of
from .cpp_wrapping import load_in_cpp
from .fallback import with_fallback
from .ir.canonical import canonicalize
from .ir.config import Config
from .ir.errors import CompilerError
from .ir.in_flight import HostCopy
from .ir.loops import Kernel
from .ir.plan import Plan
from .ir.program import KernelOp, Program
from .ir.verify import ProgramVerifier, verify_program
from .ir.verify_plan import verify_plan
from .kernel_tuning import tuned, tuning_wanted
from .lowering.lower import NOTHING_KEPT, Kept
from .lowering_stage import Lowering
from .out_of_memory import Remedy, Shortage, explained
from .passes.comm import Communication, place_in_arenas
from .passes.donation import keeping_inputs, without_donation
from .passes.inplace import InPlace, Reuse
from .passes.offload import WAIT, schedule_copies
from .passes.overlap import overlap
from .passes.pipeline import PASSES as PIPELINE
from .passes.pipeline import Pass, collector_paused, run_pipeline
from .passes.reorder import reorder
from .passes.room import best_room
from .passes.row_totals import RowTotals
from .passes.schedule import lifetimes, make_plan, own_peak, storages, timeline
from .passes.split_reductions import SplitReductions
from .passes.store_and_reduce import StoreAndReduce
from .passes.templates import Templates
from .passes.whole_step import Laid
from .plan_cache import Beside, Found, find_entry
from .planner import planner_libraries
from .pooling import StepChoice, choose, step_memories
from .progress import working_on
from .remedies import switched_on
from .runtime.current_device import on_own_device
from .runtime.host_copies import settled
from .runtime.python_runtime import namespace
from .runtime.reserve import reserves_of, reserving
from .runtime.triton_launch import Launcher
from .template_tuning import chooser
from .templates import NO_TEMPLATES, TemplateSet, collect_templates, with_templates
from .user_kernels import UserKernels, build_user_kernels, named_user_kernels
from .wrapper_choice import REASONS as CPP_REASONS
from .wrapper_choice import build_ahead, choose_wrapper, say_python, seen_by_modes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompiledProgram:
    """A program ready to run: ``call`` takes one boxed list of arguments and returns a tuple.

    The plan is read when it is first asked for, where it comes from the cache.
    """

    make_plan: Callable[[], Plan]
    call: Callable[..., object]
    source: str
    #: the same kernels and calls in a plan that leaves donated inputs to their owner
    keeping: Callable[[], CompiledProgram]
    waterfall: tuple[tuple[str, int], ...] = ()
    #: all that runs it, as data; None where something in it is none
    artifact: Artifact | None = None
    #: what else can be planned when memory runs out, given the bytes that there were; its owner adds to it
    remedies: list[Callable[[int], Remedy | None]] = field(default_factory=list)

    @cached_property
    def plan(self) -> Plan:
        return self.make_plan()


PASSES: tuple[type[Pass], ...] = (
    Lowering, *PIPELINE, RowTotals, SplitReductions, StoreAndReduce, Templates, Communication,
)  # fmt: skip
#: names that ``options={"disable": [...]}`` accepts
PASS_NAMES = (
    "attention",
    "copies",
    "layout",
    "chunked_loss",
    "rematerialize",
    "padding",
    "convolutions",
    "scratch",
    *(p.name for p in PASSES),
    "reorder",
    "overlap",
    "inplace",
    "pools",
)


NO_USER_KERNELS = UserKernels({}, {})


@dataclass(frozen=True)
class Planned:
    """A plan, and what each decision did: (name, peak of live bytes after it), the captured program first."""

    plan: Plan
    waterfall: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Prepared:
    """A program that only lacks its pools: all passes have run, order and in-place reuse are decided."""

    laid: Laid
    stages: tuple[tuple[str, int], ...]
    order_bound: int
    program_peak: int | None
    notes: tuple[tuple[str, str], ...]
    note: str
    pools: str


def plan_program(program: Program, config: Config, kept: Kept = NOTHING_KEPT) -> Planned:
    """All passes and the planner; nothing is built. What is ``kept`` stays a call."""
    return plan_prepared((prepare_program(program, config, kept),), (), config)[0]


@collector_paused()
def prepare_program(program: Program, config: Config, kept: Kept = NOTHING_KEPT) -> Prepared:
    """All passes, order and in-place reuse. What is ``kept`` stays a call."""
    stages = [("captured", own_peak(program, _names(program)))]

    def on_pass(name: str, before: Program, after: Program) -> None:
        working_on(f"{program.name}: {name} done")
        if after is not before:
            stages.append((name, own_peak(after, _names(after))))

    refused = "programs recorded as CUDA graphs keep to the library" if config.cuda_graphs else ""
    facts = {} if refused else facts_of(program, config)
    communication = Communication(facts, config.communication, refused)
    last = (Templates(chooser(config, kept)), communication)
    passes: tuple[type[Pass] | Pass, ...] = (Lowering(config, kept), *PASSES[1:-2], *last)
    program = run_pipeline(program, config, ProgramVerifier(), on_pass, passes=passes)
    return _laid_out(program, config, stages)


def _laid_out(program: Program, config: Config, stages: list[tuple[str, int]]) -> Prepared:
    """Order and in-place reuse of a program that all passes have seen; ``stages`` are the peaks so far."""
    libraries = planner_libraries()
    order = _names(program)
    reuse = Reuse(program, _safe_in_place, config.enabled("inplace"))
    bound, program_peak, note = 0, None, libraries.note
    if config.enabled("reorder") and order:
        ordered = reorder(program, reuse.taken(order), libraries.order)
        order, bound, program_peak = ordered.order, ordered.lower_bound, ordered.program_peak
        stages.append(("reorder", own_peak(program, order)))
    copy = next((op for op in program.operations if isinstance(op, HostCopy)), None)
    if copy is not None:
        order = schedule_copies(program, order, figures_for(copy.device, config))
    order, taken = _overlapped(program, order, config, reuse)
    in_place = dict(taken.taken) if taken is not None else {}
    stages.append(("inplace", _unplanned_peak(program, in_place, order)))
    pools = config.pools if config.enabled("pools") and order else "never"
    notes = taken.notes if taken is not None else ()
    return Prepared(Laid(program, order, in_place), tuple(stages), bound, program_peak, notes, note, pools)


@collector_paused()
def plan_prepared(
    prepared: Sequence[Prepared],
    joins: Sequence[tuple[str, str]],
    config: Config,
    choice: StepChoice | None = None,
) -> tuple[Planned, ...]:
    """Plans of programs that run one after the other.

    Parameters
    ----------
    joins:
        (buffer of a forward, input of its backward that receives it).
    choice:
        Their pools; chosen here where not given.
    """
    choice = choice or choose(prepared, joins, budget=config.budget is not None)
    pack = planner_libraries().pack
    plans = []
    for k, p in enumerate(prepared):
        pooled = choice.pooled[k]
        arenas, in_arenas = place_in_arenas(p.laid.program, len(p.laid.order), p.laid.stores, pack)
        plans.append(
            make_plan(
                p.laid.program,
                p.laid.order,
                in_place=p.laid.in_place,
                pools=(*pooled.pools, *arenas),
                offsets={**(pooled.offsets or {}), **in_arenas},
                order_bound=p.order_bound,
                program_peak=p.program_peak,
                notes=p.notes,
                note=p.note,
                slabs=choice.slabs if k == len(prepared) - 1 else (),
                reserve=choice.reserve if k == 0 else None,
                requests=choice.requests if k == 0 else None,
            )
        )
    memory = step_memories(plans, joins)
    out = []
    for p, plan in zip(prepared, plans, strict=True):
        plan = replace(plan, step=memory)
        if config.verify:
            verify_plan(plan, check_program=False)
        out.append(Planned(plan, (*p.stages, ("pools", max(plan.timeline)))))
    return tuple(out)


def _overlapped(
    program: Program, order: tuple[str, ...], config: Config, reuse: Reuse
) -> tuple[tuple[str, ...], InPlace | None]:
    """The order with communication beside computation, if with reuse in place the peak allows it; and that reuse."""
    taken, extra = reuse(order), config.communication.overlap_bytes
    moved = overlap(program, order, extra) if config.enabled("overlap") else order
    if moved == order:
        return order, taken
    before, after = (_unplanned_peak(program, reuse.taken(o), o) for o in (order, moved))
    return (moved, reuse(moved)) if after <= before + extra else (order, taken)


def _names(program: Program) -> tuple[str, ...]:
    return tuple([op.name for op in program.operations])


def _unplanned_peak(program: Program, in_place: Mapping[str, str], order: Sequence[str]) -> int:
    """Peak of live bytes with every storage its own allocation."""
    stores = storages(program, lifetimes(program, order), in_place)
    return max(timeline(program, order, stores, (), frozenset()))


def _safe_in_place(op: KernelOp, old: str, new: str) -> bool:
    """Whether the kernel as emitted for its device may write ``new`` over ``old``."""
    canonical = canonicalize(op.kernel)
    names = {name: f"b{k}" for k, name in enumerate(canonical.buffers)}
    if old not in names or new not in names:
        return False
    return _safe_canonical(op.device == "cpu", canonical.kernel, names[old], names[new])


@lru_cache(maxsize=4096)
def _safe_canonical(cpu: bool, kernel: Kernel, old: str, new: str) -> bool:
    """`_safe_in_place` of all kernels that are equal but for their names: the layers of a model."""
    emitter = cpp_kernel if cpu else triton_kernel
    return bool(emitter.safe_in_place(kernel, old, new))


@dataclass(frozen=True, slots=True)
class Together:
    """How a program is planned that runs before or after another one.

    ``plan`` makes its plan, given what is kept as calls; ``beside`` says what else decides it; ``as_foreseen`` whether
    the other one is as it would be if all its kernels had been built, so that the cache's plans go with it.
    """

    plan: Callable[[Kept], Planned]
    beside: Beside
    as_foreseen: Callable[[], bool]


def compile_program(program: Program, config: Config, together: Together | None = None) -> CompiledProgram:
    """Plan, print, build and load, or take all that from the cache.

    What no kernel can be built for runs as calls, with a warning; such a result is not kept.

    Parameters
    ----------
    together:
        How it is planned with another program; without it, by itself.
    """
    foreseen = together is None or together.as_foreseen()
    entry = find_entry(program, config, together.beside if together else None) if foreseen else None
    found = entry.read() if entry is not None else None
    if found is not None:
        ready = _from_cache(found, program, config)
        if ready is not None:
            return ready

    def attempt(kept: Kept) -> CompiledProgram:
        planned = together.plan(kept) if together is not None else plan_program(program, config, kept)
        made, artifact = _compile(planned, program, config, kept)
        if entry is not None and artifact is not None and kept == NOTHING_KEPT and not made.plan.certificate.note:
            entry.write(artifact, made.plan)
        return made

    return with_fallback(program, attempt)


def _from_cache(found: Found, program: Program, config: Config) -> CompiledProgram | None:
    """The cached result ready to run; None if its kernels are gone, or cannot be loaded."""
    artifact = found.artifact

    def wide(name: str) -> Launcher:
        plan = found.plan()
        device, kernel = kernel_sets.collect(plan.program).sources[name]
        return kernel_sets.build_wide(device, kernel, name, plan.program.hints, deterministic, config)

    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        cpu = load_cached(artifact.library, found.entry.store)
        if cpu is None:
            return None
        gpu, launchers = load_gpu(artifact.gpu, wide)
    except (CompilerError, RuntimeError) as error:
        log.warning("%s is compiled again: %s", program.name, error)
        return None
    kernels = {**cpu, **gpu}
    if not found.same_origins:  # kernels are named after the operators they came from
        printed = _printed(found.plan(), artifact, kernels, config)
        if printed is None:
            return None
        artifact = printed
    linked = Linked(kernels, launchers, found.callables(), found.constants())
    return _assemble(artifact, linked, found.plan, program, config, NOTHING_KEPT)


def _compile(planned: Planned, program: Program, config: Config, kept: Kept) -> tuple[CompiledProgram, Artifact | None]:
    """`compile_program` for what is left to calls so far, and the result as data where it can be had as such.

    Raises
    ------
    LoweringError, KernelBuildError
        Naming the operations that no kernel can be had for.
    """
    plan = planned.plan
    found = kernel_sets.collect(plan.program)
    templates = collect_templates(plan.program)
    user = build_user_kernels(plan.program)
    lines = _lines(plan, found, user, templates)
    on_cpu = not (templates.sources or user.direct) and all(device == "cpu" for device, _ in found.sources.values())
    ahead = choose_wrapper(lines, {}, config) if on_cpu else None
    if ahead is not None:
        build_ahead(ahead, program.name, config)

    def choose(emitted: Mapping[str, TritonKernel]) -> Mapping[str, int]:
        gpu = {n: k for n, (_, k) in found.sources.items() if n in emitted}
        return tuned(lines, gpu, emitted, config, lambda text: _dump(config, f"{program.name}.tuning.py", text))

    first = () if not tuning_wanted(config) else (choose,)
    built = with_templates(kernel_sets.build(found, plan.program, config, *first), templates, config)
    built = replace(built, callables={**built.callables, **user.launchers})
    python = print_python(lines, poison=config.poison)
    cpp = ahead if on_cpu else choose_wrapper(lines, built.emitted, config, user.fixed)
    _dump(config, f"{program.name}.py", python.source)
    _dump(config, f"{program.name}.kernels.txt", built.source)
    if cpp is not None:
        _dump(config, f"{program.name}.wrapper.cpp", cpp.source)
    gpu = [
        GpuKernel.of(n, launcher.index, built.emitted[n], launcher.compiled) for n, launcher in built.launchers.items()
    ]
    gpu += [GpuKernel.of_user(n, index, found) for n, (index, found) in user.direct.items()]
    artifact = Artifact(python, cpp, cached(built.library), tuple(gpu), planned.waterfall, reserves_of(plan))
    held, communicating = plan.program, Communicating.of(plan, config)
    linked = Linked(built.callables, {**built.launchers, **user.loaders}, held.callables, held.constants, communicating)
    ready = _assemble(artifact, linked, lambda: plan, program, config, kept)
    if user.launchers.keys() - user.direct.keys():  # compiled by Triton, for what their arguments turn out to be
        return replace(ready, artifact=None), None
    return ready, artifact


def _printed(plan: Plan, artifact: Artifact, kernels: Container[str], config: Config) -> Artifact | None:
    """The artifact with the wrappers of a plan that is to run on kernels which are there; None if it wants another."""
    sets, templates = kernel_sets.collect(plan.program), collect_templates(plan.program)
    user = UserKernels(named_user_kernels(plan.program)[0], {})
    of_templates = (n for name, (_, product) in templates.sources.items() for n in product.launches(name))
    if not all(name in kernels for name in (*sets.sources, *of_templates, *user.names.values())):
        return None
    lines = _lines(plan, sets, user, templates)
    fixed = {k.name: k.fixed for k in artifact.gpu if k.fixed is not None}
    cpp = choose_wrapper(lines, {k.name: k for k in artifact.gpu}, config, fixed)
    return replace(artifact, python=print_python(lines, poison=config.poison), cpp=cpp)


def _keeping(
    plan: Plan, artifact: Artifact, linked: Linked, program: Program, config: Config, kept: Kept
) -> CompiledProgram:
    """What was compiled with this plan, in one that leaves donated inputs to their owner.

    It is laid out anew, on the same kernels and calls: so it computes the same bits, and nothing is built for it but a
    wrapper.
    """
    same = keeping_inputs(plan.program)
    if config.verify:
        verify_program(same)
    prepared = _laid_out(same, config, [("captured", own_peak(same, _names(same)))])
    planned = plan_prepared((prepared,), (), config)[0]
    found = _printed(planned.plan, artifact, linked.kernels, config)
    assert found is not None, "a plan of the same kernels wants others"
    _dump(config, f"{program.name}.kept.py", found.python.source)
    found = replace(found, waterfall=planned.waterfall, reserves=reserves_of(planned.plan))
    linked = replace(linked, communicating=Communicating.of(planned.plan, config))
    return _assemble(found, linked, lambda: planned.plan, without_donation(program), config, kept)


def _dump(config: Config, name: str, text: str) -> None:
    """Write generated code to the folder that was asked for, if one was."""
    if config.dump:
        folder = Path(config.dump)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def _lines(
    plan: Plan, found: kernel_sets.KernelSet, user: UserKernels, templates: TemplateSet = NO_TEMPLATES
) -> WrapperProgram:
    """The plan's wrapper as data."""
    known = {**found.arguments, **templates.arguments}
    arguments = {n: (a.source, a.buffers, a.symbols) for n, a in known.items()}
    arguments.update((n, (kernel, (), ())) for n, kernel in user.names.items())
    return wrapper_lines(plan, arguments, {n: a.offsets for n, a in known.items()})


def print_cpp_wrapper(plan: Plan, config: Config) -> CppWrapper | None:
    """The C++ wrapper of a plan for the CPU; None where only Python can run it.  Raises UnsupportedError likewise."""
    found = kernel_sets.collect(plan.program)
    return choose_wrapper(_lines(plan, found, NO_USER_KERNELS), {}, replace(config, wrapper="cpp"))


def _assemble(
    artifact: Artifact, linked: Linked, make_plan: Callable[[], Plan], program: Program, config: Config, kept: Kept
) -> CompiledProgram:
    """The wrapper joined to what it calls."""
    filename = f"<memplan {program.name}>"

    def explain(plan: Plan, shortage: Shortage) -> str:
        from .reports.oom import explain_oom  # only then: reports bring pydantic and rich

        def remedies(had: int) -> list[Remedy]:
            found = [remedy(had) for remedy in made.remedies]
            again = switched_on(plan, config, lambda c: plan_program(program, c, kept).plan)
            return [r for r in found if r is not None] + again

        return explain_oom(plan, shortage, remedies)

    def in_python() -> Callable[..., object]:
        names = namespace(artifact.python.operators, linked.callables, linked.constants, linked.kernels)
        if linked.communicating is not None:
            names.update(linked.communicating.names())
        exec(compile(artifact.python.source, filename, "exec"), names)
        return names["call"]  # type: ignore[return-value]

    source, native = artifact.python.source, None
    if artifact.cpp is not None:
        try:
            native = load_in_cpp(artifact.cpp, program.name, linked, config)
            source = artifact.cpp.source
        except CPP_REASONS as error:
            if config.wrapper == "cpp":
                raise
            say_python(str(error))
    call = in_python() if native is None else seen_by_modes(native, in_python)
    call = below_autograd(call) if artifact.python.operators else call
    call = on_own_device(call, {b.device for b in program.buffers.values()})
    keeping = made_once(lambda: _keeping(made.plan, artifact, linked, program, config, kept))
    made: CompiledProgram = CompiledProgram(make_plan, call, source, keeping, artifact.waterfall, artifact)
    starts = artifact.python.starts
    call = explained(reserving(call, artifact.reserves, best_room), lambda: made.plan, filename, starts, explain)
    call = settled(call) if WAIT in artifact.python.operators.values() else call
    call = call if linked.communicating is None else linked.communicating.guarded(call)
    return replace(made, call=call)
