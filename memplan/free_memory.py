"""How many bytes were still free when an allocation failed."""

from __future__ import annotations

import re
import resource
from pathlib import Path

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = r"(\d+(?:\.\d+)?) (bytes|KiB|MiB|GiB|TiB)"
_FREE = re.compile(rf"of which {_SIZE} is free")
_ALLOWED = re.compile(rf"{_SIZE} allowed;")
_ALLOCATED = re.compile(rf"Of the allocated memory {_SIZE} is allocated by PyTorch")
_UNUSED = re.compile(rf"and {_SIZE} is reserved by PyTorch but unallocated")


def bytes_in(pattern: re.Pattern[str], text: str) -> int | None:
    """The bytes that a pattern with a number and a unit finds in a text; None without such."""
    found = pattern.search(text)
    return None if found is None else int(float(found[1]) * _UNITS[found[2]])


def free_on_gpu(message: str) -> int | None:
    """What the caching allocator's message says of its device: free, within the process's own limit if it has one.

    Bytes that the allocator holds in pieces that were of no use are not counted. None where the message says nothing.
    """
    free, allowed = bytes_in(_FREE, message), bytes_in(_ALLOWED, message)
    if free is None or allowed is None:
        return free
    held = (bytes_in(_ALLOCATED, message) or 0) + (bytes_in(_UNUSED, message) or 0)
    return max(0, min(free, allowed - held))


def free_on_host() -> int | None:
    """The least that any limit of this process leaves it: its address space, its data, its group, the machine."""
    page = resource.getpagesize()
    pages = [int(n) for n in Path("/proc/self/statm").read_text().split()]
    left = []
    for limit, used in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            left.append(soft - used * page)
    found = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
    if found is not None:
        left.append(int(found[1]) * 1024)
    left += _left_in_group(Path("/sys/fs/cgroup"))
    return max(0, min(left)) if left else None


def _left_in_group(root: Path) -> list[int]:
    """What the process's control group leaves (version 2); nothing without a limit."""
    try:
        groups = Path("/proc/self/cgroup").read_text()
        found = re.search(r"^0::/?(.*)$", groups, re.MULTILINE)
        folder = root / found[1] if found is not None else root
        most, used = (folder / "memory.max").read_text().strip(), int((folder / "memory.current").read_text())
    except OSError:  # no such group, or one that is not ours to read: it sets no limit that can be known
        return []
    return [] if most == "max" else [int(most) - used]
