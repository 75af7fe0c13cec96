"""What operators on integers compute, as operators on floats between their conversions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import onnx_ir as ir

from onnx_fliqs.passes._dequantize import unpacked
from onnx_fliqs.passes._graph import (
    constant_of,
    formula_for,
    is_standard,
    only_reader,
    replace_node,
)
from onnx_fliqs.passes._ops import Ops

__all__ = ["lower_quantized_operator"]


def lower_quantized_operator(node: ir.Node) -> bool:
    """Write a quantized operator as DequantizeLinear, a float operator and QuantizeLinear.

    Layers that quantize their input while they run become float layers at once.

    Returns:
        Whether that is possible.
    """
    lower = _LOWERINGS.get((node.domain, node.op_type))
    op = formula_for(node)
    result = None if lower is None else lower(op, node, _Inputs(node))
    if result is None:
        _forget(op)
        return False
    outputs = list(result.values)
    if result.scale is not None:
        outputs = [op.QuantizeLinear(outputs[0], result.scale, result.zero)]
    layer = result.values[0].producer()
    replace_node(_last_of_dynamic_layer(node) or node, op, outputs)
    if layer is not None and node.name:
        layer.name = node.name.removesuffix("_quant")  # as ONNX Runtime's quantizer found it
    return True


def _forget(op: Ops) -> None:
    """Let the nodes of a formula that is not used read nothing."""
    for node in op.nodes:
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)


class _Inputs:
    """The inputs of a node; those that are missing read as None."""

    def __init__(self, node: ir.Node) -> None:
        self._values = node.inputs

    def __getitem__(self, index: int) -> ir.Value | None:
        return self._values[index] if index < len(self._values) else None

    def three(self, start: int) -> list[ir.Value | None]:
        """Codes, scale and zero point that stand together."""
        return [self[start], self[start + 1], self[start + 2]]


class _Result(NamedTuple):
    """Float values, and how the operator quantizes the first, if it does."""

    values: Sequence[ir.Value]
    scale: ir.Value | None = None
    zero: ir.Value | None = None


_Lowering: TypeAlias = Callable[[Ops, ir.Node, _Inputs], _Result | None]


def _attributes(node: ir.Node, *dropped: str) -> dict[str, Any]:
    return {name: a for name, a in node.attributes.items() if name not in dropped}


def _product(*scales: ir.Value | None) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """The product of constant scales, which is the scale of an int32 bias."""
    arrays = [constant_of(scale) for scale in scales]
    product = np.ones((), np.float32)
    for array in arrays:
        if array is None:
            return None
        product = product * array.astype(np.float32).reshape(-1 if array.size > 1 else ())
    return np.asarray(product, np.float32)


# --- QLinear operators ---------------------------------------------------------------------


def _conv(op: Ops, node: ir.Node, inputs: _Inputs) -> _Result | None:
    x, w = op.DequantizeLinear(*inputs.three(0)), op.DequantizeLinear(*inputs.three(3), axis=0)
    bias = inputs[8]
    if bias is not None:
        scale = _product(inputs[1], inputs[4])
        if scale is None:
            return None
        bias = op.DequantizeLinear(bias, scale, axis=0)
    return _Result(op.node("Conv", [x, w, bias], node.attributes), inputs[6], inputs[7])


def _matmul(op: Ops, _: ir.Node, inputs: _Inputs) -> _Result:
    a = op.DequantizeLinear(*inputs.three(0), axis=-2)
    b = op.DequantizeLinear(*inputs.three(3), axis=-1)
    return _Result([op.MatMul(a, b)], inputs[6], inputs[7])


def _gemm(op: Ops, node: ir.Node, inputs: _Inputs) -> _Result | None:
    columns = 0 if node.attributes.get_int("transB", 0) else 1
    a = op.DequantizeLinear(*inputs.three(0))
    b = op.DequantizeLinear(*inputs.three(3), axis=columns)
    scale = _product(inputs[1], inputs[4])
    bias = inputs[6]
    if scale is None:
        return None
    alpha = np.float32(node.attributes.get_float("alpha", 1.0))
    if bias is not None:
        bias = op.DequantizeLinear(bias, scale * alpha, axis=-1)
    return _Result(op.node("Gemm", [a, b, bias], node.attributes), inputs[7], inputs[8])


def _of_two(op_type: str) -> _Lowering:
    def lower(op: Ops, _: ir.Node, inputs: _Inputs) -> _Result:
        operands = [op.DequantizeLinear(*inputs.three(start)) for start in (0, 3)]
        return _Result(op.node(op_type, operands), inputs[6], inputs[7])

    return lower


def _of_one(op_type: str) -> _Lowering:
    def lower(op: Ops, node: ir.Node, inputs: _Inputs) -> _Result | None:
        if node.attributes.get_int("channels_last", 0):
            return None
        kept = _attributes(node, "channels_last", "opset")
        operand = op.DequantizeLinear(*inputs.three(0))
        return _Result(op.node(op_type, [operand], kept), inputs[3], inputs[4])

    return lower


def _concat(op: Ops, node: ir.Node, inputs: _Inputs) -> _Result:
    starts = range(2, len(node.inputs), 3)
    operands = [op.DequantizeLinear(*inputs.three(start)) for start in starts]
    return _Result(op.node("Concat", operands, node.attributes), inputs[0], inputs[1])


def _where(op: Ops, _: ir.Node, inputs: _Inputs) -> _Result:
    x, y = (op.DequantizeLinear(*inputs.three(start)) for start in (1, 4))
    return _Result([op.Where(inputs[0], x, y)], inputs[7], inputs[8])


# --- layers that quantize their input while they run ---------------------------------------


def _with_bias(op: Ops, value: ir.Value, bias: ir.Value | None) -> _Result:
    return _Result([value if bias is None else op.Add(value, bias)])


def _matmul_of_floats(op: Ops, _: ir.Node, inputs: _Inputs) -> _Result:
    w = op.DequantizeLinear(inputs[1], inputs[2], inputs[3], axis=-1)
    return _with_bias(op, op.MatMul(inputs[0], w), inputs[4])


def _matmul_to_floats(op: Ops, _: ir.Node, inputs: _Inputs) -> _Result:
    a = op.DequantizeLinear(inputs[0], inputs[2], inputs[4], axis=-2)
    b = op.DequantizeLinear(inputs[1], inputs[3], inputs[5], axis=-1)
    return _with_bias(op, op.MatMul(a, b), inputs[6])


def _last_of_dynamic_layer(node: ir.Node) -> ir.Node | None:
    """The Mul that turns the int32 sums of a layer into floats.

    ``sums = MatMulInteger (codes, ...);  f = Cast (sums);  y = Mul (f, scales)``
    """
    if not is_standard(node, "MatMulInteger", "ConvInteger"):
        return None
    cast = only_reader(node.outputs[0])
    if cast is None or not is_standard(cast[0], "Cast"):
        return None
    scaled = only_reader(cast[0].outputs[0])
    return scaled[0] if scaled is not None and is_standard(scaled[0], "Mul") else None


def _integer_layer(op: Ops, node: ir.Node, inputs: _Inputs) -> _Result | None:
    source = inputs[0].producer() if inputs[0] is not None else None
    last = _last_of_dynamic_layer(node)
    if last is None or source is None or not is_standard(source, "DynamicQuantizeLinear"):
        return None
    cast_output = node.outputs[0].consumers()[0].outputs[0]
    scales = next((v for v in last.inputs if v is not cast_output), None)
    scale = _other_factor(scales, source.outputs[1])
    if scale is None:
        return None
    is_conv = node.op_type == "ConvInteger"
    array = constant_of(scale)
    if is_conv and (array is None or array.size > 1):
        return None
    w = op.DequantizeLinear(inputs[1], scale, inputs[3], axis=0 if is_conv else -1)
    operands = [source.inputs[0], w]
    return _Result(op.node("Conv" if is_conv else "MatMul", operands, node.attributes))


def _other_factor(product: ir.Value | None, factor: ir.Value) -> ir.Value | None:
    """What a product has beside one factor."""
    node = product.producer() if product is not None else None
    if node is None or not is_standard(node, "Mul") or factor not in node.inputs:
        return None
    return next((value for value in node.inputs if value is not factor), None)


def _lstm(op: Ops, node: ir.Node, inputs: _Inputs) -> _Result | None:
    """ONNX Runtime's DynamicQuantizeLSTM keeps its weights transposed."""
    weights = []
    for places in (1, 8, 9), (2, 10, 11):
        codes, scale, zero = (constant_of(inputs[index]) for index in places)
        if codes is None or scale is None:
            return None
        # A scale for each direction, or for each direction and row.
        steps = scale.reshape(len(codes), 1, -1)
        zeros = np.zeros(()) if zero is None else zero.reshape(len(codes), 1, -1)
        numbers = codes.astype(np.float32) - zeros.astype(np.float32)
        weights.append((numbers * steps.astype(np.float32)).transpose(0, 2, 1))
    operands = [inputs[0], *weights, *(inputs[index] for index in range(3, 8))]
    return _Result(op.node("LSTM", operands, node.attributes, outputs=len(node.outputs)))


