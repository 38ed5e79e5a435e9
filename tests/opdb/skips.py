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

#: Operators with a gradient that is not defined by its value alone (signs of eigenvectors, ties): the forward is
#: compared, and of these through what does not depend on the choice.
FORWARD_ONLY: dict[str, str] = {}
