"""Which values of a model are judged: its outputs or, behind decisions, what they rest on.

A classifier may end in ArgMax, a detector in NonMaxSuppression, an exported scikit-learn model
in a sequence of maps. Such outputs have no gradient, and two models that differ a little may
give them another shape. What tells how well a model keeps up with another, and what can be
learned from, are the numbers right before the decision.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import onnx_ir as ir

from onnx_fliqs.passes._graph import with_bodies

__all__ = [
    "FLOATS",
    "Judged",
    "chosen_outputs",
    "compared_names",
    "exposed",
    "judged_values",
    "tensor_outputs",
    "values_read",
]

FLOATS: Final = (
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.DOUBLE,
)
_LAYERS: Final = frozenset(
    ("Conv", "ConvTranspose", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "RNN")
)
_STEPS: Final = frozenset(("Ceil", "Floor", "Hardmax", "Round", "Sign"))
"""From floats to floats, without a slope."""
_CHOOSING: Final = frozenset(("ArgMax", "ArgMin", "Hardmax", "TopK"))
_COUNTING: Final = frozenset(("Compress", "NonMaxSuppression", "NonZero", "Unique"))
"""The shape of what they give depends on the numbers."""
_SHAPED: Final = {
    **dict.fromkeys(("ConstantOfShape", "Range"), 0),
    **dict.fromkeys(
        ("Expand", "Pad", "Reshape", "Resize", "Slice", "Split", "Tile", "TopK"), 1
    ),
}
"""From which input on they take the shape of what they give."""
_MEASURING: Final = frozenset(("Shape", "Size"))


@dataclass(frozen=True, slots=True)
class Judged:
    """A value that is judged."""

    name: str
    output: str
    """The graph output that it is, or that is computed from it."""
    class_axis: int | None = None
    """The axis along which the output names the largest, if it does."""


@dataclass(slots=True)
class _Facts:
    """What is known of the values that depend on layers; others are in none of the sets."""

    moving: set[ir.Value] = field(default_factory=set)
    """Their numbers change with the weights of layers."""
    smooth: set[ir.Value] = field(default_factory=set)
    """They change a little if the weights do."""
    chosen: set[ir.Value] = field(default_factory=set)
    """Which numbers they hold was decided, and no layer has worked on them since."""
    ragged: set[ir.Value] = field(default_factory=set)
    """Their shape depends on moving numbers."""

    def judgeable(self, value: ir.Value) -> bool:
        rough = value in self.chosen or value in self.ragged
        return value in self.smooth and not rough and _may_be_float(value)


def judged_values(model: ir.Model) -> tuple[Judged, ...]:
    """Find the numbers by which a model is judged, in the order of its outputs.

    A float output that follows smoothly from the layers stands for itself. For any other that
    depends on layers, the nearest values before it that do are taken, unless they only lead
    to such an output as well: what ArgMax compares, the boxes and scores of
    NonMaxSuppression. A model without layers is judged by its float outputs.
    """
    facts = _facts(model)
    outputs = list(model.graph.outputs)
    found = {v: Judged(str(v.name), str(v.name)) for v in outputs if facts.judgeable(v)}
    for output in outputs:
        for value, reader in _frontier(output, facts):
            axis = _class_axis(reader, value)
            found.setdefault(value, Judged(str(value.name), str(output.name), axis))
    if not found:
        floats = [v for v in outputs if _may_be_float(v)]
        return tuple(Judged(str(v.name), str(v.name)) for v in floats)
    return tuple(
        judged
        for value, judged in found.items()
        if judged.name == judged.output or not _leads_to(value, found.keys() - {value})
    )


def chosen_outputs(model: ir.Model) -> frozenset[str]:
    """Outputs that hold what was decided, as the largest scores in their order do."""
    chosen = _facts(model).chosen
    return frozenset(str(value.name) for value in model.graph.outputs if value in chosen)


def compared_names(model: ir.Model) -> list[str]:
    """The values by which two runs of a model are compared.

    Those that are judged or, if there are none, the outputs that are tensors of numbers.
    """
    return [judged.name for judged in judged_values(model)] or tensor_outputs(model)


def exposed(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """The model with some of its values as further outputs; itself if all are outputs."""
    known = {value.name for value in model.graph.outputs}
    missing = [name for name in names if name not in known]
    if not missing:
        return model
    copy = model.clone()
    values = ir.convenience.create_value_mapping(copy.graph)
    copy.graph.outputs.extend(values[name] for name in missing)
    return copy


def tensor_outputs(model: ir.Model) -> list[str]:
    """The names of the outputs that are, or may be, tensors of numbers."""
    return [
        str(value.name)
        for value in model.graph.outputs
        if value.type is None
        or (isinstance(value.type, ir.TensorType) and value.dtype is not ir.DataType.STRING)
    ]


def _may_be_float(value: ir.Value) -> bool:
    return value.type is None or (
        isinstance(value.type, ir.TensorType) and value.dtype in FLOATS
    )


def _has_slope(value: ir.Value) -> bool:
    """Whether it is a float of any width, or the codes of one."""
    node = value.producer()
    is_code = node is not None and node.op_type == "QuantizeLinear"
    return is_code or value.dtype is None or value.dtype.is_floating_point()


def _facts(model: ir.Model) -> _Facts:
    facts = _Facts()
    for node in model.graph:
        inputs = values_read(node)
        layer = _is_layer(node)
        counted = _counts(node, facts) or _any(inputs, facts.ragged)
        if counted:
            facts.ragged.update(node.outputs)
        if node.op_type in _MEASURING or not (layer or _any(inputs, facts.moving)):
            continue
        facts.moving.update(node.outputs)
        if not layer and (node.op_type in _CHOOSING or counted or _any(inputs, facts.chosen)):
            facts.chosen.update(node.outputs)
        if layer or (node.op_type not in _STEPS and _any(inputs, facts.smooth)):
            facts.smooth.update(value for value in node.outputs if _has_slope(value))
    return facts


def _any(values: Sequence[ir.Value], known: set[ir.Value]) -> bool:
    return not known.isdisjoint(values)


def values_read(node: ir.Node) -> list[ir.Value]:
    """What a node reads, with the values that its bodies take from outside."""
    return [value for each in with_bodies(node) for value in each.inputs if value is not None]


def _is_layer(node: ir.Node) -> bool:
    """Whether it works with weights, itself or in its bodies, or looks up embeddings."""
    return any(each.op_type in _LAYERS or _looks_up(each) for each in with_bodies(node))


def _looks_up(node: ir.Node) -> bool:
    table = node.inputs[0] if node.op_type == "Gather" else None
    return (
        table is not None
        and table.is_initializer()
        and table.dtype in FLOATS
        and table.shape is not None
        and len(table.shape) > 1
    )


def _counts(node: ir.Node, facts: _Facts) -> bool:
    """Whether the shape of its outputs depends on moving numbers."""
    if node.op_type in _COUNTING:
        return _any(values_read(node), facts.moving)
    if node.op_type == "Loop":
        return _any([value for value in node.inputs[:2] if value is not None], facts.moving)
    first = _SHAPED.get(node.op_type)
    if first is None:
        return False
    return _any([value for value in node.inputs[first:] if value is not None], facts.moving)


def _leads_to(value: ir.Value, others: Iterable[ir.Value]) -> bool:
    """Whether one of the others follows from a value without another layer."""
    pending = list(others)
    seen: set[ir.Value] = set()
    while pending:
        current = pending.pop()
        if current is value:
            return True
        node = current.producer()
        if current not in seen and node is not None and not _is_layer(node):
            pending += values_read(node)
        seen.add(current)
    return False


def _frontier(output: ir.Value, facts: _Facts) -> Iterator[tuple[ir.Value, ir.Node | None]]:
    """The judgeable values nearest to an output, each with the node that reads it."""
    pending: list[tuple[ir.Value, ir.Node | None]] = [(output, None)]
    seen: set[ir.Value] = set()
    while pending:
        value, reader = pending.pop()
        if value in seen or value not in facts.moving:
            continue
        seen.add(value)
        if facts.judgeable(value):
            yield value, reader
            continue
        node = value.producer()
        if node is not None:
            pending += [(source, node) for source in reversed(values_read(node))]


def _class_axis(node: ir.Node | None, value: ir.Value) -> int | None:
    if node is None or node.op_type != "ArgMax" or value.shape is None:
        return None
    return node.attributes.get_int("axis", 0) % len(value.shape)
