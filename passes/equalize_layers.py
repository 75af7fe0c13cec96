"""Equalize the ranges of the channels that connect layers."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.passes._graph import (
    constant_of,
    is_standard,
    only_reader,
    require_opset,
    used_names,
)
from onnx_fliqs.passes._linear import (
    LinearLayer,
    constant_addend,
    linear_layer,
    set_addend,
)
from onnx_fliqs.passes._rearranging import channels, forwards, rearranges

__all__ = ["EqualizeLayersPass"]

_Array: TypeAlias = npt.NDArray[np.float64]
_Indices: TypeAlias = npt.NDArray[np.intp]

_SUFFIX: Final = "equalized"
_CONVERGED: Final = 1e-6
"""Largest step, in powers of two, at which the iteration ends."""
_SWEEPS: Final = 2000
_WORTH_IT: Final = 0.01
"""Largest factor, in powers of two, that is not worth a change: a second run, which finds no
more than what rounding and the iteration left, changes nothing."""

_DEAD: Final = 16.0
"""A channel whose ranges on both sides have a product that is smaller than the largest by more
than this power of two has no weights to speak of. By them its bias would be divided by nearly
0, and dwarf all other activations."""
_LOWEST: Final = -1e3
"""Below the logarithm of any weight."""

_ELEMENTWISE: Final = ("Relu", "LeakyRelu", "PRelu")
_POOLING: Final = ("AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool")
_REDUCING: Final = ("ReduceMean", "ReduceSum", "ReduceMax")

logger = logging.getLogger(__name__)


class EqualizeLayersPass(ir.passes.InPlacePass):
    """Equalize the ranges of the weights that write and that read each channel.

    Before:  c = Conv (x, w1, b1);  r = Relu (c);  y = Conv (r, w2, b2)
    After:   c' = Conv (x, w1 / s, b1 / s);  r' = Relu (c');  y = Conv (r', w2 * s, b2)

    Cross-layer equalization (Nagel et al. 2019, section 4.1): s is such that in each channel
    the largest weight before it is as large as the largest weight behind it. In a chain of
    layers the factors of all pairs are found together, by iteration. Between two layers there
    may be what commutes with a positive factor per channel: Relu, LeakyRelu and PRelu, pooling
    and means, zero padding, rearrangements, products with constants, and the addition of
    constants, which are divided as well. A Clip at 6 does not commute.

    Requires: opset >= 18, where reductions take their axes as an input; constant weights.
    Ensures: results change by float32 rounding only; the graph's signature is unchanged; a
        weight that several nodes read, and a tensor that is read twice or is an output of the
        graph, keep their numbers. A channel that has hardly any weights on one side gets the
        factor of the median channel.
    Idempotent: channels that are equal to within 1 % are left alone.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse opsets whose reductions have their axes elsewhere."""
        require_opset(model, 18)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Equalize each chain of layers, in the main graph and in subgraphs."""
        taken = used_names(model)
        changed = 0
        for chain in _chains(model):
            chain.equalize()
            if max(np.abs(factors).max() for factors in chain.factors) > _WORTH_IT:
                chain.apply(taken)
                changed += len(chain.links)
        logger.info("equalized %d pairs of layers", changed)
        return ir.passes.PassResult(model, modified=changed > 0)


@dataclass(frozen=True, slots=True)
class _Link:
    """How the output channels of a layer reach the next layer."""

    source: _Indices
    """For each input channel of the next layer, the output channel that it comes from."""
    addends: Sequence[tuple[ir.Node, int, _Indices]]
    """Additions on the way: of which input, and which channel's each number is."""


# --- what is connected ---------------------------------------------------------------------


def _chains(model: ir.Model) -> Iterator["_Chain"]:
    """Layers that follow one another, as many as there are without a break."""
    followers = {node: _next_layer(node) for node in model.graph.all_nodes()}
    follower = {node: found for node, found in followers.items() if found is not None}
    behind = {node for node, _ in follower.values()}
    for start in follower:
        if start in behind:
            continue
        nodes, links = [start], []
        while nodes[-1] in follower:
            node, link = follower[nodes[-1]]
            nodes.append(node)
            links.append(link)
        yield _Chain(nodes, links)


