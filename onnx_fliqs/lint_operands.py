"""Rules of operators: what their operands and results have to be together."""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import onnx_ir as ir

from onnx_fliqs.containers import container_of
from onnx_fliqs.formats import Format, IntFormat
from onnx_fliqs.layer_operators import (
    LAYER_OPERATORS,
    PRODUCTS,
    after_activation,
    product_channel_axis,
)
from onnx_fliqs.lint_rule import (
    Findings,
    Product,
    QdqGraph,
    is_hardware,
    type_name,
)
from onnx_fliqs.precision import parse_precision
from onnx_fliqs.quantizers import Array, Quantizer, dequantizer, quantizer
from onnx_fliqs.signs import REARRANGING
from onnx_fliqs.targets import Activations, Bias, Placement, Target

__all__ = [
    "bias",
    "blocks",
    "channels",
    "fixed_ranges",
    "one_activation_type",
    "operand_types",
    "shared_scales",
    "weight_range",
]


_EIGHT_BITS: Final = {ir.DataType.INT8, ir.DataType.UINT8}


def channels(graph: QdqGraph, target: Target) -> Findings:
    """Scales per channel: which operators and types have them, and along which axis."""
    if not is_hardware(target):
        return
    for product in _products(graph, target):
        node = product.node
        for index, operand in enumerate((product.first, product.second)):
            if operand.has_one_scale or operand.block or not operand.is_stored:
                continue
            ops, types = target.per_channel_ops, target.per_channel_types
            rank = operand.rank
            axis = None if rank is None else product_channel_axis(node, index, rank)
            message = None
            if ops is not None and node.op_type not in ops:
                message = "its weights need one scale for the whole tensor"
            elif types is not None and type_name(operand.dtype) not in types:
                message = (
                    f"weights of {type_name(operand.dtype)} have no scale per channel, only"
                    f" {', '.join(types)}"
                )
            elif rank is not None and operand.axis != axis:
                wanted = "one scale" if axis is None else f"scales along axis {axis}"
                message = f"its weights have scales along axis {operand.axis}, not {wanted}"
            if message is not None:
                yield node, message


def _products(graph: QdqGraph, target: Target) -> Iterator[Product]:
    """The products that are the target's business; another runtime computes the others."""
    return (each for each in graph.products if target.has_kernel(each.node.op_type))


def blocks(graph: QdqGraph, target: Target) -> Findings:
    """Scales per block: in which operators, types and sizes, and along which axis."""
    if not is_hardware(target):
        return
    for each in graph.quantizers:
        readers = each.node.outputs[0].uses() if each.block else ()
        for node, index in readers:
            allowed = _block_kernels(target, node)
            if (each.dtype, each.block) not in allowed:
                found = f"{type_name(each.dtype)} in blocks of {each.block}"
                known = ", ".join(f"{type_name(t)} in blocks of {n}" for t, n in allowed)
                yield node, f"reads {found}; the target has {known or 'no blocks'} there"
            elif each.axis != _summed_axis(node, index, each.rank):
                yield node, f"reads blocks along axis {each.axis}, over which it does not sum"


def _summed_axis(node: ir.Node, index: int, rank: int | None) -> int | None:
    """The axis of a matrix over which a product sums; None for other operands."""
    channel = None if rank != 2 else product_channel_axis(node, index, 2)
    return None if channel is None or node.op_type not in ("MatMul", "Gemm") else 1 - channel


def _block_kernels(target: Target, node: ir.Node) -> list[tuple[ir.DataType, int]]:
    """The types and sizes of blocks in which a target runs an operator."""
    formats = [fmt for fmt in _weight_formats(target, node.op_type) if fmt.group is not None]
    found = ((container_of(fmt).dtype, fmt.group) for fmt in formats if fmt.group is not None)
    return list(dict.fromkeys(found))


def _weight_formats(target: Target, op_type: str) -> Iterator[Format]:
    for kernels in target.kernels or ():
        if op_type in kernels.ops:
            yield from (parse_precision(name).weights for name in kernels.precisions)


