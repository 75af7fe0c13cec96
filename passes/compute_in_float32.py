"""Let a model of float16, bfloat16 or double compute in float32, between the same ends."""

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.passes._graph import is_standard, label, used_names

__all__ = ["ComputeInFloat32Pass"]

_HALVES: Final = frozenset((ir.DataType.FLOAT16, ir.DataType.BFLOAT16))
_LAYERS: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN")
# What takes float32 wherever it takes another float: these domains, but for a few operators.
_ADAPTABLE_DOMAINS: Final = ("", "com.microsoft")
_BOUND_TO_A_TYPE: Final = ("BitCast",)
# Attributes that hold a data type as a number.
_TYPE_ATTRIBUTES: Final = (
    *("to", "dtype", "output_dtype", "output_datatype"),
    *("precision", "softmax_precision", "stash_type"),
)


class ComputeInFloat32Pass(ir.passes.InPlacePass):
    """Replace float16 and bfloat16, and double where layers compute in it, by float32.

    Before:  g (float16[N,4] x) => (float16[N,3] y) <float16[4,3] w> { y = MatMul (x, w) }
    After:   g (float16[N,4] x) => (float16[N,3] y) <float[4,3] w> {
                 x_float32 = Cast <to = FLOAT> (x)
                 y_float32 = MatMul (x_float32, w)
                 y = Cast <to = FLOAT16> (y_float32) }

    Operators of other domains keep their types, between Casts. A model that mixes types loses
    the Casts between them, and with them the rounding to fewer bits.

    Requires: no model-local functions; inferred types.
    Ensures: no other float type is left but at the ends of the graph and at operators of other
        domains; numbers differ by the narrower type's rounding; the graph's signature is
        unchanged.
    Idempotent: Casts at the ends are left alone.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse functions, whose bodies have no types."""
        if model.functions:
            raise ir.passes.PreconditionError(
                f"the model has {len(model.functions)} functions, but needs 0: inline them"
            )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Put Casts at the ends, then change types in between."""
        change = _Change(model, _replaced_types(model))
        return ir.passes.PassResult(model, modified=change.is_needed() and change.make())


def _replaced_types(model: ir.Model) -> frozenset[ir.DataType]:
    """The types to replace. Double alone may be the precision of a computed size."""
    in_double = any(
        is_standard(node, *_LAYERS)
        and any(v is not None and v.dtype is ir.DataType.DOUBLE for v in node.inputs)
        for node in model.graph.all_nodes()
    )
    return _HALVES | {ir.DataType.DOUBLE} if in_double else _HALVES


def _is_bound(node: ir.Node) -> bool:
    """Whether an operator may insist on a type."""
    return node.domain not in _ADAPTABLE_DOMAINS or node.op_type in _BOUND_TO_A_TYPE


def _is_read_as_it_is(value: ir.Value) -> bool:
    """Whether all readers are Casts to float32, or insist on a type."""
    return all(_is_bound(reader) or _casts_to_float32(reader) for reader in value.consumers())


def _casts_to_float32(node: ir.Node) -> bool:
    return is_standard(node, "Cast") and node.attributes["to"].as_int() == ir.DataType.FLOAT


class _Change:
    """The change of some types in one model."""

    def __init__(self, model: ir.Model, replaced: frozenset[ir.DataType]) -> None:
        self._model = model
        self._replaced = replaced
        self._taken = used_names(model)

    def is_needed(self) -> bool:
        """Whether a value or an attribute has one of the types."""
        return any(self._new_type(value.type) is not None for value in self._values()) or any(
            self._new_attribute(attribute) is not None
            for node in self._model.graph.all_nodes()
            for attribute in node.attributes.values()
        )

    def make(self) -> bool:
        """Change the model; whether anything was left to change."""
        self._refuse_ends()
        nodes = list(self._model.graph.all_nodes())
        done = [self._enclose(node) for node in nodes if _is_bound(node)]
        done += [self._enter(), self._leave()]
        done += [self._change_value(value) for value in list(self._values())]
        done += [
            self._change_attributes(node) for node in nodes if not self._keeps_its_types(node)
        ]
        done += [self._remove_cast(node) for node in nodes]
        return any(done)

    def _values(self) -> Iterator[ir.Value]:
        for graph in self._model.graphs():
            yield from graph.inputs
            yield from graph.initializers.values()
        for node in self._model.graph.all_nodes():
            yield from node.outputs

    def _refuse_ends(self) -> None:
        """Stop where a type is unknown, or no Cast can change it."""
        graph = self._model.graph
        for kind, values in (("input", graph.inputs), ("output", graph.outputs)):
            for value in values:
                is_tensor = isinstance(value.type, ir.TensorType)
                if not is_tensor and self._new_type(value.type) is not None:
                    raise UnsupportedError(
                        f"{kind} {value.name!r} holds {value.dtype}, but is no tensor; give"
                        " the float32 model"
                    )
        for node in filter(_is_bound, graph.all_nodes()):
            for operand in (*node.inputs, *node.outputs):
                if operand is not None and operand.name and operand.dtype is None:
                    raise UnsupportedError(
                        f"{label(node)} of the domain {node.domain!r} stands in a model that"
                        f" is not float32, and the type of {operand.name!r} is unknown; give"
                        " the float32 model"
                    )

    def _keeps_its_types(self, node: ir.Node | None) -> bool:
        """Whether an operator insists on its types, or is a Cast at one of the ends.

        Such a Cast makes only a graph output, or only what operators that insist read.
        """
        if node is None or _is_bound(node):
            return node is not None
        result = node.outputs[0]
        if not is_standard(node, "Cast"):
            return False
        if result.is_graph_output() and node.graph is self._model.graph:
            return not result.uses()
        return bool(result.uses()) and all(map(_is_bound, result.consumers()))

    # --- Casts at the ends -----------------------------------------------------------------

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Node:
        """A Cast that is not in a graph yet."""
        name = (
            f"{value.name}_{'float32' if dtype is ir.DataType.FLOAT else dtype.name.lower()}"
        )
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        result = ir.val(name, dtype, value.shape)
        return ir.node(
            "Cast", [value], {"to": int(dtype)}, outputs=[result], name=f"Cast_{name}"
        )

    def _enter(self) -> bool:
        """Cast the graph's inputs to float32."""
        graph = self._model.graph
        found = [
            value
            for value in graph.inputs
            if value.dtype in self._replaced and not _is_read_as_it_is(value)
        ]
        for value in reversed(found):
            graph.insert_before(graph[0], self._widened(value))
        return bool(found)

    def _widened(self, value: ir.Value) -> ir.Node:
        """A Cast to float32 for all readers but those that insist on the type."""
        cast = self._cast(value, ir.DataType.FLOAT)
        for reader, index in list(value.uses()):
            if reader is not cast and not _is_bound(reader):
                reader.replace_input_with(index, cast.outputs[0])
        return cast

    def _leave(self) -> bool:
        """Cast the graph's outputs back."""
        graph = self._model.graph
        modified = False
        for index, value in enumerate(graph.outputs):
            dtype = value.dtype
            if dtype is None or dtype not in self._replaced or value.is_graph_input():
                continue
            if self._keeps_its_types(value.producer()):
                continue
            cast = self._cast(value, ir.DataType.FLOAT)
            result = cast.outputs[0]
            cast.attributes["to"] = ir.AttrInt64("to", int(dtype))
            result.type, name = value.type, value.name
            graph.outputs[index] = result
            value.name, result.name = result.name, name
            cast.name = f"Cast_{name}"
            graph.append(cast)
            modified = True
        return modified

    def _enclose(self, node: ir.Node) -> bool:
        """Put Casts around an operator that keeps its types."""
        graph = node.graph
        assert graph is not None
        modified = False
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in self._replaced or value.is_graph_input():
                continue
            if self._keeps_its_types(value.producer()):
                continue
            assert value.dtype is not None
            cast = self._cast(value, value.dtype)
            node.replace_input_with(index, cast.outputs[0])
            graph.insert_before(node, cast)
            modified = True
        for value in node.outputs:
            if value.dtype in self._replaced and not _is_read_as_it_is(value):
                graph.insert_after(node, self._widened(value))
                modified = True
        return modified

    # --- types in between ------------------------------------------------------------------

    def _change_value(self, value: ir.Value) -> bool:
        ends = {*self._model.graph.inputs, *self._model.graph.outputs}
        type_ = self._new_type(value.type)
        if type_ is None or value in ends or self._keeps_its_types(value.producer()):
            return False
        if value.const_value is not None:
            value.const_value = self._in_float32(value.const_value, str(value.name))
        value.type = type_
        return True

    def _new_type(self, type_: ir.TypeProtocol | None) -> ir.TypeProtocol | None:
        """The type with float32 in it; None where nothing has to change."""
        if isinstance(type_, ir.TensorType):
            return ir.TensorType(ir.DataType.FLOAT) if type_.dtype in self._replaced else None
        if isinstance(type_, ir.SequenceType | ir.OptionalType):
            inner = self._new_type(type_.elem_type)
            return None if inner is None else type(type_)(inner)
        return None

    def _change_attributes(self, node: ir.Node) -> bool:
        changed = {
            name: new
            for name, attribute in node.attributes.items()
            if (new := self._new_attribute(attribute)) is not None
        }
        node.attributes.update(changed)
        return bool(changed)

    def _new_attribute(self, attribute: ir.Attr) -> ir.Attr | None:
        """The attribute with float32 in it; None where nothing has to change."""
        name = attribute.name
        if attribute.type is ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.dtype in self._replaced:
                return ir.AttrTensor(name, self._in_float32(tensor, name))
        elif attribute.type is ir.AttributeType.INT and name in _TYPE_ATTRIBUTES:
            if attribute.as_int() in self._replaced:
                return ir.AttrInt64(name, int(ir.DataType.FLOAT))
        elif attribute.type is ir.AttributeType.TYPE_PROTO:
            held: ir.TypeAndShape = attribute.value
            type_ = self._new_type(held.type)
            if type_ is not None:
                return ir.AttrTypeProto(name, ir.TypeAndShape(type_, held.shape))
        return None

    def _in_float32(self, tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
        """The same numbers as float32.

        Raises:
            UnsupportedError: One of them is too large.
        """
        numbers = tensor.numpy()
        if tensor.dtype is ir.DataType.DOUBLE:
            return ir.tensor(_rounded(numbers, name), name=tensor.name)
        return ir.tensor(numbers.astype(np.float32), name=tensor.name)

    def _remove_cast(self, node: ir.Node) -> bool:
        """Let an Identity take the place of a Cast from float32 to float32."""
        source = node.inputs[0] if node.inputs else None
        if source is None or source.dtype is not ir.DataType.FLOAT:
            return False
        if not _casts_to_float32(node):
            return False
        graph = node.graph
        assert graph is not None
        copy = ir.node("Identity", [source], name=node.name)
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], [copy], node.outputs, copy.outputs
        )
        return True


def _rounded(numbers: npt.NDArray[np.generic], name: str) -> npt.NDArray[np.float32]:
    """Doubles as float32; what would vanish stays, since a model may divide by it."""
    limits = np.finfo(np.float32)
    sizes = np.abs(numbers.astype(np.float64))
    beyond = np.isfinite(sizes) & (sizes > limits.max)
    if beyond.any():
        raise UnsupportedError(
            f"{name!r} is of type double and holds {sizes[beyond].max():g}, which is beyond"
            " float32; give a float32 model"
        )
    vanishing = (sizes > 0) & (sizes < limits.tiny)
    kept = np.where(vanishing, np.copysign(limits.tiny, numbers), numbers)
    return kept.astype(np.float32)
