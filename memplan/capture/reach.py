"""Views that reach beyond the tensor they were made of: `as_strided` may see all of an input's storage."""

from __future__ import annotations

from dataclasses import replace

from ..ir.errors import UnsupportedError
from ..ir.program import EXTERNAL_KINDS, Buffer, Origin, View
from .sizes import extent


def reached(buffer: Buffer, view: View, origin: Origin) -> Buffer:
    """The buffer, with as many bytes as the view needs.

    Only what the caller made can have more bytes than its own elements span. Sizes that are not known are left alone.

    Raises
    ------
    UnsupportedError
        If the view starts before the input's first element, or reaches beyond the last one on a GPU, where an input at
        an odd address is replaced by a copy of its own elements.
    """
    length = extent(view.sizes, view.strides)
    if buffer.kind not in EXTERNAL_KINDS or not isinstance(view.offset, int) or not isinstance(length, int):
        return buffer
    end = (view.offset + length) * view.dtype.itemsize
    if not length or not isinstance(buffer.nbytes, int) or (view.offset >= 0 and end <= buffer.nbytes):
        return buffer
    if view.offset < 0 or buffer.device != "cpu":
        raise UnsupportedError(
            f"{origin.op} reads memory outside of the tensor {buffer.name!r} that the compiled function was given; "
            "pass the tensor that holds all of it, or call the function without compiling it",
            where=" ".join(filter(None, (origin.node, origin.location))),
        )
    return replace(buffer, nbytes=end)
