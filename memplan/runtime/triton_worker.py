"""One Triton build, and a process that makes them: ``python triton_worker.py`` reads requests from its input.

Run as a script this file imports neither torch nor memplan, so that a process is ready in a third of a second. Triton's
front end holds the interpreter's lock, so that threads gain nothing (measured: 24 kernels in 7.7 s with one thread,
8.6 s with four); processes share nothing but Triton's cache on disk.

A request is a line of JSON, ``[cache folder, name, source, arguments, aligned, blocks, warps, stages, checks,
target]``; the answer is a line, empty or the error.
"""

from __future__ import annotations

import hashlib
import json
import linecache
import os
import sys
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType


@lru_cache(maxsize=4096)
def load_module(source: str, name: str) -> ModuleType:
    """The module of a kernel's source text. Its lines show in tracebacks and profilers under a name of their own."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    filename = f"<memplan {name} {digest}>"
    module = ModuleType(f"memplan_kernel_{digest}")
    module.__file__ = filename
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    sys.modules[module.__name__] = module
    exec(compile(source, filename, "exec"), module.__dict__)
    return module


def build(
    name: str,
    source: str,
    arguments: Sequence[tuple[str, str]],
    aligned: Sequence[bool],
    blocks: Sequence[Sequence[object]],
    num_warps: int,
    num_stages: int,
    checks: bool,
    *,
    target: tuple[str, int, int],
) -> object:
    """Compile, or load from Triton's cache; gives Triton's `CompiledKernel`.

    ``checks``: with its device-side assertions, but without those that Triton itself makes of integers' overflow.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(load_module(source, name), name)
    constants = {str(block): size for block, size in blocks}
    signature = {**dict(arguments), **dict.fromkeys(constants, "constexpr")}
    attrs = {(k,): [["tt.divisibility", 16]] for k, is_aligned in enumerate(aligned) if is_aligned}
    text = ASTSource(function, signature, constexprs=constants, attrs=attrs)
    options: dict[str, object] = {"num_warps": num_warps, "num_stages": num_stages}
    if checks:
        options |= {"debug": True, "sanitize_overflow": False}
    return triton.compile(text, target=GPUTarget(*target), options=options)


def main() -> None:
    """Serve until the input ends, which it does when the parent is gone."""
    sink = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        folder, *request, target = json.loads(line)
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            build(*request, target=tuple(target))
            answer = ""
        except Exception as error:
            answer = f"{type(error).__name__}: {error}".replace("\n", " ")
        sink.write(answer + "\n")
        sink.flush()


if __name__ == "__main__":
    sys.path.pop(0)  # the script's own folder: its modules are not to be found as top-level ones
    main()
