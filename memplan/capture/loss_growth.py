"""A region of logits, grown reader by reader."""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.fx

from .loss_operators import CONSTANTS, NEUTRAL, SAME_VALUES, SOFTMAX_GRADIENTS, TOTALS, constant, is_pointwise
from .loss_region import NLL, NLL_BACK, SCATTERS, WINDOWS, Region, Role, Rows, WholeLogits

Node = torch.fx.Node
aten = torch.ops.aten


@dataclass
class Growth:
    """``adopted``: matrices of the region that do not come of the logits; ``sources``: gradients that products take."""

    region: Region
    heap: list[Node] = field(default_factory=list)
    seen: set[Node] = field(default_factory=set)
    turned: set[Node] = field(default_factory=set)
    adopted: set[Node] = field(default_factory=set)
    sources: list[Node] = field(default_factory=list)

    # -- growing ----

    def grow(self) -> None:
        rows = self.region.rows
        rows[self.region.linear] = Rows(True)
        self.push(self.region.linear)
        while self.heap:
            node = heapq.heappop(self.heap)
            if node in self.region.rows:
                continue
            placed = self.place(node)
            if placed is not None:
                rows[node] = placed
                self.push(node)

    def push(self, node: Node) -> None:
        for user in node.users:
            if user.op == "output" and (node in self.turned or self.region.rows[node].wide):
                raise WholeLogits("they, or as much as they are, leave the compiled function")
            if user not in self.seen:
                self.seen.add(user)
                heapq.heappush(self.heap, user)

    def place(self, node: Node) -> Rows | None:
        """What the node is to the region; None if it is none of it, and may read what it reads from outside."""
        rows, target = self.region.rows, node.target
        if node.op == "output":
            return None
        inner = [a for a in node.all_input_nodes if a in rows]
        if any(a in self.turned for a in node.all_input_nodes):
            self.product(node)
            return None
        found = self.by_operator(node, inner)
        if found is None and any(rows[a].wide for a in inner) and not self.is_end(node, inner):
            raise WholeLogits(f"{target} reads them")
        return found

    def by_operator(self, node: Node, inner: list[Node]) -> Rows | None:
        target = node.target
        if target is operator.getitem:
            return self.item(node)
        if target in SAME_VALUES:
            return self.same(node)
        if target in WINDOWS:
            return self.windowed(node)
        if target in CONSTANTS:
            return self.by_shape(node) if constant(node) is not None else None
        if is_pointwise(node):
            return self.pointwise(node, inner)
        if target in NEUTRAL:
            return self.reduced(node)
        if target is aten.gather.default:
            return self.gathered(node)
        if target in SCATTERS:
            return self.scattered(node)
        if target in SOFTMAX_GRADIENTS:
            return self.softmax_gradient(node)
        if target is NLL:
            return self.likelihood(node, node.args[0], node.args[1], node.args[2])
        if target is NLL_BACK:
            return self.likelihood(node, node.args[1], node.args[2], node.args[3])
        return None

    def by_shape(self, node: Node, inside: bool | None = None) -> Rows | None:
        """A value as its shape says; views keep the order of elements, so the last dimension tells words apart."""
        shape = node.meta["val"].shape
        if not all(isinstance(n, int) for n in shape):
            return None
        for one in (False, True) if inside is None else (inside,):
            count = self.region.count(one)
            if shape[-1:] == (self.region.words,) and math.prod(shape[:-1]) == count:
                return Rows(True, one)
            if math.prod(shape) == count:
                return Rows(False, one)
        return None

    def item(self, node: Node) -> Rows | None:
        source, index = node.args
        if not isinstance(source, Node) or source.target is not NLL:
            return None
        if index == 1:
            if any(u.target is not NLL_BACK for u in node.users):
                raise WholeLogits("the weight of all targets is read")
            return None
        if source.args[3] == 0:
            return self.region.rows[source]
        self.region.totals.append(node)
        return None

    def same(self, node: Node) -> Rows | None:
        source = node.args[0]
        assert isinstance(source, Node)
        rows = self.region.rows
        if source in rows:
            placed = self.by_shape(node, rows[source].inside)
            if placed is None:
                return None
            if placed.wide and not rows[source].wide:
                return placed if self.aligned(source, node, placed) else None
            return placed
        placed = self.by_shape(node)
        return placed if placed is not None and self.operand(source, node, placed) else None

    def windowed(self, node: Node) -> Rows | None:
        """Positions of a sequence: the same ones wherever some are left out."""
        source, rows = node.args[0], self.region.rows
        if not isinstance(source, Node) or source not in rows:
            return None
        shape, given = node.meta["val"].shape, source.meta["val"].shape
        pads = node.args[1] if node.target is aten.constant_pad_nd.default else ()
        if tuple(shape) == tuple(given) and not any(pads):  # type: ignore[arg-type]  # (pads of 1 and -1 move tokens)
            return rows[source]
        forward = node.target is aten.slice.Tensor
        longer = given if forward else shape
        if len(longer) < 2 or math.prod(longer[:2]) != self.region.tokens:
            return None
        window = _window(node, int(longer[1]), len(longer))
        if window is None or self.region.window not in (None, window):
            return None
        self.region.window = window
        return Rows(rows[source].wide, forward)

    def pointwise(self, node: Node, inner: list[Node]) -> Rows | None:
        rows = self.region.rows
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return None
        if inner:
            inside = rows[inner[0]].inside
            if any(rows[a].inside != inside for a in inner):
                return None
            placed = self.by_shape(node, inside)
        else:
            placed = self.by_shape(node)
        if placed is None:
            return None
        for a in node.all_input_nodes:
            if not (self.aligned(a, node, placed) if a in rows else self.operand(a, node, placed)):
                return None
        return placed

    def aligned(self, a: Node, node: Node, placed: Rows) -> bool:
        """Whether an operand of the region is broadcast to a result along the words alone."""
        rows, shape = self.region.rows, tuple(node.meta["val"].shape)
        given = tuple(a.meta["val"].shape)
        if rows[a].wide == placed.wide:
            return given == shape
        return given == (*shape[:-1], 1)

    def operand(self, a: Node, node: Node, placed: Rows) -> bool:
        """Whether an operand from outside can be read in slices; matrices that are cheap to make are made in them."""
        shape = node.meta["val"].shape
        whole = placed.wide and tuple(a.meta["val"].shape) == tuple(shape)
        if whole and a.op == "call_function" and self.adopt(a):
            return True
        role = self.region.role(a, shape, placed)
        return role is not None and not (role is Role.MATRIX and a in self.region.backward)

    def adopt(self, node: Node) -> bool:
        """Take a matrix that does not come of the logits into the region, with what it is made of."""
        rows = self.region.rows
        cheap = node.target in SAME_VALUES or node.target in CONSTANTS or node.target in SCATTERS or is_pointwise(node)
        if not cheap or any(a in rows and a not in self.adopted for a in node.all_input_nodes):
            return False
        placed = self.by_operator(node, [a for a in node.all_input_nodes if a in rows])
        if placed is None:
            return False
        rows[node] = placed
        self.adopted.add(node)
        return True

    def last(self, node: Node, dims: object) -> bool:
        last = node.meta["val"].dim() - 1
        dims = [dims] if isinstance(dims, int) else dims
        return isinstance(dims, (list, tuple)) and len(dims) == 1 and dims[0] in (-1, last)

    def reduced(self, node: Node) -> Rows | None:
        """Over the words."""
        source, rows = node.args[0], self.region.rows
        if not isinstance(source, Node) or source not in rows or not rows[source].wide or len(node.args) < 2:
            return None
        return Rows(False, rows[source].inside) if self.last(source, node.args[1]) else None

    def index(self, index: object, shape: Sequence[int], of: Rows) -> bool:
        """Whether there is one word for each token."""
        rows = self.region.rows
        if not isinstance(index, Node) or tuple(index.meta["val"].shape) != (*shape[:-1], 1):
            return False
        return not rows[index].wide and rows[index].inside == of.inside if index in rows else True

    def gathered(self, node: Node) -> Rows | None:
        source, dim, index = node.args[:3]
        rows = self.region.rows
        if not isinstance(source, Node) or source not in rows or not rows[source].wide:
            return None
        placed = rows[source]
        if not self.last(source, dim) or not self.index(index, source.meta["val"].shape, placed):
            return None
        return Rows(False, placed.inside)

    def scattered(self, node: Node) -> Rows | None:
        zeros, dim, index, values = node.args[:4]
        placed = self.by_shape(node)
        if placed is None or not placed.wide or constant(zeros) != 0 or not self.last(node, dim):
            return None
        if not self.index(index, node.meta["val"].shape, placed):
            return None
        if isinstance(values, Node) and tuple(values.meta["val"].shape) != (*node.meta["val"].shape[:-1], 1):
            return None
        return placed

    def softmax_gradient(self, node: Node) -> Rows | None:
        gradient, output, dim, *_ = node.args
        rows = self.region.rows
        if not isinstance(output, Node) or output not in rows or not rows[output].wide or not self.last(output, dim):
            return None
        placed = rows[output]
        assert isinstance(gradient, Node)
        if gradient not in rows and not self.adopt(gradient):
            return None
        return placed if rows[gradient] == placed else None

    def likelihood(self, node: Node, probabilities: object, target: object, weight: object) -> Rows | None:
        """`nll_loss_forward` or the gradient of it."""
        rows = self.region.rows
        if not isinstance(probabilities, Node) or probabilities not in rows or not rows[probabilities].wide:
            return None
        if target in rows or weight in rows:
            return None
        return Rows(node.target is NLL_BACK, rows[probabilities].inside)

    # -- where it ends ----

    def is_end(self, node: Node, inner: list[Node]) -> bool:
        """Whether a reader of a matrix is a sum over all of it, or makes a gradient of the product's factors."""
        if node.target in TOTALS and not node.kwargs:
            self.region.totals.append(node)
            return True
        if node not in self.region.backward or any(self.region.rows[a].inside for a in inner):
            return False
        if node.target in (aten.permute.default, aten.t.default, aten.transpose.int):
            if tuple(node.meta["val"].shape) != (self.region.words, self.region.tokens):
                return False
            self.turned.add(node)
            self.push(node)
            return True
        if node.target is aten.sum.dim_IntList and node.args[1] in ([0], [-2], (0,), (-2,)) and not node.kwargs:
            if len(inner[0].meta["val"].shape) != 2:
                return False
            self.region.bias_gradients.append(node)
            self.sources.append(inner[0])
            return True
        if node.target is aten.mm.default:
            self.product(node)
            return True
        return False

    def product(self, node: Node) -> None:
        """A gradient of hidden or weight."""
        region = self.region
        shape = tuple(node.meta["val"].shape)
        features = region.weight_t.meta["val"].shape[0]
        if node.target is not aten.mm.default:
            raise WholeLogits(f"{node.target} reads them")
        left, right = node.args
        assert isinstance(left, Node)
        assert isinstance(right, Node)
        if left in self.turned and _same_matrix(right, region.hidden):
            region.weight_gradients.append((node, False))
            self.sources.append(left.args[0])  # type: ignore[arg-type]
        elif left in region.rows and shape == (region.tokens, features) and _same_matrix(right, region.weight_t, True):
            region.hidden_gradients.append(node)
            self.sources.append(left)
        elif right in region.rows and shape == (features, region.words) and _same_matrix(left, region.hidden, True):
            region.weight_gradients.append((node, True))
            self.sources.append(right)
        else:
            raise WholeLogits("their gradient goes into another product")


