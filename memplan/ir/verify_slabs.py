"""What must hold of the slabs of a backward: see `memplan.ir.verify_plan`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .errors import VerificationError
from .plan import Lifetime, Plan, Slab
from .program import EXTERNAL_KINDS, Buffer
from .verify_kernel import evaluate_index

Fail = Callable[[str, Buffer | None], VerificationError]


def check_slabs(plan: Plan, storages: Mapping[str, Sequence[str]], fail: Fail) -> None:
    """Members are donated inputs of one device, in one slab each, that fit, and die with the backward.

    Parameters
    ----------
    storages:
        Under each storage's root, the buffers in it.
    fail:
        Makes the error from a message and the buffer that it is about.

    Raises
    ------
    VerificationError
        Naming the slab and the input.
    """
    seen: dict[str, str] = {}
    for slab in plan.slabs:
        for name in slab.members:
            b = plan.program.buffers.get(name)
            if b is None:
                raise fail(f"slab {slab.name!r} holds {name!r}, which does not exist", None)
            if name in seen:
                raise fail(f"{name!r} is in slab {seen[name]!r} and in slab {slab.name!r}", b)
            seen[name] = slab.name
            _check_member(plan, slab, b, storages.get(name, ()), fail)
        _check_places(plan, slab, fail)


def _check_places(plan: Plan, slab: Slab, fail: Fail) -> None:
    """Members lie side by side, within the slab."""
    if len(slab.offsets) != len(slab.members):
        raise fail(f"slab {slab.name!r} has {len(slab.offsets)} offsets for {len(slab.members)} inputs", None)
    end, before = 0, ""
    for offset, name in sorted(zip(slab.offsets, slab.members, strict=True)):
        if offset < end:
            raise fail(f"{before!r} and {name!r} overlap in slab {slab.name!r}", plan.program.buffers[name])
        end, before = offset + plan.program.nbytes(name), name
    size = evaluate_index(slab.nbytes, plan.program.hints)
    if end > size:
        raise fail(f"{before!r} ends at byte {end} of slab {slab.name!r}, which has {size}", None)


def _check_member(plan: Plan, slab: Slab, b: Buffer, storage: Sequence[str], fail: Fail) -> None:
    if b.kind not in EXTERNAL_KINDS or not b.donated:
        raise fail(f"slab {slab.name!r} holds {b.name!r}, which is no donated input", b)
    if b.device != slab.device:
        raise fail(f"{b.name!r} on {b.device} is in slab {slab.name!r} on {slab.device}", b)
    for name in (b.name, *storage):
        if name in plan.program.output_buffers:
            raise fail(
                f"{name!r} leaves the program in the storage of {b.name!r}, and would keep slab {slab.name!r} alive", b
            )


def held_slabs(plan: Plan, storages: Mapping[str, Sequence[str]]) -> dict[Slab, Lifetime]:
    """Each slab from step 0 until the last of its members' storages ends."""
    found = {}
    for slab in plan.slabs:
        stops = [plan.lifetimes[n].stop for m in slab.members for n in storages.get(m, ())]
        if stops:
            found[slab] = Lifetime(0, max(stops))
    return found
