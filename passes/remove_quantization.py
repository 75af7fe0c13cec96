"""Turn a quantized model back into a float model."""

import re
from typing import Final, NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnx_fliqs.passes._dequantize import Grid, dequantized
from onnx_fliqs.passes._graph import (
    add_initializer,
    changed_constant,
    constant_of,
    formula_for,
    is_standard,
    replace_node,
    used_names,
)
from onnx_fliqs.passes._ops import Ops
from onnx_fliqs.passes._qonnx_quantizers import activation_ends, is_qonnx, quantized_by
from onnx_fliqs.passes._quantized_operators import lower_quantized_operator
from onnx_fliqs.passes.remove_unused import RemoveUnusedPass

__all__ = ["RemoveQuantizationPass"]

_DOMAINS: Final = ("", "com.microsoft")
# Operators that move codes about, or choose among them, and do not compute new ones.
_MOVING: Final = frozenset(
    {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Slice", "Gather"}
    | {"Split", "Expand", "Tile", "MaxPool", "DepthToSpace", "SpaceToDepth", "Concat"}
)
# And those that keep the sign of what they choose or average.
_SIGN_KEEPING: Final = _MOVING | {
    *("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax")
}
_NONNEGATIVE: Final = ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Softplus", "Abs", "Exp")
_CLIP_WITH_INPUTS: Final = 11
# What quantizers append to the name of a weight; this tool's sites and their layer.
_CODES: Final = re.compile(r"(_quantized|@.*\.codes)$")


class RemoveQuantizationPass(ir.passes.InPlacePass):
    """Compute on float numbers what a model computes on quantized ones.

    Before:  x_q = QuantizeLinear (x, s, z);  x_d = DequantizeLinear (x_q, s, z)
             w_d = DequantizeLinear (w_codes, t);  y = Conv (x_d, w_d)
    After:   y = Conv (x, w)                        # w: what w_codes stand for

    Rounding goes; where a range begins at zero, a quantizer may have dropped a Relu or a Clip
    in favour of it, and a Clip takes its place. Operators on integers, dynamically quantized
    layers and packed weights become float operators. Quantizers of QONNX go likewise.

    Requires: no model-local functions; constants apart from inputs.
    Ensures: a quantized operator is left only if it is none of those, or if something else
        reads the codes that it makes; the graph's signature is unchanged.
    Idempotent: a float model is left alone.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse functions, whose operands are unknown."""
        if model.functions:
            raise ir.passes.PreconditionError(
                f"the model has {len(model.functions)} functions, but needs 0: inline them"
            )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Write all as DequantizeLinear and QuantizeLinear, then follow each of the former."""
        modified = False
        for node in list(model.graph.all_nodes()):
            modified |= lower_quantized_operator(node)
        removal = _Removal(model)
        for node in list(model.graph.all_nodes()):
            if _is(node, "DequantizeLinear"):
                modified |= removal.remove(node)
            elif is_qonnx(node.domain, node.op_type):
                modified |= removal.remove_qonnx(node)
        modified |= RemoveUnusedPass()(model).modified if modified else False
        return ir.passes.PassResult(model, modified=modified)


def _is(node: ir.Node | None, op_type: str) -> bool:
    return node is not None and node.domain in _DOMAINS and node.op_type == op_type


class _Spacing(NamedTuple):
    """How a node reads or writes codes."""

    scale: ir.Value | None
    grid: Grid | None
    """None where the scale is computed while the model runs."""

    @classmethod
    def of(cls, node: ir.Node) -> "_Spacing":
        """The spacing of a QuantizeLinear or DequantizeLinear."""
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        array, zeros = constant_of(node.inputs[1]), constant_of(zero)
        if array is None or (zero is not None and zeros is None):
            return cls(node.inputs[1], None)
        attributes = node.attributes
        axis, block_size = attributes.get_int("axis", 1), attributes.get_int("block_size", 0)
        return cls(node.inputs[1], Grid(array, zeros, axis, block_size))

    def equals(self, other: "_Spacing") -> bool:
        """Whether the same code means the same number."""
        if self.grid is None or other.grid is None:
            return self.scale is other.scale
        return self.grid.key == other.grid.key


class _Removal:
    """Finds the floats that codes stand for."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._opset = model.opset_imports.get("", 0)
        self._taken = used_names(model)
        self._known: dict[tuple[ir.Value, object], ir.Value | None] = {}

    def remove(self, node: ir.Node) -> bool:
        """Let the readers of a DequantizeLinear read floats; whether that is possible."""
        codes, spacing, result = node.inputs[0], _Spacing.of(node), node.outputs[0]
        assert codes is not None
        op = formula_for(node)
        if not result.is_graph_output():
            self._taken.discard(str(result.name))  # a weight may have the name
        floats = self._floats(codes, spacing)
        self._taken.add(str(result.name))
        if floats is None:
            floats = _computed(op, node, spacing.grid)
        if floats is None:
            return False
        _replace(node, op, floats)
        return True

    def remove_qonnx(self, node: ir.Node) -> bool:
        """Let the readers of a quantizer of QONNX read floats; whether that is possible."""
        source = node.inputs[0]
        assert source is not None
        op, floats = formula_for(node), source
        if constant_of(source) is not None:
            numbers = quantized_by(node)
            if numbers is None:
                return False
            floats = changed_constant(node, source, numbers, "quantized", self._taken)
        else:
            ends = activation_ends(node)
            if ends is None:
                return False
            if ends[0] == 0 and _may_be_negative(source):
                floats = self._clipped(op, source, ends[1])
        _replace(node, op, floats)
        return True

    def _floats(self, codes: ir.Value, spacing: _Spacing) -> ir.Value | None:
        """The value whose rounding gave the codes; None where they are computed as codes."""
        key = (codes, spacing.scale if spacing.grid is None else spacing.grid.key)
        if key not in self._known:
            self._known[key] = self._find(codes, spacing)
        return self._known[key]

    def _find(self, codes: ir.Value, spacing: _Spacing) -> ir.Value | None:
        array, node = constant_of(codes), codes.producer()
        if array is not None and spacing.grid is not None:
            name = _CODES.sub("", str(codes.name))
            numbers = dequantized(array, spacing.grid)
            return add_initializer(self._graph, name, numbers, self._taken)
        if node is None:
            return None
        if is_standard(node, "DynamicQuantizeLinear"):
            return node.inputs[0] if spacing.scale is node.outputs[1] else None
        if _is(node, "QuantizeLinear"):
            own = _Spacing.of(node)
            return self._before(node, own) if own.equals(spacing) else None
        if is_standard(node, *_MOVING):
            return self._moved(codes, node, spacing)
        return None

    def _before(self, node: ir.Node, spacing: _Spacing) -> ir.Value | None:
        """What a QuantizeLinear reads, clipped where its range may stand for an activation."""
        source, grid, dtype = node.inputs[0], spacing.grid, _type_of_codes(node)
        if source is None or grid is None or not grid.is_per_tensor:
            return source
        if not dtype.is_integer() or not _may_be_negative(source):
            return source
        limits = ml_dtypes.iinfo(dtype.numpy())  # type: ignore[no-untyped-call]
        low, high = dequantized(np.array([limits.min, limits.max]), grid)
        if low != 0:
            return source
        op = formula_for(node)
        clipped = self._clipped(op, source, float(high))
        _insert(op, node)
        return clipped

    def _clipped(self, op: Ops, source: ir.Value, high: float) -> ir.Value:
        if self._opset >= _CLIP_WITH_INPUTS:
            return op.Clip(source, 0.0, high)
        return op.Clip(source, min=0.0, max=high)

    def _moved(self, codes: ir.Value, node: ir.Node, spacing: _Spacing) -> ir.Value | None:
        """The result of the same move of floats."""
        if spacing.grid is None or not spacing.grid.is_per_tensor:
            return None
        count = len(node.inputs) if node.op_type == "Concat" else 1
        floats = [self._floats(value, spacing) for value in node.inputs[:count] if value]
        if any(value is None for value in floats):
            return None
        op = formula_for(node)
        copies = op.node(
            node.op_type,
            [*floats, *node.inputs[count:]],
            node.attributes,
            outputs=len(node.outputs),
        )
        _insert(op, node)
        for old, new in zip(node.outputs, copies, strict=True):
            self._known[old, spacing.grid.key] = new
        return copies[list(node.outputs).index(codes)]


def _type_of_codes(node: ir.Node) -> ir.DataType:
    """What a QuantizeLinear makes: the zero point, or without one an attribute, tells it."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is not None and zero.dtype is not None:
        return zero.dtype
    return ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8)


def _replace(node: ir.Node, op: Ops, floats: ir.Value) -> None:
    """Put a formula, or a value that is there already, in the place of a node."""
    result = node.outputs[0]
    if op.nodes or result.is_graph_output():
        replace_node(node, op, [floats])
    else:
        ir.convenience.replace_all_uses_with(result, floats)
        assert node.graph is not None
        node.graph.remove(node, safe=True)


def _insert(op: Ops, node: ir.Node) -> None:
    """Put a formula in front of a node that stays."""
    assert node.graph is not None
    node.graph.insert_before(node, op.nodes)


def _computed(op: Ops, node: ir.Node, grid: Grid | None) -> ir.Value | None:
    """The formula of DequantizeLinear, for codes that are an input or computed as such."""
    codes, scale, *zeros = node.inputs
    if codes is None or scale is None:
        return None
    numbers = op.cast(codes)
    if grid is None:
        shifted = op.Sub(numbers, op.cast(zeros[0])) if zeros and zeros[0] else numbers
        return op.Mul(shifted, scale)
    spread = grid.spread(None if codes.shape is None else len(codes.shape))
    if spread is None:
        return None
    steps, offsets = spread
    return op.Mul(op.Sub(numbers, offsets) if offsets.any() else numbers, steps)


def _may_be_negative(value: ir.Value) -> bool:
    """Whether an activation may have been dropped behind a value."""
    node = value.producer()
    if node is None:
        return False  # an input or a weight is what it is
    if is_standard(node, *_SIGN_KEEPING):
        count = len(node.inputs) if node.op_type == "Concat" else 1
        return any(_may_be_negative(v) for v in node.inputs[:count] if v is not None)
    if is_standard(node, "Clip"):
        low = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
        lowest = node.attributes.get_float("min", -np.inf) if low is None else low.min()
        return bool(lowest < 0)
    return not is_standard(node, *_NONNEGATIVE)
