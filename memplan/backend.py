"""The one place that joins everything: ``torch.compile(model, backend="memplan")`` arrives here."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch._functorch.config as functorch_config
import torch.fx
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
from torch._logging._internal import trace_log

from . import budget, recording
from .budget import Budget
from .calibration import figures_for
from .capture.attention import simplify_masks
from .capture.fx import capture
from .capture.joint import Costs
from .capture.partition import Chooser, Cutter, Modules, Partitioned, partitioner
from .compilation import PASS_NAMES, compile_program, plan_program
from .ir.config import Config
from .ir.errors import OptionError, PlanningError, UnsupportedError
from .ir.plan import Plan
from .ir.program import BufferKind, Phase, Program, TensorInput, View
from .lowering.decompositions import decomposition_table
from .passes.rematerialize import choose_within
from .passes.step_peak import step_peak
from .runtime import cuda_graphs

log = logging.getLogger(__name__)
_groups = itertools.count()
SUPPORTED_TORCH = ((2, 11), (2, 14))


def check_platform() -> None:
    """Refuse what cannot work, warn of what was never tried.

    Raises
    ------
    UnsupportedError
        On ROCm, Windows, macOS, or a torch older than 2.11.
    """
    if sys.platform != "linux":
        raise UnsupportedError(f"memplan runs on Linux; this is {sys.platform}")
    if torch.version.hip is not None:
        raise UnsupportedError("memplan does not support ROCm builds of torch; use an NVIDIA or a CPU build")
    version = tuple(int(p) for p in torch.__version__.split("+")[0].split(".")[:2])
    if version < SUPPORTED_TORCH[0]:
        raise UnsupportedError(f"memplan needs torch 2.11 or newer; this is torch {torch.__version__}")
    if version > SUPPORTED_TORCH[1]:
        warnings.warn(f"memplan was tested with torch 2.11 to 2.14; this is torch {torch.__version__}", stacklevel=3)


def check_built(config: Config) -> None:
    """Refuse options whose machinery does not exist yet, instead of doing something else in silence.

    Raises
    ------
    UnsupportedError
        Naming the option and what to use meanwhile.
    """
    if config.budget is not None and not config.enabled("rematerialize"):
        raise OptionError("option 'budget' chooses what is recomputed: leave 'rematerialize' out of 'disable'")
    if config.target is not None:
        raise UnsupportedError("option 'target' is not there yet; plans are made for the devices of the tensors")


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

    def compile_forward(self, module: torch.fx.GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        program = self.capture_forward(module)
        if self.records(program):
            self.recorded = True
            return self.watch_hooks(self.finish_recorded(program, module, inputs))
        return self.watch_hooks(self.finish(program, module))

    def watch_hooks(self, call: Callable[..., object]) -> Callable[..., object]:
        """The forward, which notes whether saved-tensor hooks (offload, for example) were active."""
        top_hooks = torch._C._autograd._top_saved_tensors_default_hooks

        def forward(args: list[object]) -> object:
            if not self.hooked and top_hooks(True) is not None:
                self.hooked = True
            return call(args)

        forward._boxed_call = True  # type: ignore[attr-defined]
        return forward

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
        self.forward = program
        return program

    def compile_backward(self, module: torch.fx.GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        leave_donation_to_us()
        program = self.capture_backward(module)
        if self.recorded:
            if self.records(program):
                return self.finish_recorded(program, module, inputs)
            plain = self.finish(without_donation(program), module)  # what the forward saved is in its recording's pool
            return cuda_graphs.beside_recordings(plain, cuda_graphs.gpu_of(program) or 0)
        donating = self.finish(program, module)
        if self.config.plan_only or not any(b.donated for b in program.buffers.values()):
            return donating
        return backward_call(donating, lambda: compile_program(without_donation(program), self.config).call, self)

    def capture_backward(self, module: torch.fx.GraphModule) -> Program:
        """Inputs that the forward made for this backward alone are donated: they die with their last use."""
        donated: set[int] = set()
        kinds: dict[str, BufferKind] = {}
        if self.forward is not None:
            assert self.partitioned.forward is not None
            outputs = self.partitioned.forward.graph.output_node().args[0]
            counted: set[str] = set()
            for node, out in zip(outputs, self.forward.outputs, strict=True):  # type: ignore[arg-type]
                if isinstance(out, View) and isinstance(node, torch.fx.Node) and out.buffer not in counted:
                    counted.add(out.buffer)
                    kinds[node.name] = self.forward.buffers[out.buffer].kind
        static: set[int] = set()
        for position, node in enumerate(n for n in module.graph.nodes if n.op == "placeholder"):
            match kinds.get(node.name):
                case BufferKind.SAVED:
                    donated.add(position)
                case BufferKind.PARAMETER:
                    static.add(position)
                case _:
                    pass
        return capture(
            module,
            Phase.BACKWARD,
            name=f"backward{self.group}",
            static_inputs=frozenset(static),
            donated_inputs=frozenset(donated),
        )

    def compile_inference(self, module: torch.fx.GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        program = capture(module, Phase.INFERENCE, name=f"inference{self.group}", static_inputs=static_inputs())
        self.hold_to_budget(program)
        if self.records(program):
            return self.finish_recorded(program, module, inputs)
        return self.finish(program, module)

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
        if planned.peak.nbytes > self.config.budget:
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
        return cuda_graphs.recorded(self.finish(kept, module), inputs, kept, module, static)

    def finish(self, program: Program, module: torch.fx.GraphModule) -> Callable[..., object]:
        if self.config.plan_only:
            planned = plan_program(program, self.config)
            joins = self.joins(planned.plan)
            trace(planned.plan)
            recording.tell(recording.CompiledGraph(planned.plan, self.group, joins, planned.waterfall))
            return make_boxed_func(module.forward)  # type: ignore[no-any-return]
        compiled = compile_program(program, self.config)
        if recording.listening() or trace_log.handlers:  # a plan from the cache is read for them alone
            plan = compiled.plan
            trace(plan)
            joins = self.joins(plan)
            recording.tell(recording.CompiledGraph(plan, self.group, joins, compiled.waterfall, compiled.source))
        return true_elements(program, module, compiled.call)

    def trial(self, forward_outputs: int, parameters: frozenset[int], modules: Modules) -> budget.Planned:
        """The plans that a cut of the joint graph would get; this region is left as it is."""
        config = replace(self.config, dump=None, verify=False)
        partitioned = Partitioned(forward_outputs, *modules)
        trial = Region(config, self.group, partitioned, parameters=parameters)
        programs = [trial.capture_forward(modules[0]), trial.capture_backward(modules[1])]
        if config.cuda_graphs:  # see `finish_recorded`
            programs = [without_donation(p) for p in programs]
        plans = [plan_program(p, config).plan for p in programs]
        joins = {later: earlier for earlier, later in trial.joins(plans[1])}
        return budget.Planned(plans, joins, step_peak(plans, joins))

    def joins(self, plan: Plan) -> tuple[tuple[str, str], ...]:
        """(forward buffer, backward buffer) for what this backward got from its forward."""
        if plan.program.phase is not Phase.BACKWARD or self.forward is None:
            return ()
        assert self.partitioned.forward is not None
        outputs = self.partitioned.forward.graph.output_node().args[0]
        out = []
        for node, held in zip(outputs, self.forward.outputs, strict=True):  # type: ignore[arg-type]
            if isinstance(held, View) and isinstance(node, torch.fx.Node) and node.name in plan.program.buffers:
                out.append((held.buffer, node.name))
        return tuple(dict.fromkeys(out))


def trace(plan: Plan) -> None:
    """The plan in torch's structured trace, where one is being written (``TORCH_TRACE=folder``)."""
    if trace_log.handlers:
        from .reports.structured import trace_plan  # only then: reports bring pydantic and rich

        trace_plan(plan)


