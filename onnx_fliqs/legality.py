"""Which precisions a layer may take: what the target runs, less what makes no difference."""

from collections.abc import Sequence

import onnx_ir as ir

from onnx_fliqs.errors import ConfigError
from onnx_fliqs.layer_operators import PRODUCTS, constant, weights
from onnx_fliqs.precision import Precision
from onnx_fliqs.sites import SearchSpace
from onnx_fliqs.targets import Target

__all__ = ["check_pairs", "group_axis", "legal_precisions"]


def legal_precisions(
    node: ir.Node,
    target: Target,
    precisions: Sequence[Precision],
    *,
    weights_only: bool,
    distinct: bool = True,
) -> list[Precision]:
    """What a layer may choose.

    Args:
        node: Its operator.
        target: What it runs on.
        precisions: To choose from, cheapest first.
        weights_only: Whether its activations stay float.
        distinct: Of precisions that differ only in an operand that the layer does not have,
            the one alone that names a single format, or else the cheapest.
    """
    left = target.kernels is not None and node.op_type in PRODUCTS
    if left and any(index == 0 for index, _ in weights(node)):
        # Kernels take a scale per channel, and compressed weights, on the right only.
        return [precision for precision in precisions if precision.name == "float32"]
    channels = _channels(node)
    legal: dict[object, Precision] = {}
    for precision in precisions:
        group = precision.weights.group
        if not target.runs(node.op_type, precision, channels, weights_only=weights_only):
            continue
        if group is not None and not _fits(node, group, weights_only=weights_only):
            continue
        differs: object = precision
        if distinct and weights_only:
            differs = precision.weights
        elif distinct and not weights(node):
            differs = precision.activations
        if precision.tied or differs not in legal:
            legal[differs] = precision
    return list(legal.values())


def check_pairs(space: SearchSpace, target: Target) -> None:
    """Refuse to choose the formats of operands apart where no layer can.

    Raises:
        ConfigError: Every layer with both operands has to take one format for both.
    """
    both = [layer.name for layer in space.layers if layer.weights and not layer.weight_only]
    if all(precision.tied for name in both for precision in space.choices_of[name]):
        names = ", ".join(p.name for p in space.precisions if p.tied)
        rules = " under its rules" if any(layer.rule for layer in space.layers) else ""
        raise ConfigError(
            f"--separate changes nothing: target {target.name} runs no layer of this model in"
            f" different formats of {names}{rules}; leave it out, or ask for other formats"
        )


def group_axis(node: ir.Node, index: int) -> int | None:
    """The axis of a weight over which a product of matrices sums; None for other weights."""
    tensor = constant(node.inputs[index])
    if node.op_type not in ("MatMul", "Gemm") or tensor is None or len(tensor.shape) != 2:
        return None
    attribute = "transB" if index else "transA"
    transposed = node.op_type == "Gemm" and node.attributes.get_int(attribute, 0) != 0
    # The second operand is [summed, channels], the first [channels, summed].
    return int(transposed) if index else 1 - int(transposed)


def _fits(node: ir.Node, group: int, *, weights_only: bool) -> bool:
    """Whether the weights can be cut into groups of that size."""
    if weights_only or not weights(node):
        return False
    for index, value in weights(node):
        axis, tensor = group_axis(node, index), constant(value)
        if axis is None or tensor is None or tensor.shape.numpy()[axis] % group:
            return False
    return True


def _channels(node: ir.Node) -> int:
    """The fewer of the channels that go in and come out, as far as the weights tell."""
    tensors = [constant(value) for _, value in weights(node)]
    shapes = [tensor.shape.numpy() for tensor in tensors if tensor is not None]
    last = slice(-2, None) if node.op_type == "MatMul" else slice(2)  # of a stack of matrices
    return min((size for shape in shapes for size in shape[last]), default=1 << 30)
