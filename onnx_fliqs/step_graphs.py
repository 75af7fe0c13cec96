"""Cuts a gradient graph into what runs once a step and what runs for each part of a batch.

Weights are quantized, and rearranged for the kernels, in graphs *before* the parts; masks, and
whatever else is linear in the gradients of the parts, are applied to their sum *after* them.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir
from onnx_ir.passes import common

from onnx_fliqs.partition import united
from onnx_fliqs.passes._graph import is_standard, with_bodies
from onnx_fliqs.passes._ops import Ops

__all__ = ["StepGraphs", "cut_step", "part_value"]

_LINEAR: Final = ("Identity", "Mul", "Reshape", "Transpose")
"""Operators that are linear in the one operand of which the gradient of a part is made, and
that do not make it smaller: where little is left of it, little has to be added up."""
_FREE: Final = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
"""Operators that copy nothing, unless what they give leaves the graph."""
_RANDOM: Final = frozenset(
    """
    Bernoulli Dropout Multinomial RandomNormal RandomNormalLike RandomUniform
    RandomUniformLike
    """.split()  # noqa: SIM905 - reads as a list
)
"""Operators whose results differ from part to part whatever they read."""


@dataclass(frozen=True, slots=True)
class StepGraphs:
    """The graphs of a step. A value that crosses into a later one keeps its name."""

    before: tuple[ir.Model, ...]
    """What follows from the parameters, in shares that have about as much to do."""
    part: ir.Model
    """The loss of a part, then what the gradient is made of."""
    after: ir.Model
    """The sum of the gradients, from the values of all parts (:func:`part_value`)."""


def part_value(name: str, index: int) -> str:
    """What an output of one of the parts is called in the graph after them."""
    return f"{name}/part_{index}"


def cut_step(
    model: ir.Model,
    parameters: Collection[str],
    formats: Collection[str],
    *,
    shares: int,
    weights: Sequence[float],
) -> StepGraphs:
    """Cut the gradient graph of a step.

    What depends on the formats alone are few numbers, which each graph computes for itself.

    Args:
        model: A graph without functions, whose outputs are the loss and the gradient, a
            Concat. It is not changed.
        parameters: Inputs that are the same for all parts: weights.
        formats: Inputs that are the same for all parts, and small.
        shares: The most graphs to make of what comes before the parts. What follows from the
            same parameter is in one of them.
        weights: What the gradient of each part is multiplied by in the sum.
    """
    model = model.clone()
    graph = model.graph
    loss, gradient = graph.outputs
    roots = _roots(graph, parameters, formats)
    added, linear = _linear_end(gradient, roots)
    crossing = _with_types(model, _crossing(graph, roots, linear))
    return StepGraphs(
        tuple(
            _extract(model, graph.inputs, share) for share in _shares(crossing, roots, shares)
        ),
        _extract(model, [*graph.inputs, *crossing], [loss, *added]),
        _after(model, added, gradient, weights),
    )


@dataclass(frozen=True, slots=True)
class _Roots:
    """What values follow from."""

    samples: AbstractSet[ir.Value]
    """Those that follow from the samples."""
    parameters: Mapping[ir.Value, frozenset[str]]
    """All others that follow from parameters: the names of these."""


def _roots(graph: ir.Graph, parameters: Collection[str], formats: Collection[str]) -> _Roots:
    named = {value: str(value.name) for value in graph.inputs}
    samples = {v for v, name in named.items() if name not in (*parameters, *formats)}
    found = {v: frozenset({name}) for v, name in named.items() if name in parameters}
    for node in graph:
        reads = list(_read_values(node))
        random = any(inner.op_type in _RANDOM for inner in with_bodies(node))
        if random or not samples.isdisjoint(reads):
            samples.update(node.outputs)
        elif names := frozenset().union(*(found.get(value, ()) for value in reads)):
            found |= dict.fromkeys(node.outputs, names)
    return _Roots(samples, found)


def _read_values(node: ir.Node) -> Iterator[ir.Value]:
    for inner in with_bodies(node):
        yield from (value for value in inner.inputs if value is not None)


def _linear_end(gradient: ir.Value, roots: _Roots) -> tuple[list[ir.Value], set[ir.Node]]:
    """The values of the parts that can be added up, and the nodes from there on."""
    concat = gradient.producer()
    assert concat is not None
    linear = {concat}
    ends: dict[ir.Value, None] = {}
    for operand in concat.inputs:
        assert operand is not None
        value, passed = _end(operand, roots, _LINEAR)
        linear |= passed
        # The gradient of the loss varies with the samples; so does what is multiplied by it,
        # and all else is zero.
        if value in roots.samples:
            ends[value] = None
    added = []
    for end in ends:
        # A sum of what is added up anyway is left for later.
        value, passed = _end(end, roots, (*_LINEAR, "ReduceSum"))
        if value is not end and value in ends:
            linear |= passed
        else:
            added.append(end)
    return added, linear


def _end(
    value: ir.Value, roots: _Roots, operators: Sequence[str]
) -> tuple[ir.Value, set[ir.Node]]:
    """What a value is linear in, as far back as operators go, and the nodes from there on."""
    passed = set()
    while (following := _linear_operand(value, roots, operators)) is not None:
        producer = value.producer()
        assert producer is not None
        passed.add(producer)
        value = following
    return value, passed


def _linear_operand(
    value: ir.Value, roots: _Roots, operators: Sequence[str]
) -> ir.Value | None:
    """What a value is linear in, if nothing else is made of it and that varies with parts."""
    node = value.producer()
    if node is None or not is_standard(node, *operators) or len(value.uses()) > 1:
        return None
    varying = [index for index, v in enumerate(node.inputs) if v in roots.samples]
    if len(varying) != 1 or (varying[0] > 0 and node.op_type != "Mul"):
        return None
    return node.inputs[varying[0]]


def _crossing(graph: ir.Graph, roots: _Roots, linear: Collection[ir.Node]) -> list[ir.Value]:
    """Computed from the parameters, and read by the parts."""
    found: dict[ir.Value, None] = {}
    for node in graph:
        if node in linear or roots.samples.isdisjoint(node.outputs):
            continue
        for value in _read_values(node):
            made = _made(value)
            if made in roots.parameters and made.producer() is not None:
                found[made] = None
    return list(found)


def _made(value: ir.Value) -> ir.Value:
    """What a value is but for its shape."""
    node = value.producer()
    while node is not None and is_standard(node, *_FREE) and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _with_types(model: ir.Model, values: Sequence[ir.Value]) -> list[ir.Value]:
    """Those of the values that can be inputs, with their types and shapes.

    Sizes are left where they are read, to be folded.
    """
    if not values:
        return []
    inferred = _extract(model, model.graph.inputs, values)
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(inferred)
    for value, known in zip(values, inferred.graph.outputs, strict=True):
        value.type, value.shape = known.type, known.shape
    return [value for value in values if value.dtype not in (None, ir.DataType.INT64)]


def _shares(values: Sequence[ir.Value], roots: _Roots, count: int) -> list[list[ir.Value]]:
    """Values in groups of about the same size; of one parameter, all are in one group."""
    names = dict.fromkeys(name for value in values for name in roots.parameters[value])
    groups = united(names, [sorted(roots.parameters[value]) for value in values])
    members = [[v for v in values if not roots.parameters[v].isdisjoint(g)] for g in groups]
    shares: list[list[ir.Value]] = [[] for _ in range(count)]
    for member in sorted(members, key=_size, reverse=True):
        min(shares, key=_size).extend(member)
    return [share for share in shares if share]


def _size(values: Sequence[ir.Value]) -> int:
    """How many numbers there are, of those whose shape is known."""
    shapes = [v.shape for v in values if v.shape is not None and v.shape.is_static()]
    return sum(math.prod(shape.numpy()) for shape in shapes)


def _extract(
    model: ir.Model, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]
) -> ir.Model:
    """What computes some values from others, without inputs that it does not read."""
    graph = ir.convenience.extract(model.graph, inputs, outputs)
    graph.inputs[:] = [v for v in graph.inputs if v.uses() or v.is_graph_output()]
    return ir.Model(graph, ir_version=model.ir_version)


def _after(
    model: ir.Model, added: Sequence[ir.Value], gradient: ir.Value, weights: Sequence[float]
) -> ir.Model:
    """What makes the gradient of the weighted sums of some values."""
    after = _extract(model, [*model.graph.inputs, *added], [gradient])
    graph = after.graph
    names = {value.name for value in added}
    ops = Ops(ir.DataType.FLOAT, "parts/")
    inputs = list(graph.inputs)
    graph.inputs.clear()
    for value in inputs:
        if value.name not in names:
            graph.inputs.append(value)
            continue
        parts = [
            ir.val(part_value(str(value.name), index), ir.DataType.FLOAT, value.shape)
            for index in range(len(weights))
        ]
        graph.inputs.extend(parts)
        terms = [
            part if weight == 1 else ops.Mul(part, float(weight))
            for part, weight in zip(parts, weights, strict=True)
        ]
        ir.convenience.replace_all_uses_with(value, ops.Sum(*terms))
    graph.insert_before(next(iter(graph)), ops.nodes)
    return after
