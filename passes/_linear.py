"""Layers with a constant weight, and how to scale and shift what they read and compute."""

import math
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.passes._graph import (
    add_initializer,
    changed_constant,
    constant_of,
    formula_for,
    is_standard,
    only_reader,
    replace_node,
)

__all__ = ["LinearLayer", "bias_input", "constant_addend", "linear_layer", "set_addend"]

_Array: TypeAlias = npt.NDArray[np.float64]
_CONVOLUTIONS: Final = ("Conv", "ConvTranspose")


def linear_layer(node: ir.Node | None) -> "LinearLayer | None":
    """The node as a layer, if it is one with a constant weight (and a constant bias)."""
    if node is None or not is_standard(node, *_CONVOLUTIONS, "Gemm", "MatMul"):
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and constant_of(bias) is None:
        return None
    for index in (1, 0) if node.op_type == "MatMul" else (1,):
        weight = constant_of(node.inputs[index])
        if weight is not None and weight.ndim >= 2:
            return LinearLayer(node, index, weight.astype(np.float64))
    return None


def constant_addend(node: ir.Node) -> int | None:
    """Which input of an Add is a constant, if just one is."""
    if not is_standard(node, "Add"):
        return None
    constant = [index for index in (0, 1) if constant_of(node.inputs[index]) is not None]
    return constant[0] if len(constant) == 1 else None


def bias_input(layer: "LinearLayer") -> tuple[ir.Node, int] | None:
    """The node and the input that read a layer's constant bias; of a MatMul, an Add behind."""
    node = layer.node
    if node.op_type != "MatMul":
        has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
        return (node, 2) if has_bias else None
    reader = only_reader(node.outputs[0])
    if reader is None or reader[0].graph is not node.graph:
        return None
    index = constant_addend(reader[0])
    return None if index is None else (reader[0], index)


