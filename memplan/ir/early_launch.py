"""Whether a GPU kernel of ours is started before the kernel in front of it has ended (programmatic dependent launch).

A GPU of compute capability 9.0 or more starts a kernel that is launched so while the one before it on the stream runs;
the kernel itself waits (PTX ``griddepcontrol.wait``) until the one before it has ended and all that it wrote can be
seen. What is saved is the time from one kernel's end to the next one's start.

Why every result stays as it was:

- The wait is the first thing each thread of such a kernel does, outside of any branch, before it touches memory that
  another kernel may use; `memplan.runtime.early_launch` reads that off the compiled text, and only what passes is
  launched so. What it does before the wait is to read its own parameters.
- So every kernel of the stream ends after the one before it has ended: ours because it waits in every thread, one that
  is launched in the ordinary way because it does not even start sooner, and a library's that is launched early because
  it has to wait, too, before it writes (what it writes may be memory that the allocator had from the kernel before).
  By induction over the stream, all work before a kernel is over when its wait is, not only the kernel before it; and
  nothing that any of them writes, frees or takes again is touched sooner than without.
- What is no kernel (copies, fills, events, other streams' work that an event is waited for) has no part of a grid that
  could let the next one start; before and after it the driver keeps the full order. An event that is recorded after an
  early kernel waits for the kernel's end, as always, and so does the next ordinary kernel (ATen's, a user's).
- Counters that the last instance of a kernel sets back to zero, seeds and offsets of random numbers in memory, results
  written in place: all are loads and stores after the wait.
- Nobody waits for what cannot come: a kernel becomes resident when all instances of the one before it are (or have
  ended), so that those that wait never take the place of those that they wait for.

The same holds of a recorded CUDA graph, where the driver keeps "may start early" as the kind of an edge between two
kernels.

References
----------
CUDA C++ programming guide, "Programmatic dependent launch and synchronization"; PTX ISA, ``griddepcontrol``.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

#: compute capability (times ten) from which on kernels can be launched early
FIRST_ARCH = 90


class EarlyLaunch(Enum):
    """What an emitted kernel does about the kernels around it.

    ``NEVER``: nothing, and it is launched in the ordinary way. The others begin with the wait and are launched early.
    ``WAIT``: the next one may start when this one's instances have ended. ``START``, ``END``: it may as soon as each
    instance has begun, or has stored its results.
    """

    NEVER = "never"
    WAIT = "wait"
    START = "start"
    END = "end"


#: values of option ``early_launch``, and what each means where the GPU can do it
EARLY_LAUNCHES: Mapping[str, EarlyLaunch] = {"auto": EarlyLaunch.START, **{e.value: e for e in EarlyLaunch}}


def early_launch(option: str, arch: int) -> EarlyLaunch:
    """What kernels that are built for a GPU do; ``arch``: its compute capability times ten."""
    return EARLY_LAUNCHES[option] if arch >= FIRST_ARCH else EarlyLaunch.NEVER


def early_template(option: str, arch: int) -> EarlyLaunch:
    """`early_launch` of templates of matrix products.

    Their instances end at different times, the last of a tile adding up what all have summed. Those of a next one that
    starts at once crowd onto the multiprocessors that are free first, two where there should be one: products with
    long sums that took 5.4 us after one another took 6.6 (H200).
    """
    found = early_launch(option, arch)
    return EarlyLaunch.END if option == "auto" and found is EarlyLaunch.START else found
