"""Operators whose operands are quantized: which of them, along which axis, at what cost."""

import math
from collections.abc import Callable
from typing import Final, TypeAlias

import onnx_ir as ir

__all__ = [
    "LAYER_OPERATORS",
    "PRODUCTS",
    "RECURRENT",
    "ShapeOf",
    "after_activation",
    "channel_axis",
    "constant",
    "macs",
    "operands",
    "product_channel_axis",
    "weights",
]

PRODUCTS: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Products of two operands, of which runtimes have integer kernels."""
RECURRENT: Final = ("LSTM", "GRU", "RNN")
"""Recurrent cells: operands 1 and 2 are the weights of the input and of the state."""
LAYER_OPERATORS: Final = (*PRODUCTS, *RECURRENT, "Gather", "Einsum")
"""All of them. Gather counts as the embedding that it is where its table is constant."""

_ACTIVATIONS: Final = ("Relu", "Clip")
"""What integer kernels compute in the same pass as the operator in front of it."""

Shape: TypeAlias = tuple[int, ...]
ShapeOf: TypeAlias = Callable[[ir.Value], Shape | None]
"""The shape of a value, None where it is not known."""


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The content of an initializer, None for anything else."""
    return value.const_value if value is not None and value.is_initializer() else None


def operands(node: ir.Node) -> tuple[int, ...]:
    """Indices of the inputs that a layer of this operator may quantize."""
    if node.op_type in RECURRENT:
        return (1, 2)
    if node.op_type == "Gather":
        return (0,)
    return tuple(range(len(node.inputs))) if node.op_type == "Einsum" else (0, 1)


def weights(node: ir.Node) -> tuple[tuple[int, ir.Value], ...]:
    """The constant operands, with their indices (of an Einsum, those that are matrices)."""
    found = [(i, node.inputs[i]) for i in operands(node) if i < len(node.inputs)]
    return tuple(
        (index, value)
        for index, value in found
        if value is not None
        and (tensor := constant(value)) is not None
        and (node.op_type != "Einsum" or len(tensor.shape) > 1)
    )


def after_activation(value: ir.Value) -> ir.Value:
    """The value after a Relu or Clip that integer kernels compute in the same pass."""
    uses = list(value.uses())
    if len(uses) == 1 and not value.is_graph_output():
        node, index = uses[0]
        if node.op_type in _ACTIVATIONS and not node.domain and index == 0:
            return node.outputs[0]
    return value


def channel_axis(node: ir.Node, index: int) -> int | None:
    """The axis of a weight along which it has scales of its own; None for one scale.

    It makes channels of the output, so that an integer kernel can multiply by the scale after
    it has added up the products. The rows of a table are activations: they have one scale, so
    that a runtime can dequantize those that it has read, in one pass.
    """
    tensor = constant(node.inputs[index])
    rank = 0 if tensor is None else len(tensor.shape)
    if node.op_type in RECURRENT:
        return 1  # [directions, gates * hidden, inputs]
    if node.op_type == "Einsum":
        return _free_label(node, index)
    return None if node.op_type == "Gather" else product_channel_axis(node, index, rank)


def product_channel_axis(node: ir.Node, index: int, rank: int) -> int | None:
    """Like :func:`channel_axis`, for an operand of a product that has so many axes."""
    if rank < 2:
        return None
    if node.op_type in ("Conv", "ConvTranspose"):
        return {"Conv": 0, "ConvTranspose": 1}[node.op_type] if index == 1 else None
    if node.op_type == "Gemm":
        transposed = node.attributes.get_int("transB" if index else "transA", 0)
        return (0 if transposed else 1) if index else (1 if transposed else 0)
    # ONNX Runtime's integer kernels take one scale for a stack of matrices.
    return (1 if index else 0) if rank == 2 else None


def macs(node: ir.Node, shape_of: ShapeOf) -> int | None:
    """Multiply-accumulates of one run, None where a shape that counts is not known."""
    if node.op_type == "Gather":
        return 0
    shapes = [None if value is None else shape_of(value) for value in node.inputs]
    output = shape_of(node.outputs[0])
    if node.op_type == "Einsum":
        return _einsum_macs(node, shapes)
    first, second = shapes[0], shapes[1]
    if first is None or second is None:
        return None
    if node.op_type in RECURRENT:
        state = shapes[2]
        # Each step of each sample meets every weight once.
        return None if state is None else math.prod(first[:2]) * _size(second, state)
    if node.op_type == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:])
    if output is None:
        return None
    if node.op_type == "Conv":
        return math.prod(output) * math.prod(second[1:])
    if node.op_type == "Gemm":
        return math.prod(output) * first[0 if node.attributes.get_int("transA", 0) else 1]
    return math.prod(output) * first[-1]


def _size(*shapes: Shape) -> int:
    return sum(math.prod(shape) for shape in shapes)


# --- Einsum --------------------------------------------------------------------------------


def _terms(node: ir.Node) -> tuple[list[str], str | None]:
    """The labels of each operand, and of the output where they are spelled out."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    return left.split(","), right if arrow else None


def _free_label(node: ir.Node, index: int) -> int | None:
    """The first axis of an operand that the output keeps and no other operand has."""
    terms, output = _terms(node)
    mine = terms[index]
    if output is None or "." in mine:
        return None
    others = "".join(terms[:index] + terms[index + 1 :])
    free = [axis for axis, label in enumerate(mine) if label in output and label not in others]
    return free[0] if free else None


def _einsum_macs(node: ir.Node, shapes: list[Shape | None]) -> int | None:
    """The product of the sizes of all labels."""
    sizes: dict[str, int] = {}
    for term, shape in zip(_terms(node)[0], shapes, strict=True):
        if shape is None:
            return None
        before, dots, after = term.partition("...")
        hidden = len(shape) - len(before) - len(after) if dots else 0
        # Ellipses are aligned at their ends.
        labels = [*before, *(f"-{i}" for i in range(hidden, 0, -1)), *after]
        for label, size in zip(labels, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    return math.prod(sizes.values())
