"""``memplan.save``: an exported model compiled into one file that runs in another process without compiling."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch.export import ExportedProgram

from . import package
from .artifact import WIDE, Artifact, GpuKernel
from .backend import check_built, check_platform
from .communicating import group_of
from .compilation import PASS_NAMES, CompiledProgram, compile_program
from .exported import Exported, captured, storages
from .interface import Interface
from .ir.config import Config
from .ir.errors import SavedModelError
from .ir.program import Extern
from .kernels import build_wide, collect
from .passes.expose_clones import expose_clones
from .recording import CompiledGraph
from .runtime import cuda_launch
from .runtime.cache import Cache
from .runtime.toolchain import cpu_instructions
from .saving_cpp import cpp_parts
from .saving_encoding import encode
from .user_kernels import with_chosen_configs

_BASE = 64  # stored weights start at a multiple of so many bytes of their memory


def save(model: ExportedProgram, path: str | Path, *, options: Mapping[str, object] | None = None) -> None:
    """Compile an exported model and write it to a file that `memplan.load` runs.

    Weights, plan, wrapper and built kernels are in the one file, and the memory report (``memplan report FILE``).
    Kernels are built for this CPU or GPU. Saved models do inference: they run without autograd.

    Parameters
    ----------
    model:
        ``torch.export.export(module, args, kwargs, dynamic_shapes=...)``.
    path:
        The file; an old one is replaced when the new one is complete.
    options:
        As for ``torch.compile(model, backend="memplan")``.

    Raises
    ------
    SavedModelError
        If something in the model is no data (a user's Triton kernel of several variants, a subgraph, a script object),
        or the file cannot be written.
    OptionError, UnsupportedError
        As when compiling.

    Examples
    --------
    >>> import torch, memplan
    >>> model = torch.nn.Linear(4, 2)
    >>> exported = torch.export.export(model, (torch.randn(3, 4),))
    >>> memplan.save(exported, "/tmp/model.memplan")  # doctest: +SKIP
    """
    if not isinstance(model, ExportedProgram):
        raise SavedModelError(
            f"memplan.save takes what torch.export.export(model, args) gives, not a {type(model).__name__}"
        )
    check_platform()
    config = Config.from_options(options, known_passes=PASS_NAMES)
    # a saved model runs without memplan's operators
    config = replace(config, wrapper="python", disable=tuple({*config.disable, "convolutions"}))
    check_built(config)
    with torch.no_grad():
        exported = captured(model, config)
        # custom operators that change their arguments are wrapped in such a function, and taken out of it here
        program = expose_clones(exported.program)
        called = (op.target for op in program.operations if isinstance(op, Extern))
        if name := next((t.removeprefix("callable:") for t in called if t.startswith("callable:")), None):
            raise SavedModelError(
                f"the model calls {name}, a function over graphs, which torch runs and which is no data: for "
                "torch.cond compute both branches and choose with torch.where, or save a model for each branch"
            )
        talks = next((op for op in program.operations if group_of(op) is not None), None)
        if talks is not None:
            raise SavedModelError(
                f"the model communicates with other processes ({talks.name}), which cannot be saved yet: groups and "
                "their memory belong to one run"
            )
        exported = replace(exported, program=with_chosen_configs(replace(program, callables={})))
        compiled = compile_program(exported.program, config)
    if compiled.artifact is None:
        raise SavedModelError(
            "the model launches Triton kernels of its own of which several variants may be needed (sizes that change "
            "from call to call, TMA descriptors), so that Triton would have to compile where the model is loaded: "
            "export it with static sizes, and load and store through pointers"
        )
    artifact = compiled.artifact
    package.write(Path(path), lambda writer: _fill(writer, exported, compiled, artifact, config))


def _fill(
    writer: package.Writer, exported: Exported, compiled: CompiledProgram, artifact: Artifact, config: Config
) -> Mapping[str, object]:
    from .reports.model import dump_report
    from .reports.target import report_from

    plan = compiled.plan
    artifact = replace(artifact, gpu=(*artifact.gpu, *_wide_kernels(compiled, artifact, config)))
    interface = _with_weights(writer, exported)
    constants = {}
    for name, tensor in plan.program.constants.items():
        constants[name] = (str(tensor.dtype), tuple(tensor.shape), tuple(tensor.stride()), str(tensor.device))
        writer.add(f"constants/{name}", _bytes_of(tensor))
    if artifact.library is not None:
        store = Cache(config.cache_dir) if config.cache_dir else Cache()
        data = store.get_bytes(artifact.library.key)
        if data is None:
            raise SavedModelError("the built kernels are gone from the cache: save again")
        writer.add("kernels.so", data)
    if artifact.gpu:
        writer.add(f"host/{cuda_launch.module_name()}", cuda_launch.module_path().read_bytes())
    cpp = cpp_parts(plan, interface, artifact, plan.program.constants, config)
    if cpp is not None:
        writer.add("wrapper.so", cpp[0])
        writer.add("cpp.txt", cpp[1].encode())
    bare = replace(plan, program=replace(plan.program, constants={}, callables={}))
    writer.add("model.json", encode((interface, artifact, constants)))
    writer.add("plan.json", encode(bare))
    writer.add("wrapper.py", artifact.python.source.encode())
    graph = CompiledGraph(plan, 0, (), compiled.waterfall, compiled.source)
    writer.add("report.json", dump_report(report_from([graph], target="model")).encode())
    return {"memplan": version("memplan"), "torch": _release(torch.__version__), "needs": _needs(artifact)}


def _wide_kernels(compiled: CompiledProgram, artifact: Artifact, config: Config) -> list[GpuKernel]:
    """Kernels that count in 64 bits, for those whose sizes may come to need it."""
    found: list[GpuKernel] = []
    sources = collect(compiled.plan.program).sources
    for kernel in artifact.gpu:
        if kernel.index_limit:
            deterministic = torch.are_deterministic_algorithms_enabled()
            hints = compiled.plan.program.hints
            wide = build_wide(*sources[kernel.name], kernel.name, hints, deterministic, config)
            made = GpuKernel.of(kernel.name + WIDE, kernel.index, kernel, wide.compiled)
            found.append(replace(made, index_limit=()))
    return found


def _with_weights(writer: package.Writer, exported: Exported) -> Interface:
    """Write each memory of weights once, as much of it as they reach; the interface that says where each lies."""
    places: dict[str, tuple[str, int]] = {}
    for number, (memory, names) in enumerate(storages(exported.weights)):
        reach = [_reach(exported.weights[n]) for n in names]
        start = min(a for a, _ in reach) // _BASE * _BASE
        stop = max(b for _, b in reach)
        entry = f"weights/{number}"
        writer.add(entry, _bytes_of(memory[start:stop]))
        for name in names:
            places[name] = (entry, start)
    weights = []
    for spec in exported.interface.weights:
        tensor = exported.weights[spec.name]
        entry, start = places[spec.name]
        offset = tensor.storage_offset() - start // tensor.element_size()
        view = replace(
            spec.view, buffer=entry, sizes=tuple(tensor.shape), strides=tuple(tensor.stride()), offset=offset
        )
        weights.append(replace(spec, storage=entry, view=view))
    return replace(exported.interface, weights=tuple(weights))


def _reach(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes of its memory that a tensor reaches."""
    start = int(tensor.storage_offset()) * tensor.element_size()
    if tensor.numel() == 0:
        return start, start
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + extent * tensor.element_size()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The elements of a tensor, with the gaps between them, as bytes."""
    start, stop = _reach(tensor)
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    return memoryview(whole[start:stop].cpu().numpy())  # type: ignore[arg-type]


def _release(text: str) -> str:
    return text.partition("+")[0]


def _needs(artifact: Artifact) -> dict[str, object]:
    """What a machine must have to run it."""
    found: dict[str, object] = {}
    if artifact.library is not None:
        found["machine"] = platform.machine()
        found["instructions"] = sorted(cpu_instructions())
    if artifact.gpu:
        index = artifact.gpu[0].index
        found["cuda"] = list(torch.cuda.get_device_capability(index))
        found["gpu"] = index
    return found
