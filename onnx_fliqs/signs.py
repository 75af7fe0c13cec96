"""Which values of a graph are never negative, so that they need no sign."""

from collections.abc import Collection
from dataclasses import replace
from typing import Final

import onnx_ir as ir

from onnx_fliqs.sites import SearchSpace, Site

__all__ = ["REARRANGING", "mark_unsigned", "never_negative", "padding", "positive_sites"]

REARRANGING: Final = frozenset(
    {"Flatten", "Gather", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
    | {"DepthToSpace", "SpaceToDepth", "Expand", "Tile", "Split"}
)
"""Operators whose first output (all outputs of Split) holds only values of input 0."""
_NONNEGATIVE: Final = frozenset({"Relu", "Sigmoid", "Softmax", "Abs", "HardSigmoid", "Exp"})
_SIGN_KEEPING: Final = REARRANGING | {
    *("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax", "Sqrt")
}
_ALL_INPUTS_SIGN_KEEPING: Final = frozenset({"Add", "Concat", "Max", "Mul", "Sum"})


def mark_unsigned(
    model: ir.Model, space: SearchSpace, inputs: Collection[str] = ()
) -> SearchSpace:
    """Decide which activation sites take unsigned formats.

    Args:
        model: The canonical model.
        space: Its sites.
        inputs: Names of graph inputs that are never negative.

    Returns:
        The space, in which exactly those activations are unsigned that cannot be negative, and
        of those that share a scale, all or none.
    """
    names = {value.name for value in never_negative(model, inputs)}

    def root(site: Site) -> str:
        return site.same_scale_as or site.name

    activations = [site for site in space.sites if not site.is_weight]
    signed = {root(site) for site in activations if site.tensor not in names}
    unsigned = {root(site) for site in activations} - signed
    sites = (
        site
        if site.is_weight
        else replace(site, negative=0.0 if root(site) in unsigned else None)
        for site in space.sites
    )
    return replace(space, sites=tuple(sites))


def positive_sites(model: ir.Model, space: SearchSpace) -> frozenset[str]:
    """Names of the sites with one scale that nothing negative reaches, whatever the data are.

    ``Site.negative`` may be 0 as well because no value of a sample was negative.

    Args:
        model: The canonical model.
        space: Its sites.
    """
    names = {value.name for value in never_negative(model)}
    return frozenset(
        site.name
        for site in space.sites
        if site.tensor in names and site.broadcast_shape == ()
    )


def never_negative(model: ir.Model, inputs: Collection[str] = ()) -> set[ir.Value]:
    """The computed values and inputs that the graph guarantees to have no negative element.

    Args:
        model: The canonical model.
        inputs: Names of graph inputs that are never negative.
    """
    known = {value for value in model.graph.inputs if value.name in inputs}
    for node in model.graph:
        if not node.domain and _makes_no_negative(node, known):
            known.update(node.outputs)
    return known


def _makes_no_negative(node: ir.Node, known: set[ir.Value]) -> bool:
    def never(index: int) -> bool:
        value = node.inputs[index] if index < len(node.inputs) else None
        return value is not None and (value in known or _is_constant_without_sign(value))

    if node.op_type in _NONNEGATIVE:
        return True
    if node.op_type == "Clip":
        return never(1)
    if node.op_type == "Pad":
        fill = padding(node)
        return fill is not None and fill >= 0 and never(0)
    if node.op_type in _SIGN_KEEPING:
        return never(0)
    if node.op_type in _ALL_INPUTS_SIGN_KEEPING:
        is_square = node.op_type == "Mul" and node.inputs[0] is node.inputs[1]
        return is_square or all(never(index) for index in range(len(node.inputs)))
    return False


def _is_constant_without_sign(value: ir.Value) -> bool:
    tensor = value.const_value if value.is_initializer() else None
    return tensor is not None and tensor.size > 0 and bool((tensor.numpy() >= 0).all())


def padding(node: ir.Node) -> float | None:
    """The number with which a Pad fills, 0 where it repeats values; None if unknown."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None or node.attributes.get_string("mode", "constant") != "constant":
        return 0.0
    tensor = value.const_value if value.is_initializer() else None
    return None if tensor is None else float(tensor.numpy().reshape(-1)[0])
