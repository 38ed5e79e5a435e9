"""torch's own operator samples through memplan: several calls in one graph, forward and gradients, against eager.

A graph is built directly (a call of the operator for each sample, its tensors as inputs), which is what Dynamo would
make of it, and goes through `memplan.backend.compile_with`. What a graph cannot hold (results whose sizes depend on the
data) goes through ``torch.compile``, as a user's call would.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.fx
from torch import Tensor
from torch.utils import _pytree as pytree

from memplan.backend import compile_with
from memplan.ir.config import Config
from memplan.ir.errors import MemplanError
from tests.opdb.skips import ABSENT, CONTIGUOUS_ONLY, FORWARD_ONLY, SKIPS
from tests.tolerances import Differs, assert_near

CONFIG = Config(random="eager")
#: What `wrapper_set_seed` sets inside of torch's samples of random operators; it is traced away.
SEED = 42
PREFERRED = (torch.float32, torch.int64, torch.bool, torch.complex64)


@dataclass(frozen=True)
class Call:
    """One sample: the operator, its arguments as a flat list with tensors as leaves, and whether it has a gradient."""

    name: str
    op: object
    leaves: tuple[object, ...]
    spec: pytree.TreeSpec
    grad: bool

    @property
    def seeded(self) -> bool:
        """Whether the sample's operator sets the seed itself, so that it must run first after it is set."""
        return "wrapper_set_seed" in getattr(getattr(self.op, "__code__", None), "co_names", ())

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in self.leaves if isinstance(t, Tensor)]

    def with_tensors(self, tensors: Iterable[object]) -> tuple[tuple[object, ...], dict[str, object]]:
        """Arguments with these in the places of the tensors."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(t, Tensor) else t for t in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)  # type: ignore[no-any-return]


def names() -> list[str]:
    """Every operator with its variant, sorted; those that do not exist here left out."""
    return sorted(n for n in _operators() if not n.startswith(ABSENT))


def _operators() -> dict[str, object]:
    from torch.testing._internal.common_methods_invocations import op_db

    return {op.full_name if hasattr(op, "full_name") else op.formatted_name: op for op in op_db}


_cache: dict[str, object] = {}


def operator(name: str) -> object:
    if not _cache:
        _cache.update(_operators())
    return _cache[name]


def calls(name: str, *, limit: int | None) -> list[Call]:
    """The operator's samples that eager itself can run, contiguous and not, in the first dtype that it supports."""
    op = operator(name)
    supported = op.supported_dtypes("cpu")  # type: ignore[attr-defined]
    dtype = next((d for d in PREFERRED if d in supported), next(iter(sorted(supported, key=str)), None))
    if dtype is None:
        return []
    grad = bool(op.supports_autograd) and (dtype.is_floating_point or dtype.is_complex) and name not in FORWARD_ONLY  # type: ignore[attr-defined]
    found: list[Call] = []
    torch.manual_seed(0)
    for sample in op.sample_inputs("cpu", dtype, requires_grad=grad):  # type: ignore[attr-defined]
        for variant in (sample, None if name in CONTIGUOUS_ONLY else _noncontiguous(sample)):
            if variant is None:
                continue
            call = _call(name, op, variant, grad)
            if eager_runs(call):
                found.append(call)
            if limit is not None and len(found) >= limit:
                return found
    return found


def _noncontiguous(sample: object) -> object | None:
    leaves = pytree.tree_leaves((sample.input, sample.args, sample.kwargs))  # type: ignore[attr-defined]
    if any(t.layout is not torch.strided for t in leaves if isinstance(t, Tensor)):
        return None
    return sample.noncontiguous()  # type: ignore[attr-defined, no-any-return]


def _call(name: str, op: object, sample: object, grad: bool) -> Call:
    arguments = ((sample.input, *sample.args), sample.kwargs)  # type: ignore[attr-defined]
    leaves, spec = pytree.tree_flatten(arguments)
    return Call(name, op.op, tuple(leaves), spec, grad)  # type: ignore[attr-defined]


def eager_runs(call: Call) -> bool:
    """Whether eager takes the sample (some are there to be refused)."""
    try:
        eager([call], fresh(call.tensors))
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError):
        return False
    return True


