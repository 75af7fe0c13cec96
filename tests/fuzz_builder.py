"""What random models are built with: values, constants and weights in every form."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

__all__ = ["BATCH", "VOCABULARY", "Builder", "FuzzModel", "Value", "value_info"]

BATCH: Final = 2
"""Samples in a batch, where the model does not fix their number."""
OPSETS: Final = (21, 20, 18, 17, 16, 14, 13, 12, 11)
VOCABULARY: Final = 512
"""Integers that are fed lie below."""

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Value:
    """A float tensor inside the model."""

    name: str
    dims: tuple[int, ...]
    """Sizes behind the batch axis, which always comes first."""

    @property
    def rank(self) -> int:
        """Axes, the batch axis included."""
        return 1 + len(self.dims)

    @property
    def size(self) -> int:
        """Elements for one sample."""
        return math.prod(self.dims)


@dataclass(frozen=True, slots=True)
class FuzzModel:
    """A model and what it may be fed."""

    proto: onnx.ModelProto
    batch: int | None
    """The batch size that the model fixes."""

    def __str__(self) -> str:
        return str(onnx.printer.to_text(self.proto))

    def feeds(self, seed: int, batch: int = BATCH) -> dict[str, Array]:
        """Random inputs; both values of a condition occur over the seeds."""
        rng = np.random.default_rng(seed)
        found: dict[str, Array] = {}
        constants = {tensor.name for tensor in self.proto.graph.initializer}
        for entry in self.proto.graph.input:
            if entry.name in constants:
                continue
            tensor = entry.type.tensor_type
            shape = [d.dim_value or self.batch or batch for d in tensor.shape.dim]
            if tensor.elem_type == TensorProto.BOOL:
                found[entry.name] = np.array(seed % 2 == 0)
            elif tensor.elem_type == TensorProto.INT64:
                found[entry.name] = rng.integers(0, VOCABULARY, shape)
            else:
                found[entry.name] = rng.standard_normal(shape).astype(np.float32)
        return found


@dataclass
class _Scope:
    """The main graph, or the body of a control-flow operator."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)


