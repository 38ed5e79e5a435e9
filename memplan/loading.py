"""``memplan.load``: a saved model, run from its file. Nothing is compiled, traced or unpickled."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils import _pytree as pytree

from . import package
from .artifact import WIDE, Artifact, load_gpu
from .interface import Interface, WeightSpec, checked, symbol_values
from .ir.errors import CompilerError, SavedModelError
from .ir.plan import Plan
from .moved_model import gpus_of, moved
from .runtime import cuda_launch
from .runtime.cpp_launch import load_kernels
from .runtime.current_device import on_own_device
from .runtime.python_runtime import find_operator, namespace
from .runtime.toolchain import cpu_instructions
from .runtime.triton_launch import Launcher
from .saving_encoding import decode

if TYPE_CHECKING:
    from .reports.shown import ShownReport


@dataclass(frozen=True)
class LoadedModel:
    """A saved model. Called as the exported module was; it runs without autograd.

    Buffers that the model changes are its own: they change from call to call, as in the module.
    """

    path: Path
    _run: Callable[[list[object]], object] = field(repr=False)
    _interface: Interface = field(repr=False)
    _weights: tuple[torch.Tensor, ...] = field(repr=False)
    _plan: bytes = field(repr=False)
    _in: pytree.TreeSpec = field(repr=False)
    _out: pytree.TreeSpec = field(repr=False)

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run the model.

        Raises
        ------
        SavedModelError
            If the arguments are not of the structure, shapes, dtypes or devices that the model was exported with.
        """
        interface = self._interface
        given = self._flat(args, kwargs)
        symbols = symbol_values(interface, given)
        ready = [checked(spec, value, symbols) for spec, value in zip(interface.inputs, given, strict=True)]
        arguments: list[object] = []
        for kind, k in interface.arguments:
            match kind:
                case "symbol":
                    arguments.append(symbols[interface.symbols[k].symbol])
                case "weight":
                    arguments.append(self._weights[k])
                case _:
                    arguments.append(ready[k])
        with torch.no_grad():
            out = self._run(arguments)
            for spec, value, used in zip(interface.inputs, given, ready, strict=True):
                if spec.changed:
                    assert isinstance(value, torch.Tensor)
                    assert isinstance(used, torch.Tensor)
                    if used.data_ptr() != value.data_ptr():
                        value.copy_(used)
        return pytree.tree_unflatten(list(out), self._out)  # type: ignore[call-overload]

    def _flat(self, args: tuple[object, ...], kwargs: dict[str, object]) -> list[object]:
        if set(kwargs) == set(self._interface.keywords):
            kwargs = {name: kwargs[name] for name in self._interface.keywords}
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._in:
            raise SavedModelError(
                f"{self.path} takes arguments of another structure:\n  given    {spec}\n  exported {self._in}"
            )
        return list(flat)

    @property
    def plan(self) -> Plan:
        """The memory plan that the model runs by."""
        found = decode(self._plan)
        assert isinstance(found, Plan)
        return found

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Parameters, buffers and constants by name: the memory that the model itself uses."""
        return {spec.name: t for spec, t in zip(self._interface.weights, self._weights, strict=True)}

    def report(self) -> ShownReport:
        """The memory report of the model."""
        from .reports.shown import report

        return report(self.path)


def load(path: str | Path, *, device: str | int | torch.device | None = None) -> LoadedModel:
    """Load a model that `memplan.save` wrote.

    Every byte of the file is checked against the digest that was saved before any code in it is loaded. Weights are
    read to where they stay, piece by piece. Load only files that you trust: they hold code.

    Parameters
    ----------
    path:
        What `memplan.save` wrote.
    device:
        The GPU to run on (``"cuda:1"`` or its index), of the architecture that the model was saved for; the one that
        it was saved on if nothing is given. A model of the CPU stays there.

    Raises
    ------
    SavedModelError
        If the file is not there, damaged or no saved model; or was saved for another CPU, GPU, torch or version of the
        format; or cannot run on the device.

    Examples
    --------
    >>> model = memplan.load("model.memplan")  # doctest: +SKIP
    >>> model(inputs)  # doctest: +SKIP
    """
    path = Path(path)
    wanted = None if device is None else wanted_gpu(path, device)
    with package.read(path) as reader:
        check_machine(reader, wanted)
        found = decode(reader.read("model.json"))
        if not isinstance(found, tuple) or len(found) != 3 or not isinstance(found[1], Artifact):
            raise SavedModelError(f"{path} is no model that this memplan can read")
        interface, artifact, about = found
        assert isinstance(interface, Interface)
        gpus = gpus_of(interface, artifact, about)
        if wanted is not None:
            if len(gpus) != 1:
                kind = f"{len(gpus)} GPUs" if gpus else "the CPU"
                raise SavedModelError(f"{path} was saved for {kind}: only what runs on one GPU moves to cuda:{wanted}")
            interface, artifact, about = moved(interface, artifact, about, wanted)
            gpus = frozenset({wanted})
        check_gpus(path, gpus)
        memories = {w.storage: _memory(reader, w.storage, w.device) for w in _one_of_each(interface)}
        constants = {name: _constant(reader, name, *given) for name, given in about.items()}
        for name in ("wrapper.py", "report.json", "wrapper.so", "cpp.txt"):
            if name in reader.entries:
                reader.verify(name)
        plan = reader.read("plan.json")
        hosts = [n for n in reader.entries if n.startswith("host/")]
        code = {n: reader.read(n) for n in ("kernels.so", *hosts) if n in reader.entries}
    _check_operators(path, artifact.python.operators.values())
    weights = tuple(_weight(spec, memories[spec.storage]) for spec in interface.weights)
    kernels = _load_code(path, artifact, code)
    names = namespace(artifact.python.operators, {}, constants, kernels)
    exec(compile(artifact.python.source, f"<memplan {path.name}>", "exec"), names)
    specs = (pytree.treespec_loads(interface.in_spec), pytree.treespec_loads(interface.out_spec))
    run = on_own_device(names["call"], [f"cuda:{k}" for k in gpus])  # type: ignore[arg-type]
    return LoadedModel(path, run, interface, weights, plan, *specs)


def wanted_gpu(path: Path, device: str | int | torch.device) -> int:
    """The index of the GPU that a model is to run on instead of the one that it was saved on.

    Raises
    ------
    SavedModelError
        If the device is no GPU that is there.
    """
    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError as error:
        raise SavedModelError(f"{path} cannot be loaded for {device!r}, which is no device of torch's") from error
    if found.type != "cuda":
        raise SavedModelError(f"{path} cannot be loaded for {found}: a model moves from one GPU to another only")
    check_gpus(path, (found.index or 0,))
    return torch.cuda.current_device() if found.index is None else found.index


def check_gpus(path: Path, gpus: Iterable[int]) -> None:
    """Refuse a model of GPUs that are not there.

    Raises
    ------
    SavedModelError
        Naming the GPU.
    """
    count = torch.cuda.device_count()
    for index in gpus:
        if index >= count:
            here = f"there are {count} (device='cuda:0' would be the first)" if count else "there is none here"
            raise SavedModelError(f"{path} is to run on the GPU cuda:{index}, and {here}")


def check_machine(reader: package.Reader, gpu: int | None = None) -> None:
    """Refuse what was saved for something else than this machine and this torch.

    ``gpu``: the one to run on, where another one is wanted than it was saved on.

    Raises
    ------
    SavedModelError
        Saying what differs, and what to do.
    """
    path, saved = reader.path, reader.manifest
    here = torch.__version__.partition("+")[0]
    if saved["torch"] != here:
        raise SavedModelError(f"{path} was saved with torch {saved['torch']}, this is torch {here}: save it again here")
    needs = saved["needs"]
    assert isinstance(needs, Mapping)
    if needs.get("machine", platform.machine()) != platform.machine():
        raise SavedModelError(f"{path} was saved for {needs['machine']}, this is {platform.machine()}")
    missing = sorted(set(needs.get("instructions", ())) - cpu_instructions())
    if missing:
        raise SavedModelError(
            f"{path} was saved on a CPU with {', '.join(missing[:6])}, which this one lacks: save it again here"
        )
    if "cuda" in needs:
        wanted = tuple(needs["cuda"])
        if not torch.cuda.is_available():
            raise SavedModelError(f"{path} was saved for an NVIDIA GPU (sm_{wanted[0]}{wanted[1]}); there is none here")
        index = needs.get("gpu", 0) if gpu is None else gpu
        check_gpus(path, (index,))
        found = torch.cuda.get_device_capability(index)
        if found != wanted:
            raise SavedModelError(
                f"{path} was saved for GPUs of architecture sm_{wanted[0]}{wanted[1]}, this one is "
                f"sm_{found[0]}{found[1]}: save it again here"
            )


def _check_operators(path: Path, targets: Iterable[str]) -> None:
    """Refuse a model that calls operators which nobody has registered here: before any of its code is loaded.

    Raises
    ------
    SavedModelError
        Naming the first of them.
    """
    for target in targets:
        try:
            find_operator(target, {})
        except AttributeError as error:
            name = "::".join(target.split(".")[:2])
            raise SavedModelError(
                f"{path} calls the operator {name}, which is not registered in this process: import the module that "
                "defines it before memplan.load"
            ) from error


def _one_of_each(interface: Interface) -> list[WeightSpec]:
    return list({w.storage: w for w in interface.weights}.values())


def _memory(reader: package.Reader, entry: str, device: str) -> torch.Tensor:
    """A memory of weights, read to where it stays."""
    out = torch.empty(reader.size(entry), dtype=torch.uint8, device=device)
    if out.device.type == "cpu":
        reader.read_into(entry, memoryview(out.numpy()))  # type: ignore[arg-type]
    else:
        reader.stream(entry, lambda start, data: _copy_piece(out, start, data))
    return out


def _copy_piece(out: torch.Tensor, start: int, data: memoryview) -> None:
    out[start : start + len(data)].copy_(torch.frombuffer(data, dtype=torch.uint8))


def _weight(spec: WeightSpec, memory: torch.Tensor) -> torch.Tensor:
    view = spec.view
    out = torch.empty(0, dtype=view.dtype, device=memory.device)
    return out.set_(memory.untyped_storage(), view.offset, view.sizes, view.strides)


def _constant(
    reader: package.Reader, name: str, dtype: str, sizes: tuple[int, ...], strides: tuple[int, ...], device: str
) -> torch.Tensor:
    memory = _memory(reader, f"constants/{name}", device)
    out = torch.empty(0, dtype=getattr(torch, dtype.removeprefix("torch.")), device=device)
    return out.set_(memory.untyped_storage(), 0, sizes, strides)


def _load_code(path: Path, artifact: Artifact, code: Mapping[str, bytes]) -> dict[str, Callable[..., object]]:
    """The kernels, from files that are this process's own and gone when they are loaded."""
    kernels: dict[str, Callable[..., object]] = {}
    with tempfile.TemporaryDirectory(prefix="memplan-load-") as folder:
        try:
            if artifact.library is not None:
                file = Path(folder) / "kernels.so"
                file.write_bytes(code["kernels.so"])
                kernels |= load_kernels(file, artifact.library.signatures)
            host = code.get(f"host/{cuda_launch.module_name()}")
            if host is not None:
                file = Path(folder) / "cuda_launch.so"
                file.write_bytes(host)
                cuda_launch.use_module(file)
                cuda_launch.native_launch()
            if artifact.gpu:
                kernels |= _gpu_kernels(artifact)
        except (CompilerError, RuntimeError, OSError) as error:
            raise SavedModelError(f"the kernels of {path} cannot be loaded here: {error}") from error
    return kernels


def _gpu_kernels(artifact: Artifact) -> dict[str, Callable[..., object]]:
    wide = {k.name.removesuffix(WIDE): k for k in artifact.gpu if k.name.endswith(WIDE)}
    plain = [k for k in artifact.gpu if not k.name.endswith(WIDE)]

    def make_wide(name: str) -> Launcher:
        return replace(wide[name], name=name).launcher()

    return load_gpu(plain, make_wide)[0]
