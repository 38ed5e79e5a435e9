"""AOTAutograd's FX graphs as programs.

Every call becomes an `Extern`; view operations become views and cost nothing; `copy_` into an input becomes a `Copy`.
So a captured program runs as it is, and lowering is free to replace what it can.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy
import torch
import torch.fx
from torch.utils import _pytree as pytree
from torch.utils._sympy.singleton_int import SingletonInt

from ..ir.communication import is_wait
from ..ir.errors import UnsupportedError
from ..ir.loops import Size
from ..ir.program import (
    Argument,
    Buffer,
    BufferKind,
    Contract,
    Copy,
    Extern,
    Literal,
    OpaqueInput,
    Operation,
    Origin,
    Phase,
    Program,
    ProgramInput,
    ProgramOutput,
    Symbolic,
    SymbolInput,
    TensorInput,
    Tuple,
    View,
)
from . import communication
from .origin import operator_name, origin_of
from .random_state import fill_random_values
from .reach import reached
from .size_inputs import size_inputs
from .sizes import convert, extent, size_of, sizes_of
from .user_kernels import FUNCTIONAL, MUTATION, capture_user_kernel, operator_is

#: What an FX node stands for: a view, a size, a literal, or a nest of these.
Value = Argument | None
# View operations whose result carries a lazy bit that strides cannot express: run as the operation that copies.
_LAZY_BITS = {"aten._conj.default": "aten._conj_physical.default", "aten._neg_view.default": "aten.neg.default"}
# Views whose schemas do not say so.
_UNMARKED_VIEWS = frozenset({"aten._unsafe_view.default", "aten._reshape_alias.default", "aten.lift_fresh.default"})
_PURE_HIGHER_ORDER = {
    "triton_kernel_wrapper_functional",
    "flex_attention",
    "flex_attention_backward",
    "cond",
    "while_loop",
}


@dataclass(frozen=True)
class HigherOrderCall:
    """A higher-order operator with its subgraphs: everything but tensors and sizes is held in ``template``.

    ``template`` is the flat argument list, ``spec`` its pytree; positions in ``slots`` are filled from the call's
    arguments. Calling it returns the flat list of results. ``offsets`` are, per slot, the storage offset in elements
    that a tensor had when the graph was traced (0 for the rest): some operators' arguments count from there.
    """

    operator: Callable[..., object]
    template: tuple[object, ...]
    spec: pytree.TreeSpec
    slots: tuple[int, ...]
    offsets: tuple[Size, ...] = ()

    def __call__(self, *values: object) -> list[object]:
        leaves = list(self.template)
        for position, value in zip(self.slots, values, strict=True):
            leaves[position] = value
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return pytree.tree_leaves(self.operator(*args, **kwargs))


@dataclass
class _Capture:
    """State of one walk over a graph."""

    module: torch.fx.GraphModule
    phase: Phase
    static_inputs: frozenset[int]
    donated_inputs: frozenset[int]
    buffers: dict[str, Buffer] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    inputs: list[ProgramInput] = field(default_factory=list)
    outputs: list[ProgramOutput] = field(default_factory=list)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    callables: dict[str, object] = field(default_factory=dict)
    hints: dict[sympy.Symbol, int] = field(default_factory=dict)
    values: dict[torch.fx.Node, object] = field(default_factory=dict)
    base_offset: dict[str, object] = field(default_factory=dict)  # bytes from the storage's start to the buffer's
    ragged: dict[sympy.Expr, sympy.Symbol] = field(default_factory=dict)  # as the arguments that they are

    def run(self, name: str) -> Program:
        position = 0
        for node in self.module.graph.nodes:
            match node.op:
                case "placeholder":
                    self.placeholder(node, position)
                    position += 1
                    if node.next.op != "placeholder":
                        self.inputs.extend(size_inputs(self.inputs))
                case "get_attr":
                    self.get_attr(node)
                case "call_function":
                    self.call(node)
                case "output":
                    self.output(node)
                case _:
                    raise UnsupportedError(f"FX node of kind {node.op!r} in an AOTAutograd graph", where=node.name)
        return Program(
            name,
            self.phase,
            self.buffers,
            communication.joined(self.operations),
            tuple(self.inputs),
            tuple(self.outputs),
            self.hints,
            self.constants,
            self.callables,
        )

    # -- leaves -----------------------------------------------------------------------------------------------------

    def placeholder(self, node: torch.fx.Node, position: int) -> None:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and is_plain(value):
            kind = BufferKind.PARAMETER if position in self.static_inputs else BufferKind.INPUT
            view = self.fresh(node.name, value, kind, origin_of(node), donated=position in self.donated_inputs)
            self.inputs.append(TensorInput(position, view))
            self.values[node] = view
        elif isinstance(value, torch.SymInt) and is_ragged(value):
            # a name for the offsets of a nested tensor: it is handed on, and nothing is computed of it
            self.inputs.append(OpaqueInput(position, node.name))
            self.values[node] = _Opaque(node.name)
            self.ragged[value.node.expr] = opaque_symbol(node.name)
        elif isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
            self.note_symbols(value)
            self.inputs.append(SymbolInput(position, value.node.expr))
            self.values[node] = Symbolic(value.node.expr)
        elif isinstance(value, (int, float, bool, torch.SymInt)) and not isinstance(value, torch.SymInt):
            self.inputs.append(OpaqueInput(position, node.name))
            self.values[node] = Literal(value)
        elif isinstance(value, torch.SymInt):
            # the caller passes an expression of symbols that other inputs define
            self.note_symbols(value)
            self.inputs.append(OpaqueInput(position, node.name))
            self.values[node] = Symbolic(convert(value.node.expr))
        else:
            self.inputs.append(OpaqueInput(position, node.name))
            self.values[node] = _Opaque(node.name)

    def get_attr(self, node: torch.fx.Node) -> None:
        target = self.module
        for part in str(node.target).split("."):
            target = getattr(target, part)
        if isinstance(target, torch.Tensor):
            name = _identifier(str(node.target))
            self.constants[name] = target
            self.values[node] = self.fresh(name, node.meta.get("val", target), BufferKind.CONSTANT, origin_of(node))
        else:
            self.values[node] = _Opaque(str(node.target), target)

    def fresh(self, name: str, value: torch.Tensor, kind: BufferKind, origin: Origin, *, donated: bool = False) -> View:
        """A new buffer that holds ``value`` from its first element on."""
        for s in (*value.shape, *value.stride()):
            self.note_symbols(s)
        sizes, strides = sizes_of(value.shape), sizes_of(value.stride())
        itemsize = value.dtype.itemsize
        nbytes = extent(sizes, strides) * itemsize
        self.buffers[name] = Buffer(name, nbytes, value.dtype, str(value.device), kind, origin, donated=donated)
        self.base_offset[name] = size_of(value.storage_offset()) * itemsize
        return View(name, value.dtype, sizes, strides, 0)

    def note_symbols(self, value: int | torch.SymInt) -> None:
        """Remember the hint of every symbol in a size."""
        if isinstance(value, int):
            return
        env = value.node.shape_env
        for symbol in value.node.expr.free_symbols:
            if symbol in self.hints:
                continue
            known = symbol_hint(env, symbol)
            self.hints[symbol] = known

    # -- calls ------------------------------------------------------------------------------------------------------

    def call(self, node: torch.fx.Node) -> None:
        target = node.target
        value = node.meta.get("val")
        if target is operator.getitem:
            container, key = node.args
            held = self.values[container]  # type: ignore[index]
            self.values[node] = (held.items if isinstance(held, Tuple) else held)[key]  # type: ignore[index]
            return
        if isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)) and not _has_tensor(node):
            self.scalar(node, value)
            return
        if isinstance(target, torch._ops.OpOverload):
            self.overload(node, target)
        elif isinstance(target, torch._ops.HigherOrderOperator) or callable(target):
            self.higher_order(node)

    def scalar(self, node: torch.fx.Node, value: object) -> None:
        """Arithmetic on sizes: the result's expression says it all."""
        if isinstance(value, torch.SymInt) and is_ragged(value):
            self.values[node] = Symbolic(convert(value.node.expr).xreplace(self.ragged))
        elif isinstance(value, torch.SymInt):
            self.note_symbols(value)
            size = size_of(value)
            self.values[node] = Literal(size) if isinstance(size, int) else Symbolic(size)
        elif isinstance(value, (int, float, bool)):
            self.values[node] = Literal(value)
        else:
            expr = value.node.expr  # type: ignore[attr-defined]
            self.values[node] = Symbolic(convert(expr))

    def overload(self, node: torch.fx.Node, target: torch._ops.OpOverload) -> None:
        name = str(target)
        if name == "aten.copy_.default":
            self.copy(node)
            return
        if name.startswith(("aten._assert", "aten.sym_constrain_range", "aten._assert_tensor_metadata")):
            self.values[node] = Literal(None)
            if name.startswith(("aten._assert_scalar", "aten._assert_async")) is False:
                return
        if is_wait(name):
            self.wait(node)
            return
        value = node.meta.get("val")
        aliased = _view_of(target)
        if aliased is not None and name not in _LAZY_BITS:
            base = self.argument(node.args[aliased] if aliased < len(node.args) else None)
            if isinstance(base, View):
                self.values[node] = pytree.tree_map(lambda v: self.reseen(base, v), value)
                if name == "aten.as_strided.default":
                    seen = self.values[node]
                    assert isinstance(seen, View)
                    self.buffers[seen.buffer] = reached(self.buffers[seen.buffer], seen, origin_of(node))
                return
        if name == "aten._conj.default" and isinstance(node.args[0], complex):  # a factor, in the gradient of a product
            self.values[node] = Literal(node.args[0].conjugate())
            return
        self.extern(node, _LAZY_BITS.get(name, name), target)

    def reseen(self, base: View, value: object) -> object:
        """The view that the fake tensor ``value``, an alias of ``base``, describes."""
        assert isinstance(value, torch.Tensor)
        start = self.base_offset[base.buffer]
        itemsize = value.dtype.itemsize
        offset_bytes = size_of(value.storage_offset()) * itemsize - start  # type: ignore[operator]
        offset = offset_bytes // itemsize if isinstance(offset_bytes, int) else sympy.cancel(offset_bytes / itemsize)
        return View(base.buffer, value.dtype, sizes_of(value.shape), sizes_of(value.stride()), offset)

    def copy(self, node: torch.fx.Node) -> None:
        target, source = self.argument(node.args[0]), self.argument(node.args[1])
        assert isinstance(target, View)
        assert isinstance(source, View)
        device = self.buffers[target.buffer].device
        origins = (origin_of(node),)
        self.operations.append(Copy(node.name, source, target, device, origins, mutates=(target.buffer,)))
        self.values[node] = target

    def wait(self, node: torch.fx.Node) -> None:
        view = self.argument(node.args[0])
        assert isinstance(view, View)
        device = self.buffers[view.buffer].device
        self.operations.append(communication.wait_for(view, node.name, device, (origin_of(node),)))
        self.values[node] = view

    def extern(self, node: torch.fx.Node, name: str, target: torch._ops.OpOverload) -> None:
        args = tuple(self.argument(a) for a in node.args)
        kwargs = tuple((k, self.argument(a)) for k, a in node.kwargs.items())
        mutates: dict[str, None] = {}
        written: list[View] = []
        for k, schema in enumerate(target._schema.arguments):
            if schema.alias_info is None or not schema.alias_info.is_write:
                continue
            given = args[k] if k < len(args) else dict(kwargs).get(schema.name)
            for view in _views(given):
                mutates[view.buffer] = None
                written.append(view)
        random = torch.Tag.nondeterministic_seeded in target.tags
        effect = random or _is_effect(name)
        self.finish(node, name, args, kwargs, tuple(mutates), written, effect=effect)

    def user_kernel(self, node: torch.fx.Node) -> bool:
        """A launch of a user's Triton kernel; False where it can only be called as a higher-order operator."""
        origin = origin_of(node)
        captured = capture_user_kernel(
            node,
            self.argument,
            lambda name, value: self.fresh(name, value, BufferKind.TEMPORARY, origin),
            lambda view: self.buffers[view.buffer].device,
            origin,
        )
        if captured is None:
            return False
        self.operations.extend(captured.operations)
        self.values[node] = dict(captured.changed) if operator_is(node, FUNCTIONAL) else Literal(None)
        return True

    def higher_order(self, node: torch.fx.Node) -> None:
        if (operator_is(node, FUNCTIONAL) or operator_is(node, MUTATION)) and self.user_kernel(node):
            return
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        template: list[object] = []
        slots: list[int] = []
        offsets: list[Size] = []
        args: list[Argument] = []
        for leaf in leaves:
            held = self.values[leaf] if isinstance(leaf, torch.fx.Node) else leaf
            if isinstance(held, _Opaque) and held.value is not None:
                template.append(held.value)
            elif isinstance(leaf, torch.fx.Node):
                slots.append(len(template))
                template.append(None)
                args.append(self.argument(leaf))
                value = leaf.meta.get("val")
                offsets.append(size_of(value.storage_offset()) if isinstance(value, torch.Tensor) else 0)
            else:
                template.append(leaf)
        key = node.name
        call = HigherOrderCall(node.target, tuple(template), spec, tuple(slots), tuple(offsets))  # type: ignore[arg-type]
        self.callables[key] = call
        name = operator_name(node.target)
        effect = name not in _PURE_HIGHER_ORDER
        mutates: dict[str, None] = {}
        written: list[View] = []
        if name == "triton_kernel_wrapper_mutation":
            for a in args:
                for view in _views(a):
                    mutates[view.buffer] = None
                    written.append(view)
        self.finish(node, f"callable:{key}", tuple(args), (), tuple(mutates), written, effect=effect)

    def finish(
        self,
        node: torch.fx.Node,
        target: str,
        args: tuple[Argument, ...],
        kwargs: tuple[tuple[str, Argument], ...],
        mutates: tuple[str, ...],
        written: Sequence[View],
        *,
        effect: bool,
    ) -> None:
        """Append the call, and buffers for its results."""
        value = node.meta.get("val")
        origin = origin_of(node)
        flat, spec = pytree.tree_flatten(value)
        absent = _never_returned(target, args)
        results: list[View | None] = []
        held: list[object] = []
        single = not isinstance(value, (tuple, list, dict))
        for k, item in enumerate(flat):
            if k in absent:
                results.append(None)
                held.append(Literal(None))
            elif isinstance(item, torch.Tensor) and is_plain(item):
                if mutates and len(written) > k and _same_tensor(item, written[k]):
                    results.append(written[k])
                else:
                    name = node.name if single else f"{node.name}_{k}"
                    results.append(self.fresh(name, item, BufferKind.TEMPORARY, origin))
                held.append(results[-1])
            elif isinstance(item, torch.SymInt):
                self.note_symbols(item)
                results.append(None)
                held.append(Symbolic(convert(item.node.expr)))
            elif isinstance(item, torch.SymFloat | torch.SymBool) and node.meta.get("unbacked_bindings"):
                results.append(None)
                held.append(Symbolic(convert(item.node.expr)))
            else:
                results.append(None)
                held.append(
                    Literal(item) if isinstance(item, (int, float, bool, type(None))) else _Opaque(node.name, item)
                )
        symbols = self.bound_symbols(node)
        if mutates and all(r is None or r.buffer in mutates for r in results):
            contract = Contract.MUTATE
        else:
            contract = Contract.DYNAMIC if symbols else Contract.FRESH
        device = next((self.buffers[r.buffer].device for r in results if r is not None), None) or self.device_of(args)
        call = Extern(
            node.name, target, args, kwargs, tuple(results), contract, device, (origin,), mutates,
            symbols=symbols, effect=effect,
        )  # fmt: skip
        self.operations.extend(communication.started(call, self.buffers))
        self.values[node] = pytree.tree_unflatten(held, spec)

    def device_of(self, args: tuple[Argument, ...]) -> str:
        for a in args:
            for v in _views(a):
                return self.buffers[v.buffer].device
        return "cpu"

    def bound_symbols(self, node: torch.fx.Node) -> tuple[tuple[str, sympy.Symbol], ...]:
        """Accessors of the unbacked sizes that this node makes known."""
        found = node.meta.get("unbacked_bindings") or {}
        out = []
        for symbol, path in found.items():
            text, rest = "[0]", list(path)
            value = node.meta.get("val")
            if rest and isinstance(value, (tuple, list)) and hasattr(rest[0], "idx"):
                text, rest = f"[{rest[0].idx}]", rest[1:]
            for step in rest:
                text += _accessor(step)
            symbol = renamed_symbol(value, symbol)
            self.hints.setdefault(symbol, 1)
            out.append((text, symbol))
        return tuple(out)

    def argument(self, value: object) -> Argument:
        if isinstance(value, torch.fx.Node):
            held = self.values[value]
            if isinstance(held, (View, Literal, Symbolic, Tuple)):
                return held
            if isinstance(held, (list, tuple)):
                return Tuple(tuple(self.argument_value(v) for v in held))
            if isinstance(held, _Opaque):
                if isinstance(held.value, torch.Tensor):
                    raise UnsupportedError(
                        f"a tensor of layout {held.value.layout} inside a compiled graph has no buffer to plan; keep "
                        "what makes it out of the graph with torch.compiler.disable (embeddings: sparse=False)",
                        where=f"{value.name} ({value.target})",
                    )
                return Symbolic(opaque_symbol(held.name))
            raise UnsupportedError(f"value {held!r} as an argument", where=value.name)
        if isinstance(value, (list, tuple)):
            return Tuple(tuple(self.argument(v) for v in value))
        if isinstance(value, torch.SymInt):
            return Symbolic(convert(value.node.expr))
        return Literal(value)  # type: ignore[arg-type]

    def argument_value(self, held: object) -> Argument:
        if isinstance(held, (View, Literal, Symbolic, Tuple)):
            return held
        raise UnsupportedError(f"value {held!r} inside a list argument")

    def output(self, node: torch.fx.Node) -> None:
        for value in node.args[0]:  # type: ignore[union-attr]
            held = self.argument(value)
            if isinstance(held, Tuple):
                raise UnsupportedError("a nested output of an AOTAutograd graph", where=str(value))
            self.outputs.append(held)
        for held in self.outputs:
            if isinstance(held, View) and self.buffers[held.buffer].kind is BufferKind.TEMPORARY:
                b = self.buffers[held.buffer]
                self.buffers[held.buffer] = _with_kind(b, BufferKind.OUTPUT)


