"""Calls that are run on buffers of their own while a program is compiled, to see what they do with memory.

Here is what does not depend on the device: which calls can be run so, their arguments as tensors, and where what was
seen is kept between processes.
"""

from __future__ import annotations

import json
import logging

import torch

from .ir.config import Config
from .ir.errors import CacheError
from .ir.program import Argument, Extern, Literal, Tuple, View
from .runtime.cache import Cache

log = logging.getLogger(__name__)


def is_static(op: Extern) -> bool:
    """Whether the call's arguments are tensors of known sizes and plain data, and nothing else."""
    views = [v for v in (*op.args, *op.results) if isinstance(v, View)]
    numbers = [n for v in views for n in (*v.sizes, *v.strides)]
    named = tuple(a for _, a in op.kwargs)
    return all(isinstance(n, int) for n in numbers) and plain((*op.args, *named)) is not None


def plain(args: tuple[Argument, ...]) -> list[object] | None:
    """The arguments as data: tensors by shape, strides and dtype; None if there are symbols among them."""
    found: list[object] = []
    for a in args:
        if isinstance(a, View):
            if not all(isinstance(n, int) for n in (*a.sizes, *a.strides)):
                return None
            found.append([list(a.sizes), list(a.strides), str(a.dtype)])
        elif isinstance(a, Literal) and (a.value is None or isinstance(a.value, (bool, int, float))):
            found.append(a.value)
        elif isinstance(a, Tuple):
            inner = plain(a.items)
            if inner is None:
                return None
            found.append(inner)
        else:
            return None
    return found


def sample(argument: Argument, device: torch.device) -> object:
    """A value for an argument of known sizes; tensors are zero."""
    match argument:
        case View():
            sizes, strides = [int(n) for n in argument.sizes], [int(s) for s in argument.strides]
            # numbers that are none slow nothing down, but what is timed should be ordinary
            flat = torch.zeros(nbytes(argument) // argument.dtype.itemsize, dtype=argument.dtype, device=device)
            return flat.as_strided(sizes, strides)
        case Tuple(items):
            return [sample(i, device) for i in items]
        case Literal(value):
            return value
        case _:
            raise TypeError(f"{argument} is no argument of known sizes")


def nbytes(view: View) -> int:
    """Bytes from a view's first element to its last."""
    reach = sum((int(n) - 1) * int(s) for n, s in zip(view.sizes, view.strides, strict=True) if int(n) > 0)
    return (reach + 1) * view.dtype.itemsize


# -- what was seen -----------------------------------------------------------------------------------------------------


def stored(key: str, config: Config) -> object:
    """What `keep` kept under this key, as JSON gives it back; None where there is nothing."""
    data = _store(config).get_bytes(key)
    if data is None:
        return None
    try:
        content: object = json.loads(data)
    except ValueError:
        return None
    return content


def keep(key: str, content: object, what: str, config: Config) -> None:
    """Keep plain data; where that cannot be done, ``what`` is named in a warning."""
    try:
        _store(config).put(key, json.dumps(content).encode(), suffix=".json")
    except CacheError as error:
        log.warning("%s cannot be stored, and will be measured again: %s", what, error)


def _store(config: Config) -> Cache:
    return Cache(config.cache_dir) if config.cache_dir else Cache()
