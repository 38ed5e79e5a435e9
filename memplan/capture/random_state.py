"""Values of the operators that checkpointing wraps around random calls.

AOTAutograd makes ``run_and_save_rng_state`` and ``run_with_rng_state`` of a random operator that is recomputed, and
leaves them without the fake value (``meta["val"]``) that every other node has.
"""

from __future__ import annotations

import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensorMode

#: Positions of the operator and of its first argument, by the wrapper's name.
_WRAPPERS = {"run_and_save_rng_state": 0, "run_with_rng_state": 1}


def fill_random_values(module: torch.fx.GraphModule) -> None:
    """Give each such node the value that its call has: (state, result), or the result."""
    for node in module.graph.nodes:
        name = getattr(node.target, "_name", "")
        if node.op != "call_function" or name not in _WRAPPERS or node.meta.get("val") is not None:
            continue
        start = _WRAPPERS[name]
        args, kwargs = torch.fx.node.map_arg((node.args[start + 1 :], node.kwargs), lambda n: n.meta["val"])
        size = _state_bytes(_device(node))
        with _fake_mode(node):
            result = node.args[start](*args, **kwargs)
            state = torch.empty(size, dtype=torch.uint8)
        node.meta["val"] = result if start else (state, result)
        for user in node.users:
            if user.op == "call_function" and user.meta.get("val") is None and isinstance(user.args[-1], int):
                user.meta["val"] = node.meta["val"][user.args[-1]]


def _state_bytes(device: torch.device) -> int:
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return state.numel()


def _device(node: torch.fx.Node) -> torch.device:
    """Where the wrapped operator runs."""
    devices = [v.device for v in _values(node)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def _fake_mode(node: torch.fx.Node) -> FakeTensorMode:
    modes = [m for v in _values(node) if isinstance(m := getattr(v, "fake_mode", None), FakeTensorMode)]
    return modes[0] if modes else FakeTensorMode()


def _values(node: torch.fx.Node) -> list[torch.Tensor]:
    return [v for n in node.all_input_nodes if isinstance(v := n.meta.get("val"), torch.Tensor)]
