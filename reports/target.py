"""What a command is asked about: a saved report, or a factory that returns a model and example inputs."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import platform
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..ir.errors import MemplanError, OptionError
from .model import Measurement, Report, StepRecord, read_report

if TYPE_CHECKING:
    from ..ir.activation import Activation
    from ..ir.eager import EagerMemory
    from ..ir.plan import Plan


class TargetError(MemplanError):
    """The model to look at cannot be imported, made, or compiled."""


@runtime_checkable
class CompiledGraph(Protocol):
    """What `memplan.record` collects: one compiled graph (see `memplan.recording.CompiledGraph`)."""

    @property
    def plan(self) -> Plan: ...
    @property
    def group(self) -> int: ...
    @property
    def joins(self) -> tuple[tuple[str, str], ...]: ...
    @property
    def waterfall(self) -> tuple[tuple[str, int], ...]: ...
    @property
    def activations(self) -> tuple[Activation, ...]: ...
    @property
    def compilation(self) -> tuple[int, int] | None: ...
    @property
    def eager(self) -> EagerMemory | None: ...
    @property
    def runs(self) -> tuple[tuple[int, int], ...]: ...


@dataclass(frozen=True, slots=True)
class Request:
    """How a factory's model is to be analysed.

    ``fake``: trace with fake tensors, nothing is computed or allocated. ``backward``: None means: if the model is in
    training mode and has parameters that require gradients. ``batch``: passed to the factory as ``batch=``.
    """

    fake: bool = True
    backward: bool | None = None
    dynamic: bool = False
    batch: int | None = None
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Made:
    """What a factory returned: a model, and its example inputs."""

    model: Callable[..., object]
    args: tuple[object, ...]
    kwargs: Mapping[str, object]


def report_for(target: str, request: Request | None = None) -> Report:
    """The report of a target.

    Raises
    ------
    ReportError
        If a saved report cannot be read.
    TargetError
        If the factory is not there, fails, or nothing of it could be compiled.
    """
    request = request or Request()
    if is_saved(target):
        return read_report(target)
    return analysed(make(target, request.batch), request, target)


def is_saved(target: str) -> bool:
    """Whether a target names a saved report rather than a factory.

    Raises
    ------
    OptionError
        For a Python file without the name of a factory.
    """
    if target.endswith(".py") and Path(target).is_file():
        raise OptionError(
            f"{target!r} is a script: write {target}:FACTORY, a function in it that returns a model and "
            f"example inputs, or record what it compiles with `memplan run {target}`"
        )
    return Path(target).is_file() or target.endswith(".json") or ":" not in target


def factory_of(target: str) -> Callable[..., object]:
    """Import the module (or file) of ``MODULE:FACTORY`` and find the factory."""
    place, _, name = target.rpartition(":")
    module = _module(place, target)
    factory = getattr(module, name, None)
    if not callable(factory):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise TargetError(f"{place!r} has no function {name!r}; it has {', '.join(names[:12]) or 'none'}")
    return factory  # type: ignore[no-any-return]


def make(target: str, batch: int | None = None) -> Made:
    """Call the factory of ``MODULE:FACTORY``."""
    factory = factory_of(target)
    arguments: dict[str, object] = {}
    if batch is not None:
        if "batch" not in inspect.signature(factory).parameters:
            name = target.rpartition(":")[2]
            raise TargetError(f"{target!r} takes no argument 'batch'; write 'def {name}(batch=8):' to try other sizes")
        arguments["batch"] = batch
    try:
        result = factory(**arguments)
    except Exception as error:
        raise TargetError(f"{target!r} failed: {type(error).__name__}: {error}") from error
    return _made(result, target)


def _made(result: object, target: str) -> Made:
    if not isinstance(result, tuple) or len(result) not in (2, 3) or not callable(result[0]):
        raise TargetError(f"{target!r} must return (model, example_inputs), not {type(result).__name__}")
    model, inputs, *rest = result
    keywords = rest[0] if rest else {}
    if isinstance(inputs, Mapping):
        return Made(model, (), {**inputs, **keywords})
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    return Made(model, args, keywords)


def _module(place: str, target: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if spec is None or spec.loader is None or not Path(place).is_file():
            raise TargetError(f"there is no file {place!r}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    except TargetError:
        raise
    except Exception as error:
        raise TargetError(f"cannot import {place!r} of {target!r}: {type(error).__name__}: {error}") from error


def analysed(made: Made, request: Request, target: str) -> Report:
    """Plan a model without running it.

    Raises
    ------
    OptionError
        If there is no such option, or it has no such value.
    TargetError
        If the model cannot be compiled, or does nothing with tensors.
    """
    import memplan

    backward = wants_backward(made.model) if request.backward is None else request.backward
    try:
        with _said_once():
            graphs = memplan.analyze(
                made.model,
                made.args,
                made.kwargs,
                fake=request.fake,
                backward=backward,
                dynamic=request.dynamic,
                options=dict(request.options),
            )
    except OptionError:
        raise
    except MemplanError as error:
        raise TargetError(str(error)) from error
    except Exception as error:
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, OptionError):
            raise inner from None
        raise TargetError(_compiling(target, error)) from error
    if not graphs:
        raise TargetError(f"there is nothing to plan: the model of {target!r} ran without one operation on its tensors")
    return report_from(graphs, target=target)


@contextmanager
def _said_once() -> Iterator[None]:
    """What fails on fake tensors is an error's to tell: torch logs it, with a traceback of its own frames, as well."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _compiling(target: str, error: Exception) -> str:
    """Why a target was not compiled; where the reason is one of ours, without what Dynamo says around it."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    inner = getattr(error, "inner_exception", None)
    if isinstance(inner, MemplanError):
        return str(inner)
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return (
            f"{target!r} could not be traced on fake tensors: {_place(error)} asks for the values of a tensor "
            f"({error.func}), and these have none; --real traces with the values that the factory gives"
        )
    about = str(error).partition("Set TORCHDYNAMO_VERBOSE")[0]  # torch's advice to those who look for its own faults
    paragraphs = [part for part in about.split("\n\n") if not part.strip().startswith(_TORCHS_OWN)]
    return f"{target!r} could not be compiled: {type(error).__name__}: " + "\n\n".join(paragraphs).rstrip()


_TORCHS_OWN = ("Developer debug context", "For more details about this graph break")


def _place(error: Exception) -> str:
    """The line of the user's from which an error came: the last outside of torch and of memplan."""
    import torch

    ours = (str(Path(torch.__file__).parent), str(Path(__file__).resolve().parents[1]), "<")
    frames = traceback.extract_tb(error.__traceback__)
    found = [f for f in frames if not f.filename.startswith(ours)]
    return f"{found[-1].filename}:{found[-1].lineno}" if found else "it"


