"""Residuals that are had again from the results of all layers before them, and kept between sections of layers."""

from __future__ import annotations

from memplan.ir.device import DEFAULTS
from memplan.ir.joint import JointGraph, JointNode, NodeKind, Side
from memplan.passes.remat_timeline import backward_peak
from memplan.passes.rematerialize import _handed_on, _in_sections, _severed, choose_within

CALL, FUSED, INPUT, VIEW = NodeKind.CALL, NodeKind.FUSED, NodeKind.INPUT, NodeKind.VIEW
NARROW, WIDE = 1 << 20, 1 << 21


def layers(count: int, *, wide: int = WIDE) -> JointGraph:
    """A residual of ``wide`` bytes to which each layer adds a product of `NARROW` bytes.

    The product's weight is cast first, and the backward reads the cast transposed and the residual before the layer.
    """
    nodes: list[JointNode] = []

    def node(name: str, kind: NodeKind, side: Side, inputs: tuple[int, ...], nbytes: int, again: float | None) -> int:
        k = len(nodes)
        keep = None if kind is VIEW else float(nbytes)
        storage = inputs[0] if kind is VIEW else k
        elementwise = kind is FUSED
        nodes.append(
            JointNode(
                name, kind, side, inputs, storage, nbytes, keep, again, kind is not CALL, 1.0, nbytes, False, name,
                elementwise,
            )
        )  # fmt: skip
        return k

    residuals = [node("x", INPUT, Side.FORWARD, (), 0, 0.0)]
    casts = []
    for n in range(count):
        weight = node(f"weight{n}", INPUT, Side.FORWARD, (), 0, 0.0)
        casts.append(node(f"cast{n}", FUSED, Side.FORWARD, (weight,), NARROW // 8, 0.001))
        product = node(f"product{n}", CALL, Side.FORWARD, (residuals[-1], casts[-1]), NARROW, None)
        residuals.append(node(f"residual{n}", FUSED, Side.FORWARD, (residuals[-1], product), wide, 0.001))
    turned = [node(f"turned{n}", VIEW, Side.EITHER, (cast,), 0, 0.0) for n, cast in enumerate(casts)]
    gradient = node("gradient", INPUT, Side.BACKWARD, (), 0, None)
    for n in reversed(range(count)):
        gradient = node(f"back{n}", CALL, Side.BACKWARD, (gradient, turned[n], residuals[n + 1]), NARROW, None)
    return JointGraph(tuple(nodes))


def names(graph: JointGraph, kept: tuple[int, ...], prefix: str) -> list[str]:
    return [graph.nodes[k].name for k in kept if graph.nodes[k].name.startswith(prefix)]


def products(graph: JointGraph) -> tuple[int, ...]:
    return tuple(k for k, n in enumerate(graph.nodes) if n.kind is INPUT or n.name.startswith("product"))


def test_wide_residuals_are_kept_between_sections() -> None:
    graph = layers(16)
    kept = products(graph)
    chosen = _in_sections(graph, kept)
    between = names(graph, chosen, "residual")
    assert 1 <= len(between) <= 6
    assert backward_peak(graph, chosen) < backward_peak(graph, kept)
    assert not names(graph, chosen, "cast"), "what the backward alone reads of every layer is not handed on"
    assert not set(graph.recomputed(chosen)) - set(graph.recomputed(kept))


def test_what_a_kept_residual_is_the_sum_of_is_dropped() -> None:
    graph = layers(16)
    chosen = _in_sections(graph, products(graph))
    between = {name.removeprefix("residual") for name in names(graph, chosen, "residual")}
    assert between
    assert not between & {name.removeprefix("product") for name in names(graph, chosen, "product")}


def test_residuals_no_wider_than_their_terms_stay_as_they_are() -> None:
    graph = layers(16, wide=NARROW // 16)
    kept = products(graph)
    assert backward_peak(graph, _in_sections(graph, kept)) <= backward_peak(graph, kept)


def test_where_nothing_is_computed_again_nothing_changes() -> None:
    graph = layers(4)
    everything = graph.completed(
        [k for k, n in enumerate(graph.nodes) if n.side is Side.FORWARD and n.keep is not None]
    )
    assert _in_sections(graph, everything) == everything


def test_what_a_cut_hands_on_is_the_residual() -> None:
    graph = layers(8)
    kept = products(graph)
    cut = next(k for k, n in enumerate(graph.nodes) if n.name == "weight4")
    assert [graph.nodes[k].name for k in _handed_on(graph, graph.recomputed(kept), cut)] == ["residual3"]


def test_where_the_first_layers_keep_less_the_residual_after_them_is_kept() -> None:
    graph = layers(8)
    inputs = tuple(k for k, n in enumerate(graph.nodes) if n.kind is INPUT)
    found = _severed(graph, inputs, products(graph), 1e9)
    assert found
    for choice in found:
        assert set(graph.completed(choice)) == set(choice)
        assert names(graph, choice, "residual")


def test_by_default_the_peak_is_no_higher_than_with_all_products_kept() -> None:
    graph = layers(16)
    chosen = choose_within(graph, 0.5, DEFAULTS["H100"])
    assert backward_peak(graph, chosen) <= backward_peak(graph, products(graph))