class _View(NamedTuple):
    """A weight with an axis for each role."""

    array: _Array
    inputs: int
    outputs: int
    groups: int | None

    def shape(self, axis: int) -> list[int]:
        """In which the numbers of the channels along an axis broadcast against the weight."""
        kept = (axis, self.groups)
        return [size if i in kept else 1 for i, size in enumerate(self.array.shape)]

    def times(self, axis: int, channels: _Array) -> _Array | None:
        """Multiply by one number per channel; None if there are not as many channels."""
        shape = self.shape(axis)
        if channels.size not in (1, math.prod(shape)):
            return None
        spread = np.broadcast_to(channels.reshape(-1), math.prod(shape))
        product: _Array = self.array * spread.reshape(shape)
        return product


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A Conv, ConvTranspose, Gemm or MatMul with a constant operand.

    Its channels lie along one axis of its input, over which it sums, and along the same axis
    of its output.
    """

    node: ir.Node
    weight_index: int
    weight: _Array

    @property
    def channel_axis(self) -> int:
        """The axis of the channels, of the input and of the output."""
        if self.node.op_type != "MatMul":
            return 1
        return -1 if self.weight_index == 1 else -2

    @property
    def rank(self) -> int | None:
        """Rank of the output, where the operator tells it."""
        if self.node.op_type in _CONVOLUTIONS:
            return self.weight.ndim
        return 2 if self.node.op_type == "Gemm" else None

    @property
    def channels(self) -> tuple[int, int]:
        """Numbers of input and of output channels."""
        view = self._view()
        return math.prod(view.shape(view.inputs)), math.prod(view.shape(view.outputs))

    def magnitudes(self) -> _Array:
        """The largest magnitude of the weights between two channels.

        Shape [groups, output channels of each, input channels of each].
        """
        view = self._view()
        array = view.array if view.groups is not None else view.array[None]
        shifted = 0 if view.groups is not None else 1
        moved = np.moveaxis(array, (view.outputs + shifted, view.inputs + shifted), (1, 2))
        found: _Array = np.abs(moved).max(axis=tuple(range(3, moved.ndim)), initial=0.0)
        return found

    def times_outputs(self, factor: _Array) -> _Array | None:
        """The weight that also multiplies each output channel; None if there are others."""
        view = self._view()
        product = view.times(view.outputs, factor)
        return None if product is None else product.reshape(self.weight.shape)

    def times_inputs(self, factor: _Array) -> _Array | None:
        """The weight that multiplies each input channel first; None if there are others."""
        view = self._view()
        product = view.times(view.inputs, factor)
        return None if product is None else product.reshape(self.weight.shape)

    def response(self, offset: _Array) -> _Array | None:
        """What an offset of each input channel adds to the output, as a bias.

        None where it is not the same at every position, or where the channels misfit.
        """
        if not offset.any():
            return np.zeros(1)
        view = self._view()
        product = view.times(view.inputs, offset) if self._has_no_border() else None
        if product is None:
            return None
        if self.node.op_type == "MatMul":
            sums: _Array = product.sum(axis=view.inputs, keepdims=True)
            return sums.reshape(-1) if sums.ndim == 2 and view.inputs == 0 else sums
        kept = (view.outputs, view.groups)
        summed = tuple(axis for axis in range(product.ndim) if axis not in kept)
        alpha = self.node.attributes.get_float("alpha", 1.0)
        channels: _Array = product.sum(axis=summed).reshape(-1)
        return channels * alpha

    def as_bias(self, shift: _Array) -> _Array:
        """One number per output channel, in the shape in which it is added."""
        return shift[:, None] if self.channel_axis == -2 else shift

    def write(
        self,
        weight: _Array,
        suffix: str,
        taken: set[str],
        *,
        factor: _Array | float = 1.0,
        shift: _Array,
    ) -> None:
        """Give the layer another weight, and the bias ``old bias * factor + shift``.

        The constants keep their names or, where something else reads them too, get the
        suffix. A MatMul with a shift gets an Add, unless one with a constant follows.
        """
        node, graph = self.node, self.node.graph
        assert isinstance(graph, ir.Graph)
        old = node.inputs[self.weight_index]
        stored = constant_of(old)
        assert old is not None
        assert stored is not None
        dtype = stored.dtype
        new = changed_constant(node, old, weight.astype(dtype), suffix, taken)
        node.replace_input_with(self.weight_index, new)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        addend = constant_of(bias)
        if bias is not None and addend is not None:
            beta = node.attributes.get_float("beta", 1.0)
            node.attributes.pop("beta", None)
            total = (addend.astype(np.float64) * beta * factor + shift).astype(dtype)
            changed = changed_constant(node, bias, total, suffix, taken)
            node.replace_input_with(2, changed)
        elif not shift.any():
            return
        elif node.op_type == "MatMul":
            _add_after(node, shift, f"{new.name}_bias", suffix, taken)
        else:
            view = self._view()
            count = math.prod(view.shape(view.outputs))
            row = np.broadcast_to(shift.reshape(-1), count).astype(dtype)
            node.resize_inputs(3)
            node.replace_input_with(2, add_initializer(graph, f"{new.name}_bias", row, taken))

    def _view(self) -> _View:
        weight, attributes = self.weight, self.node.attributes
        if self.node.op_type == "MatMul":
            inputs, outputs = weight.ndim - 2, weight.ndim - 1
            if self.weight_index == 0:
                inputs, outputs = outputs, inputs
            return _View(weight, inputs, outputs, None)
        if self.node.op_type == "Gemm":
            outputs = 0 if attributes.get_int("transB", 0) else 1
            return _View(weight, 1 - outputs, outputs, None)
        # Convolutions: [groups, first / groups, second, ...], as both are cut in groups.
        groups = attributes.get_int("group", 1)
        shape = (groups, weight.shape[0] // groups, *weight.shape[1:])
        inputs, outputs = (2, 1) if self.node.op_type == "Conv" else (1, 2)
        return _View(weight.reshape(shape), inputs, outputs, 0)

    def _has_no_border(self) -> bool:
        """Whether every element of the output is a sum over the same number of inputs."""
        attributes = self.node.attributes
        if self.node.op_type not in _CONVOLUTIONS:
            return True
        if attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return False
        if any(attributes.get_ints("pads", ())):
            return False
        # The places in which a transposed convolution puts its products overlap unevenly.
        return self.node.op_type == "Conv" or (
            math.prod(self.weight.shape[2:]) == 1
            and not any(attributes.get_ints("output_padding", ()))
            and all(stride == 1 for stride in attributes.get_ints("strides", ()))
            and "output_shape" not in attributes
        )


def _add_after(node: ir.Node, shift: _Array, name: str, suffix: str, taken: set[str]) -> None:
    """Add a constant to what a MatMul computes: with an Add that follows, or a new one."""
    reader = only_reader(node.outputs[0])
    follower = reader[0] if reader is not None and reader[0].graph is node.graph else None
    index = None if follower is None else constant_addend(follower)
    if follower is not None and index is not None:
        old = constant_of(follower.inputs[index])
        assert old is not None
        set_addend(follower, index, old.astype(np.float64) + shift, suffix, taken)
        return
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    dtype = next(array.dtype for v in node.inputs if (array := constant_of(v)) is not None)
    bias = add_initializer(graph, name, shift.astype(dtype), taken)
    op = formula_for(node)
    product = op.MatMul(*node.inputs)
    replace_node(node, op, [op.Add(product, bias)], heir=product)


def set_addend(node: ir.Node, index: int, array: _Array, suffix: str, taken: set[str]) -> None:
    """Give an Add another constant, in the type of the old one."""
    value = node.inputs[index]
    old = constant_of(value)
    assert value is not None
    assert old is not None
    new = changed_constant(node, value, array.astype(old.dtype), suffix, taken)
    node.replace_input_with(index, new)