def wants_backward(model: object) -> bool:
    """Whether a model is one to train: in training mode, with a parameter that requires a gradient."""
    import torch

    if not isinstance(model, torch.nn.Module):
        return False
    return model.training and any(p.requires_grad for p in model.parameters())


def report_from(
    graphs: Iterable[CompiledGraph | Plan], *, target: str = "", measured: Measurement | None = None
) -> Report:
    """The report of recorded graphs (`memplan.record`) or bare plans.

    Raises
    ------
    TargetError
        If there is no graph: the message says what to do.
    """
    from .build import report_of  # brings torch, which reading a saved report does without

    groups: dict[int, list[CompiledGraph | Plan]] = {}
    for g in graphs:
        groups.setdefault(g.group if isinstance(g, CompiledGraph) else -1, []).append(g)
    if not groups:
        raise TargetError(
            'no graph was compiled: nothing called a model compiled with torch.compile(model, backend="memplan"). '
            "Call the compiled model at least once while recording; what was compiled before is compiled anew after "
            "torch.compiler.reset(). `memplan run --backend-override` sends every torch.compile here"
        )
    records = [_record(members) for members in groups.values()]
    if measured is not None:
        records[0] = replace(records[0], measured=measured)
    return report_of(records, target=target)


def _record(members: Sequence[CompiledGraph | Plan]) -> StepRecord:
    plans = tuple(m.plan if isinstance(m, CompiledGraph) else m for m in members)
    told = [m for m in members if isinstance(m, CompiledGraph)]
    return StepRecord(
        plans,
        environment=environment(),
        joins=tuple(j for m in told for j in m.joins),
        stages=tuple(m.waterfall if isinstance(m, CompiledGraph) else () for m in members),
        activations=tuple(a for m in told for a in m.activations),
        compilation=next((m.compilation for m in told), None),
        eager=next((m.eager for m in told if m.eager is not None), None),
        runs=next((m.runs for m in told if m.runs), ()),
    )


def environment() -> dict[str, str]:
    """Versions that a report depends on."""
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    return found
