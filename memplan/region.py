"""A compiled region: a forward and its backward, or an inference graph, from FX graphs to calls."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import assert_never

import torch
import torch.fx
from functorch.compile import make_boxed_func
from torch._guards import CompileContext, TracingContext
from torch._logging._internal import trace_log

from . import budget, recording
from .calibration import copy_figures
from .calls import backward_call, completed, forward_call
from .capture.fx import capture
from .capture.layout import convolutions_channels_last
from .capture.partition import Modules, Partitioned, result_names
from .capture.traced import Traced, runnable
from .compilation import (
    CompiledProgram,
    Together,
    compile_program,
    plan_prepared,
    plan_program,
    prepare_program,
)
from .ir.activation import Activation, Fate
from .ir.config import Config
from .ir.errors import PlanningError
from .ir.in_flight import HostCopy
from .ir.plan import InPool, Plan
from .ir.program import BufferKind, Phase, Program, TensorInput, View
from .lowering.lower import NOTHING_KEPT
from .offload_budget import model_of, offload_device
from .passes.donation import without_donation
from .passes.offload import host_name, offload_saved, prefetch_received
from .passes.offload_choice import OffloadModel
from .passes.step_peak import step_peak
from .pooling import choose
from .remedies import recomputing
from .runtime import cuda_graphs
from .runtime.host_copies import finish_copies
from .runtime.library_workspaces import product_gpus, with_workspaces
from .step_planning import PlannedAhead, StepPlanner, joined
from .target import on_target
from .trace_cache import Step


@dataclass
class Region:
    """One torch.compile region: a forward and its backward, or an inference graph."""

    config: Config
    group: int
    partitioned: Partitioned = field(default_factory=Partitioned)
    forward: Program | None = None
    #: a forward of this region ran under saved-tensor hooks: what is saved may be somebody else's tensor then
    hooked: bool = False
    #: the forward is recorded as a CUDA graph
    recorded: bool = False
    #: positions of parameters among the forward's inputs, where AOTAutograd cannot be asked
    parameters: frozenset[int] | None = None
    #: the forward planned together with its backward; None where each is planned by itself
    planner: StepPlanner | None = None
    #: what a search for a budget has planned already
    ahead: PlannedAhead | None = None
    #: the backward as it was planned, and its FX graph's text
    backward: Program | None = None
    backward_code: str = ""
    #: the forward's plan, once it is compiled, and the backward's
    forward_plan: Callable[[], Plan] | None = None
    backward_plan: Callable[[], Plan] | None = None
    #: the programs as captured, and positions of their lazy inputs; a backward that was not as foreseen is none of them
    captured: dict[Phase, Program] = field(default_factory=dict)
    lazy: dict[Phase, tuple[int, ...]] = field(default_factory=dict)
    #: Dynamo's number of the frame, and how often it was compiled before
    compilation: tuple[int, int] | None = field(default_factory=lambda: compilation())

    def compile_forward(self, module: torch.fx.GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        program = self.capture_forward(module)
        if self.records(program):
            self.recorded = True
            return self.watch_hooks(self.finish_recorded(program, module, inputs))
        return self.finish_forward(program, Traced.of(module), self.plan_together(program))

    def finish_forward(self, program: Program, traced: Traced, planner: StepPlanner | None) -> Callable[..., object]:
        """The forward's call, from its program."""
        self.note(program, traced)
        self.planner = planner
        if self.planner is None:
            return self.with_workspaces(program, self.watch_hooks(self.finish(program, traced)))
        call = self.finish(program, traced, self.planner.role(program))
        hooked = self.watch_hooks(call, lambda: self.forward_apart(call, program, traced))
        return self.with_workspaces(program, hooked)

    def note(self, program: Program, traced: Traced) -> None:
        """Remember a program for `step`."""
        self.captured[program.phase], self.lazy[program.phase] = program, traced.lazy

    def step(self) -> Step | str:
        """The region as it was captured, to be kept; or why it cannot be."""
        phases = set(self.captured)
        if phases not in ({Phase.INFERENCE}, {Phase.FORWARD, Phase.BACKWARD}):
            return "its backward was not foreseen"
        bare = replace(self.partitioned, backward=None, recut=None)
        programs = {p: replace(program) for p, program in self.captured.items()}
        return Step(programs, self.lazy, bare, self.planner is not None)

    def restored(self, step: Step) -> Callable[[Phase], Callable[..., object]]:
        """Calls of a kept step, the forward's first; the region is a new one."""
        self.partitioned = replace(step.partitioned)
        named = {p: replace(program, name=f"{p.value}{self.group}") for p, program in step.programs.items()}
        self.forward, self.backward = named.get(Phase.FORWARD), named.get(Phase.BACKWARD)

        def together() -> StepPlanner | None:
            if not step.together:
                return None
            assert self.forward is not None
            assert self.backward is not None
            return StepPlanner(self.forward, self.backward, self.received(self.backward), self.config)

        def call_of(phase: Phase) -> Callable[..., object]:
            program, traced = named[phase], Traced(step.lazy[phase])
            match phase:
                case Phase.FORWARD:
                    return self.finish_forward(program, traced, together())
                case Phase.BACKWARD:
                    return self.finish_backward(program, traced, foreseen=True)
                case Phase.INFERENCE:
                    self.hold_to_budget(program)
                    return self.finish_inference(program, traced)
            assert_never(phase)

        return call_of

    def with_workspaces(self, program: Program, call: Callable[..., object]) -> Callable[..., object]:
        """The call of a forward or an inference, before which the libraries have what they keep."""
        if self.config.plan_only:
            return call

        def gpus() -> frozenset[int]:
            known = (program,) if self.backward is None else (program, self.backward)
            return frozenset().union(*map(product_gpus, known))

        return with_workspaces(call, gpus, trains=program.phase is Phase.FORWARD)

    def plan_together(self, forward: Program) -> StepPlanner | None:
        """Both programs of the region, the backward's as it will be handed over; None where it makes no difference."""
        module = self.partitioned.backward
        if module is None or not forward.operations:
            return None
        on_gpu = any(b.device.startswith("cuda") for b in forward.buffers.values())
        if not on_gpu and self.config.pools != "always" and self.ahead is None:
            return None
        self.backward, self.backward_code = self.capture_backward(module), str(module.graph)
        return StepPlanner(forward, self.backward, self.received(self.backward), self.config, self.ahead)

    def forward_apart(self, call: Callable[..., object], program: Program, traced: Traced) -> Callable[..., object]:
        """The forward with no saved tensor in a slab."""
        assert self.forward_plan is not None
        plan = self.forward_plan()
        saved = (n for n, b in plan.program.buffers.items() if b.kind is BufferKind.SAVED and n in plan.placements)
        if not any(isinstance(plan.placements[plan.storage_of(n)], InPool) for n in saved):
            return call
        return completed(program, traced.lazy, compile_program(program, self.config).call)

    def watch_hooks(
        self, call: Callable[..., object], make_apart: Callable[[], Callable[..., object]] | None = None
    ) -> Callable[..., object]:
        """`forward_call`, which is told when hooks were active."""

        def note() -> None:
            self.hooked = True

        settle = finish_copies if self.partitioned.offloaded else None
        return forward_call(call, note, make_apart, settle)

    def capture_forward(self, module: torch.fx.GraphModule) -> Program:
        count = len(module.graph.output_node().args[0])  # type: ignore[arg-type]
        saved = frozenset(range(self.partitioned.forward_outputs, count))
        program = capture(
            module,
            Phase.FORWARD,
            name=f"forward{self.group}",
            static_inputs=static_inputs() if self.parameters is None else self.parameters,
            saved_outputs=saved,
        )
        program = on_target(program, self.config)
        program = replace(program, notes=(*program.notes, *self.partitioned.whole_logits))
        if self.partitioned.offloaded:
            program = offload_saved(program, self.offloaded_positions(), self.host_bandwidth(program))
        self.forward = program
        return program

    def host_bandwidth(self, program: Program) -> float:
        """Bytes per microsecond between a program's device and the host."""
        return copy_figures(offload_device(program), self.config).host_bandwidth

    def offloaded_positions(self) -> tuple[int, ...]:
        """Positions of what goes to the host among the forward's results."""
        wanted = frozenset(self.partitioned.offloaded)
        return tuple(k for k, name in enumerate(self.partitioned.results) if name in wanted)

    def compile_backward(self, module: torch.fx.GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        leave_donation_to_us()
        foreseen = self.planner is not None and self.backward_code == str(module.graph)
        program = self.backward if foreseen and self.backward is not None else self.capture_backward(module)
        if self.recorded:
            if self.records(program):
                return self.finish_recorded(program, module, inputs)
            # what the forward saved is in its recording's pool
            plain = self.finish(without_donation(program), Traced.of(module))
            return cuda_graphs.beside_recordings(plain, cuda_graphs.gpu_of(program) or 0)
        return self.finish_backward(program, Traced.of(module), foreseen)

    def finish_backward(self, program: Program, traced: Traced, foreseen: bool) -> Callable[..., object]:
        """The backward's call, from its program; ``foreseen``: it is the one that the forward was planned with."""
        if foreseen or self.planner is None:
            self.note(program, traced)
        together = self.planner.role(program) if foreseen and self.planner else None
        if self.config.plan_only or not any(b.donated for b in program.buffers.values()):
            return self.finish(program, traced, together)
        compiled = self.compiled(program, together)

        def keeping() -> Callable[..., object]:
            return completed(program, traced.lazy, compiled.keeping().call)

        return backward_call(completed(program, traced.lazy, compiled.call), keeping, lambda: self.hooked)

    def capture_backward(self, module: torch.fx.GraphModule) -> Program:
        """Inputs that the forward made for this backward alone are donated: they die with their last use."""
        donated: set[int] = set()
        kinds: dict[str, BufferKind] = {}
        if self.forward is not None:
            times = Counter(out.buffer for out in self.forward.outputs if isinstance(out, View))
            for name, out in zip(self.partitioned.results, self.forward.outputs, strict=True):
                # (of a storage that is saved twice, neither may be written over while the other is read)
                if isinstance(out, View) and name is not None:
                    kind = self.forward.buffers[out.buffer].kind
                    if kind is not BufferKind.SAVED or times[out.buffer] == 1:
                        kinds[name] = kind
        static: set[int] = set()
        for position, node in enumerate(n for n in module.graph.nodes if n.op == "placeholder"):
            match kinds.get(node.name):
                case BufferKind.SAVED:
                    donated.add(position)
                case BufferKind.PARAMETER:
                    static.add(position)
                case _:
                    pass
        program = capture(
            module,
            Phase.BACKWARD,
            name=f"backward{self.group}",
            static_inputs=frozenset(static),
            donated_inputs=frozenset(donated),
        )
        program = on_target(program, self.config)
        if not self.partitioned.offloaded:
            return program
        return prefetch_received(program, self.partitioned.offloaded, self.host_bandwidth(program))

    def compile_inference(self, module: torch.fx.GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        if self.config.enabled("layout"):
            convolutions_channels_last(module)
        program = capture(module, Phase.INFERENCE, name=f"inference{self.group}", static_inputs=static_inputs())
        program = on_target(program, self.config)
        self.hold_to_budget(program)
        if self.records(program):
            return self.finish_recorded(program, module, inputs)
        return self.finish_inference(program, Traced.of(module))

    def finish_inference(self, program: Program, traced: Traced) -> Callable[..., object]:
        """The call of an inference graph, from its program."""
        self.note(program, traced)
        return self.with_workspaces(program, self.finish(program, traced))

    def hold_to_budget(self, program: Program) -> None:
        """A program without a backward has nothing to recompute: it is within the budget or it is not.

        Raises
        ------
        PlanningError
            If it is not: the bytes that it needs, and what stands at its peak.
        """
        if self.config.budget is None:
            return
        plan = plan_program(program, replace(self.config, dump=None, verify=False)).plan
        planned = budget.Planned((plan,), {}, step_peak((plan,), {}))
        if planned.peak.needed > self.config.budget:
            raise PlanningError(budget.cannot_be_met(self.config.budget, planned))

    def records(self, program: Program) -> bool:
        """Whether the program becomes a CUDA graph; what was asked for and cannot be had is said."""
        if not self.config.cuda_graphs or self.config.plan_only or not torch.cuda.is_available():
            return False
        if cuda_graphs.gpu_of(program) is None:
            return False
        found = cuda_graphs.obstacle(program)
        if found is not None:
            warnings.warn(f"{program.name} runs without CUDA graphs: {found}", stacklevel=2)
        return found is None

    def finish_recorded(
        self, program: Program, module: torch.fx.GraphModule, inputs: Sequence[object]
    ) -> Callable[..., object]:
        """`finish`, recorded. Nothing is donated: a result in place of an input would be a part of its recording."""
        static = cuda_graphs.static_positions(program)
        kept = without_donation(program)
        return cuda_graphs.recorded(self.finish(kept, Traced.of(module)), inputs, kept, module, static)

    def finish(self, program: Program, traced: Traced, together: Together | None = None) -> Callable[..., object]:
        """The program planned, built, told to who listens."""
        if self.config.plan_only:
            planned = together.plan(NOTHING_KEPT) if together is not None else plan_program(program, self.config)
            if program.phase is Phase.FORWARD:
                self.forward_plan = lambda: planned.plan
            trace(planned.plan)
            self.tell(program, planned.plan, planned.waterfall)
            assert traced.module is not None
            return make_boxed_func(runnable(traced.module).forward)  # type: ignore[no-any-return]
        return completed(program, traced.lazy, self.compiled(program, together).call)

    def compiled(self, program: Program, together: Together | None = None) -> CompiledProgram:
        """The program planned and built, told to who listens."""
        compiled = compile_program(program, self.config, together)
        if program.phase is Phase.FORWARD:
            self.forward_plan = lambda: compiled.plan
        elif program.phase is Phase.BACKWARD:
            self.backward_plan = lambda: compiled.plan
        compiled.remedies.append(lambda had: recomputing(self, had))
        if recording.listening() or trace_log.handlers:  # a plan from the cache is read for them alone
            plan = compiled.plan
            trace(plan)
            self.tell(program, plan, compiled.waterfall, compiled.source)
        return compiled

    def tell(self, program: Program, plan: Plan, waterfall: tuple[tuple[str, int], ...], source: str = "") -> None:
        """Tell all that record."""
        eager = self.partitioned.eager if program.phase is Phase.FORWARD else None
        joins, fates = self.joins(plan.program), self.activations(program)
        recording.tell(
            recording.CompiledGraph(plan, self.group, joins, waterfall, source, fates, self.compilation, eager)
        )

    def activations(self, program: Program) -> tuple[Activation, ...]:
        """What became of the forward's values that a backward needs."""
        if program.phase is not Phase.BACKWARD:
            return ()
        copies = [op for op in program.operations if isinstance(op, HostCopy)]
        spent = {op.in_flight_results[0]: 2 * op.microseconds for op in copies}
        return tuple(
            replace(a, fate=Fate.OFFLOADED, microseconds=spent[a.name]) if a.name in spent else a
            for a in self.partitioned.activations
        )

    def offload_model(
        self, forward_outputs: int, parameters: frozenset[int], modules: Modules, planned: budget.Planned
    ) -> OffloadModel:
        """What taking saved tensors of a planned cut to the host would do."""
        cut = Partitioned(forward_outputs, result_names(modules[0]), modules[1])
        trial = Region(self.config, self.group, cut, parameters=parameters)
        return model_of(trial.capture_forward(modules[0]), forward_outputs, modules, planned, self.config)

    def trial(
        self, forward_outputs: int, parameters: frozenset[int], modules: Modules, offloaded: Sequence[str] = ()
    ) -> budget.Planned:
        """The plans that a cut of the joint graph would get; this region is left as it is.

        ``offloaded``: nodes whose values are kept on the host.
        """
        config = replace(self.config, dump=None, verify=False)
        partitioned = Partitioned(forward_outputs, result_names(modules[0]), modules[1], offloaded=tuple(offloaded))
        trial = Region(config, self.group, partitioned, parameters=parameters)
        programs = [trial.capture_forward(modules[0]), trial.capture_backward(modules[1])]
        if config.cuda_graphs:  # see `finish_recorded`
            programs = [without_donation(p) for p in programs]
        forward, backward = programs
        prepared = (prepare_program(forward, config), prepare_program(backward, config))
        pairs = joined(prepared[0].laid.program, trial.received(backward))
        choice = choose(prepared, pairs, budget=True)
        planned = plan_prepared(prepared, pairs, config, choice)
        plans = [p.plan for p in planned]
        joins = {later: earlier for earlier, later in pairs}
        ahead = PlannedAhead((forward, backward), prepared, pairs, choice, planned)
        return budget.Planned(plans, joins, step_peak(plans, joins), ahead)

    def received(self, backward: Program) -> tuple[tuple[int, str], ...]:
        """(position among the forward's results, input of the backward that receives it)."""
        if backward.phase is not Phase.BACKWARD or self.forward is None:
            return ()
        given = {i.view.buffer for i in backward.inputs if isinstance(i, TensorInput)}
        return tuple(
            (k, name)
            for k, result in enumerate(self.partitioned.results)
            if result is not None
            for name in (result, host_name(result))
            if name in given
        )

    def joins(self, backward: Program) -> tuple[tuple[str, str], ...]:
        """(forward buffer, backward buffer) for what this backward got from its forward, as they are planned."""
        if self.forward_plan is None:
            return ()
        return joined(self.forward_plan().program, self.received(backward))


def compilation() -> tuple[int, int] | None:
    """Dynamo's number of the frame that is being compiled, and how often it was compiled before."""
    found = CompileContext.current_compile_id()
    if found is None or found.frame_id is None or found.frame_compile_id is None:
        return None
    return found.frame_id, found.frame_compile_id


def trace(plan: Plan) -> None:
    """The plan in torch's structured trace, where one is being written (``TORCH_TRACE=folder``)."""
    if trace_log.handlers:
        from .reports.structured import trace_plan  # only then: reports bring pydantic and rich

        trace_plan(plan)


def leave_donation_to_us() -> None:
    """Tell AOTAutograd that nothing is donated, so that it does not refuse ``retain_graph=True``: see `backward_call`.

    (Switching its option off instead leaves the list unset, which its check at run time takes for a donation.)
    """
    metadata = getattr(TracingContext.try_get(), "fw_metadata", None)
    if metadata is not None:
        metadata.bw_donated_idxs = []


def static_inputs() -> frozenset[int]:
    """Positions of parameters and module buffers among the forward's inputs."""
    context = TracingContext.try_get()
    metadata = getattr(context, "fw_metadata", None)
    return frozenset(getattr(metadata, "static_input_indices", None) or ())
