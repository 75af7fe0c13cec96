"""Finds the layers of a canonical model and decides which tensors are quantized.

Nothing is changed here: the result is the :class:`~onnx_fliqs.sites.SearchSpace` that
``InsertSearchSitesPass`` puts into the graph.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import onnx_ir as ir

from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.formats import Format
from onnx_fliqs.sites import Layer, SearchSpace, Site, Skipped, computed_in_integers
from onnx_fliqs.targets import Placement, Target

__all__ = ["find_layers"]

_LAYER_OPS: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_NOT_YET: Final = {
    "LSTM": "recurrent cells are left in float",
    "GRU": "recurrent cells are left in float",
    "RNN": "recurrent cells are left in float",
    "Einsum": "Einsum is left in float",
    "If": "layers in the branches are left in float",
    "Loop": "layers in the body are left in float",
    "Scan": "layers in the body are left in float",
}
# Ops whose output holds only values of input 0 (or zeros): they keep its sign and its grid.
_REARRANGING: Final = frozenset(
    {"Flatten", "Gather", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
    | {"DepthToSpace", "SpaceToDepth", "Expand", "Tile", "Split"}
)
_NONNEGATIVE: Final = frozenset({"Relu", "Sigmoid", "Softmax", "Abs", "HardSigmoid", "Exp"})
_SIGN_KEEPING: Final = frozenset(
    {"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax", "Sqrt"}
)
_ALL_INPUTS_SIGN_KEEPING: Final = frozenset({"Add", "Concat", "Max", "Mul", "Sum"})
_ACTIVATIONS: Final = frozenset({"Relu", "Clip"})
_TENSOR_OPS: Final = frozenset({"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool"})


def find_layers(model: ir.Model, target: Target, formats: Sequence[Format]) -> SearchSpace:
    """Find what can be quantized in a canonical model.

    Args:
        model: A model after ``canonicalise``.
        target: Decides which activations get a site.
        formats: The formats that each layer may take, cheapest first.

    Returns:
        The search space; the multiply-accumulates of its layers are still 0.

    Raises:
        UnsupportedError: There is no quantizable layer.
    """
    found = _Found()
    for node in model.graph:
        _classify(node, found)
    if not found.layers:
        raise UnsupportedError(
            "no quantizable layer: the model has no float32 "
            + ", ".join(_LAYER_OPS)
            + (f" (left out: {_summary(found.skipped)})" if found.skipped else "")
        )
    operands = (
        _layer_input_sites(found)
        if target.placement is Placement.LAYER_INPUTS
        else _tensor_sites(model, found)
    )
    weights = {
        layer.name: site
        for layer in found.layers
        if (site := _weight_site(layer, found.nodes[layer.name])) is not None
    }
    integers = any(computed_in_integers(fmt) for fmt in formats)
    biases = _bias_sites(found, operands, weights) if integers else []
    return SearchSpace(
        tuple(found.layers),
        (*operands, *weights.values(), *biases),
        tuple(formats),
        tuple(found.skipped),
    )


@dataclass
class _Found:
    layers: list[Layer] = field(default_factory=list)
    nodes: dict[str, ir.Node] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)


def _summary(skipped: Sequence[Skipped]) -> str:
    return "; ".join(f"{item.op_type} {item.name}: {item.reason}" for item in skipped[:3])


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    return value.const_value if value is not None and value.is_initializer() else None


def _classify(node: ir.Node, found: _Found) -> None:
    name = node.name or ""
    if node.domain or node.op_type not in _LAYER_OPS:
        if not node.domain and node.op_type in _NOT_YET and _holds_layers(node):
            found.skipped.append(
                Skipped(name=name, op_type=node.op_type, reason=_NOT_YET[node.op_type])
            )
        return
    reason = _why_not(node)
    if reason is not None:
        found.skipped.append(Skipped(name=name, op_type=node.op_type, reason=reason))
        return
    weight = node.inputs[_weight_index(node) or 0] if _weight_index(node) is not None else None
    found.nodes[name] = node
    found.layers.append(
        Layer(
            name=name,
            op_type=node.op_type,
            weights=(str(weight.name),) if weight is not None else (),
            params=_constant(weight).size if weight is not None else 0,  # type: ignore[union-attr]
            output=str(node.outputs[0].name),
        )
    )


def _holds_layers(node: ir.Node) -> bool:
    """Whether a recurrent cell, Einsum, or control flow with layers in its bodies."""
    attributes = node.attributes.values()
    bodies = [a.as_graph() for a in attributes if a.type is ir.AttributeType.GRAPH]
    nested = [inner for body in bodies for inner in body.all_nodes()]
    return not bodies or any(n.op_type in (*_LAYER_OPS, *_NOT_YET) for n in nested)


def _why_not(node: ir.Node) -> str | None:
    operands = node.inputs[:2]
    if any(value is None for value in operands):
        return "an operand is missing"
    if all(_constant(value) is not None for value in operands):
        return "both operands are constant"
    for value in operands:
        if value is not None and value.dtype not in (None, ir.DataType.FLOAT):
            return f"its operand {value.name} is {value.dtype.name}, not FLOAT"
    return None


def _weight_index(node: ir.Node) -> int | None:
    """Index of the constant operand, None for the product of two activations."""
    return next((i for i in (1, 0) if _constant(node.inputs[i]) is not None), None)


def _weight_axis(node: ir.Node, index: int, rank: int) -> int | None:
    """The output-channel axis of a constant operand; None for one scale."""
    if rank < 2:
        return None
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        transposed = node.attributes.get_int("transB" if index else "transA", 0)
        return (0 if transposed else 1) if index else (1 if transposed else 0)
    # ONNX Runtime's integer kernels take one scale for a stack of matrices.
    return (1 if index else 0) if rank == 2 else None


def _weight_site(layer: Layer, node: ir.Node) -> Site | None:
    index = _weight_index(node)
    if index is None:
        return None
    weight = node.inputs[index]
    tensor = _constant(weight)
    assert weight is not None and tensor is not None  # noqa: PT018 - by _weight_index
    rank = len(tensor.shape)
    axis = _weight_axis(node, index, rank)
    return Site(
        name=f"{weight.name}@{layer.name}",
        tensor=str(weight.name),
        layers=(layer.name,),
        consumers=((layer.name, index),),
        is_weight=True,
        axis=axis,
        channels=1 if axis is None else int(tensor.shape[axis]),  # type: ignore[arg-type]
        rank=rank,
    )


def _bias_sites(
    found: _Found, operands: Sequence[Site], weights: Mapping[str, Site]
) -> list[Site]:
    """Sites of the biases that integer kernels add to their int32 sums."""
    reads = {use: site for site in operands for use in site.consumers}
    sites = []
    for name, weight in weights.items():
        node = found.nodes[name]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        tensor = _constant(bias)
        activation = reads.get((name, 0))
        if bias is None or tensor is None or activation is None or len(tensor.shape) != 1:
            continue
        scaled = any(node.attributes.get_float(a, 1.0) != 1.0 for a in ("alpha", "beta"))
        if scaled or weight.channels not in (1, tensor.size):
            continue
        per_channel = weight.channels > 1
        sites.append(
            Site(
                name=f"{bias.name}@{name}:bias",
                tensor=str(bias.name),
                layers=(name,),
                consumers=((name, 2),),
                is_weight=True,
                axis=0 if per_channel else None,
                channels=weight.channels,
                rank=1,
                bias_of=(activation.name, weight.name),
            )
        )
    return sites


def _activation_operands(node: ir.Node) -> Iterator[tuple[int, ir.Value]]:
    for index in (0, 1):
        value = node.inputs[index]
        if value is not None and _constant(value) is None:
            yield index, value


def _layer_input_sites(found: _Found) -> list[Site]:
    return [
        Site(
            name=f"{value.name}@{layer.name}:{index}",
            tensor=str(value.name),
            layers=(layer.name,),
            consumers=((layer.name, index),),
            is_weight=False,
            unsigned=_never_negative(value),
        )
        for layer in found.layers
        for index, value in _activation_operands(found.nodes[layer.name])
    ]


def _never_negative(value: ir.Value | None, depth: int = 64) -> bool:
    """Whether the graph guarantees that no element is negative."""
    node = value.producer() if value is not None else None
    if node is None or node.domain or depth == 0:
        tensor = _constant(value)
        return tensor is not None and tensor.size > 0 and bool((tensor.numpy() >= 0).all())
    if node.op_type in _NONNEGATIVE:
        return True
    if node.op_type == "Clip":
        low = _constant(node.inputs[1]) if len(node.inputs) > 1 else None
        return low is not None and float(low.numpy().min()) >= 0
    if node.op_type == "Pad":
        fill = _fill(node)
        return fill is not None and fill >= 0 and _never_negative(node.inputs[0], depth - 1)
    if node.op_type in _REARRANGING | _SIGN_KEEPING:
        return _never_negative(node.inputs[0], depth - 1)
    if node.op_type in _ALL_INPUTS_SIGN_KEEPING:
        return all(_never_negative(v, depth - 1) for v in node.inputs)
    return False


def _fill(node: ir.Node) -> float | None:
    """The number with which a Pad fills, 0 where it repeats values; None if unknown."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None or node.attributes.get_string("mode", "constant") != "constant":
        return 0.0
    tensor = _constant(value)
    return None if tensor is None else float(tensor.numpy().reshape(-1)[0])