def operand_types(graph: QdqGraph, target: Target) -> Findings:
    """There is a kernel for the types of activations and weights together."""
    if target.operand_types is None:
        return
    allowed = {
        (pair.activations, weights)
        for pair in target.operand_types
        for weights in pair.weights
    }
    for product in _products(graph, target):
        found = (product.activations.dtype, product.weights.dtype)
        names = (type_name(found[0]), type_name(found[1]))
        if None not in found and names not in allowed:
            pairs = ", ".join(" x ".join(pair) for pair in sorted(allowed))
            message = f"multiplies {' x '.join(names)}, which is not among {pairs}"
            yield product.node, message


def one_activation_type(graph: QdqGraph, target: Target) -> Findings:
    """What an operator in integers reads and writes is of one type."""
    if not target.one_activation_type:
        return
    for node in graph.nodes:
        operands = [value for value in node.inputs if _is_computed_float(value)]
        read = [each for value in operands if (each := dequantizer(value)) is not None]
        if not _may_read_codes(node, target) or len(read) < len(operands):
            continue
        read = [each for each in read if not each.is_stored]
        if node.op_type in PRODUCTS:
            read = read[:1]
        made = (quantizer(after_activation(value)) for value in node.outputs)
        written = [each for each in made if each is not None]
        names = {type_name(each.dtype) for each in (*read, *written)}
        if len(names) > 1 and read:
            message = f"its activations are of {' and '.join(sorted(names))}; one is needed"
            yield node, message


def _is_computed_float(value: ir.Value | None) -> bool:
    """Whether a value may be quantized by the graph; sizes and indices are not."""
    if value is None or value.is_initializer():
        return False
    return value.dtype is None or value.dtype.is_floating_point()


def _may_read_codes(node: ir.Node, target: Target) -> bool:
    """Whether an operator may run on codes."""
    if node.op_type in LAYER_OPERATORS:
        return target.has_kernel(node.op_type)
    return _rearranges(node, target) or node.op_type in (
        *target.between_ops,
        *target.shared_scale_ops,
    )


def weight_range(graph: QdqGraph, target: Target) -> Findings:
    """Codes of weights keep to the bits that the target's kernels take."""
    for product in _products(graph, target):
        narrow = _narrow_format(target, product.node.op_type, product.weights.dtype)
        codes = None if narrow is None else product.weights.codes
        if narrow is None or codes is None or not codes.size:
            continue
        least, most = int(codes.min()), int(codes.max())
        if least < narrow.min or most > narrow.max:
            message = f"codes of its weights reach from {least} to {most}"
            yield product.node, f"{message}; the target takes {narrow.bits} bits"


def _narrow_format(
    target: Target, op_type: str, dtype: ir.DataType | None
) -> IntFormat | None:
    """The widest of the weights that travel in a type, if it does not need all codes."""
    formats = [
        fmt
        for fmt in _weight_formats(target, op_type)
        if isinstance(fmt, IntFormat) and container_of(fmt).dtype is dtype
    ]
    widest = max(formats, key=lambda fmt: fmt.bits, default=None)
    return None if widest is None or container_of(widest).native else widest


def bias(graph: QdqGraph, target: Target) -> Findings:
    """The bias of a product of quantized operands is what the target adds to its sums."""
    if not is_hardware(target):
        return
    for product in _products(graph, target):
        value = product.node.inputs[2] if len(product.node.inputs) > 2 else None
        if value is None:
            continue
        message = _wrong_bias(product, value, target)
        if message is not None:
            yield product.node, message


def _wrong_bias(product: Product, value: ir.Value, target: Target) -> str | None:
    found, wanted = dequantizer(value), product.weights.dtype
    if target.bias is Bias.FLOAT:
        return None if found is None else "its bias is quantized, it has to stay float"
    if target.bias is not Bias.WEIGHT:
        return None if found is None else _wrong_int32_bias(product, found, target)
    if found is None:
        stays = not value.is_initializer()
        return None if stays else f"its bias is float, it has to be {type_name(wanted)}"
    if found.dtype is not wanted:
        return f"its bias is {type_name(found.dtype)}, not {type_name(wanted)} like weights"
    return None if found.has_one_scale else "its bias needs one scale"


