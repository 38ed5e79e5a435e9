"""The one place that joins everything: ``torch.compile(model, backend="memplan")`` arrives here."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch._functorch.config as functorch_config
import torch.fx
from torch._dynamo.backends.common import aot_autograd

from . import budget, recording, target
from .budget import Budget
from .calibration import copy_figures, figures_for
from .capture.attention import simplify_masks
from .capture.joint import Costs
from .capture.partition import Chooser, Cutter, Modules, partitioner
from .capture.size_inputs import sizes_as_nodes
from .compilation import (
    PASS_NAMES,
)
from .frame_room import with_frame_room
from .ir.config import Config
from .ir.errors import OptionError, UnsupportedError
from .ir.program import Phase
from .lowering.corrections import corrected
from .lowering.decompositions import decomposition_table
from .offload_budget import OffloadBudget, check_offload
from .passes.pipeline import collector_paused
from .passes.rematerialize import choose_within
from .recompute_prices import cheap_again
from .region import Region
from .runtime.cache import Cache, cache_key
from .trace_cache import Step, TraceCache
from .trace_key import switched_off, trace_key

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
    if config.offload and config.budget is None:
        raise OptionError("option 'offload' says what a budget may do: give one, for example budget=\"12GiB\"")
    if config.offload and config.cuda_graphs:
        raise UnsupportedError("option 'offload' does not go with CUDA graphs: leave out one of the two")
    if config.target is not None and not config.plan_only:
        raise UnsupportedError(
            "option 'target' plans for a GPU that is not here, and nothing is built for it: give it to "
            "memplan.analyze, or to memplan report MODULE:FACTORY --option target=h100"
        )


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


#: Told of every training graph's curve over all budgets, where one is asked for.
CurveTeller = Callable[[tuple[budget.CurvePoint, ...]], None]


def chooser(
    config: Config, device: str = "cpu", region: Region | None = None, tell_curve: CurveTeller | None = None
) -> Chooser:
    """What is kept for the backward on a device; within the budget, where one is asked for."""
    figures = figures_for(device, config, measure=config.budget is not None)

    def search(cut: Cutter, forward_outputs: int, parameters: frozenset[int]) -> Modules:
        assert region is not None
        assert config.budget is not None
        if tell_curve is None and config.target is None:
            check_budget(config.budget, device)
        search = Budget(config.budget, figures, cut, partial(region.trial, forward_outputs, parameters))
        searching: Budget | OffloadBudget = search
        if config.offload:
            check_offload(device)
            model = partial(region.offload_model, forward_outputs, parameters)
            searching = OffloadBudget(search, model, partial(region.trial, forward_outputs, parameters))
        if tell_curve is not None:
            tell_curve(searching.curve())
        with collector_paused():
            modules, planned = searching.search()
        region.ahead = planned.ahead
        return modules

    return Chooser(
        choose=lambda graph: choose_within(graph, config.recompute_time, figures, products=config.recompute_products),
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


@with_frame_room
def compile_with(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[object],
    config: Config,
    tell_curve: CurveTeller | None = None,
) -> Callable[..., object]:
    """As `compile`, for a ready `Config`; ``tell_curve`` is told what training graphs need at all budgets."""
    check_built(config)
    if config.enabled("attention"):
        simplify_masks(module)
    region = Region(config, next(_groups))
    device = device_of(module) if config.target is None else target.DEVICE
    compilers = {
        Phase.FORWARD: region.compile_forward,
        Phase.BACKWARD: region.compile_backward,
        Phase.INFERENCE: region.compile_inference,
    }

    def compiler(phase: Phase) -> Callable[..., Callable[..., object]]:
        return lambda module, inputs: recording.counted(compilers[phase](module, inputs), region.group, phase)

    backend = aot_autograd(
        fw_compiler=compiler(Phase.FORWARD),
        bw_compiler=compiler(Phase.BACKWARD),
        inference_compiler=compiler(Phase.INFERENCE),
        partition_fn=partitioner(config, region.partitioned, chooser(config, device, region, tell_curve)),
        decompositions=decomposition_table(config),
        keep_inference_input_mutations=True,
    )
    kept = None if tell_curve is not None else kept_traces(region, device, example_inputs)
    # the backward is built with its forward, not inside the first .backward(), when all activations are alive
    joined = nullcontext() if kept is None else kept.joined()
    patched = functorch_config.patch(force_non_lazy_backward_lowering=True)
    with patched, sizes_as_nodes(), corrected(), joined:
        return backend(module, example_inputs)


def kept_traces(region: Region, device: str, inputs: Sequence[object]) -> TraceCache | None:
    """Where AOTAutograd's results are kept; None if graphs are traced each time."""
    config = region.config
    found = switched_off(config, inputs)
    if found is not None:
        log.debug("graphs are traced in every process: %s", found)
        return None
    figures = copy_figures(device, config) if config.offload else figures_for(device, config)

    def key(module: torch.fx.GraphModule, inputs: Sequence[object], aot: object) -> str:
        return cache_key("trace 1", *trace_key(module, inputs, aot, config), device, repr(figures))

    def restore(step: Step) -> Callable[[Phase], Callable[..., object]]:
        if config.budget is not None:
            check_budget(config.budget, device)
        again = Region(config, region.group)
        make = again.restored(step)
        return lambda phase: recording.counted(make(phase), again.group, phase)

    return TraceCache(Cache(config.cache_dir) if config.cache_dir else Cache(), key, region.step, restore)
