"""All options, in one place.

`Config.from_options` reads what a user passes to `torch.compile`; `from_environment` is the only function of memplan
that reads the environment. Every field that changes a result is part of `Config.cache_key`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from .communication_options import CommunicationOptions
from .early_launch import EARLY_LAUNCHES
from .errors import OptionError

WRAPPERS = ("auto", "python", "cpp")
RANDOM = ("fast", "eager")
#: GPUs whose figures are known (`memplan.ir.device.DEFAULTS`)
TARGETS = ("H100", "H200", "A100")
MODES: Mapping[str, Mapping[str, object]] = {
    "default": {},
    "reduce-overhead": {"cuda_graphs": True},
    "max-autotune": {"max_autotune": True, "cuda_graphs": True},
    "max-autotune-no-cudagraphs": {"max_autotune": True},
}


@dataclass(frozen=True, slots=True)
class Config:
    """Options of ``torch.compile(model, backend="memplan", options={...})``.

    Attributes
    ----------
    wrapper:
        Language of the code that runs the plan: ``"python"``, ``"cpp"``, or ``"auto"`` (C++ where it can be had).
    disable:
        Names of passes to leave out, for example ``["inplace"]``.
    verify:
        Run the program verifier after every pass and the plan verifier on the plan.
    poison:
        Fill bytes with a signalling pattern when the plan frees them, and put red zones between neighbours in a pool.
    dump:
        Folder to write the program to after every pass; None for none.
    random:
        ``"fast"``: random numbers from seeds, recomputed in the backward pass instead of being kept;
        ``"eager"``: exactly eager's numbers, in eager's order.
    target:
        GPU to plan for where there is none, one of `TARGETS`; for plans that are only looked at (`memplan.analyze`,
        ``memplan report``): nothing is built for it.
    cuda_graphs:
        Capture what runs on a GPU into CUDA graphs.
    max_autotune:
        Search kernel configurations and templates.
    recompute_time:
        Largest part of the step's estimated time that recomputation may add; 0: only what costs nothing is recomputed.
    recompute_products:
        What convolutions, matrix products and attention may add to that, where all that is cheap has room: those that
        free most bytes in a microsecond first; 0: they are never done twice unless a budget asks for it.
    budget:
        Largest bytes of the step above those before it, or None; text such as ``"12GiB"`` is understood. On a GPU they
        are what the device's caching allocator reserves, by simulation, elsewhere what is alive. What is recomputed is
        chosen for it, products too, so that the step is as fast as it can be within.
    offload:
        Whether a budget may take saved tensors to pinned memory of the host and back, where that is faster than
        computing more of them again, or where that is not enough.
    max_fused_buffers:
        Largest number of buffers that one fused kernel may touch.
    loss_chunk:
        Largest bytes of a slice of logits in a loss computed by slices of tokens; 0 computes losses whole.
    check_indices:
        Raise where an index of a gather, a scatter, an embedding or a loss is out of range, as eager does: an
        `IndexOutOfRangeError` from a CPU's kernels, a device-side assertion on a GPU. Without it such an index reads
        or writes whatever lies there.
    early_launch:
        Whether a kernel of ours on a GPU of compute capability 9.0 or more is started while the one before it ends,
        and waits itself (`memplan.ir.early_launch`): ``"auto"``; ``"start"``, ``"end"`` or ``"wait"`` (it may as soon
        as the one before it has begun everywhere, has stored its results, or has ended everywhere); ``"never"``.
    pools:
        ``"auto"`` (what the simulated device allocator likes best), ``"always"`` or ``"never"``.
    communication:
        How collectives run and what memory they use: a dictionary, see `CommunicationOptions`.
    cache_dir:
        Where plans and built kernels are kept; None for the user's cache directory.
    plan_cache:
        Take plans from the cache, and put them there. (Built kernels are always kept.)
    trace_cache:
        Take AOTAutograd's traces from the cache, too, and put them there; not without ``plan_cache``.
    """

    wrapper: str = "auto"
    disable: tuple[str, ...] = ()
    verify: bool = True
    poison: bool = False
    dump: str | None = None
    random: str = "fast"
    target: str | None = None
    cuda_graphs: bool = False
    max_autotune: bool = False
    recompute_time: float = 0.2
    recompute_products: float = 0.02
    budget: int | None = None
    offload: bool = False
    max_fused_buffers: int = 24
    loss_chunk: int = 2**28
    check_indices: bool = True
    early_launch: str = "auto"
    pools: str = "auto"
    communication: CommunicationOptions = field(default_factory=CommunicationOptions)
    cache_dir: str | None = None
    plan_cache: bool = True
    trace_cache: bool = True
    #: make the plan and run the traced graph as it is; nothing is built (`memplan.analyze`)
    plan_only: bool = False
    #: passes that exist; filled in by the caller of `from_options` for the check of `disable`
    known_passes: tuple[str, ...] = ()

    @classmethod
    def from_options(
        cls, options: Mapping[str, object] | None, mode: str | None = None, *, known_passes: tuple[str, ...] = ()
    ) -> Config:
        """The options a user gave, checked, over those of the environment.

        Raises
        ------
        OptionError
            For an unknown option, mode or pass (naming the nearest valid one) or a value of the wrong kind.
        """
        config = from_environment(cls(known_passes=known_passes))
        if mode is not None:
            if mode not in MODES:
                raise OptionError(f"unknown mode {mode!r}{_nearest(mode, MODES)}; modes are {', '.join(MODES)}")
            config = replace(config, **MODES[mode])  # type: ignore[arg-type]
        values: dict[str, object] = {}
        names = [f.name for f in fields(cls) if f.name not in ("known_passes", "plan_only")]
        for name, value in (options or {}).items():
            if name not in names:
                raise OptionError(f"unknown option {name!r}{_nearest(name, names)}; options are {', '.join(names)}")
            values[name] = _checked(name, value, known_passes)
        if "disable" in values:  # what the environment switches off stays off: `memplan bisect` counts on it
            values["disable"] = tuple(dict.fromkeys((*config.disable, *values["disable"])))  # type: ignore[misc]
        return replace(config, **values)  # type: ignore[arg-type]

    def enabled(self, name: str) -> bool:
        """Whether the pass of this name runs."""
        return name not in self.disable

    def cache_key(self) -> tuple[tuple[str, str], ...]:
        """Every field that changes what is generated."""
        skip = {"dump", "cache_dir", "plan_cache", "trace_cache", "known_passes"}
        return tuple((f.name, repr(getattr(self, f.name))) for f in fields(self) if f.name not in skip)


def from_environment(config: Config) -> Config:
    """The options that ``MEMPLAN_`` and their name set: dump, poison, cache_dir, plan_cache, trace_cache, disable,
    wrapper, early_launch."""
    env = os.environ
    values: dict[str, object] = {}
    if env.get("MEMPLAN_DUMP"):
        values["dump"] = env["MEMPLAN_DUMP"]
    if env.get("MEMPLAN_POISON"):
        values["poison"] = env["MEMPLAN_POISON"] != "0"
    if env.get("MEMPLAN_PLAN_CACHE"):
        values["plan_cache"] = env["MEMPLAN_PLAN_CACHE"] != "0"
    if env.get("MEMPLAN_TRACE_CACHE"):
        values["trace_cache"] = env["MEMPLAN_TRACE_CACHE"] != "0"
    if env.get("MEMPLAN_CACHE_DIR"):
        values["cache_dir"] = env["MEMPLAN_CACHE_DIR"]
    if env.get("MEMPLAN_DISABLE"):
        names = tuple(n for n in env["MEMPLAN_DISABLE"].replace(" ", ",").split(",") if n)
        values["disable"] = _checked("disable", names, config.known_passes)
    for name in ("wrapper", "early_launch"):
        if given := env.get(f"MEMPLAN_{name.upper()}"):
            values[name] = _checked(name, given, config.known_passes)
    return replace(config, **values)  # type: ignore[arg-type]


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str | int) -> int:
    """Bytes from ``"12GiB"``, ``"1.5 GB"``, ``4096``.

    Raises
    ------
    OptionError
        If it is not a positive number of bytes.
    """
    if isinstance(text, (bool, float)):
        raise OptionError(f"{text!r} is not a number of bytes; write for example '12GiB' or 12000000000")
    if isinstance(text, int):
        value = float(text)
    else:
        compact = str(text).replace(" ", "").replace("_", "")
        digits = compact.rstrip("BKMGTibkmgtI")
        unit = compact[len(digits) :].upper()
        try:
            value = float(digits) * _UNITS[unit]
        except (ValueError, KeyError):
            raise OptionError(f"{text!r} is not a number of bytes; write for example '12GiB' or 12000000000") from None
    if not 0 < value < 2**62:
        raise OptionError(f"{text!r} is not a positive number of bytes below 2**62")
    return int(value)


def _checked(name: str, value: object, known_passes: tuple[str, ...]) -> object:
    match name:
        case "wrapper":
            return _choice(name, value, WRAPPERS)
        case "random":
            return _choice(name, value, RANDOM)
        case "target":
            return None if value is None else _choice(name, str(value).upper(), TARGETS)
        case "early_launch":
            return _choice(name, value, tuple(EARLY_LAUNCHES))
        case "pools":
            return _choice(name, value, ("auto", "always", "never"))
        case "communication":
            return CommunicationOptions.checked(value)
        case "disable":
            names = (value,) if isinstance(value, str) else value
            if not isinstance(names, (tuple, list)):
                raise OptionError(f"option 'disable' takes a list of pass names, not {value!r}")
            for n in names:
                if known_passes and n not in known_passes:
                    raise OptionError(
                        f"unknown pass {n!r} in 'disable'{_nearest(str(n), known_passes)}; "
                        f"passes are {', '.join(known_passes)}"
                    )
            return tuple(names)
        case (
            "verify" | "poison" | "plan_cache" | "trace_cache" | "cuda_graphs" | "max_autotune" | "check_indices"
            | "offload"
        ):  # fmt: skip
            if not isinstance(value, bool):
                raise OptionError(f"option {name!r} takes True or False, not {value!r}")
            return value
        case "recompute_time" | "recompute_products":
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 10:
                raise OptionError(f"option {name!r} takes a number from 0 to 10, not {value!r}")
            return float(value)
        case "loss_chunk":
            if value in (0, None):
                return 0
            return parse_bytes(value)  # type: ignore[arg-type]
        case "budget":
            return None if value is None else parse_bytes(value)  # type: ignore[arg-type]
        case "max_fused_buffers":
            if isinstance(value, bool) or not isinstance(value, int) or value < 2:
                raise OptionError(f"option 'max_fused_buffers' takes an integer of at least 2, not {value!r}")
            return value
        case _:
            if value is not None and not isinstance(value, (str, os.PathLike)):
                raise OptionError(f"option {name!r} takes text or None, not {value!r}")
            return None if value is None else str(value)


def _choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise OptionError(
            f"option {name!r} is one of {', '.join(choices)}, not {value!r}{_nearest(str(value), choices)}"
        )
    return str(value)


def _nearest(name: str, valid: Mapping[str, object] | tuple[str, ...] | list[str]) -> str:
    found = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
