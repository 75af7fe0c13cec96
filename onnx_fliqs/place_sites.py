"""Decides which tensors get a site: weights, activations and biases of the layers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import onnx_ir as ir

from onnx_fliqs.layer_operators import (
    after_activation,
    channel_axis,
    constant,
    operands,
    weights,
)
from onnx_fliqs.legality import group_axis
from onnx_fliqs.partition import united
from onnx_fliqs.place_every_tensor import place_every_tensor
from onnx_fliqs.precision import Precision
from onnx_fliqs.signs import REARRANGING, never_negative, padding
from onnx_fliqs.sites import Layer, Site
from onnx_fliqs.targets import Activations, Bias, Placement, Target

__all__ = ["place_sites"]

Nodes: TypeAlias = Mapping[str, ir.Node]


def place_sites(
    model: ir.Model,
    layers: Sequence[Layer],
    nodes: Nodes,
    target: Target,
    precisions: Sequence[Precision],
) -> tuple[Site, ...]:
    """The sites of some layers, all of them signed.

    Args:
        model: A canonical model.
        layers: In the graph's order.
        nodes: The node of each layer, by name.
        target: Decides which activations get a site, and how many scales weights have.
        precisions: What can be chosen.
    """
    full = [layer for layer in layers if layer.weight_only is None]
    if target.placement is Placement.EVERY_TENSOR:
        activations = place_every_tensor(model, full, nodes, target, precisions)
    elif target.placement is Placement.TENSORS:
        activations = _tensor_sites(model, full, nodes, target)
    else:
        activations = _layer_input_sites(full, nodes)
        if target.residual_adds:
            activations += _residual_sites(model, full, nodes)
    stored = _weight_sites(layers, nodes, target, precisions)
    biases: list[Site] = []
    if target.bias is Bias.WEIGHT:
        biases = [site for _, _, site in _stored_biases(full, nodes)]
    elif target.bias is Bias.INT32_ALWAYS:
        found = _bias_sites(full, nodes, (*activations, *stored))
        biases = [replace(site, every_width=True) for site in found]
    elif target.bias is Bias.INT32 and any(p.in_integers for p in precisions):
        biases = _bias_sites(full, nodes, (*activations, *stored))
    return (*activations, *stored, *biases)


def _activations(node: ir.Node) -> Iterator[tuple[int, ir.Value]]:
    """The operands of a layer that are computed, with their indices."""
    for index in operands(node):
        value = node.inputs[index]
        if value is not None and constant(value) is None:
            yield index, value


def _layer_input_sites(layers: Sequence[Layer], nodes: Nodes) -> list[Site]:
    return [
        Site(
            name=f"{value.name}@{layer.name}:{index}",
            tensor=str(value.name),
            layers=(layer.name,),
            consumers=((layer.name, index),),
            is_weight=False,
        )
        for layer in layers
        for index, value in _activations(nodes[layer.name])
    ]


def _residual_sites(model: ir.Model, layers: Sequence[Layer], nodes: Nodes) -> list[Site]:
    """Sites of what is added to the output of a Conv, in the same pass."""
    convolutions = {
        nodes[layer.name].outputs[0]: (index, layer.name)
        for index, layer in enumerate(layers)
        if layer.op_type == "Conv"
    }
    sites = []
    for node in model.graph:
        made = [value for value in node.inputs if value in convolutions]
        if node.op_type != "Add" or node.domain or not made:
            continue
        # Of two, the one that is computed last.
        fused = max(made, key=convolutions.__getitem__)
        position = int(node.inputs[0] is fused)
        other = node.inputs[position]
        if other is None or constant(other) is not None or len(fused.uses()) > 1:
            continue
        sites.append(
            Site(
                name=f"{other.name}@{node.name}:{position}",
                tensor=str(other.name),
                layers=(convolutions[fused][1],),
                consumers=((str(node.name), position),),
                is_weight=False,
            )
        )
    return sites


# --- weights and biases --------------------------------------------------------------------


def _weight_sites(
    layers: Sequence[Layer], nodes: Nodes, target: Target, precisions: Sequence[Precision]
) -> list[Site]:
    """One site for each weight, whatever the number of layers that read it."""
    uses: dict[ir.Value, list[tuple[Layer, int]]] = {}
    for layer in layers:
        for index, value in weights(nodes[layer.name]):
            uses.setdefault(value, []).append((layer, index))
    sites = []
    for value, readers in uses.items():
        tensor = constant(value)
        assert tensor is not None
        axis = _common_axis(readers, nodes, target)
        along, group, groups = _groups(readers, nodes, precisions, tensor.shape.numpy())
        names = dict.fromkeys(layer.name for layer, _ in readers)
        sites.append(
            Site(
                name=f"{value.name}@{readers[0][0].name}",
                tensor=str(value.name),
                layers=tuple(names),
                consumers=tuple((layer.name, index) for layer, index in readers),
                is_weight=True,
                axis=axis,
                channels=1 if axis is None else int(tensor.shape[axis]),  # type: ignore[arg-type]
                rank=len(tensor.shape),
                group_axis=along,
                group=group,
                groups=groups,
            )
        )
    return sites


def _common_axis(
    readers: Sequence[tuple[Layer, int]], nodes: Nodes, target: Target
) -> int | None:
    """The axis that all readers want, if they agree; who multiplies in float takes any."""
    strict = [(layer, index) for layer, index in readers if layer.weight_only is None]
    known = target.per_channel_ops
    axes = {
        channel_axis(nodes[layer.name], index)
        if known is None or layer.op_type in known
        else None
        for layer, index in strict or readers
    }
    return axes.pop() if len(axes) == 1 else None


def _groups(
    readers: Sequence[tuple[Layer, int]],
    nodes: Nodes,
    precisions: Sequence[Precision],
    shape: Sequence[int],
) -> tuple[int | None, int | None, int]:
    """The smallest groups into which the readers may cut a weight: axis, size, number."""
    excluded = frozenset[str]().union(*(layer.excluded for layer, _ in readers))
    sizes = [
        precision.weights.group
        for precision in precisions
        if precision.name not in excluded and precision.weights.group is not None
    ]
    axis = group_axis(nodes[readers[0][0].name], readers[0][1])
    if not sizes or axis is None:
        return None, None, 1
    return axis, min(sizes), shape[axis] // min(sizes)


def _bias_sites(
    layers: Sequence[Layer], nodes: Nodes, operand_sites: Sequence[Site]
) -> list[Site]:
    """Sites of the biases that integer kernels add to their int32 sums."""
    read_by = {use: site for site in operand_sites for use in site.consumers}
    sites = []
    for layer, node, site in _stored_biases(layers, nodes):
        tensor = constant(node.inputs[2])
        first, second = (read_by.get((layer.name, index)) for index in (0, 1))
        if tensor is None or first is None or second is None:
            continue
        scaled = any(node.attributes.get_float(a, 1.0) != 1.0 for a in ("alpha", "beta"))
        fits = first.axis is None and second.channels in (1, tensor.size)
        if scaled or not fits or len(tensor.shape) != 1:
            continue
        per_channel = second.channels > 1
        sites.append(
            replace(
                site,
                axis=0 if per_channel else None,
                channels=second.channels,
                rank=1,
                bias_of=(first.name, second.name),
            )
        )
    return sites


def _stored_biases(
    layers: Sequence[Layer], nodes: Nodes
) -> Iterator[tuple[Layer, ir.Node, Site]]:
    """The layers with a constant bias, and its site as that of a weight with one scale."""
    for layer in layers:
        node = nodes[layer.name]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is None or constant(bias) is None:
            continue
        site = Site(
            name=f"{bias.name}@{layer.name}:bias",
            tensor=str(bias.name),
            layers=(layer.name,),
            consumers=((layer.name, 2),),
            is_weight=True,
        )
        yield layer, node, site


# --- one site per tensor -------------------------------------------------------------------


@dataclass
class _Tensors:
    """What integer kernels read and write."""

    unsigned: set[ir.Value] = field(default_factory=set)
    """What is never negative, where that makes another type."""
    readers: dict[ir.Value, list[str]] = field(default_factory=dict)
    """The layers that read a tensor."""
    makers: dict[ir.Value, str] = field(default_factory=dict)
    """The layer that writes it."""
    integers: set[ir.Value] = field(default_factory=set)
    """What kernels write that write integers only."""
    operands: dict[ir.Value, tuple[ir.Value, ...]] = field(default_factory=dict)
    """What an operator between layers computes it from."""
    computed: set[ir.Value] = field(default_factory=set)
    """What operators between layers compute, not only rearrange."""
    same_scale: list[tuple[ir.Value, ...]] = field(default_factory=list)
    """Tensors that share a scale."""
    limits: dict[ir.Value, tuple[float, float]] = field(default_factory=dict)
    """Between what a Clip keeps a tensor."""

    def has_site(self, value: ir.Value | None) -> bool:
        """Whether a tensor may be quantized.

        An output of the graph may be if a layer reads it, or if the integer kernel that writes
        it can write nothing else.
        """
        if value is None:
            return False
        if value.is_graph_output():
            return value in self.readers or value in self.integers
        if not value.uses():
            return False
        return value in self.readers or value in self.makers or value in self.operands


def _tensor_sites(
    model: ir.Model, layers: Sequence[Layer], nodes: Nodes, target: Target
) -> list[Site]:
    """One site for each tensor that integer kernels read or write.

    Inputs and outputs of layers; outputs of the operators between them that read nothing else;
    and rearrangements of quantized tensors, on the same scale.
    """
    found = _Tensors()
    if target.activations is Activations.UNSIGNED:
        found.unsigned |= never_negative(model)
    for layer in layers:
        for _, value in _activations(nodes[layer.name]):
            found.readers.setdefault(value, []).append(layer.name)
        made = after_activation(nodes[layer.name].outputs[0])
        if layer.op_type not in target.float_output_ops:
            found.makers[made] = layer.name
        if layer.op_type in target.integer_output_ops:
            found.integers.add(made)
    for node in model.graph:
        if not node.domain and node.name not in nodes:
            _look_between(node, found, target)
    order = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    quantized = _worth_it([value for value in order if found.has_site(value)], found)
    # Powers of two meet limits only by chance.
    for value in () if target.power_of_two_scales else quantized:
        _note_limits(value, found)
    sites = [_tensor_site(value, found, target) for value in quantized]
    return _with_shared_scales(sites, found)


def _worth_it(values: Sequence[ir.Value], found: _Tensors) -> list[ir.Value]:
    """Those that an integer kernel reads or has to write, at once or rearranged.

    The others would be dequantized for readers of floats: the detour costs accuracy, and of
    some graphs that make it OpenVINO computes a part wrongly.
    """
    kept: set[ir.Value] = set()
    for value in reversed(values):
        wanted = value in found.readers or value in found.integers or value in found.computed
        if wanted or value in kept:
            kept |= {value, *found.operands.get(value, ())}
    return [value for value in values if value in kept]


def _look_between(node: ir.Node, found: _Tensors, target: Target) -> None:
    """Note what an operator that is no layer does with quantized tensors."""
    inputs = tuple(value for value in node.inputs if value is not None)
    if node.op_type in target.between_ops and all(found.has_site(value) for value in inputs):
        made = after_activation(node.outputs[0])
        found.operands[made] = inputs
        found.computed.add(made)
        # On one scale for signed numbers, kernels could not compute the Relu of those without.
        signs = {value in found.unsigned for value in inputs}
        shares = node.op_type in target.shared_scale_ops and len(signs) == 1
        if shares and made is node.outputs[0]:
            found.same_scale.append((*inputs, made))
    elif _keeps_grid(node) and found.has_site(node.inputs[0]):
        # The second output of MaxPool is indices.
        for made in node.outputs if node.op_type == "Split" else node.outputs[:1]:
            found.operands[made] = inputs[:1]
            found.same_scale.append((inputs[0], made))


def _note_limits(value: ir.Value, found: _Tensors) -> None:
    """Note the limits of a tensor whose numbers all went through a Clip."""
    node = value.producer()
    if node is None or node.domain:
        return
    if node.op_type == "Clip" and len(node.inputs) > 2:
        ends = [constant(end) for end in node.inputs[1:3]]
        low, high = (math.inf if end is None else float(end.numpy().item()) for end in ends)
        if low <= 0 < high < math.inf:
            found.limits[value] = low, high
    elif node.op_type == "Concat" or _keeps_grid(node):
        limits = _hull(
            [found.limits.get(operand) for operand in found.operands.get(value, ())]
        )
        if limits is not None:
            found.limits[value] = limits


def _hull(limits: Sequence[tuple[float, float] | None]) -> tuple[float, float] | None:
    """Between what several tensors lie; None where one of them, or all, have no limits."""
    known = [pair for pair in limits if pair is not None]
    if not known or len(known) < len(limits):
        return None
    lows, highs = zip(*known, strict=True)
    return min(lows), max(highs)


def _keeps_grid(node: ir.Node) -> bool:
    """Whether the output holds only numbers of the first input, and zeros."""
    if node.op_type == "Pad":
        return padding(node) == 0
    return node.op_type in REARRANGING


def _tensor_site(value: ir.Value, found: _Tensors, target: Target) -> Site:
    node = value.producer()
    deciding = (*found.readers.get(value, ()), *filter(None, [found.makers.get(value)]))
    return Site(
        name=f"{value.name}@all",
        tensor=str(value.name),
        layers=tuple(dict.fromkeys(deciding)),
        consumers=tuple((str(node.name), index) for node, index in value.uses()),
        is_weight=False,
        operands=tuple(f"{operand.name}@all" for operand in found.operands.get(value, ())),
        is_output=value.is_graph_output() and value in found.integers,
        limits=found.limits.get(value),
        fixed_range=None if node is None or node.domain else target.range_of(node.op_type),
    )


def _with_shared_scales(sites: Sequence[Site], found: _Tensors) -> list[Site]:
    """Tie the sites that share a scale to the first of them."""
    names = {site.tensor: site.name for site in sites}
    groups = [
        [names[str(value.name)] for value in values]
        for values in found.same_scale
        if all(value.name in names for value in values)
    ]
    by_name = {site.name: site for site in sites}
    moved = {names.get(str(v.name)) for v in found.operands.keys() - found.computed}
    tied: dict[str, Site] = {}
    for part in united(names.values(), groups):
        limits = _hull([by_name[name].limits for name in part])
        # What only moves numbers about has the range of where they come from.
        ranges = {by_name[name].fixed_range for name in part if name not in moved}
        fixed = ranges.pop() if len(ranges) == 1 else None
        for name in part:
            root = None if name == part[0] else part[0]
            tied[name] = replace(
                by_name[name], same_scale_as=root, limits=limits, fixed_range=fixed
            )
    return [tied[site.name] for site in sites]
