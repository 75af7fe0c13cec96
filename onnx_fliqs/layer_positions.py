"""Where layers lie on the way of the data: first, last, or between others."""

import enum
from collections.abc import Collection, Mapping
from typing import Final

import onnx_ir as ir

__all__ = ["Position", "layer_positions"]

_SHAPE_ONLY: Final = frozenset({"Shape", "Size"})
"""Operators that no data flows through."""


class Position(enum.Enum):
    """An end of the way of the data."""

    FIRST = "first"
    """No layer comes before it: it reads what the inputs become without one."""
    LAST = "last"
    """No layer comes after it."""


def layer_positions(
    graph: ir.Graph, names: Collection[str]
) -> Mapping[str, frozenset[Position]]:
    """The positions of some layers; there may be several first ones, and several last ones.

    Args:
        graph: Of a canonical model.
        names: Nodes of the graph, or of the bodies in it.
    """
    before: dict[str, frozenset[str]] = {}
    _walk(graph, set(names), {}, frozenset(), before)
    followed = frozenset[str]().union(*before.values())
    return {
        name: frozenset(
            position
            for position, holds in (
                (Position.FIRST, not before[name]),
                (Position.LAST, name not in followed),
            )
            if holds
        )
        for name in names
    }


def _walk(
    graph: ir.Graph,
    layers: Collection[str],
    behind: dict[ir.Value, frozenset[str]],
    outer: frozenset[str],
    before: dict[str, frozenset[str]],
) -> None:
    """Note the nearest layers in front of each layer.

    Args:
        graph: The main graph, or a body.
        layers: Names.
        behind: Value → the layers that it comes from, with no other layer between; extended.
        outer: The same for whatever a body is given.
        before: Layer → the layers that it reads from; extended.
    """
    for value in graph.inputs:
        behind[value] = outer
    for node in graph:
        found = outer.union(*(behind.get(v, outer) for v in node.inputs if v is not None))
        if node.name in layers:
            before[str(node.name)] = found
            found = frozenset({str(node.name)})
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH:
                bodies = [attribute.as_graph()]
            elif attribute.type is ir.AttributeType.GRAPHS:
                bodies = list(attribute.as_graphs())
            else:
                continue
            given = found
            for body in bodies:
                _walk(body, layers, behind, given, before)
                found = found.union(*(behind.get(v, given) for v in body.outputs))
        if node.op_type in _SHAPE_ONLY:
            found = outer
        behind.update(dict.fromkeys(node.outputs, found))
