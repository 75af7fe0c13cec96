"""Writes nodes the way formulas are written."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = ["Operand", "Ops", "known_shape"]

Operand: TypeAlias = ir.Value | float | Sequence[int] | npt.NDArray[Any] | None
"""What a node may read: a value, or a number of which a constant is made. A ``float`` takes
the type that the formula computes in; integers are int64, a sequence of them a vector."""

_CONTRIB: Final = "com.microsoft"


class Ops:
    """The nodes of a formula, in order: ``op.Mul(x, 0.5)`` adds one and gives its value.

    Every operator of ONNX is a method: positional arguments are inputs, keywords attributes.
    """

    def __init__(
        self, dtype: ir.DataType | None, stem: str = "", *, whole: "Ops | None" = None
    ) -> None:
        """Start an empty formula.

        Args:
            dtype: The type that it computes in, float32 where that is not known.
            stem: What the names of its nodes and values start with.
            whole: The formula that it is a part of.
        """
        self.dtype: Final = dtype or ir.DataType.FLOAT
        self.nodes: Final[list[ir.Node]] = [] if whole is None else whole.nodes
        self._stem = stem
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], ir.Value] = (
            {} if whole is None else whole._constants
        )

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        """The method that adds an operator with one output."""

        def add(*inputs: Operand, **attributes: Any) -> ir.Value:
            return self.node(op_type, inputs, attributes)[0]

        return add

    def contrib(
        self,
        op_type: str,
        *inputs: Operand,
        outputs: int = 1,
        only: int | None = None,
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Add an operator that ONNX Runtime adds to those of ONNX; gives all its values.

        Args:
            op_type: The operator.
            inputs: What it reads.
            outputs: Number of its outputs.
            only: The one output to compute, if not all are needed.
            attributes: Its attributes.
        """
        values = self.node(op_type, inputs, attributes, domain=_CONTRIB, outputs=outputs)
        if only is not None:
            for index, value in enumerate(values):
                value.name = value.name if index == only else ""
        return values

    def again(self, node: ir.Node, *inputs: Operand, **changes: Any) -> Sequence[ir.Value]:
        """Add a node like another one, with other inputs and some other attributes.

        An attribute that is changed to None is left out.
        """
        attributes = {**node.attributes, **changes}
        kept = {name: value for name, value in attributes.items() if value is not None}
        return self.node(
            node.op_type, inputs, kept, domain=node.domain, outputs=len(node.outputs)
        )

    def node(
        self,
        op_type: str,
        inputs: Sequence[Operand],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> Sequence[ir.Value]:
        """Add any node; gives all its values."""
        values = [
            value if value is None or isinstance(value, ir.Value) else self._constant(value)
            for value in inputs
        ]
        while values and values[-1] is None:
            values.pop()
        return self._append(op_type, values, attributes or {}, domain, outputs)

    def part(self, name: str) -> "Ops":
        """The same formula; names of nodes that are added this way tell what they are for."""
        return Ops(self.dtype, f"{self._stem}{name}/", whole=self)

    def body(self) -> "Ops":
        """An empty formula for the body of a node that is yet to be added."""
        return Ops(self.dtype, f"{self._stem}body_{len(self.nodes)}/")

    def vector(self, numbers: Sequence[int]) -> ir.Value:
        """Integers as a value, where an operand will not do."""
        return self._constant(numbers)

    def discard(self) -> None:
        """Forget the nodes, and let what they read forget them."""
        for node in self.nodes:
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)
        self.nodes.clear()

    def zeros(self, shape: Operand) -> ir.Value:
        """Zeros of a shape that is known when the graph runs."""
        return self.full(shape, 0.0)

    def full(self, shape: Operand, number: float) -> ir.Value:
        """One number, repeated to a shape that is known when the graph runs."""
        tensor = ir.tensor(np.array([number], self.dtype.numpy()))
        return self.ConstantOfShape(shape, value=tensor)

    def cast(self, value: ir.Value) -> ir.Value:
        """Convert to the type that the formula computes in."""
        return self.Cast(value, to=int(self.dtype))

    def sum_to(self, gradient: ir.Value, operand: ir.Value, result: ir.Value) -> ir.Value:
        """Undo broadcasting: add up a gradient over the axes along which an operand repeats.

        Args:
            gradient: Of the shape of the result.
            operand: Tells the shape to come to.
            result: What the operand was broadcast to; where both shapes are known to be the
                same, nothing is added.
        """
        known = known_shape(result)
        if known is not None and known == known_shape(operand):
            return gradient
        large, small = self.Shape(gradient), self.Shape(operand)
        missing = self.Sub(self.Shape(large), self.Shape(small))
        ones = self.ConstantOfShape(missing, value=ir.tensor(np.array([1], np.int64)))
        repeated = self.Not(self.Equal(large, self.Concat(ones, small, axis=0)))
        axes = self.Reshape(self.NonZero(repeated), [-1])
        summed = self.ReduceSum(gradient, axes, keepdims=1, noop_with_empty_axes=1)
        return self.Reshape(summed, small)

    def _append(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any],
        domain: str,
        outputs: int,
    ) -> Sequence[ir.Value]:
        name = f"{self._stem}{op_type}_{len(self.nodes)}"
        node = ir.Node(
            domain,
            op_type,
            inputs,
            ir.convenience.convert_attributes(attributes),
            num_outputs=outputs,
            name=name,
        )
        for index, value in enumerate(node.outputs):
            value.name = f"{name}.{index}"
        self.nodes.append(node)
        return node.outputs

    def _constant(self, number: float | Sequence[int] | npt.NDArray[Any]) -> ir.Value:
        if isinstance(number, float):
            array = np.array(number, self.dtype.numpy())
        elif isinstance(number, np.ndarray):
            array = number
        else:
            array = np.array(number, np.int64)
        key = (array.dtype.str, array.tobytes(), array.shape)
        if key not in self._constants:
            attributes = {"value": ir.tensor(array)}
            (self._constants[key],) = self._append("Constant", [], attributes, "", 1)
        return self._constants[key]


def known_shape(value: ir.Value) -> list[int | str] | None:
    """The dimensions, if each is a number or has a name."""
    if value.shape is None:
        return None
    found = [d if isinstance(d, int) else d.value for d in value.shape]
    return None if None in found else [d for d in found if d is not None]
