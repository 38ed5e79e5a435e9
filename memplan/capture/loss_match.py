"""Whether the gradient of a region of logits can be made in the forward, and what comes of the region."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
import torch.fx

from .loss_growth import Growth
from .loss_operators import CONSTANTS, SAME_VALUES, constant, is_linear, is_repeatable
from .loss_region import NLL, NLL_BACK, Region, WholeLogits

Node = torch.fx.Node
aten = torch.ops.aten


def find_region(linear: Node, backward: frozenset[Node]) -> Region:
    """The region that reads the result of an `mm` or `addmm`; ``backward`` are the nodes that depend on a tangent.

    Raises
    ------
    WholeLogits
        If something that reads the logits, or makes their gradient, needs them whole.
    """
    bias: object = None
    if linear.target is aten.mm.default:
        hidden, weight_t = linear.args
    elif not linear.kwargs:
        bias, hidden, weight_t = linear.args
        if tuple(bias.meta["val"].shape) != (linear.meta["val"].shape[1],):  # type: ignore[union-attr]
            raise WholeLogits("what is added to them is no bias")
    else:
        raise WholeLogits("their product or what is added to it is scaled")
    region = Region(linear, hidden, weight_t, bias, backward)  # type: ignore[arg-type]
    if region.words == 1:  # what is one for each token could not be told from what is one for each word
        raise WholeLogits("they are one number for each token")
    growth = Growth(region)
    growth.grow()
    _Match(region, frozenset(growth.sources)).finish()
    return region


@dataclass
class _Match:
    region: Region
    sources: frozenset[Node]
    apart: set[Node] = field(default_factory=set)  # known not to come of the logits

    def finish(self) -> None:
        region = self.region
        if not region.hidden_gradients and not region.weight_gradients:
            raise WholeLogits("they have no gradient")
        roots = {self.root(n) for n in self.sources}
        if len(roots) != 1:
            raise WholeLogits("they have several gradients")
        region.gradient = roots.pop()
        needed = self.needed()
        kept = {n: region.rows[n] for n in sorted(needed)}
        outside = []
        for node in kept:
            if kept[node].wide or (node.target is NLL and node.args[3] != 0):
                continue
            readers = [u for u in node.users if u not in needed and u.target is not operator.getitem]
            if readers:
                region.exits.append(node)
                outside += readers
        outside += [u for n in region.totals for u in n.users]
        region.before = min([*outside, *region.totals], default=region.linear)
        if region.before is region.linear:
            raise WholeLogits("nothing but their gradient comes of them")
        if any(n in region.backward for n in (*region.exits, *region.totals)):
            raise WholeLogits("another gradient is made of theirs")
        region.rows = kept
        region.tangent = self.tangent()
        self.check_operands()

    def root(self, node: Node) -> Node:
        rows = self.region.rows
        while node.target in SAME_VALUES and node.args[0] in rows and rows[node.args[0]] == rows[node]:  # type: ignore[index]
            node = node.args[0]  # type: ignore[assignment]
        return node

    def needed(self) -> set[Node]:
        """What must be made for each slice: the gradient, and all sums over the words that are read."""
        rows, region = self.region.rows, self.region
        stack = [region.gradient]
        stack += [n.args[0] for n in region.totals]  # type: ignore[misc]
        for node in rows:
            if rows[node].wide or not node.users:
                continue
            if node.target is operator.getitem or any(a in rows and rows[a].wide for a in node.all_input_nodes):
                stack.append(node)
        found: set[Node] = set()
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack.extend(a for a in node.all_input_nodes if a in rows)
        return found

    def comes_of_logits(self, node: Node) -> bool:
        linear = self.region.linear
        stack, seen = [node], set()
        while stack:
            one = stack.pop()
            if one is linear:
                return True
            if linear < one and one not in seen and one not in self.apart:
                seen.add(one)
                stack.extend(one.all_input_nodes)
        self.apart |= seen
        return False

    def tangent(self) -> Node:
        """The number nearest to the loss in which the gradient is linear, with factors that the forward knows."""
        region = self.region
        frontier, best = {region.gradient}, None
        while frontier:
            node = max(frontier)
            if len(frontier) == 1 and node not in region.rows and node.meta["val"].dim() == 0:
                best = node
            varying = [a for a in node.all_input_nodes if a in region.backward]
            known = [a for a in node.all_input_nodes if a not in region.backward]
            if node not in region.rows:
                known = [a for a in known if not self.comes_of_logits(a)] if is_repeatable(node) else []
            if not is_linear(node, varying) or len(varying) + len(known) < len(node.all_input_nodes):
                break
            frontier.remove(node)
            frontier.update(varying)
        if best is None:
            raise WholeLogits("their gradient is not one number times what the forward knows")
        return best

    def check_operands(self) -> None:
        """What is read from outside must be there before the first result, or be made there once more."""
        region = self.region
        stack = [a for n in region.rows for a in _read(n) if a not in region.rows]
        seen: set[Node] = set()
        while stack:
            node = stack.pop()
            if node in seen or node is region.tangent:
                continue
            seen.add(node)
            if node not in region.backward and self.comes_of_logits(node):
                raise WholeLogits(f"what all tokens give ({node.name}) goes into the gradient of each")
            if constant(node) is not None:
                continue
            if node.op == "call_function" and (node in region.backward or not node < region.before):
                if not is_repeatable(node):
                    raise WholeLogits(f"{node.name} cannot be made before them")
                stack.extend(node.all_input_nodes)


def _read(node: Node) -> list[Node]:
    """The operands whose values are needed."""
    if node.target in CONSTANTS:
        return []
    if node.target is NLL_BACK:  # the weight of all targets is had from the targets
        return [a for a in (node.args[0], node.args[2], node.args[3]) if isinstance(a, Node)]
    return node.all_input_nodes