# --- weights in blocks ---------------------------------------------------------------------


def _matmul_of_blocks(op: Ops, node: ir.Node, inputs: _Inputs) -> _Result | None:
    """MatMulNBits: packed codes [N, blocks, bytes], and a scale for each block."""
    sizes = ("bits", "block_size", "K", "N", "weight_prepacked")
    bits, block, k, n, rearranged = (node.attributes.get_int(name, 0) for name in sizes)
    bits = bits or 4
    packed, scale, zero = (constant_of(inputs[index]) for index in (1, 2, 3))
    order = constant_of(inputs[4])
    unknown = [i for i in (3, 4) if inputs[i] is not None and constant_of(inputs[i]) is None]
    if packed is None or scale is None or unknown or rearranged or bits not in (2, 4, 8):
        return None
    blocks = -(-k // block)
    if zero is None:
        zero = np.full((n, blocks), 1 << (bits - 1))
    elif zero.dtype == np.uint8:
        zero = unpacked(zero.reshape(n, -1), bits, blocks)
    codes = unpacked(packed.reshape(n, -1), bits, k).astype(np.float32)
    block_of = np.arange(k) // block if order is None or not order.size else order[:k]
    steps, zeros = (
        a.reshape(n, blocks).astype(np.float32)[:, block_of] for a in (scale, zero)
    )
    weight = np.ascontiguousarray(((codes - zeros) * steps).T)
    return _with_bias(op, op.MatMul(inputs[0], weight), inputs[5])


def _gather_of_blocks(op: Ops, node: ir.Node, inputs: _Inputs) -> _Result | None:
    """GatherBlockQuantized of 4-bit types; of bytes it depends on the release."""
    if inputs[0] is None or inputs[0].dtype not in (ir.DataType.INT4, ir.DataType.UINT4):
        return None
    attributes = node.attributes
    weight = op.DequantizeLinear(
        inputs[0],
        inputs[2],
        inputs[3],
        axis=attributes.get_int("quantize_axis", 1),
        block_size=attributes.get_int("block_size", 128),
    )
    return _Result([op.Gather(weight, inputs[1], axis=attributes.get_int("gather_axis", 0))])


_CONTRIB: Final = "com.microsoft"
_LOWERINGS: Final[Mapping[tuple[str, str], _Lowering]] = {
    ("", "QLinearConv"): _conv,
    ("", "QLinearMatMul"): _matmul,
    ("", "MatMulInteger"): _integer_layer,
    ("", "ConvInteger"): _integer_layer,
    (_CONTRIB, "QGemm"): _gemm,
    (_CONTRIB, "QLinearAdd"): _of_two("Add"),
    (_CONTRIB, "QLinearMul"): _of_two("Mul"),
    (_CONTRIB, "QLinearSigmoid"): _of_one("Sigmoid"),
    (_CONTRIB, "QLinearLeakyRelu"): _of_one("LeakyRelu"),
    (_CONTRIB, "QLinearSoftmax"): _of_one("Softmax"),
    (_CONTRIB, "QLinearAveragePool"): _of_one("AveragePool"),
    (_CONTRIB, "QLinearGlobalAveragePool"): _of_one("GlobalAveragePool"),
    (_CONTRIB, "QLinearConcat"): _concat,
    (_CONTRIB, "QLinearWhere"): _where,
    (_CONTRIB, "DynamicQuantizeMatMul"): _matmul_of_floats,
    (_CONTRIB, "MatMulIntegerToFloat"): _matmul_to_floats,
    (_CONTRIB, "DynamicQuantizeLSTM"): _lstm,
    (_CONTRIB, "MatMulNBits"): _matmul_of_blocks,
    (_CONTRIB, "GatherBlockQuantized"): _gather_of_blocks,
}