@dataclass(frozen=True)
class _Opaque:
    """A value that is neither tensor nor size (a subgraph, a token, a script object)."""

    name: str
    value: object = None


def capture(
    module: torch.fx.GraphModule,
    phase: Phase,
    *,
    name: str,
    static_inputs: frozenset[int] = frozenset(),
    donated_inputs: frozenset[int] = frozenset(),
    saved_outputs: frozenset[int] = frozenset(),
) -> Program:
    """An AOTAutograd graph as a program of extern calls.

    Parameters
    ----------
    static_inputs:
        Positions of parameters and buffers of the model (the caller keeps them).
    donated_inputs:
        Positions whose storage dies with its last use here (what a forward saved for this backward).
    saved_outputs:
        Positions of outputs that are kept for the backward pass.

    Raises
    ------
    UnsupportedError
        For a construct that has no meaning here, naming the FX node.
    """
    fill_random_values(module)
    communication.call_by_name(module)
    state = _Capture(module, phase, static_inputs, donated_inputs)
    program = state.run(name)
    if saved_outputs:
        public = {o.buffer for k, o in enumerate(program.outputs) if isinstance(o, View) and k not in saved_outputs}
        for k in saved_outputs:
            out = program.outputs[k]
            if isinstance(out, View) and out.buffer not in public:
                b = state.buffers[out.buffer]
                if b.kind is BufferKind.OUTPUT:
                    state.buffers[out.buffer] = _with_kind(b, BufferKind.SAVED)
    return program


