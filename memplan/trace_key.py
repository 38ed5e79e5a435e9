"""What decides AOTAutograd's trace of a Dynamo graph: the key of what is kept of it, or why nothing is.

torch has a key of its own (`autograd_cache_key`). This one takes its place because that one reads and imports Inductor
(1.5 s of a warm start), and leaves out what a backend adds and more: which inputs share memory, the ranges of size
symbols, attention's switches, the source of custom operators. What cannot be told as text here is traced each time.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch.fx
import torch.fx.experimental._config as symbolic_config
from torch._decomp import global_decomposition_table
from torch._functorch import predispatch
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import extract_tensor_metadata
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._sympy.symbol import SymT, symbol_is_type

from .capture.fx import symbol_hint
from .ir.config import Config
from .plan_cache import settings, versions
from .runtime.cache import KeyPart

#: operators whose definition is torch's, by version, or in the digest of memplan's source
_NAMESPACES = frozenset({"aten", "prims", "prim", "memplan"})
_MODULES = frozenset({"torch", "_operator", "operator", "math", "builtins"})
#: dispatch keys of Python implementations that are not traced through (torch registers such itself)
_BELOW_TRACING = frozenset({"Meta", "CPU", "CUDA", "MPS", "XPU", "HPU"})
_PLAIN = (
    int, float, complex, bool, str, type(None), type(...), torch.dtype, torch.device, torch.layout,
    torch.memory_format, enum.Enum,
)  # fmt: skip
_ATTENTION = ("flash", "mem_efficient", "math", "cudnn", "overrideable")


class UntoldError(Exception):
    """Something that the trace depends on cannot be told; the message says what."""


def switched_off(config: Config, inputs: Sequence[object]) -> str | None:
    """Why no traces are kept at all, or none for such inputs; None if they are."""
    if not (config.plan_cache and config.trace_cache) or torch.compiler.config.force_disable_caches:
        return "caching is switched off"
    if config.dump or config.plan_only or config.cuda_graphs:
        return "dumps, plans that are not built and CUDA graphs need the traced graph"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "all ranks have to compile alike"
    if any(isinstance(value, (tuple, list, dict)) for value in inputs):
        return "an input is a nest of tensors"
    if torch._dynamo.config.caching_precompile or torch._dynamo.config.compiled_autograd:
        return "Dynamo wants to see the traced graph"
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack():
        return "a transform or a dispatch mode is active"
    if functorch_config.activation_memory_budget != 1:
        return "torch's own memory budget is set"
    return next(_overridden(), None)


def _overridden() -> Iterator[str]:
    """What somebody has registered for operators that are traced through."""
    # torch's own for vmap, which it registers when that is first called
    own: set[str] = getattr(predispatch.VMAP_DECOMPOSITIONS_LIB, "_op_impls", set())
    for registered in torch.library._impls - own:
        namespace, _, key = registered.split("/")
        if namespace in ("aten", "prim") and key not in _BELOW_TRACING:
            yield f"{registered} has been registered"
    for table in global_decomposition_table.values():
        for operator, function in table.items():
            whole: object = function
            while isinstance(whole, partial) or hasattr(whole, "__wrapped__"):
                whole = whole.func if isinstance(whole, partial) else whole.__wrapped__
            if (getattr(whole, "__module__", None) or "").partition(".")[0] not in ("torch", "memplan"):
                yield f"a decomposition of {operator} has been registered"


def trace_key(
    module: torch.fx.GraphModule, inputs: Sequence[object], aot: object, config: Config
) -> tuple[KeyPart, ...]:
    """Key parts of AOTAutograd's result for a Dynamo graph.

    Parameters
    ----------
    inputs:
        Parameters, buffers and arguments, as AOTAutograd has them.
    aot:
        torch's ``AOTConfig``.

    Raises
    ------
    UntoldError
        If something that it depends on cannot be told.
    """
    _of_context()
    state = (versions(), settings(), _switches(), config.cache_key(), _asked(aot))
    return (*state, _inputs(inputs), _graph(module))


def _asked(aot: object) -> KeyPart:
    """How AOTAutograd is asked."""
    sources = getattr(aot, "aot_autograd_arg_pos_to_source") or ()  # noqa: B009
    names = tuple("" if s is None else str(s.name() if callable(s.name) else s.name) for s in sources)
    options = (
        "num_params_buffers", "keep_inference_input_mutations", "is_export", "no_tangents", "dynamic_shapes",
        "static_input_indices", "enable_log", "pre_dispatch", "ignore_shape_env", "disable_functionalization",
    )  # fmt: skip
    return (names, tuple(f"{name} {getattr(aot, name)}" for name in options))


def _inputs(inputs: Sequence[object]) -> KeyPart:
    """All that tracing sees of inputs: metadata, which of them share memory, hints and ranges of symbols."""
    storages: dict[int, int] = {}
    symbols: dict[str, str] = {}
    found: list[KeyPart] = []
    for value in inputs:
        sizes: tuple[object, ...] = ()
        match value:
            case torch.Tensor():
                if is_traceable_wrapper_subclass(value) or value.layout is not torch.strided:
                    raise UntoldError(f"an input is a {type(value).__name__} of layout {value.layout}")
                storage = storages.setdefault(value.untyped_storage()._cdata, len(storages))
                about = (type(value).__name__, value.is_leaf, value._is_view(), extract_tensor_metadata(value))
                found.append((storage, *map(str, about)))
                sizes = (*value.shape, *value.stride(), value.storage_offset())
            case torch.SymInt():
                found.append(("symbol", str(value.node.expr)))
                sizes = (value,)
            case None | bool() | int() | float() | str():
                found.append((type(value).__name__, repr(value)))
            case _:
                raise UntoldError(f"an input is a {type(value).__name__}")
        for size in sizes:
            if isinstance(size, torch.SymInt):
                symbols |= _symbols(size)
    return (tuple(found), tuple(sorted(symbols.items())))


def _of_context() -> None:
    """What is found out about sizes of data while tracing is kept nowhere, nor is what DDP asks of a first call."""
    context = TracingContext.try_get()
    if context is not None and context.fakify_first_call:
        raise UntoldError("the first call is to be traced")
    env = getattr(context.fake_mode, "shape_env", None) if context is not None else None
    for symbol in env.var_to_range if env is not None else ():
        if symbol_is_type(symbol, (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)):
            raise UntoldError(f"the size {symbol} is known only when it runs")


def _symbols(size: torch.SymInt) -> dict[str, str]:
    """Hint and range of each symbol."""
    env, found = size.node.shape_env, {}
    for symbol in size.node.expr.free_symbols:
        found[str(symbol)] = f"{symbol_hint(env, symbol)} {env.var_to_range.get(symbol)} {env.settings}"
    return found


def _graph(module: torch.fx.GraphModule) -> str:
    """Digest of a graph with its subgraphs: every call, and where in the user's code it comes from."""
    digest = hashlib.sha256()
    if hasattr(module, "saved_tensors_hooks_pack_0"):
        raise UntoldError("saved-tensor hooks are a part of the graph")
    for name, part in module.named_modules():
        if not isinstance(part, torch.fx.GraphModule):
            raise UntoldError(f"the graph calls a module, {name}")
        if "_checkpoint_context_fn" in part.meta:
            raise UntoldError("what checkpointing keeps is chosen by a function of the user's")
        digest.update(repr(("graph", name)).encode())
        for node in part.graph.nodes:
            called = _target(part, node)
            arguments = _told((node.args, dict(node.kwargs)))
            modules = tuple((node.meta.get("nn_module_stack") or {}).values())  # (its keys are addresses)
            notes = tuple(node.meta.get(k) for k in ("stack_trace", "custom", "recompute"))
            digest.update(repr((node.op, node.name, called, arguments, modules, notes)).encode())
    return digest.hexdigest()