def fresh(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Leaves with the same values, strides and requires_grad, on storage of their own.

    The storage from the first element on is copied whole where no two elements share an address: `as_strided` reads
    what lies between them.
    """
    out = []
    for t in tensors:
        if t.layout is not torch.strided:
            out.append(t.detach().clone().requires_grad_(t.requires_grad))
            continue
        if t.numel() and _dense(t) and not (t.is_conj() or t.is_neg()):
            count = t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()
            flat = torch.as_strided(t.detach(), (count,), (1,)).clone()
            new = torch.empty(0, dtype=t.dtype, device=t.device)
            new.set_(flat.untyped_storage(), 0, t.shape, t.stride())  # type: ignore[call-overload]
        elif _dense(t):
            new = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t.detach())
        else:
            new = t.detach().clone(memory_format=torch.preserve_format)
        if t.is_conj():
            new = t.detach().clone().conj().resolve_conj().conj()
        out.append(new.requires_grad_(t.requires_grad))
    return out


def _dense(t: Tensor) -> bool:
    """Whether no two elements share an address, so that a copy can have the same strides."""
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


def eager(group: Sequence[Call], tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Flat tensor results of each call, run one after another."""
    rest = list(tensors)
    out = []
    for call in group:
        mine, rest = rest[: len(call.tensors)], rest[len(call.tensors) :]
        args, kwargs = call.with_tensors(mine)
        out.append(flat(call.op(*args, **kwargs)))  # type: ignore[operator]
    return out


def flat(result: object) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def graph_of(group: Sequence[Call]) -> torch.fx.GraphModule:
    """The calls as one graph: inputs are all their tensors, results all of theirs, flat."""
    graph = torch.fx.Graph()
    inputs = [[graph.placeholder(f"x{k}_{i}") for i, _ in enumerate(call.tensors)] for k, call in enumerate(group)]
    results = []
    for call, nodes in zip(group, inputs, strict=True):
        args, kwargs = call.with_tensors(nodes)
        node = graph.call_function(call.op, args, kwargs)  # type: ignore[arg-type]
        results.append(graph.call_function(flat, (node,)))
    graph.output(tuple(results))
    return torch.fx.GraphModule(torch.nn.Module(), _flattened(graph, group))


def _flattened(graph: torch.fx.Graph, group: Sequence[Call]) -> torch.fx.Graph:
    """Dynamo's graphs return a flat tuple: how many results each call has, eager tells."""
    output = graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    items = []
    with graph.inserting_before(output):
        for call, node in zip(group, results, strict=True):
            count = len(eager([call], fresh(call.tensors))[0])
            items += [graph.call_function(_item, (node, i)) for i in range(count)]
    output.args = (tuple(items),)
    return graph


def _item(values: Sequence[Tensor], index: int) -> Tensor:
    return values[index]


def compare(group: Sequence[Call], *, through_dynamo: bool = False) -> None:
    """Run the calls compiled and in eager, forward and gradients; AssertionError where they differ."""
    tensors = [t for call in group for t in call.tensors]
    theirs, ours = fresh(tensors), fresh(tensors)
    torch.manual_seed(SEED)
    expected = [t for results in eager(group, theirs) for t in results]
    torch.manual_seed(SEED)
    actual = run_dynamo(group, ours) if through_dynamo else run_graph(group, ours)
    if len(actual) != len(expected):
        raise Differs(f"{len(actual)} results where eager has {len(expected)}")
    labels = [f"{call.name} result {i}" for call in group for i in range(len(eager([call], fresh(call.tensors))[0]))]
    exact = Exact(group)
    for k, (label, a, b) in enumerate(zip(labels, actual, expected, strict=True)):
        exact.judge(a.detach(), b.detach(), label, k, gradient=False)
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a.detach(), b.detach(), "an input after the call")
    backward(expected)
    backward(actual)
    owners = [call.name for call in group for _ in call.tensors]
    for k, (owner, a, b) in enumerate(zip(owners, ours, theirs, strict=True)):
        if a.grad is not None and b.grad is not None:
            exact.judge(a.grad, b.grad, f"{owner} gradient", k, gradient=True)
            continue
        for grad in (a.grad, b.grad):  # none is as good as zeros
            if grad is not None and bool(grad.to_dense().any()):
                raise Differs(f"{owner}: a gradient where {'eager' if grad is a.grad else 'memplan'} has none")


