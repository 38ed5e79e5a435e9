"""The section ``communication`` of the options."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from .errors import OptionError

ALGORITHMS = ("auto", "library", "one_shot", "two_shot")


@dataclass(frozen=True, slots=True)
class CommunicationOptions:
    """``options={"communication": {...}}`` of ``torch.compile(model, backend="memplan")``.

    Attributes
    ----------
    all_reduce:
        ``"auto"``: by bytes, ranks and hardware; ``"library"``, ``"one_shot"`` or ``"two_shot"`` for all that can run
        so. One-shot: every rank reads the values of all; two-shot: each rank adds up its part and writes it to all.
    one_shot_bytes, two_shot_bytes:
        Largest message of either for ``"auto"``; None: calibrated on this machine, or else the defaults.
    agree:
        Compare the plans of all ranks before the first call of each program that communicates.
    overlap_bytes:
        How far starting collectives earlier and waiting for them later may raise the peak of live bytes.
    timeout:
        Seconds to wait for the other ranks' plans; None: the process group's own timeout.
    multicast:
        Whether operations that need NVLink multicast may be used. Not built: refused.
    """

    all_reduce: str = "auto"
    one_shot_bytes: int | None = None
    two_shot_bytes: int | None = None
    agree: bool = True
    overlap_bytes: int = 0
    timeout: float | None = None
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


def _check(name: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    match name:
        case "all_reduce":
            if value not in ALGORITHMS:
                raise OptionError(
                    f"option 'all_reduce' in 'communication' is one of {', '.join(ALGORITHMS)}, not {value!r}"
                )
        case "one_shot_bytes" | "two_shot_bytes" | "overlap_bytes":
            none = value is None and name != "overlap_bytes"
            if not none and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise OptionError(f"option {name!r} in 'communication' takes a number of bytes, not {value!r}")
        case "timeout":
            if value is not None and (not number or value <= 0):  # type: ignore[operator]
                raise OptionError(f"option 'timeout' in 'communication' takes seconds or None, not {value!r}")
        case "multicast":
            if value is not False:
                raise OptionError(
                    "option 'multicast' in 'communication' is not there yet: operations that need NVLink multicast are "
                    "not used"
                )
        case _:
            if not isinstance(value, bool):
                raise OptionError(f"option {name!r} in 'communication' takes True or False, not {value!r}")