def opaque_symbol(name: str) -> sympy.Symbol:
    """What stands in arguments and results for an input that is passed on as it is."""
    return sympy.Symbol(f"opaque_{name}")


def _traced_value(env: object, symbol: sympy.Symbol) -> object:
    table = "backed_var_to_val" if hasattr(env, "backed_var_to_val") else "var_to_val"
    known: Mapping[sympy.Symbol, object] = getattr(env, table, None) or {}
    return known.get(symbol, 1)


def is_ragged(value: torch.SymInt) -> bool:
    """Whether a size is that of a nested tensor's jagged dimension, or made of it: a name of offsets, no number."""
    env = value.node.shape_env
    return any(isinstance(_traced_value(env, s), SingletonInt) for s in value.node.expr.free_symbols)


def symbol_hint(env: object, symbol: sympy.Symbol) -> int:
    """The traced value of a size symbol; 1 where it has none (unbacked sizes).

    Raises
    ------
    UnsupportedError
        For the ragged size of a nested tensor, which is no number.
    """
    value = _traced_value(env, symbol)
    if isinstance(value, SingletonInt):
        raise UnsupportedError(
            f"the ragged size {symbol} of a nested tensor stands for its offsets and is no number that a tensor could "
            "be made with: take the sizes of its values() instead"
        )
    traced: int = int(value)  # type: ignore[call-overload]
    return traced