def _layer(node: ir.Node) -> LinearLayer:
    layer = linear_layer(node)
    assert layer is not None
    return layer


def _scalable(node: ir.Node) -> LinearLayer | None:
    """The node as a layer whose weight is its alone."""
    layer = linear_layer(node)
    if layer is None:
        return None
    weight = node.inputs[layer.weight_index]
    return None if weight is None or only_reader(weight) is None else layer


def _next_layer(node: ir.Node) -> tuple[ir.Node, _Link] | None:
    """The layer that reads what this one writes, through operators that commute."""
    layer = _scalable(node)
    rank = None if layer is None else _rank(layer)
    if layer is None or rank is None:
        return None
    count = layer.channels[1]
    shape = [1] * rank
    shape[layer.channel_axis] = count
    origin = np.arange(count, dtype=np.float64).reshape(shape)
    value = node.outputs[0]
    addends: list[tuple[ir.Node, int, _Indices]] = []
    while (reader := only_reader(value)) is not None and reader[0].graph is node.graph:
        user, index = reader
        following = _scalable(user)
        if following is not None and index != following.weight_index and index < 2:
            source = channels(origin, following.channel_axis)
            inputs = following.channels[0]
            if source is None or source.size not in (1, inputs):
                return None
            spread = np.broadcast_to(source, inputs).astype(np.intp)
            return user, _Link(spread, addends)
        if constant_addend(user) == 1 - index:
            addends.append((user, 1 - index, origin.astype(np.intp)))
        moved = _through(user, index, origin)
        if moved is None:
            return None
        origin, value = moved, user.outputs[0]
    return None


def _rank(layer: LinearLayer) -> int | None:
    shape = layer.node.outputs[0].shape
    return layer.rank if shape is None else len(shape)


def _through(node: ir.Node, index: int, origin: _Array) -> _Array | None:
    """Where the channels are behind an operator that commutes with a factor for each.

    Args:
        node: The operator.
        index: Which of its inputs they are.
        origin: The channel of each number of that input, as an array that broadcasts.

    Returns:
        The same for its output; None if the operator does not commute.
    """
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return None
    if is_standard(node, "Add", "Mul") or (is_standard(node, "Div") and index == 0):
        other = constant_of(node.inputs[1 - index])
        return None if other is None or other.ndim > origin.ndim else origin
    if index != 0:
        return None
    if is_standard(node, *_ELEMENTWISE) or _is_one_sided_clip(node):
        return origin
    if rearranges(node):
        return forwards(node, origin)
    mixed = _mixed_axes(node, origin.ndim)
    if mixed is None or any(origin.shape[axis] > 1 for axis in mixed):
        return None
    if is_standard(node, *_REDUCING) and not node.attributes.get_int("keepdims", 1):
        return origin.squeeze(mixed)
    return origin


def _is_one_sided_clip(node: ir.Node) -> bool:
    """Whether a Clip has no other end than 0."""
    if not is_standard(node, "Clip"):
        return False
    ends = [value for value in node.inputs[1:] if value is not None]
    found = [constant_of(value) for value in ends]
    return all(end is not None and not end.any() for end in found)


def _mixed_axes(node: ir.Node, rank: int) -> tuple[int, ...] | None:
    """The axes along which a linear (or largest-of) operator mixes its numbers; else None."""
    if is_standard(node, *_POOLING):
        return tuple(range(2, rank))
    if is_standard(node, *_REDUCING):
        given = node.inputs[1] if len(node.inputs) > 1 else None
        axes = constant_of(given)
        if given is None:
            kept = node.attributes.get_int("noop_with_empty_axes", 0)
            return () if kept else tuple(range(rank))
        return None if axes is None or not axes.size else _positive(axes, rank)
    if is_standard(node, "Pad"):
        return _padded_axes(node, rank)
    return None


def _padded_axes(node: ir.Node, rank: int) -> tuple[int, ...] | None:
    """The axes that a Pad lengthens, if it fills in zeros or numbers of the tensor."""
    pads, fill, axes = (
        constant_of(value) for value in (*node.inputs[1:], None, None, None)[:3]
    )
    unknown = any(
        value is not None and constant_of(value) is None for value in node.inputs[1:]
    )
    if unknown or pads is None or (fill is not None and fill.any()):
        return None
    named = tuple(range(rank)) if axes is None else _positive(axes, rank)
    return tuple(
        axis for axis, ends in zip(named, pads.reshape(2, -1).T, strict=True) if ends.any()
    )