@dataclass
class Exact:
    """The same calls in float64, made when eager and memplan differ: then both may be a few roundings off."""

    group: Sequence[Call]
    _known: tuple[list[Tensor], list[Tensor | None]] | None = None

    def judge(self, actual: Tensor, expected: Tensor, what: str, position: int, *, gradient: bool) -> None:
        """`assert_near`, or memplan is at most twice as far from float64 as eager, and both are near to it.

        In float64 random numbers may be others than in float32: then eager is far from it, and the difference stands.
        """
        try:
            assert_near(actual, expected, what)
        except Differs:
            if actual.dtype not in _WIDER or actual.shape != expected.shape:
                raise
            exact = self.values()[gradient][position]
            if exact is None or exact.shape != actual.shape or exact.dtype is not _WIDER[actual.dtype]:
                raise
            ours, theirs = (float((t.to(exact.dtype) - exact).abs().max()) for t in (actual, expected))
            near = 1e-4 * max(1.0, float(exact.abs().max()))
            if not (ours <= 2 * theirs and theirs <= near):
                raise

    def values(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """Results and gradients of the inputs."""
        if self._known is None:
            given = fresh([t for call in self.group for t in call.tensors])
            torch.manual_seed(SEED)
            wide = [t.detach().to(_WIDER.get(t.dtype, t.dtype)).requires_grad_(t.requires_grad) for t in given]
            results = [t for part in eager(self.group, wide) for t in part]
            backward(results)
            self._known = [t.detach() for t in results], [t.grad for t in wide]
        return self._known


_WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def run_graph(group: Sequence[Call], tensors: Sequence[Tensor]) -> list[Tensor]:
    module = graph_of(group)
    compiled = compile_with(module, list(tensors), CONFIG)
    torch.manual_seed(SEED)
    return list(compiled(*tensors))  # type: ignore[call-overload]


def run_dynamo(group: Sequence[Call], tensors: Sequence[Tensor]) -> list[Tensor]:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda given: [t for results in eager(group, given) for t in results],
        backend="memplan", dynamic=False, options={"random": "eager"},
    )  # fmt: skip
    return compiled(list(tensors))  # type: ignore[no-any-return]


def backward(results: Sequence[Tensor]) -> None:
    """Gradients of a sum over all results with weights that differ from element to element."""
    parts = []
    for t in results:
        if not t.requires_grad or not (t.is_floating_point() or t.is_complex()):
            continue
        weight = torch.linspace(0.5, 1.5, t.numel(), dtype=t.real.dtype if t.is_complex() else t.dtype)
        value = t.to_dense() if t.layout is not torch.strided else t
        value = value.abs() if value.is_complex() else value
        parts.append((value * weight.reshape(value.shape)).sum().double())
    if parts:
        torch.stack(parts).sum().backward()


@dataclass(frozen=True)
class Outcome:
    """What came of one operator's samples: how many agreed, by which way, and what was wrong."""

    name: str
    samples: int
    error: str = ""
    way: str = "graph"


def check_group(groups: Sequence[Sequence[Call]]) -> list[Outcome]:
    """All in one graph; where that fails, each operator alone; where that cannot be a graph, through Dynamo."""
    groups = [g for g in groups if g]
    alone = [g for g in groups if g[0].seeded]
    rest = [g for g in groups if not g[0].seeded]
    with quiet():
        try:
            compare([call for group in rest for call in group])
            outcomes = [Outcome(g[0].name, len(g)) for g in rest]
        except Exception:  # whatever it is, it comes again where each operator is tried alone, and is told there
            outcomes = [check_one(g) for g in rest]
        return outcomes + [check_one(g) for g in alone]


def check_one(group: Sequence[Call]) -> Outcome:
    """One operator's samples: together, then through Dynamo."""
    name = group[0].name
    try:
        for part in [[c] for c in group] if group[0].seeded else [group]:
            compare(part)
    except Differs as error:
        return Outcome(name, len(group), _text(error))
    except Exception as error:
        if _ours(error):
            return Outcome(name, len(group), _text(error))
        return _through_dynamo(group, error)
    return Outcome(name, len(group))


def _through_dynamo(group: Sequence[Call], first: Exception) -> Outcome:
    name = group[0].name
    try:
        for call in group:
            compare([call], through_dynamo=True)
    except Exception as error:
        return Outcome(name, len(group), f"{_text(error)}  [as a graph: {_text(first)}]", "dynamo")
    return Outcome(name, len(group), way="dynamo")


def _ours(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemplanError):
            return True
        error = error.__cause__
    return False


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that torch gives for operators it does not trace."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def skipped(name: str) -> str | None:
    """Why an operator is not compared."""
    return SKIPS.get(name) or SKIPS.get(name.split(".")[0])