def renamed_symbol(value: object, symbol: sympy.Symbol) -> sympy.Symbol:
    """The name that an unbacked size has in the node's value: tracing again binds a new one and renames it back."""
    leaves = value if isinstance(value, (tuple, list)) else (value,)
    for leaf in leaves:
        mode = getattr(leaf, "fake_mode", None)
        env = mode.shape_env if mode is not None else getattr(getattr(leaf, "node", None), "shape_env", None)
        if env is not None:
            found: Mapping[sympy.Symbol, sympy.Symbol] = getattr(env, "unbacked_renamings", {})
            return found.get(symbol, symbol)
    return symbol


def is_plain(value: torch.Tensor) -> bool:
    """A strided tensor whose bytes we may plan (not sparse, quantised or mkldnn)."""
    return value.layout is torch.strided and not value.is_quantized


def _with_kind(buffer: Buffer, kind: BufferKind) -> Buffer:
    return replace(buffer, kind=kind)


def _identifier(text: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in text)


def _views(value: object) -> list[View]:
    if isinstance(value, View):
        return [value]
    if isinstance(value, Tuple):
        return [v for item in value.items for v in _views(item)]
    return []


def _never_returned(target: str, args: tuple[Argument, ...]) -> tuple[int, ...]:
    """Positions of results that the operator does not return though its fake version makes a tensor of them."""
    if target == "aten._scaled_dot_product_cudnn_attention.default" and len(args) > 4 and args[4] == Literal(False):
        return (1,)  # the log-sum-exp that was not asked for
    return ()


