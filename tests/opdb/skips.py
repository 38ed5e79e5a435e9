"""Operators of torch's own samples that are not compared, each with its reason: the one list of them."""

from __future__ import annotations

#: name (with variant) -> reason
SKIPS: dict[str, str] = {
    "empty": "its values are not defined",
    "empty_like": "its values are not defined",
    "empty_permuted": "its values are not defined",
    "empty_strided": "its values are not defined",
    "new_empty": "its values are not defined",
    "new_empty_strided": "its values are not defined",
    "resize_": "what it adds is not defined",
    "resize_as_": "what it adds is not defined",
}

#: Prefixes of names that are no operators of a CPU or a GPU build.
ABSENT = ("jiterator",)

#: Operators whose gradient is not compared: name -> reason.
FORWARD_ONLY: dict[str, str] = {}

#: Operators compared on contiguous samples only: name -> reason.
CONTIGUOUS_ONLY: dict[str, str] = {
    "normal.in_place": "eager's numbers depend on the strides of the tensor that is written; a graph writes a new one",
}
