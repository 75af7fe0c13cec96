"""Adds the gradient of clipping thresholds to a gradient graph."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from onnx_fliqs.learned_thresholds import Threshold
from onnx_fliqs.passes._graph import constant_of
from onnx_fliqs.passes._ops import Operand, Ops
from onnx_fliqs.site_functions import (
    DOMAIN,
    INNER_PRODUCT,
    SITES,
    STRAIGHT_THROUGH,
    inner_product,
)

__all__ = ["AddThresholdGradientsPass"]

_SCALE: Final = 1
"""Which input of a site is its scale; the value comes before it."""
_WIDER: Final = 1.000001
"""By how much the range of ``StraightThrough`` is wider than that of the site; multiplied in
the same order, as a Clip often ends exactly where the range does."""


class AddThresholdGradientsPass(ir.passes.InPlacePass):
    """Append what the loss changes by when thresholds grow, to the gradient.

    Before:  dx = onnx_fliqs.StraightThrough (dy, x, scale, lo, hi)
             gradient = Concat (dw)
    After:   gradient = Concat (dw, Reshape (Sub (<dy, x_q>, <dx, x>), [-1]))

    With fixed codes, x_q = scale * Q (x / scale) changes with the logarithm of the scale by
    x_q - x inside the range and by x_q outside (LSQ, Esser et al. 2020, section 2.1, for any
    Q); dx is dy inside and 0 outside. So two inner products over tensors that are there anyway
    give the derivative for any format, minifloats too, and add nothing as large as x. Of a
    weight, it is a sum over each channel, of a product with what the weight alone makes.

    Requires: a gradient graph whose calls of sites and of their gradients are not inlined, and
        whose last output is a Concat.
    Ensures: the last output is longer by the numbers of each threshold; where no gradient
        reaches a site, they are 0. All else is unchanged.
    Idempotent: a graph with inner products is left alone.
    """

    def __init__(self, thresholds: Sequence[Threshold]) -> None:
        """Say what is learned."""
        super().__init__()
        self._thresholds = thresholds

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Find the sites and their gradients by the scale that they read."""
        function = inner_product()
        if not self._thresholds or function.identifier() in model.functions:
            return ir.passes.PassResult(model, modified=False)
        graph = model.graph
        concat = graph.outputs[-1].producer()
        assert concat is not None
        sites = _by_scale(graph, SITES)
        gradients = _by_scale(graph, STRAIGHT_THROUGH)
        ops = Ops(ir.DataType.FLOAT, "thresholds/")
        found = []
        for threshold in self._thresholds:
            terms = [
                _of_channels(ops, sites[scale], gradient, threshold.shape)
                if threshold.of_weight
                else _derivative(ops, sites[scale], gradient)
                for scale in (f"{name}.scale" for name in threshold.sites)
                for gradient in gradients.get(scale, ())
            ]
            found.append(_flat(ops, terms, threshold.count))
        operands = [*concat.inputs, *found]
        (result,) = ops.node("Concat", operands, {"axis": 0})
        old = graph.outputs[-1]
        result.type, result.shape = old.type, old.shape
        old.name, result.name = f"{old.name}.weights", old.name
        graph.insert_after(concat, ops.nodes)
        graph.outputs[-1] = result
        graph.remove(concat, safe=True)
        model.functions[function.identifier()] = function
        return ir.passes.PassResult(model, modified=True)


def _by_scale(graph: ir.Graph, functions: Sequence[str]) -> Mapping[str, list[ir.Node]]:
    """The calls of some functions, by the name of the scale that they read."""
    found: dict[str, list[ir.Node]] = {}
    for node in graph:
        if node.domain == DOMAIN and node.op_type in functions:
            position = _SCALE + (node.op_type in STRAIGHT_THROUGH)
            scale = node.inputs[position]
            assert scale is not None
            found.setdefault(str(scale.name), []).append(node)
    return found


def _flat(ops: Ops, terms: Sequence[ir.Value], count: int) -> Operand:
    """The sum of what the sites of a threshold contribute."""
    if not terms:
        return np.zeros(count, np.float32)
    return ops.Reshape(terms[0] if len(terms) == 1 else ops.Sum(*terms), [-1])


def _of_channels(
    ops: Ops, sites: Sequence[ir.Node], gradient: ir.Node, shape: Sequence[int]
) -> ir.Value:
    """Of the loss, by the logarithms of the scales of a weight.

    Only the last product and the sum depend on samples: the rest is done once a step (see
    ``step_graphs``).
    """
    dy, weight = gradient.inputs[:2]
    quantized = next(site.outputs[0] for site in sites if site.inputs[0] is weight)
    (inside,) = ops.node(gradient.op_type, [weight, *gradient.inputs[1:]], domain=DOMAIN)
    product = ops.Mul(dy, ops.Sub(quantized, inside))
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    return ops.ReduceSum(product, axes, keepdims=0) if shape else ops.ReduceSum(product)


def _derivative(ops: Ops, sites: Sequence[ir.Node], gradient: ir.Node) -> ir.Value:
    """Of the loss, by the logarithm of the scale of a site."""
    dy, x = gradient.inputs[:2]
    assert dy is not None
    assert x is not None
    quantized = next(site.outputs[0] for site in sites if site.inputs[0] is x)
    whole = _inner_product(ops, dy, quantized)
    activation = _activation(gradient)
    if activation is None:
        return ops.Sub(whole, _inner_product(ops, gradient.outputs[0], x))
    # Where an activation in front lets nothing through, x is 0, or at its limit. Its gradient
    # does as well, so that both masks can be applied in one (see ``MergeMasksPass``).
    inside = _inner_product(ops, activation.gradient, x)
    if activation.limit is not None:
        # If the range reaches to the limit, all of x is inside.
        _, _, scale, _, hi = gradient.inputs
        end = ops.Mul(ops.Mul(scale, _WIDER), hi)
        reaches = ops.GreaterOrEqual(end, activation.limit)
        inside = ops.Where(reaches, _inner_product(ops, dy, x), inside)
    return ops.Sub(whole, inside)


def _inner_product(ops: Ops, x: ir.Value, y: ir.Value) -> ir.Value:
    (result,) = ops.node(INNER_PRODUCT, [x, y], domain=DOMAIN)
    return result


@dataclass(frozen=True, slots=True)
class _Activation:
    """A Relu, or a Clip from 0, in front of a site."""

    gradient: ir.Value
    """Of what it reads."""
    limit: float | None
    """The most that it lets through."""


def _activation(gradient: ir.Node) -> _Activation | None:
    """What computes the value of a site, if only that reads the site's gradient."""
    (result,), x = gradient.outputs, gradient.inputs[1]
    maker = x.producer() if x is not None else None
    readers = [use.node for use in result.uses()]
    if maker is None or [node.op_type for node in readers] != [f"{maker.op_type}_gradient"]:
        return None
    masked = readers[0].outputs[0]
    if maker.op_type.startswith("Relu_"):
        return _Activation(masked, None)
    bounds = [None if v is None else constant_of(v) for v in (*maker.inputs[1:], None, None)]
    least, most = bounds[:2]
    if not maker.op_type.startswith("Clip_") or least is None or least.item() != 0:
        return None
    if most is None and len(maker.inputs) > 2 and maker.inputs[2] is not None:
        return None
    return _Activation(masked, None if most is None else float(most.item()))
