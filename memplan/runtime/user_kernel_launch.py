"""Launching a user's Triton kernel: compiled by Triton for what its arguments are, started through the compiled handle.

Triton specialises a kernel for its arguments: dtypes, pointers at multiples of 16 bytes, integers that are 1 or
multiples of 16. What the program fixes is looked at once, when the kernel is prepared; only sizes that change from call
to call are looked at in a call, and a value of another kind compiles another variant, as in eager PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import sympy
import torch

from memplan.ir.errors import CompilerError
from memplan.ir.loops import Size
from memplan.ir.program import Symbolic, UserArgument, UserKernel, View, evaluate
from memplan.ir.user_kernel import Fixed, KernelConfig

from .user_kernel_build import BuiltKernel, build_kernel
from .user_kernel_tuning import Changed, Timer, choose_config, device_timer

ALIGNMENT = 16
Grid = tuple[int, int, int]


class Handle(Protocol):
    """Triton's `CompiledKernel`."""

    function: object
    packed_metadata: object

    @property
    def run(self) -> Callable[..., object]: ...


@dataclass(frozen=True, slots=True)
class Pointer:
    """A tensor as Triton's compiler sees it: a dtype, and an address that is a multiple of 16 or not."""

    dtype: torch.dtype
    aligned: bool

    def data_ptr(self) -> int:
        return 0 if self.aligned else 1


@dataclass(frozen=True)
class _Config:
    """One configuration: the whole argument list with gaps at ``slots`` of the launcher, and what else compiling takes.

    ``keywords`` are parameters and options that Triton wants by name.
    """

    arguments: tuple[object, ...]
    positional: int
    keywords: dict[str, object]


class UserLauncher:
    """``launcher(stream, grids, *values)``: a grid for each configuration, then the values that are no constants.

    Values are addresses, tensors where the kernel's parameter is in ``tensors``, integers and other numbers; after them
    ``(sizes, block, itemsize)`` for each TMA descriptor.

    Parameters
    ----------
    undefined:
        Parameters whose tensors hold nothing before the launch: they are not restored between timed runs.
    """

    def __init__(
        self,
        op: UserKernel,
        tensors: frozenset[str],
        undefined: frozenset[str] = frozenset(),
        *,
        timer: Callable[[], Timer] = device_timer,
    ) -> None:
        self.op = op
        self.built: BuiltKernel = build_kernel(op.kernel)
        self.timer = timer
        given = dict(op.arguments)
        self.slots = [op.kernel.parameters.index(n) for n, a in op.arguments if not isinstance(a, Fixed)]
        self.names = [n for n, a in op.arguments if not isinstance(a, Fixed)]
        self.tensors = [k for k, n in enumerate(self.names) if n in tensors]
        made = dict(op.descriptors)
        self.descriptors = [self.names.index(n) for n in made]
        #: positions among the values that decide which variant is launched: sizes, and addresses of unknown alignment
        self.varying = [k for k, n in enumerate(self.names) if n not in made and _alignment(given[n]) is None]
        self.kinds = [given[n] for n in self.names]
        self.configs = [self._config(c, given) for c in op.kernel.configs]
        self.handles: dict[tuple[object, ...], tuple[Callable[..., object], object, object]] = {}
        self.keys = [k for k, n in enumerate(self.names) if n in op.kernel.key and isinstance(given[n], Symbolic)]
        self.chosen: dict[tuple[object, ...], int] = {}
        zeroed = op.kernel.reset_to_zero
        self.changed = [
            Changed(k, n, zeroed=n in zeroed, saved=n not in undefined)
            for k, n in enumerate(self.names)
            if isinstance(a := given[n], View) and a.buffer in op.mutates and k in self.tensors and n not in made
        ]

    def _config(self, config: KernelConfig, given: Mapping[str, UserArgument]) -> _Config:
        value = self.built.value
        fixed = {n: value(a.value) for n, a in given.items() if isinstance(a, Fixed)}
        fixed.update((n, value(v)) for n, v in config.constants)
        options = {n: value(v) for n, v in (*config.options, *self.op.options)}
        defaults = {p.name: p.default for p in getattr(self.built.entry, "params", ()) if p.has_default}
        arguments: list[object] = []
        positional = 0
        keywords = dict(options)
        for k, name in enumerate(self.op.kernel.parameters):
            by_position = k == positional and name not in options and (name in fixed or name in given)
            positional += by_position
            known = fixed.get(name, options.get(name, defaults.get(name)))
            arguments.append(known)
            if not by_position and name in fixed:
                keywords[name] = known
        return _Config(tuple(arguments), positional, keywords)

    # -- compiling --------------------------------------------------------------------------------------------------

    def prepare(self, hints: Mapping[sympy.Symbol, int]) -> Sequence[object]:
        """Compile every configuration for the hinted sizes; nothing is loaded onto a device.

        Returns what Triton was shown in place of the arguments.

        Raises
        ------
        CompilerError
            With Triton's message, which shows the user's line; a configuration that alone does not compile is left out
            when the configurations are timed.
        """
        values = [self._hinted(k, hints) for k in range(len(self.names))]
        errors = []
        for number in range(len(self.configs)):
            try:
                self.compile(number, values)
            except CompilerError as error:
                errors.append(error)
        if len(errors) == len(self.configs):
            raise errors[0]
        return values

    def _hinted(self, k: int, hints: Mapping[sympy.Symbol, int]) -> object:
        kind = self.kinds[k]
        if isinstance(kind, Symbolic):
            found = sympy.sympify(kind.expr.xreplace(hints))
            return int(found) if found.is_Integer else float(found)
        assert isinstance(kind, View)
        if k in self.descriptors:
            return _described(kind, dict(self.op.descriptors)[self.names[k]].block, hints)
        return Pointer(kind.dtype, _alignment(kind) is not False)

    def compile(self, number: int, values: Sequence[object]) -> Handle:
        """The handle of one configuration for arguments like these."""
        config = self.configs[number]
        arguments = list(config.arguments)
        keywords = dict(config.keywords)
        for slot, name, value in zip(self.slots, self.names, values, strict=True):
            arguments[slot] = value
            if slot >= config.positional:
                keywords[name] = value
        entry = cast("_Compiler", self.built.entry)
        try:
            return entry.run(*arguments[: config.positional], grid=(1, 1, 1), warmup=True, **keywords)
        except Exception as error:
            where = next((o.location for o in self.op.origins if o.location), self.op.kernel.location)
            kernel = f"{self.op.kernel.function.name} ({self.op.kernel.location})"
            raise CompilerError(f"the Triton kernel {kernel} does not compile: {error}", where=where) from error

    def handle(self, number: int, values: Sequence[object]) -> tuple[Callable[..., object], object, object]:
        """How to start the variant for these values, loaded onto the current device."""
        key = (number, *(_kind(values[k]) for k in self.varying))
        found = self.handles.get(key)
        if found is None:
            seen = [self._seen(k, v) for k, v in enumerate(values)]
            handle = self.compile(number, seen)
            found = self.handles[key] = (handle.run, handle.function, handle.packed_metadata)
        return found

    def _seen(self, k: int, value: object) -> object:
        kind = self.kinds[k]
        if not isinstance(kind, View) or k in self.descriptors:
            return value
        address = value.data_ptr() if isinstance(value, torch.Tensor) else value
        assert isinstance(address, int)
        return Pointer(kind.dtype, address % ALIGNMENT == 0)

    # -- launching --------------------------------------------------------------------------------------------------

    def __call__(self, stream: int, grids: Sequence[Grid], *values: object) -> None:
        count = len(self.names)
        if self.descriptors:
            values, made = values[:count], values[count:]
            values = self._with_descriptors(values, cast("Sequence[tuple[object, ...]]", made))
        number = 0
        if len(self.configs) > 1:
            found = self.chosen.get(tuple(values[k] for k in self.keys))
            number = self._tune(stream, grids, values) if found is None else found
        self.start(number, stream, grids[number], values)

    def start(self, number: int, stream: int, grid: Grid, values: Sequence[object]) -> None:
        """Launch one configuration; a grid of nothing launches nothing."""
        x, y, z = grid
        if not (x and y and z):
            return
        run, function, metadata = self.handle(number, values)
        arguments = list(self.configs[number].arguments)
        for slot, value in zip(self.slots, values, strict=True):
            arguments[slot] = value
        run(x, y, z, stream, function, metadata, None, None, None, *arguments)

    def _with_descriptors(self, values: Sequence[object], made: Sequence[tuple[object, ...]]) -> tuple[object, ...]:
        out = list(values)
        for k, (sizes, block, itemsize) in zip(self.descriptors, made, strict=True):
            tensor = values[k]
            assert isinstance(tensor, torch.Tensor)
            out[k] = make_descriptor(
                tensor, cast("Sequence[int]", sizes), cast("Sequence[int]", block), cast("int", itemsize)
            )
        return tuple(out)

    def _tune(self, stream: int, grids: Sequence[Grid], values: Sequence[object]) -> int:
        if all(0 in g for g in grids) or (stream and torch.cuda.is_current_stream_capturing()):
            return 0  # nothing to time, or no way to
        key = tuple(values[k] for k in self.keys)

        def run(number: int) -> None:
            self.start(number, stream, grids[number], values)

        best = choose_config(len(self.configs), run, self.changed, values, self.timer())
        self.chosen[key] = best
        return best


