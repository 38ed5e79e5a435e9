"""A saved model on another GPU than the one it was saved on: the same kernels, calls and plan."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import replace

from .artifact import Artifact
from .interface import Interface
from .runtime.current_device import gpu_index

#: a constant of the program: dtype, sizes, strides, device
About = tuple[str, tuple[int, ...], tuple[int, ...], str]


def gpus_of(interface: Interface, artifact: Artifact, constants: Mapping[str, About]) -> frozenset[int]:
    """The indices of the GPUs that a saved model uses."""
    devices = {i.device for i in interface.inputs} | {w.device for w in interface.weights}
    devices |= {about[3] for about in constants.values()}
    found = {gpu_index(d) for d in devices if d.startswith("cuda")} | {k.index for k in artifact.gpu}
    named = _Named()
    named.visit(ast.parse(artifact.python.source))
    return frozenset(found | named.found)


def moved(
    interface: Interface, artifact: Artifact, constants: Mapping[str, About], index: int
) -> tuple[Interface, Artifact, dict[str, About]]:
    """All of a model of one GPU, on the GPU ``index``. What it has on the CPU stays there."""

    def device(name: str) -> str:
        return f"cuda:{index}" if _is_gpu(name) else name

    inputs = tuple(replace(i, device=device(i.device)) for i in interface.inputs)
    weights = tuple(replace(w, device=device(w.device)) for w in interface.weights)
    source = ast.unparse(_Moved(index).visit(ast.parse(artifact.python.source)))
    python = replace(artifact.python, source=source + "\n", starts=())
    gpu = tuple(replace(k, index=index) for k in artifact.gpu)
    about = {name: (dtype, sizes, strides, device(at)) for name, (dtype, sizes, strides, at) in constants.items()}
    return replace(interface, inputs=inputs, weights=weights), replace(artifact, python=python, gpu=gpu), about


def _is_gpu(value: object) -> bool:
    """Whether it is the name of a GPU as wrappers write it: a text that holds nothing else."""
    head, colon, number = value.partition(":") if isinstance(value, str) else ("", "", "")
    return head == "cuda" and (number.isdecimal() if colon else not number)


class _Named(ast.NodeVisitor):
    """The GPUs that a wrapper names: ``'cuda:1'``, ``device(type='cuda', index=1)``, ``current_stream(1)``."""

    def __init__(self) -> None:
        self.found: set[int] = set()

    def visit_Constant(self, node: ast.Constant) -> None:
        if _is_gpu(node.value):
            self.found.add(gpu_index(str(node.value)))

    def visit_Call(self, node: ast.Call) -> None:
        number = _number(node)
        if number is None:
            self.generic_visit(node)
        else:
            assert isinstance(number.value, int)
            self.found.add(number.value)


class _Moved(ast.NodeTransformer):
    """The wrapper's text with the GPUs that `_Named` finds replaced."""

    def __init__(self, index: int) -> None:
        self.index = index

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant(f"cuda:{self.index}") if _is_gpu(node.value) else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        number = _number(node)
        if number is None:
            return self.generic_visit(node)
        number.value = self.index
        return node


def _number(call: ast.Call) -> ast.Constant | None:
    """The argument that is the index of a GPU by itself."""
    named = {k.arg: k.value for k in call.keywords}
    kind, number = named.get("type"), named.get("index")
    if isinstance(call.func, ast.Name) and call.func.id == "current_stream":
        (number,) = call.args
    elif not (isinstance(kind, ast.Constant) and kind.value == "cuda"):
        return None
    return number if isinstance(number, ast.Constant) else None