def _same_tensor(value: torch.Tensor, view: View) -> bool:
    return (
        sizes_of(value.shape) == view.sizes and sizes_of(value.stride()) == view.strides and value.dtype == view.dtype
    )


def _has_tensor(node: torch.fx.Node) -> bool:
    return any(isinstance(a.meta.get("val"), torch.Tensor) for a in node.all_input_nodes) and not (
        isinstance(node.target, torch._ops.OpOverload) and str(node.target).startswith("aten.sym_")
    )


def _view_of(target: torch._ops.OpOverload) -> int | None:
    """Position of the argument that the operator returns a view of, or None if it is no view operator."""
    if str(target) in _UNMARKED_VIEWS:
        return 0
    schema = target._schema
    if not schema.returns or any(r.alias_info is None for r in schema.returns):
        return None
    if any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
        return None
    aliased = [k for k, a in enumerate(schema.arguments) if a.alias_info is not None]
    return aliased[0] if len(aliased) == 1 else None


def _is_effect(name: str) -> bool:
    communicates = ("_c10d_functional.", "_c10d_functional_autograd.", "_dtensor.", "c10d.", "symm_mem.")
    return name.startswith(("aten._assert", "aten._linalg_check_errors", *communicates))


def _accessor(step: object) -> str:
    """One step of torch's key path to an unbacked size, as a suffix of Python text."""
    match type(step).__name__:
        case "CallMethodKey":
            return f".{step.name}()"  # type: ignore[attr-defined]
        case "SequenceKey":
            return f"[{step.idx}]"  # type: ignore[attr-defined]
        case "DivideByKey":
            return f"//{step.divisor}"  # type: ignore[attr-defined]
        case "ConvertIntKey":
            return ".__int__()"
        case _:
            raise UnsupportedError(f"an unbacked size bound through {step!r}")
