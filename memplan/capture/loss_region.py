"""What lies between logits and the products that take their gradient, where the rows of different tokens stay apart.

Grown from the product that makes the logits (`loss_growth`): each operator that reads them must give, for each token,
values of that token alone (a matrix with a column for each word, or one number), or a sum over all of them. What a
number per token goes into is no longer of the region: such vectors are small, and the rest of the loss is made of them
as the user wrote it. The gradient comes back into the region from one number, the tangent of the loss, in which it must
be linear (`loss_match`): then it can be made in the forward, for a tangent of 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
import torch.fx

Node = torch.fx.Node
aten = torch.ops.aten

NLL = aten.nll_loss_forward.default
NLL_BACK = aten.nll_loss_backward.default
WINDOWS = (aten.slice.Tensor, aten.slice_backward.default, aten.constant_pad_nd.default)
SCATTERS = (aten.scatter_add.default, aten.scatter.src, aten.scatter.value)


class WholeLogits(Exception):
    """Why logits are not made in slices."""


class Role(Enum):
    """What an operand is to tokens (rows) and words (columns)."""

    SCALAR = "one number"
    ROW = "one for each word"
    COLUMN = "one for each token"
    MATRIX = "one for each token and word"


@dataclass(frozen=True)
class Rows:
    """A value of the region: a number for each token, ``wide`` if for each word; ``inside``: only in the window."""

    wide: bool
    inside: bool = False


@dataclass
class Region:
    """``linear`` makes logits (tokens, words) of ``hidden`` and ``weight_t``, its transpose.

    ``rows`` has what is made again slice by slice, in the graph's order; of that ``exits`` are vectors over the tokens
    that are read outside, and ``totals`` the sums over all of them. ``gradient`` is that of the logits, linear in the
    number ``tangent``. New nodes go ``before`` the first that reads a result.
    """

    linear: Node
    hidden: Node
    weight_t: Node
    bias: Node | None
    backward: frozenset[Node]
    rows: dict[Node, Rows] = field(default_factory=dict)
    window: tuple[int, int, int] | None = None  # (length, start, stop): the positions of a sequence that are read
    exits: list[Node] = field(default_factory=list)
    totals: list[Node] = field(default_factory=list)
    hidden_gradients: list[Node] = field(default_factory=list)
    weight_gradients: list[tuple[Node, bool]] = field(default_factory=list)  # (node, is it (features, words))
    bias_gradients: list[Node] = field(default_factory=list)
    gradient: Node = field(init=False)
    tangent: Node = field(init=False)
    before: Node = field(init=False)

    @property
    def tokens(self) -> int:
        return int(self.linear.meta["val"].shape[0])

    @property
    def words(self) -> int:
        return int(self.linear.meta["val"].shape[1])

    def count(self, inside: bool) -> int:
        """Tokens, or those inside of the window."""
        if not inside or self.window is None:
            return self.tokens
        length, start, stop = self.window
        return self.tokens // length * (stop - start)

    def role(self, operand: Node, shape: Sequence[int], of: Rows) -> Role | None:
        """What an operand from outside is to a result of this shape, as it is broadcast to it."""
        given = operand.meta["val"].shape
        if math.prod(given) == 1:
            return Role.SCALAR
        if not of.wide:
            return Role.COLUMN
        if given[-1] not in (1, self.words):
            return None
        lead = tuple(given[:-1])
        wide = given[-1] == self.words
        if all(n == 1 for n in lead):
            return Role.ROW if wide else Role.SCALAR
        if lead != tuple(shape[:-1]) or (wide and of.inside):
            return None
        return Role.MATRIX if wide else Role.COLUMN
