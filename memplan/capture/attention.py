"""Attention masks on the Dynamo graph, before AOTAutograd decides how attention runs.

Models build masks while they are traced that say nothing: all true, or plain causal. With a mask the fast attention
kernels are out of reach, and some masks make torch take attention apart into products and a softmax over the whole
score matrix (see pytorch's `sdp_utils`: which kernels take which masks). A mask whose value depends on no input is
computed here, once, on the CPU: all true is dropped, lower triangular becomes ``is_causal=True``.
"""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass
from typing import cast

import torch
import torch.fx
from torch.fx.node import Argument
from torch.nn import functional

log = logging.getLogger(__name__)
_SDPA = (functional.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention)
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
#: Larger masks are not computed: it would take longer than it saves.
_MAX_ELEMENTS = 2**27
#: Calls with these names change state that outlives the graph.
_FORBIDDEN = ("rand", "randn", "randint", "bernoulli", "dropout", "manual_seed", "item", "print")


@dataclass(frozen=True)
class Simplified:
    """How many attention calls lost their mask."""

    dropped: int
    causal: int


def simplify_masks(module: torch.fx.GraphModule) -> Simplified:
    """Drop masks that are provably all true, and turn provably causal ones into ``is_causal``; in place."""
    calls = [n for n in module.graph.nodes if n.op == "call_function" and n.target in _SDPA]
    given = [(n, _argument(n, "attn_mask", None)) for n in calls]
    masked = [(n, m) for n, m in given if isinstance(m, torch.fx.Node)]
    if not masked:
        return Simplified(0, 0)
    values = {m: constant_value(module, m) for m in dict.fromkeys(m for _, m in masked)}
    dropped = causal = 0
    for node, mask in masked:
        value = values[mask]
        if value is None or value.dtype is not torch.bool or _argument(node, "is_causal", False):
            continue
        if bool(value.all()):
            _without_mask(node, is_causal=False)
            dropped += 1
        elif _is_causal(value, node):
            _without_mask(node, is_causal=True)
            causal += 1
    if dropped or causal:
        # Only what computed the masks may go: the graph is not functional yet, so elsewhere an operation that nobody
        # reads may be one that changes its argument. Levels of vmap stay, since the model's own may share them.
        mask_nodes = {n for m in values for n in _ancestors(module, m) or () if not _is_vmap(n.target)}
        module.graph.eliminate_dead_code(is_impure_node=lambda n: n not in mask_nodes)
        module.recompile()
        log.info("attention: %d masks were all true, %d causal", dropped, causal)
    return Simplified(dropped, causal)


def _argument(node: torch.fx.Node, name: str, default: object) -> object:
    position = _NAMES.index(name)
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def _without_mask(node: torch.fx.Node, *, is_causal: bool) -> None:
    given = dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)
    given |= {"attn_mask": None, "is_causal": is_causal}
    node.args = tuple(given.pop(n) for n in ("query", "key", "value"))
    node.kwargs = given


def _is_causal(mask: torch.Tensor, node: torch.fx.Node) -> bool:
    """Whether the mask is lower triangular and square, as ``is_causal`` means it."""
    rows, columns = mask.shape[-2:]
    query, key = (_value(n).shape[-2] for n in node.args[:2])
    if rows != columns or query != rows or key != columns:
        return False
    expected = torch.ones(rows, columns, dtype=torch.bool).tril()
    return bool((mask == expected).all())


def _value(node: object) -> torch.Tensor:
    assert isinstance(node, torch.fx.Node)
    return node.meta["example_value"]  # type: ignore[no-any-return]


def constant_value(module: torch.fx.GraphModule, node: torch.fx.Node) -> torch.Tensor | None:
    """The value of a node that depends on no input, computed on the CPU; None if it depends on one."""
    example = node.meta.get("example_value")
    if not isinstance(example, torch.Tensor) or any(isinstance(s, torch.SymInt) for s in example.shape):
        return None
    if example.numel() > _MAX_ELEMENTS:
        return None
    needed = _ancestors(module, node)
    if needed is None:
        return None
    values: dict[torch.fx.Node, object] = {}
    cpu = torch.device("cpu")

    def value_of(argument: Argument) -> Argument:
        # what takes a node's place is its value, which is no Argument
        return cast(Argument, _on_cpu(values[argument] if isinstance(argument, torch.fx.Node) else argument))

    try:
        with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
            for n in needed:
                args = cast(tuple[object, ...], torch.fx.node.map_aggregate(n.args, value_of))
                kwargs = cast(dict[str, object], torch.fx.node.map_aggregate(n.kwargs, value_of))
                if "device" in n.kwargs:
                    kwargs = {**kwargs, "device": cpu}
                if n.op == "call_method":
                    values[n] = getattr(args[0], str(n.target))(*args[1:], **kwargs)
                else:
                    assert callable(n.target)
                    values[n] = n.target(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        # the mask stays as the model gave it: right, only slower
        log.info("the attention mask %s could not be computed beforehand: %s", node.name, error)
        return None
    value = values[node]
    return value if isinstance(value, torch.Tensor) else None


def _on_cpu(value: object) -> object:
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _ancestors(module: torch.fx.GraphModule, node: torch.fx.Node) -> list[torch.fx.Node] | None:
    """All that the node is computed from in order, with vmap's bookkeeping; None if an input is among it."""
    wanted: set[torch.fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n in wanted:
            continue
        example = n.meta.get("example_value")
        # the mask itself may be an input, or an attribute of the module
        if n.op not in ("call_function", "call_method") or _is_forbidden(n) or isinstance(example, torch.SymInt):
            return None
        wanted.add(n)
        stack.extend(n.all_input_nodes)
    if any(_is_in_place(user) for n in wanted for user in n.users):
        return None
    # a change through a view that is itself no part of the mask's computation changes the mask all the same
    storages = {_storage(n) for n in wanted} - {None}
    if any(_is_in_place(n) and storages & {_storage(i) for i in n.all_input_nodes} for n in module.graph.nodes):
        return None
    levels = [n for n in module.graph.nodes if n.op == "call_function" and _is_vmap(n.target)]
    nested = any(_is_batching(n.target) for n in wanted)
    if nested:
        wanted.update(levels)
    return [n for n in module.graph.nodes if n in wanted]


def _storage(node: torch.fx.Node) -> int | None:
    """Identity of the storage of a node's traced value; None where it has none (vmap's wrappers)."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return None
    return int(value.untyped_storage()._cdata)


def _is_in_place(node: torch.fx.Node) -> bool:
    """Whether a node changes one of its inputs (then the order of execution matters, which is not looked at)."""
    name = _name(node.target)
    if node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator":
        # `and_`, `or_` and `not_` change nothing
        return name == "setitem" or (name.startswith("i") and hasattr(operator, f"__{name}__") and name not in _PURE)
    return (name.endswith("_") and not name.endswith("__")) or "out" in node.kwargs


#: functions of `operator` that begin with an i and change nothing
_PURE = ("index", "invert", "inv", "is_", "is_not", "itemgetter")


def _is_forbidden(node: torch.fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return any(name == f or name.startswith(f + "_") for f in _FORBIDDEN)


def _is_vmap(target: object) -> bool:
    return "vmap" in _name(target) and (
        "increment" in _name(target) or "decrement" in _name(target) or "lazy" in _name(target)
    )


def _is_batching(target: object) -> bool:
    return "batch_dim" in _name(target) or "batchdim" in _name(target)


def _name(target: object) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