def _wrong_int32_bias(product: Product, found: Quantizer, target: Target) -> str | None:
    if found.dtype is not ir.DataType.INT32 or not found.has_zeros:
        return f"its bias is {type_name(found.dtype)}, not INT32 with zero point 0"
    in_integers = {product.first.dtype, product.second.dtype} <= _EIGHT_BITS
    if target.bias is Bias.INT32 and not in_integers:
        return None
    first, second, own = product.first.scale, product.second.scale, found.scale
    if first is None or second is None or own is None or _is_scaled(product.node):
        return None
    if first.size > 1 and second.size > 1:
        return "no scale of its bias fits scales per channel of both operands"
    if not _agree(own.reshape(-1), first.reshape(-1) * second.reshape(-1)):
        return "the scale of its bias is not the product of the scales of its operands"
    return None


def _is_scaled(node: ir.Node) -> bool:
    """Whether a Gemm multiplies its sums or its bias by a number."""
    return any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta"))


def _agree(one: Array, other: Array) -> bool:
    """Whether scales are equal but for rounding, one number standing for many."""
    fit = one.size == other.size or 1 in (one.size, other.size)
    return fit and bool(np.allclose(one, other, rtol=1e-5, atol=0.0))


def shared_scales(graph: QdqGraph, target: Target) -> Findings:
    """Operators that only copy codes read and write the same scale and zero point."""
    for node in graph.nodes:
        operands = _copied(node, target)
        read = [each for value in operands if (each := dequantizer(value)) is not None]
        written = [each for value in node.outputs if (each := quantizer(value)) is not None]
        # In float, as in front of a Relu, and between different types nothing is copied.
        if not read or not written or len(read) < len(operands):
            continue
        first, *others = (*read, *written)
        if node.op_type in target.shared_scale_ops and _signs_differ(target, (first, *others)):
            continue
        if any(each.dtype is first.dtype and not _same_grid(first, each) for each in others):
            yield node, "what it reads and writes differs in scale or zero point"


def _signs_differ(target: Target, grids: Sequence[Quantizer]) -> bool:
    """Whether some of the tensors are without a sign, so that they cannot share a scale."""
    signs = {
        (g.dtype, None if g.zero_point is None else g.zero_point.tobytes()) for g in grids
    }
    return target.activations is Activations.UNSIGNED and len(signs) > 1


def _copied(node: ir.Node, target: Target) -> list[ir.Value | None]:
    """The inputs that share a scale with the output."""
    if node.op_type in target.shared_scale_ops:
        return list(node.inputs)
    return list(node.inputs[:1]) if _rearranges(node, target) else []


def _rearranges(node: ir.Node, target: Target) -> bool:
    """Whether an operator hands on codes as they are."""
    return target.placement is not Placement.LAYER_INPUTS and node.op_type in REARRANGING


def _same_grid(one: Quantizer, other: Quantizer) -> bool:
    pairs = ((one.scale, other.scale), (one.zero_point, other.zero_point))
    return all(a is None or b is None or np.array_equal(a, b) for a, b in pairs)


def fixed_ranges(graph: QdqGraph, target: Target) -> Findings:
    """Operators whose range is known have the scale that follows from it."""
    ranges = {fixed.op: fixed for fixed in target.fixed_ranges}
    for node in graph.nodes:
        fixed = ranges.get(node.op_type)
        found = None if fixed is None else quantizer(node.outputs[0])
        if fixed is None or found is None or found.scale is None or found.zero_point is None:
            continue
        name = type_name(found.dtype)
        bits = {"UINT8": 8, "INT8": 8, "UINT16": 16, "INT16": 16}.get(name)
        if bits is None:
            continue
        if name.startswith("UINT"):
            scale = (fixed.high - fixed.low) / 2**bits
            zero = 0.0 - fixed.low / scale
        else:
            scale, zero = max(abs(fixed.low), abs(fixed.high)) / 2 ** (bits - 1), 0.0
        # Both counts of steps are in use: 2^bits and one less.
        near = np.allclose(found.scale, scale, rtol=2.0 ** (1 - bits), atol=0.0)
        if not near or (np.abs(found.zero_point - zero) > 1).any():
            message = f"its output needs the scale {scale:g} and the zero point {zero:g}"
            yield node, message
