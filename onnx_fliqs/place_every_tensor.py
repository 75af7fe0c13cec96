"""Decides the sites of a fully quantized graph: every float tensor that data flows through.

Each operator works in one format: what it computes from data and what it writes agree. A layer
chooses it; any other operator takes the widest in which its operands are made. A tensor is
quantized where it is made, in the format of its maker; a reader in another format gets a
conversion, which is a second site behind the first. Inputs of the graph, which nothing makes,
are in the format of the layers that come next.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

import numpy as np
import onnx_ir as ir

from onnx_fliqs.layer_operators import constant
from onnx_fliqs.precision import Precision
from onnx_fliqs.signs import REARRANGING, padding
from onnx_fliqs.sites import Layer, Site, Skipped
from onnx_fliqs.targets import Activations, Target

__all__ = ["place_every_tensor", "why_tensors_stay_float"]

Nodes: TypeAlias = Mapping[str, ir.Node]

_FUSING: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Add"})
"""Operators that compute a Relu or Clip behind them in the same pass."""
_MEASURING: Final = frozenset({"Shape", "Size"})
"""Operators that do not read the numbers of a tensor."""
_DATA: Final = {"Clip": 1, "Pad": 1, "Resize": 1, "Upsample": 1, "NonMaxSuppression": 2}
"""How many operands are data, where settings follow them."""
_WITH_CONSTANTS: Final = frozenset(
    {"Add", "Concat", "Div", "GridSample", "Max", "Mean", "Min", "Mul", "PRelu", "Pow", "Sub"}
    | {"Sum", "Where"}
    | REARRANGING
)
"""Operators that compute with a constant as with any other tensor."""
_NORMALIZATIONS: Final = frozenset(
    {"GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization"}
)
"""Operators that scale by a constant operand 1, and add operand 2 to products with it."""
_WEIGHT_BITS: Final = 8
"""Of a normalization's scale, beside activations of any width."""


def place_every_tensor(
    model: ir.Model,
    layers: Sequence[Layer],
    nodes: Nodes,
    target: Target,
    precisions: Sequence[Precision],
) -> list[Site]:
    """The sites of all tensors but the weights and biases of layers.

    Args:
        model: A canonical model.
        layers: Those that quantize their activations, in the graph's order.
        nodes: The node of every layer, by name.
        target: Which ranges are fixed, and how constants are quantized.
        precisions: What can be chosen.
    """
    if not layers:
        return []
    placement = _Placement(
        layers=tuple(layer.name for layer in layers),
        with_weights=frozenset(nodes),
        target=target,
        converts=len({precision.activations for precision in precisions}) > 1,
        moving=_moving(model),
    )
    for value in model.graph.inputs:
        placement.add_source(value)
    for node in model.graph:
        placement.visit(node)
    return list(placement.sites.values())


def why_tensors_stay_float(model: ir.Model, sites: Sequence[Site]) -> list[Skipped]:
    """What data flows through, and still has no site: its maker, and the reason."""
    quantized = {site.tensor for site in sites}
    moving, skipped = _moving(model), []
    for node in model.graph:
        for value in node.outputs:
            if value not in moving or value.name in quantized or not _is_read(value):
                continue
            if value.type is None:
                reason = f"the type of its output {value.name} is not known"
                skipped.append(
                    Skipped(name=str(node.name), op_type=node.op_type, reason=reason)
                )
        for index, value, tensor in _constants(node):
            if _is_float(value) and not np.isfinite(tensor.numpy()).all():
                reason = f"its constant {value.name} (operand {index}) is not finite"
                skipped.append(
                    Skipped(name=str(node.name), op_type=node.op_type, reason=reason)
                )
    return skipped