def true_elements(program: Program, module: torch.fx.GraphModule, call: Callable[..., object]) -> Callable[..., object]:
    """The call, given lazily conjugated or negated inputs as their elements are: kernels read memory, not such bits.

    (Dynamo compiles again for an input with other bits.) What the program writes into such an input is written back.
    """
    nodes = enumerate(n for n in module.graph.nodes if n.op == "placeholder")
    values = {k: n.meta.get("val") for k, n in nodes}
    lazy = [k for k, v in values.items() if isinstance(v, torch.Tensor) and (v.is_conj() or v.is_neg())]
    if not lazy:
        return call
    changed = {b for op in program.operations for b in op.mutates}
    changes = {i.position for i in program.inputs if isinstance(i, TensorInput) and i.view.buffer in changed}

    def resolved(args: list[object]) -> object:
        back = []
        for k in lazy:
            given = args[k]
            assert isinstance(given, torch.Tensor)
            made = torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=given.device)
            args[k] = made.copy_(given.detach())
            if k in changes:
                back.append((given.detach(), made))
        out = call(args)
        for given, made in back:
            given.copy_(made)
        return out

    resolved._boxed_call = True  # type: ignore[attr-defined]
    return resolved


def backward_call(
    donating: Callable[..., object], make_plain: Callable[[], Callable[..., object]], region: Region
) -> Callable[..., object]:
    """The backward that frees and overwrites what the forward saved, unless somebody may still want it.

    Under ``retain_graph=True``, or where saved-tensor hooks gave us tensors that may be the user's, a variant of the
    same program runs that leaves them alone; it is made when it is first needed, from kernels that are built already.
    """
    keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
    plain: list[Callable[..., object]] = []
    lock = threading.Lock()

    def backward(args: list[object]) -> object:
        if not keeps_graph() and not region.hooked:
            return donating(args)
        with lock:
            if not plain:
                plain.append(make_plain())
        return plain[0](args)

    backward._boxed_call = True  # type: ignore[attr-defined]
    return backward