def _target(module: torch.fx.GraphModule, node: torch.fx.Node) -> str:
    """What a node calls, by a name that stands for one definition."""
    target = node.target
    if node.meta.get("is_wrapped"):
        raise UntoldError(f"{target} is called as it is")
    match node.op:
        case "placeholder" | "output":
            return str(target)
        case "call_method":
            return str(target)
        case "get_attr":
            found: object = module
            for part in str(target).split("."):
                found = getattr(found, part)
            if isinstance(found, torch.fx.GraphModule):
                return str(target)
            raise UntoldError(f"the graph holds {target}, a {type(found).__name__}")
        case "call_function" if not isinstance(target, str):
            return _function(target)
    raise UntoldError(f"{target} is called as it is")


def _function(target: object) -> str:
    match target:
        case torch._ops.OpOverload():
            namespace, name = target.namespace, str(target)
        case torch._ops.OpOverloadPacket():
            namespace, name = target._qualified_op_name.partition("::")[0], str(target)
        case torch._ops.HigherOrderOperator():
            name = target._name
            known = target.cacheable() and not name.startswith("triton_kernel_wrapper")
            namespace = "aten" if known else ""
        case _:
            name = str(getattr(target, "__qualname__", None) or type(target).__qualname__)
            module = getattr(target, "__module__", None)
            if module is None and getattr(torch.Tensor, name.rpartition(".")[2], None) is target:
                module = "torch"  # (its methods that are written in C++ have none)
            name = f"{module}.{name}"
            namespace = "aten" if str(module).partition(".")[0] in _MODULES and "<locals>" not in name else ""
    if namespace not in _NAMESPACES:
        raise UntoldError(f"{name} is not torch's: what it does may change")
    return f"{type(target).__name__} {name}"


def _told(value: object) -> str:
    """An argument as text that nothing else has."""
    match value:
        case torch.fx.Node():
            return f"%{value.name}"
        case tuple() | list():
            return f"{type(value).__name__}({', '.join(map(_told, value))})"
        case dict():
            return f"dict({', '.join(f'{_told(k)}: {_told(v)}' for k, v in value.items())})"
        case slice():
            return f"slice{_told((value.start, value.stop, value.step))}"
        case torch._ops.OpOverload() | torch._ops.HigherOrderOperator():
            return _function(value)
    if isinstance(value, _PLAIN):
        return f"{type(value).__name__} {value!r}"
    raise UntoldError(f"a {type(value).__name__} is an argument in the graph")


def _switches() -> KeyPart:
    """Switches of torch that decide what is traced, or what memplan makes of it."""
    matmul = torch.backends.cuda.matmul
    configs: tuple[Any, ...] = (functorch_config, symbolic_config)
    autocast = [d for d in torch._C._autocast_supported_devices() if torch.is_autocast_enabled(d)]
    found: list[object] = [
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        [(d, torch.get_autocast_dtype(d)) for d in autocast],
        torch.get_default_device(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        [getattr(torch._C, f"_get_{name}_sdp_enabled", bool)() for name in _ATTENTION],
        torch._C._get_mkldnn_enabled(),
        [c.get_hash() for c in configs],
    ]
    if torch.cuda.is_available():
        found.append(torch.cuda.current_device())
        for k in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(k)
            found.append((about.name, about.major, about.minor, about.total_memory))
    return tuple(map(str, found))