@dataclass(kw_only=True)
class _Placement:
    """The sites found so far; nodes are visited in the graph's order."""

    layers: tuple[str, ...]
    with_weights: frozenset[str]
    """Names of nodes whose constants have sites of their own kind."""
    target: Target
    converts: bool
    """Whether formats may differ between operators."""
    moving: set[ir.Value]
    sites: dict[str, Site] = field(default_factory=dict)
    made: dict[ir.Value, str] = field(default_factory=dict)
    """The name of the site behind the maker of a tensor."""
    fused: set[ir.Node] = field(default_factory=set)

    def visit(self, node: ir.Node) -> None:
        """Place the sites of what a node reads, and of what it writes."""
        if node in self.fused or node.op_type in _MEASURING:
            return
        is_layer = node.name in self.layers
        operands = _computed(node)
        if not is_layer and not any(value in self.moving for _, value in operands):
            operands = []
        for _, value in operands:
            self.add_source(value)
        reads = tuple(dict.fromkeys(self.made[v] for _, v in operands if v in self.made))
        if is_layer:
            self._convert(node, operands, layers=(str(node.name),))
        elif len(reads) > 1:
            self._convert(node, operands, operands_of=reads)
        for value in node.outputs:
            if value not in self.moving:
                continue
            if not reads and not is_layer:
                self.add_source(value)
                continue
            self._add_output(node, value, (str(node.name),) if is_layer else (), reads)
        if reads:
            self._add_constants(node, reads)

    def add_source(self, value: ir.Value) -> None:
        """A tensor that nothing quantized makes: in the format of what reads it."""
        if value in self.made or not _is_float(value) or not _is_read(value):
            return
        following = _layers_after(value, frozenset(self.layers))
        layers = following or self.layers[-1:]
        self._add(value, Site(**_tensor(value), layers=layers))
        maker = value.producer()
        if maker is not None and maker.op_type in REARRANGING:
            # Codes of a table, or of what is repeated, go where its numbers go.
            self._add_constants(maker, (self.made[value],), same_scale_as=self.made[value])

    def _add(self, value: ir.Value, site: Site) -> None:
        self.sites[site.name] = site
        self.made[value] = site.name

    def _add_output(
        self, node: ir.Node, value: ir.Value, layers: tuple[str, ...], reads: tuple[str, ...]
    ) -> None:
        limits = None
        if node.op_type in _FUSING and (follower := _follower(value)) is not None:
            self.fused.add(follower)
            value = follower.outputs[0]
            most = _number(follower, 2)
            limits = None if most is None else (0.0, most)
        if not _is_float(value) or not _is_read(value):
            return
        fixed_range = self.target.range_of(node.op_type)
        source = self._source_of_grid(node)
        if source is not None:
            limits, fixed_range = self.sites[source].limits, self.sites[source].fixed_range
        self._add(
            value,
            Site(
                **_tensor(value),
                layers=layers,
                operands=() if layers else reads,
                same_scale_as=source,
                fixed_range=fixed_range,
                limits=limits,
            ),
        )

    def _source_of_grid(self, node: ir.Node) -> str | None:
        """The site whose numbers, and zeros, an operator only puts into other places."""
        keeps = padding(node) == 0 if node.op_type == "Pad" else node.op_type in REARRANGING
        name = self.made.get(node.inputs[0]) if keeps and node.inputs[0] is not None else None
        return None if name is None else self.sites[name].same_scale_as or name

    def _convert(
        self,
        node: ir.Node,
        operands: Sequence[tuple[int, ir.Value]],
        *,
        layers: tuple[str, ...] = (),
        operands_of: tuple[str, ...] = (),
    ) -> None:
        """Sites in front of a node that works in a format of its own."""
        for index, value in operands if self.converts else ():
            first = self.sites[self.made[value]] if value in self.made else None
            if first is None or (first.layers == layers and not first.operands):
                continue
            name = f"{value.name}@{node.name}:{index}"
            self.sites[name] = Site(
                name=name,
                tensor=str(value.name),
                layers=layers,
                consumers=((str(node.name), index),),
                is_weight=False,
                operands=operands_of,
                after=first.name,
                same_scale_as=first.same_scale_as or first.name,
                limits=first.limits,
                fixed_range=first.fixed_range,
            )
            kept = [use for use in first.consumers if use != (str(node.name), index)]
            self.sites[first.name] = replace(first, consumers=tuple(kept))

    def _add_constants(
        self, node: ir.Node, reads: tuple[str, ...], same_scale_as: str | None = None
    ) -> None:
        """Sites of the constants that a node computes with."""
        if node.name in self.with_weights:
            return
        scales = ""
        for index, value, tensor in _constants(node):
            if not _is_float(value) or not np.isfinite(tensor.numpy()).all():
                continue
            name = f"{value.name}@{node.name}:{index}"
            site = Site(
                name=name,
                tensor=str(value.name),
                layers=(),
                consumers=((str(node.name), index),),
                is_weight=True,
                operands=reads,
                same_scale_as=same_scale_as,
            )
            if node.op_type not in _NORMALIZATIONS:
                # A grid around zero, in the type of the activations.
                middle = 0.5 if self.target.activations is Activations.ASYMMETRIC else None
                site = replace(site, negative=middle)
            elif index == 1:
                site, scales = replace(site, most_bits=_WEIGHT_BITS), name
            elif scales:
                site = replace(site, bias_of=(reads[0], scales))
            self.sites[name] = site


