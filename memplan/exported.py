"""From an exported program to a captured one: mutations as copies, sizes as inputs, and how it is called."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch
import torch.fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    OutputKind,
    SymIntArgument,
    TensorArgument,
)
from torch.export.graph_signature import (
    InputSpec as ExportInput,
)
from torch.utils import _pytree as pytree

from .capture.fx import capture, symbol_hint
from .capture.sizes import solved
from .capture.traced import quiet_copies
from .interface import InputSpec, Interface, SymbolSource, WeightSpec
from .ir.config import Config
from .ir.errors import SavedModelError
from .ir.program import Phase, Program, TensorInput, View
from .lowering.decompositions import decomposition_table

_LIFTED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_CHANGES = ("BUFFER_MUTATION", "PARAMETER_MUTATION", "USER_INPUT_MUTATION")


@dataclass(frozen=True)
class Exported:
    """A captured program, how it is called, and its weights by the names of the interface."""

    program: Program
    interface: Interface
    weights: dict[str, torch.Tensor]


def captured(exported: ExportedProgram, config: Config) -> Exported:
    """The program of an exported one, whose graph is left as it is.

    Raises
    ------
    SavedModelError
        If it has inputs or outputs of a kind that cannot be saved, naming them.
    """
    with quiet_copies():
        own = _without_tokens(exported.run_decompositions(decomposition_table(config)))
    module, signature = own.graph_module, own.graph_signature
    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    changed = _mutations_as_copies(module, signature, nodes)
    sources, first = _size_inputs(module, signature.input_specs, nodes)
    lifted = [spec.kind in _LIFTED for spec in signature.input_specs]
    static = frozenset(first + k for k, is_lifted in enumerate(lifted) if is_lifted)
    module.recompile()
    program = capture(module, Phase.INFERENCE, name="model", static_inputs=static)
    views = {i.position: i.view for i in program.inputs if isinstance(i, TensorInput)}

    inputs: list[InputSpec] = []
    weights: list[WeightSpec] = []
    tensors: dict[str, torch.Tensor] = {}
    arguments: list[tuple[str, int]] = [("symbol", k) for k in range(first)]
    for k, (spec, node) in enumerate(zip(signature.input_specs, nodes, strict=True)):
        if lifted[k]:
            name = str(spec.target)
            tensor = _tensor_of(own, name)
            tensors[name] = tensor
            arguments.append(("weight", len(weights)))
            weights.append(WeightSpec(name, "", views[first + k], str(tensor.device)))
        elif spec.kind is InputKind.USER_INPUT:
            arguments.append(("input", len(inputs)))
            inputs.append(_input(spec, node, views.get(first + k), node.name in changed))
        else:
            raise SavedModelError(f"a model with an input of kind {spec.kind.name.lower()} cannot be saved: {spec.arg}")
    interface = Interface(
        tuple(inputs),
        tuple(weights),
        sources,
        _ranges(own),
        tuple(arguments),
        _keywords(own),
        _spec_text(own.call_spec.in_spec, "inputs"),
        _spec_text(own.call_spec.out_spec, "outputs"),
    )
    return Exported(program, interface, tensors)


def _without_tokens(exported: ExportedProgram) -> ExportedProgram:
    """Calls with side effects called plainly; torch exports them on a chain of tokens, which keeps their order.

    Programs keep the order of such calls by themselves.
    """
    if all(spec.kind is not OutputKind.TOKEN for spec in exported.graph_signature.output_specs):
        return exported
    try:
        from torch.export._remove_effect_tokens_pass import _remove_effect_tokens
    except ImportError as error:
        raise SavedModelError("a model with side effects cannot be saved with this torch: it keeps tokens") from error
    return _remove_effect_tokens(exported)


def _tensor_of(exported: ExportedProgram, name: str) -> torch.Tensor:
    held = exported.state_dict.get(name)
    held = exported.constants.get(name) if held is None else held
    if not isinstance(held, torch.Tensor):
        raise SavedModelError(f"the exported program has no tensor {name!r}")
    return held.detach()


def _input(spec: ExportInput, node: torch.fx.Node, view: View | None, changed: bool) -> InputSpec:
    match spec.arg:
        case TensorArgument() if view is not None:
            return InputSpec(node.name, view=view, device=str(node.meta["val"].device), changed=changed)
        case SymIntArgument():
            expr = node.meta["val"].node.expr
            if expr.is_Symbol:
                return InputSpec(node.name, symbol=expr)
        case ConstantArgument():
            return InputSpec(node.name, value=repr(spec.arg.value))
        case _:
            pass
    raise SavedModelError(f"a model with an input like {spec.arg} cannot be saved")


def _mutations_as_copies(module: torch.fx.GraphModule, signature: object, nodes: list[torch.fx.Node]) -> set[str]:
    """Results that an exported graph returns to be written back become copies into inputs; names of changed inputs."""
    inputs = {}
    for spec, node in zip(signature.input_specs, nodes, strict=True):  # type: ignore[attr-defined]
        inputs[spec.target if spec.kind in _LIFTED else spec.arg.name] = node
    out = module.graph.output_node()
    kept: list[object] = []
    changed: set[str] = set()
    for spec, value in zip(signature.output_specs, out.args[0], strict=True):  # type: ignore[attr-defined, arg-type]
        if spec.kind is OutputKind.USER_OUTPUT:
            kept.append(value)
        elif spec.kind.name in _CHANGES:
            target = inputs[spec.target]
            changed.add(target.name)
            with module.graph.inserting_before(out):
                copy = module.graph.call_function(torch.ops.aten.copy_.default, (target, value))
            copy.meta["val"] = target.meta["val"]
        else:
            raise SavedModelError(f"a model with an output of kind {spec.kind.name.lower()} cannot be saved")
    out.args = (tuple(kept),)  # type: ignore[arg-type]
    return changed


def _size_inputs(
    module: torch.fx.GraphModule, specs: list[ExportInput], nodes: list[torch.fx.Node]
) -> tuple[tuple[SymbolSource, ...], int]:
    """Size symbols that no input gives as such become inputs before the others: where each is read, and how many."""
    given: set[sympy.Symbol] = set()
    found: dict[sympy.Symbol, SymbolSource] = {}
    needed: dict[sympy.Symbol, torch.SymInt] = {}
    user = -1
    for spec, node in zip(specs, nodes, strict=True):
        user += spec.kind is InputKind.USER_INPUT
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
            given.add(value.node.expr)
        if not isinstance(value, torch.Tensor):
            continue
        for dim, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                for symbol in size.node.expr.free_symbols:
                    needed.setdefault(symbol, size)
                source = _solved(size.node.expr, user, dim) if spec.kind is InputKind.USER_INPUT else None
                if source is not None and (source.symbol not in found or _plain(source) > _plain(found[source.symbol])):
                    found[source.symbol] = source
    symbols = sorted(needed.keys() - given, key=lambda s: s.name)
    missing = [s for s in symbols if s not in found]
    if missing:
        raise SavedModelError(f"the size {missing[0]} is not the size of any input's dimension")
    with module.graph.inserting_before(nodes[0]):
        for symbol in symbols:
            env = needed[symbol].node.shape_env
            node = module.graph.placeholder(f"size_{symbol}")
            node.meta["val"] = env.create_symintnode(symbol, hint=symbol_hint(env, symbol))
    return tuple(found[s] for s in symbols), len(symbols)


def _plain(source: SymbolSource) -> bool:
    return (source.factor, source.offset) == (1, 0)


def _solved(expr: sympy.Expr, position: int, dim: int) -> SymbolSource | None:
    """Which symbol a dimension tells, if it is ``factor * symbol + offset``."""
    found = solved(expr)
    return None if found is None else SymbolSource(found[0], position, dim, *found[1:])


def _ranges(exported: ExportedProgram) -> tuple[tuple[sympy.Symbol, int | None, int | None], ...]:
    def bound(value: object) -> int | None:
        return int(value) if isinstance(value, (int, sympy.Integer)) else None  # infinite ones are of other classes

    return tuple((s, bound(r.lower), bound(r.upper)) for s, r in exported.range_constraints.items() if s.is_Symbol)


def _keywords(exported: ExportedProgram) -> tuple[str, ...]:
    in_spec = exported.call_spec.in_spec
    return tuple(str(k) for k in _children(in_spec)[1].context) if in_spec is not None else ()


def _children(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    """The parts of a pytree's structure; their name changed between releases."""
    return list(spec.children()) if hasattr(spec, "children") else list(spec.children_specs)


def _spec_text(spec: pytree.TreeSpec | None, what: str) -> str:
    assert spec is not None
    try:
        return pytree.treespec_dumps(spec)
    except (NotImplementedError, TypeError, KeyError, ValueError) as error:
        if "torch.return_types." in str(error):
            raise SavedModelError(
                f"the {what} of the model hold what an operator returned, a class of torch's that it cannot write "
                "down: return its parts (values, indices = x.sort())"
            ) from error
        raise SavedModelError(
            f"the {what} of the model hold a class that torch cannot write down: {error}. Register it with "
            "torch.export.register_dataclass or torch.utils._pytree.register_pytree_node(serialized_type_name=...)"
        ) from error


def storages(weights: dict[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Weights that share memory, together: the tensor of all the bytes that they reach, and their names."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name, tensor in weights.items():
        pointer = tensor.untyped_storage().data_ptr() or id(tensor)
        groups.setdefault((str(tensor.device), pointer), []).append(name)
    for names in groups.values():
        whole = weights[names[0]].untyped_storage()
        yield torch.empty(0, dtype=torch.uint8, device=whole.device).set_(whole), names