class _Compiler(Protocol):
    def run(self, *args: object, grid: Grid, warmup: bool, **kwargs: object) -> Handle: ...


def _alignment(argument: object) -> bool | None:
    """Whether a view begins at a multiple of 16 bytes; None where only the call knows (and for numbers)."""
    if not isinstance(argument, View):
        return None
    offset: Size = argument.offset * argument.dtype.itemsize
    return int(offset) % ALIGNMENT == 0 if isinstance(offset, int) or offset.is_Integer else None


def _kind(value: object) -> object:
    """What Triton looks at in a value that may change: equal kinds run the same code."""
    if isinstance(value, torch.Tensor):
        value = value.data_ptr()
    if isinstance(value, bool) or not isinstance(value, int):
        return type(value)
    return value == 1, value % ALIGNMENT == 0, -(2**31) <= value < 2**31, value < 2**63


def make_descriptor(tensor: torch.Tensor, sizes: Sequence[int], block: Sequence[int], itemsize: int) -> object:
    """The TMA descriptor of a tensor: of Triton's newer interface, or (with sizes) of its older one."""
    if not sizes:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor.from_tensor(tensor, list(block))
    from triton.tools import experimental_descriptor

    create = getattr(experimental_descriptor, f"create_{len(sizes)}d_tma_descriptor")
    return create(tensor.data_ptr(), *sizes, *block, itemsize)


def _described(view: View, block: Sequence[Size], hints: Mapping[sympy.Symbol, int]) -> object:
    """A descriptor of a tensor like the view, for the compiler to look at."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    sizes = [evaluate(s, hints) for s in view.sizes]
    strides = [evaluate(s, hints) for s in view.strides]
    tensor = torch.empty_strided(sizes, strides, dtype=view.dtype, device="meta")
    return TensorDescriptor(tensor, sizes, strides, [evaluate(b, hints) for b in block])


__all__ = ["Grid", "Pointer", "UserLauncher", "make_descriptor"]