def without_donation(program: Program) -> Program:
    """The same program with every input left to its owner."""
    buffers = {n: replace(b, donated=False) for n, b in program.buffers.items()}
    return replace(program, buffers=buffers)


#: Operators that are never computed again though nothing random or mutating marks them: they cost time.
EXPENSIVE = [
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "addmv",
    "mv",
    "dot",
    "vdot",
    "convolution",
    "cudnn_convolution",
    "mkldnn_convolution",
    "convolution_backward",
    "sort",
    "topk",
    "unique",
    "unique2",
    "_unique2",
    "cumsum",
    "cumprod",
    "scatter_add",
    "scatter_reduce",
    "index_put",
    "index_add",
    "nonzero",
    "_scaled_dot_product",
    "_flash_attention",
    "_efficient_attention",
    "_cudnn_attention",
    "embedding_bag",
    "_embedding_bag",
    "_fft",
    "linalg",
    "_linalg",
    "native_dropout",
    "svd",
    "qr",
    "cholesky",
    "inverse",
    "grid_sampler",
    "max_pool3d",
    "rnn",
    "lstm",
    "gru",
    "histc",
    "bincount",
    "_scaled_mm",
    "_int_mm",
    "_grouped_mm",
    "_cdist",
    "_pdist",
    "cdist",
    "ctc_loss",
    "_ctc_loss",
]


def cheap_again(target: str) -> bool:
    """Whether an operator may be computed again in the backward: what fuses into one pass over its inputs."""
    namespace, name, _ = target.split(".")
    if namespace not in ("aten", "prims", "memplan"):
        return False
    return not any(name == e or (e.startswith("_") and name.startswith(e)) for e in EXPENSIVE)


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


def compile(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[object],
    *,
    mode: str | None = None,
    options: dict[str, object] | None = None,
) -> Callable[..., object]:
    """The backend of ``torch.compile(model, backend="memplan", options={...})``.

    Parameters
    ----------
    module:
        A Dynamo graph.
    mode:
        ``"default"``, ``"reduce-overhead"``, ``"max-autotune"`` or ``"max-autotune-no-cudagraphs"``.
    options:
        Fields of `memplan.ir.config.Config`.

    Raises
    ------
    OptionError
        For an option that does not exist or cannot be used.
    UnsupportedError
        On a platform where memplan does not run.
    """
    check_platform()
    config = Config.from_options(options, mode, known_passes=PASS_NAMES)
    return compile_with(module, example_inputs, config)


def chooser(config: Config, device: str = "cpu", region: Region | None = None) -> Chooser:
    """What is kept for the backward on a device; within the budget, where one is asked for."""
    figures = figures_for(device, config, measure=config.budget is not None)

    def search(cut: Cutter, forward_outputs: int, parameters: frozenset[int]) -> Modules:
        assert region is not None
        assert config.budget is not None
        check_budget(config.budget, device)
        return Budget(config.budget, figures, cut, partial(region.trial, forward_outputs, parameters)).search()

    return Chooser(
        choose=lambda graph: choose_within(graph, config.recompute_time, figures),
        costs=Costs(figures, cheap_again),
        search=search if config.budget is not None and region is not None else None,
    )


def check_budget(budget: int, device: str) -> None:
    """Refuse a budget that the device cannot give.

    Raises
    ------
    OptionError
        If it is larger than the device's memory.
    """
    if device.startswith("cuda"):
        total = torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else None
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if total is not None and budget > total:
        raise OptionError(f"a budget of {budget} bytes is larger than the memory of {device}, {total} bytes")


def device_of(module: torch.fx.GraphModule) -> str:
    """The device of a Dynamo graph's step: the first GPU that it names, else the CPU."""
    found: dict[str, None] = {}
    for node in module.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor):
            found[str(value.device)] = None
    return next((d for d in found if d.startswith("cuda")), "cpu")


def compile_with(
    module: torch.fx.GraphModule, example_inputs: Sequence[object], config: Config
) -> Callable[..., object]:
    """As `compile`, for a ready `Config`."""
    check_built(config)
    if config.enabled("attention"):
        simplify_masks(module)
    region = Region(config, next(_groups))
    backend = aot_autograd(
        fw_compiler=region.compile_forward,
        bw_compiler=region.compile_backward,
        inference_compiler=region.compile_inference,
        partition_fn=partitioner(config, region.partitioned, chooser(config, device_of(module), region)),
        decompositions=decomposition_table(config),
        keep_inference_input_mutations=True,
    )
    # the backward is built with its forward, not inside the first .backward(), when all activations are alive
    with functorch_config.patch(force_non_lazy_backward_lowering=True):
        return backend(module, example_inputs)