def _window(node: Node, length: int, rank: int) -> tuple[int, int, int] | None:
    """(length, start, stop) of a slice of dimension 1, or of what puts it back among zeros."""
    args = node.args
    if node.target is aten.constant_pad_nd.default:
        pads: list[int] = list(args[1])  # type: ignore[arg-type]
        value = args[2] if len(args) > 2 else 0
        pads += [0] * (2 * rank - len(pads))
        before, after = pads[2 * (rank - 2)], pads[2 * (rank - 2) + 1]
        others = pads[: 2 * (rank - 2)] + pads[2 * (rank - 1) :]
        if value != 0 or any(others) or before < 0 or after < 0:
            return None
        return length, before, length - after
    k = 1 if node.target is aten.slice.Tensor else 2
    defaults: tuple[object, ...] = (0, None, None, 1)
    given = (*args[k:], *defaults[len(args) - k :])
    if given[0] not in (1, 1 - rank) or given[3] != 1:
        return None
    start, stop, _ = slice(given[1], given[2]).indices(length)
    return length, start, stop


def _same_matrix(a: Node, b: Node, turned: bool = False) -> bool:
    """Whether a node is the same view of one tensor as another one, or its transpose."""
    one, other = a.meta["val"], b.meta["val"].t() if turned else b.meta["val"]
    if one.untyped_storage()._cdata != other.untyped_storage()._cdata:
        return False
    return (one.shape, one.stride(), one.storage_offset()) == (other.shape, other.stride(), other.storage_offset())