class Builder:
    """A model that grows."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.opset = self.choose(*OPSETS)
        self.batch = self.choose(None, None, None, 1, 3)
        self.values: list[Value] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self._scopes = [_Scope()]
        self._weights: dict[tuple[int, ...], str] = {}
        self._named = self.choose(True, False)
        self._count = 0
        self._rng = np.random.default_rng(self.whole(0, 1 << 16))

    # --- what is drawn ---------------------------------------------------------------------

    def choose(self, *options: Any) -> Any:
        """One of the options; the first is the simplest."""
        return self.draw(st.sampled_from(options))

    def whole(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return self.draw(st.integers(low, high))

    def pick(self, *ranks: int) -> Value:
        """A value of one of the ranks, mostly a late one; any rank where none is given."""
        fitting = [v for v in self.values if not ranks or v.rank in ranks]
        if not fitting:
            return self.reshaped(self.values[-1], self.choose(*ranks))
        return fitting[-1 - self.whole(0, min(2, len(fitting) - 1))]

    # --- what is added ---------------------------------------------------------------------

    def fresh(self) -> str:
        """A name that is not taken."""
        self._count += 1
        return f"v{self._count}"

    def node(self, op: str, inputs: Sequence[Value | str], *dims: Any, **more: Any) -> Any:
        """Add a node.

        Args:
            op: Operator of the standard domain.
            inputs: Values or names.
            dims: Of each output; a single one is returned as a value, more as a list.
            more: Attributes.
        """
        names = [v.name if isinstance(v, Value) else v for v in inputs]
        outputs = [Value(self.fresh(), tuple(each)) for each in dims]
        node = helper.make_node(op, names, [v.name for v in outputs], **more)
        node.name = f"n{self._count}" if self._named else ""
        self._scopes[-1].nodes.append(node)
        return outputs[0] if len(outputs) == 1 else outputs

    def initializer(self, array: Array) -> str:
        """Add an initializer to the present graph."""
        name = self.fresh()
        self._scopes[-1].initializers.append(numpy_helper.from_array(array, name))
        return name

    def constant(self, array: Array) -> str:
        """A constant: an initializer or a Constant node."""
        if self.choose("initializer", "node") == "initializer":
            return self.initializer(array)
        value: Value = self.node("Constant", [], (), value=numpy_helper.from_array(array))
        return value.name

    def ints(self, *numbers: int) -> str:
        """A vector of whole numbers."""
        return self.constant(np.array(numbers, np.int64))

    def scalar(self, number: float) -> str:
        """A float without axes."""
        return self.constant(np.array(number, np.float32))

    def numbers(self, *shape: int, low: float = -1.0, high: float = 1.0) -> Array:
        """Random numbers within bounds."""
        return self._rng.uniform(low, high, shape).astype(np.float32)

    def weight(self, *shape: int, fan_in: int) -> str:
        """The weight of a layer, in one of the forms in which exporters write them."""
        array = self._rng.standard_normal(shape) / math.sqrt(fan_in)
        array = array.astype(np.float16).astype(np.float32)  # so that a Cast loses nothing
        inside = len(self._scopes) > 1
        form = self.choose(
            "initializer",
            "initializer",
            "initializer",
            "constant",
            "outer",
            "shared",
            "input",
            "Identity",
            "Transpose",
            "Reshape",
            "Cast",
        )
        if form == "shared" and shape in self._weights:
            return self._weights[shape]
        name = self._behind(form, array)
        if form == "input" and not inside:
            self.inputs.append(value_info(name, TensorProto.FLOAT, shape))
        if not inside:
            self._weights[shape] = name
        return name

    def _behind(self, form: str, array: Array) -> str:
        value: Value
        if form == "constant":
            value = self.node("Constant", [], (), value=numpy_helper.from_array(array))
        elif form == "outer":
            name = self.fresh()
            self._scopes[0].initializers.append(numpy_helper.from_array(array, name))
            return name
        elif form == "Identity":
            value = self.node("Identity", [self.initializer(array)], ())
        elif form == "Transpose":
            stored = np.ascontiguousarray(array.T)
            value = self.node("Transpose", [self.initializer(stored)], ())
        elif form == "Reshape":
            flat = self.initializer(array.reshape(-1))
            value = self.node("Reshape", [flat, self.ints(*array.shape)], ())
        elif form == "Cast":
            half = self.initializer(array.astype(np.float16))
            value = self.node("Cast", [half], (), to=TensorProto.FLOAT)
        else:
            return self.initializer(array)
        return value.name

    def feed(self, kind: int, *dims: int) -> str:
        """A graph input; one of the same kind and sizes is used again."""
        shape = [] if kind == TensorProto.BOOL else [self.batch or "N", *dims]
        wanted = value_info("", kind, shape).type
        for entry in self.inputs:
            if entry.type == wanted and entry.name.startswith("x"):
                return entry.name
        name = f"x{len(self.inputs)}"
        self.inputs.append(value_info(name, kind, shape))
        return name

    def axes(self, since: int, *axes: int) -> tuple[list[str], dict[str, list[int]]]:
        """Axes as an input or, before an opset, as an attribute."""
        return ([], {"axes": list(axes)}) if self.opset < since else ([self.ints(*axes)], {})

    def reshaped(self, x: Value, rank: int) -> Value:
        """The same numbers in another rank."""
        dims = list(x.dims)
        while len(dims) > rank - 1:
            dims[-2:] = [dims[-2] * dims[-1]]
        dims = dims or [1]
        while len(dims) < rank - 1:
            factor = next((f for f in (2, 3, 5) if dims[-1] % f == 0 and dims[-1] > f), 1)
            dims[-1:] = [dims[-1] // factor, factor]
        return self.reshape(x, dims)

    def reshape(self, x: Value, dims: Sequence[int]) -> Value:
        """Reshape behind the batch axis, whose size is copied, inferred or computed."""
        form = self.choose("inferred", "copied", "computed")
        if form != "computed":
            target = self.ints(-1 if form == "inferred" else 0, *dims)
        else:
            shape = self.node("Shape", [x], ())
            first = self.node("Gather", [shape, self.constant(np.array(0))], (), axis=0)
            inputs, attributes = self.axes(13, 0)
            size = self.node("Unsqueeze", [first, *inputs], (), **attributes)
            parts = [size, self.ints(*dims)] if dims else [size]
            target = self.node("Concat", parts, (), axis=0).name
        result: Value = self.node("Reshape", [x, target], dims)
        return result

    @contextlib.contextmanager
    def body(self) -> Iterator[_Scope]:
        """Nodes go into a body of control flow."""
        self._scopes.append(_Scope())
        try:
            yield self._scopes[-1]
        finally:
            self._scopes.pop()

    def finish(self, outputs: Sequence[Value]) -> FuzzModel:
        """The whole model."""
        (scope,) = self._scopes
        sized = self.choose(True, False)
        infos = [
            value_info(
                value.name,
                TensorProto.FLOAT,
                [self.batch or "N", *value.dims] if sized else [None] * value.rank,
            )
            for value in outputs
        ]
        graph = helper.make_graph(scope.nodes, "g", self.inputs, infos, scope.initializers)
        opset = helper.make_opsetid("", self.opset)
        version = 10 if self.opset > 20 else 8
        proto = helper.make_model(graph, opset_imports=[opset], ir_version=version)
        return FuzzModel(proto, self.batch)


def value_info(name: str, kind: int, shape: Sequence[Any]) -> onnx.ValueInfoProto:
    """Declare a tensor."""
    return helper.make_tensor_value_info(name, kind, shape)
