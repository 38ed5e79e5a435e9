"""The section ``communication`` of the options."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from .communication import Thresholds
from .errors import OptionError

#: by kind of collective: the ways in which it can run
WAYS: Mapping[str, tuple[str, ...]] = {
    "all_reduce": ("auto", "library", "one_shot", "two_shot"),
    "reduce_scatter": ("auto", "library", "symmetric"),
    "all_gather": ("auto", "library", "symmetric"),
    "broadcast": ("auto", "library", "symmetric"),
    "all_to_all": ("library", "symmetric"),
}
#: when the library's collectives work in registered memory
REGISTERED = ("off", "auto", "on")


@dataclass(frozen=True, slots=True)
class CommunicationOptions:
    """``options={"communication": {...}}`` of ``torch.compile(model, backend="memplan")``.

    Attributes
    ----------
    all_reduce:
        ``"auto"``: by bytes, ranks and hardware; ``"library"``, ``"one_shot"`` or ``"two_shot"`` for all that can run
        so. One-shot: every rank reads the values of all; two-shot: each rank adds up its part and writes it to all.
    reduce_scatter, all_gather, broadcast:
        ``"auto"``, ``"library"``, or ``"symmetric"`` for all that can be on symmetric memory. There it runs on the
        stream of the computation, not beside it.
    all_to_all:
        ``"library"``, or ``"symmetric"``: only where all ranks give and take as much as each other, which one rank
        cannot see; ranks that do not are refused by the comparison of plans.
    one_shot_bytes, two_shot_bytes:
        Largest message of either for ``"auto"``; None: calibrated on this machine, or else the defaults.
    symmetric_bytes:
        The same for the other kinds, in bytes of the whole message: what all ranks give together, or take.
    agree:
        Compare the plans of all ranks before the first call of each program that communicates.
    overlap_bytes:
        How far starting collectives earlier and waiting for them later may raise the peak of live bytes.
    timeout:
        Seconds to wait for the other ranks' plans; None: the process group's own timeout.
    registered:
        ``"on"``: what is left to the library works in memory that is registered with it, where buffers can lie there;
        ``"auto"``: where that is known to be faster, as timed by `memplan.calibrate_communication`.
    multicast:
        Operations on symmetric memory use NVLink multicast where the group has it; elsewhere they run without, and the
        program's notes say why.
    """

    all_reduce: str = "auto"
    reduce_scatter: str = "auto"
    all_gather: str = "auto"
    broadcast: str = "auto"
    all_to_all: str = "library"
    one_shot_bytes: int | None = None
    two_shot_bytes: int | None = None
    symmetric_bytes: int | None = None
    agree: bool = True
    overlap_bytes: int = 0
    timeout: float | None = None
    registered: str = "off"
    multicast: bool = False

    @classmethod
    def checked(cls, value: object) -> CommunicationOptions:
        """The section a user gave.

        Raises
        ------
        OptionError
            For an unknown name (naming the nearest valid one) or a value of the wrong kind.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise OptionError(f"option 'communication' takes a dictionary of options, not {value!r}")
        names = [f.name for f in fields(cls)]
        for name, given in value.items():
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise OptionError(f"unknown option {name!r} in 'communication'{hint}; options are {', '.join(names)}")
            _check(name, given)
        return replace(cls(), **value)

    def way(self, kind: str) -> str:
        """What the options say of a kind of collective; "library" of kinds that have nothing else."""
        return str(getattr(self, kind)) if kind in WAYS else "library"

    @property
    def asks_symmetric(self) -> bool:
        """Whether anything may be on symmetric memory."""
        return any(self.way(kind) != "library" for kind in WAYS)

    @property
    def asks_registered(self) -> bool:
        """Whether anything may be in memory that is registered with the library."""
        return self.registered != "off"

    def algorithm(self, kind: str, thresholds: Thresholds, nbytes: int) -> str:
        """How a collective of a message of ``nbytes`` bytes runs: one of `WAYS` other than "auto"."""
        way = self.way(kind)
        if way != "auto":
            return way
        if kind != "all_reduce":
            most = self.symmetric_bytes
            symmetric = thresholds.on_symmetric(kind, nbytes) if most is None else nbytes <= most
            return "symmetric" if symmetric else "library"
        one = thresholds.one_shot_bytes if self.one_shot_bytes is None else self.one_shot_bytes
        two = thresholds.two_shot_bytes if self.two_shot_bytes is None else self.two_shot_bytes
        return "one_shot" if nbytes <= one else "two_shot" if nbytes <= two else "library"


def _check(name: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    match name:
        case kind if kind in WAYS:
            if value not in WAYS[kind]:
                raise OptionError(
                    f"option {kind!r} in 'communication' is one of {', '.join(WAYS[kind])}, not {value!r}"
                )
        case "one_shot_bytes" | "two_shot_bytes" | "symmetric_bytes" | "overlap_bytes":
            none = value is None and name != "overlap_bytes"
            if not none and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise OptionError(f"option {name!r} in 'communication' takes a number of bytes, not {value!r}")
        case "timeout":
            if value is not None and (not number or value <= 0):  # type: ignore[operator]
                raise OptionError(f"option 'timeout' in 'communication' takes seconds or None, not {value!r}")
        case "registered":
            if value not in REGISTERED:
                raise OptionError(
                    f"option 'registered' in 'communication' is one of {', '.join(REGISTERED)}, not {value!r}"
                )
        case _:
            if not isinstance(value, bool):
                raise OptionError(f"option {name!r} in 'communication' takes True or False, not {value!r}")