def _positive(axes: npt.NDArray[np.generic], rank: int) -> tuple[int, ...]:
    return tuple(int(axis) % rank for axis in axes.reshape(-1))


# --- factors -------------------------------------------------------------------------------


class _Chain:
    """Layers that follow one another, and the factors of the channels between them."""

    def __init__(self, nodes: Sequence[ir.Node], links: Sequence[_Link]) -> None:
        self._nodes = nodes
        self.links = links
        with np.errstate(divide="ignore"):
            # Logarithms to base 2, as all in here.
            self._sizes = [np.log2(_layer(node).magnitudes()) for node in nodes]
        counts = [size.shape[0] * size.shape[1] for size in self._sizes[:-1]]
        self.factors = [np.zeros(count) for count in counts]
        """For each link, one number per channel: the weights before the link are divided,
        those behind it multiplied."""
        self._alive = [self._find_alive(index) for index in range(len(links))]

    def _find_alive(self, index: int) -> npt.NDArray[np.bool_]:
        """Which channels of a link have weights on both sides; factors do not change it."""
        product = self._before(index) + self._behind(index)
        alive: npt.NDArray[np.bool_] = product > max(product.max(), _LOWEST) - _DEAD
        return alive

    def equalize(self) -> None:
        """Let each factor be the one that makes the ranges on both sides equal.

        A factor of one link changes the ranges of the neighbouring ones, so that the links
        take turns until nothing moves.
        """
        for _ in range(_SWEEPS):
            moved = [self._equalize(index) for index in range(len(self.links))]
            if max(moved) < _CONVERGED:
                return
        logger.debug("a chain of %d layers still moves by %g", len(self._nodes), max(moved))

    def _equalize(self, index: int) -> float:
        """Equalize one link; how far that moved its factors."""
        alive = self._alive[index]
        if not alive.any():
            return 0.0
        ratio = self._before(index)[alive] - self._behind(index)[alive]
        found = np.full(len(alive), np.median(ratio) / 2)
        found[alive] = ratio / 2
        moved = np.abs(found - self.factors[index]).max()
        self.factors[index] = found
        return float(moved)

    def _before(self, index: int) -> _Array:
        """The range of each channel in the layer before a link."""
        found = self._sizes[index]
        if index:
            arriving = self.factors[index - 1][self.links[index - 1].source]
            found = found + arriving.reshape(len(found), 1, -1)
        ranges: _Array = found.max(axis=2).reshape(-1)
        return ranges

    def _behind(self, index: int) -> _Array:
        """The range of each channel in the layer behind a link."""
        found, link = self._sizes[index + 1], self.links[index]
        if index + 1 < len(self.links):
            found = found - self.factors[index + 1].reshape(len(found), -1, 1)
        ranges = np.full(self.factors[index].shape, -np.inf)
        np.maximum.at(ranges, link.source, found.max(axis=1).reshape(-1))
        return ranges

    def apply(self, taken: set[str]) -> None:
        """Write the weights, the biases and the constants between them."""
        none = np.zeros(1)
        for index, node in enumerate(self._nodes):
            layer = _layer(node)
            weight: _Array | None = layer.weight
            if index:
                link = self.links[index - 1]
                weight = layer.times_inputs(np.exp2(self.factors[index - 1])[link.source])
                assert weight is not None
                layer = replace(layer, weight=weight)
            share: _Array = none + 1
            if index < len(self.links):
                share = np.exp2(-self.factors[index])
                weight = layer.times_outputs(share)
                for add, position, origin in self.links[index].addends:
                    addend = constant_of(add.inputs[position])
                    assert addend is not None
                    total = addend.astype(np.float64) * share[origin]
                    set_addend(add, position, total, _SUFFIX, taken)
            assert weight is not None
            layer.write(weight, _SUFFIX, taken, factor=layer.as_bias(share), shift=none)