def _tensor(value: ir.Value) -> dict[str, Any]:
    """What a site says about the tensor, whoever decides its format."""
    return {
        "name": f"{value.name}@all",
        "tensor": str(value.name),
        # Shape as well: nothing but its QuantizeLinear may read what a kernel makes.
        "consumers": tuple((str(node.name), index) for node, index in value.uses()),
        "is_weight": False,
        "is_output": value.is_graph_output() and not value.is_graph_input(),
    }


# --- what the graph says -------------------------------------------------------------------


def _is_float(value: ir.Value) -> bool:
    return value.dtype is ir.DataType.FLOAT


def _is_read(value: ir.Value) -> bool:
    """Whether anything needs the numbers of a tensor."""
    if value.is_graph_output() and not value.is_graph_input():
        return True
    return any(node.op_type not in _MEASURING for node, _ in value.uses())


def _moving(model: ir.Model) -> set[ir.Value]:
    """The values that depend on the numbers fed into the graph, and not on shapes alone."""
    moving = {value for value in model.graph.inputs if not value.is_initializer()}
    for node in model.graph:
        if node.op_type not in _MEASURING and not moving.isdisjoint(_read(node)):
            moving.update(node.outputs)
    return moving


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, itself or in its bodies."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        bodies = (
            (attribute.as_graph(),)
            if attribute.type is ir.AttributeType.GRAPH
            else attribute.as_graphs()
            if attribute.type is ir.AttributeType.GRAPHS
            else ()
        )
        for body in bodies:
            for inner in body.all_nodes():
                yield from (value for value in inner.inputs if value is not None)


def _data(node: ir.Node) -> list[tuple[int, ir.Value]]:
    """The operands that a node computes with, less its settings."""
    known = node.inputs[: None if node.domain else _DATA.get(node.op_type)]
    return [(index, value) for index, value in enumerate(known) if value is not None]


def _computed(node: ir.Node) -> list[tuple[int, ir.Value]]:
    return [(i, value) for i, value in _data(node) if _is_float(value) and not _fixed(value)]


def _fixed(value: ir.Value) -> bool:
    return constant(value) is not None


def _constants(node: ir.Node) -> Iterator[tuple[int, ir.Value, ir.TensorProtocol]]:
    """The constants that are quantized with the tensors beside them."""
    if node.domain or node.op_type not in _WITH_CONSTANTS | _NORMALIZATIONS:
        return
    for index, value in _data(node):
        if (tensor := constant(value)) is not None and tensor.size:
            yield index, value, tensor


def _follower(value: ir.Value) -> ir.Node | None:
    """A Relu, or a Clip that begins at zero, which alone reads a value.

    Runtimes drop it where the range of the quantized output says the same.
    """
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node, index = uses[0]
    if node.domain or index or node.graph is not value.graph:
        return None
    is_clip = node.op_type == "Clip" and _number(node, 1) == 0 and (_number(node, 2) or 0) > 0
    return node if node.op_type == "Relu" or is_clip else None


def _number(node: ir.Node, index: int) -> float | None:
    """A constant scalar operand."""
    tensor = constant(node.inputs[index]) if index < len(node.inputs) else None
    return None if tensor is None else float(tensor.numpy().reshape(-1)[0])


def _layers_after(value: ir.Value, layers: frozenset[str]) -> tuple[str, ...]:
    """The names of the first layers on every way from a tensor."""
    found: dict[str, None] = {}
    seen, waiting = {value}, [value]
    while waiting:
        for node, _ in waiting.pop(0).uses():
            if node.name in layers:
                found[str(node.name)] = None
                continue
            fresh = [each for each in node.outputs if each not in seen]
            seen.update(fresh)
            waiting += fresh
    return tuple(found)