# --- one site per tensor -------------------------------------------------------------------


def _after_activation(value: ir.Value) -> ir.Value:
    """The value after a Relu or Clip that integer kernels compute in the same pass."""
    uses = list(value.uses())
    if len(uses) == 1 and not value.is_graph_output():
        node, index = uses[0]
        if node.op_type in _ACTIVATIONS and not node.domain and index == 0:
            return node.outputs[0]
    return value


def _tensor_sites(model: ir.Model, found: _Found) -> list[Site]:
    """One site for each tensor that integer kernels read or write.

    Inputs and outputs of layers; outputs of Add, Mul, Concat and average pools between
    quantized tensors; and the rearrangements of quantized tensors, on the same scale. The
    graph's outputs stay float.
    """
    owners: dict[ir.Value, tuple[str, ...]] = {}
    grids: dict[ir.Value, ir.Value] = {}
    # The layers that computed a value, as far as only rearrangements lie between.
    makers: dict[ir.Value, tuple[str, ...]] = {}
    for layer in found.layers:
        for _, value in _activation_operands(found.nodes[layer.name]):
            owners[value] = (*owners.get(value, ()), layer.name)
    for node in model.graph:
        if node.name in found.nodes:
            value = _after_activation(node.outputs[0])
            makers[value] = (str(node.name),)
            owners[value] = (*owners.get(value, ()), *makers[value])
            continue
        inputs = [v for v in node.inputs if v is not None and _constant(v) is None]
        if not inputs or node.domain or not all(v in owners for v in inputs):
            continue
        inherited = tuple(name for v in inputs for name in owners[v])
        if node.op_type in _TENSOR_OPS:
            value = _after_activation(node.outputs[0])
            direct = tuple(name for v in inputs for name in makers.get(v, ()))
            owners[value] = (*owners.get(value, ()), *direct) or inherited
        elif _keeps_grid(node):
            # The second output of MaxPool is indices.
            for value in node.outputs if node.op_type == "Split" else node.outputs[:1]:
                owners[value] = (*owners.get(value, ()), *inherited)
                makers[value] = makers.get(inputs[0], ())
                grids[value] = inputs[0]
    order = _definition_order(model)
    return _build_tensor_sites(
        sorted(
            (v for v in owners if v.uses() and not v.is_graph_output()),
            key=lambda v: order[v],
        ),
        owners,
        grids,
    )


def _keeps_grid(node: ir.Node) -> bool:
    if node.op_type == "Pad":
        return _fill(node) == 0
    return node.op_type in _REARRANGING


def _definition_order(model: ir.Model) -> dict[ir.Value, int]:
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    return {value: i for i, value in enumerate(values)}


def _build_tensor_sites(
    tensors: Sequence[ir.Value],
    owners: dict[ir.Value, tuple[str, ...]],
    grids: dict[ir.Value, ir.Value],
) -> list[Site]:
    sites: dict[ir.Value, Site] = {}
    for value in tensors:
        source = sites.get(grids[value]) if value in grids else None
        site = Site(
            name=f"{value.name}@all",
            tensor=str(value.name),
            layers=tuple(dict.fromkeys(owners[value])),
            consumers=tuple((str(node.name), index) for node, index in value.uses()),
            is_weight=False,
            unsigned=_never_negative(value),
        )
        if source is not None:
            site = replace(
                site,
                same_scale_as=source.same_scale_as or source.name,
                unsigned=source.unsigned,
            )
        sites[value] = site
    return list(sites.values())
