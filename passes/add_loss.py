"""Appends the training loss to a graph."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.objective import LossKind, LossTerm, before_cast

__all__ = ["DIVERGENCE", "LABELS", "LOSS", "AddLossPass", "teacher_input"]

LOSS: Final = "onnx_fliqs.loss"
"""Name of the scalar output that the pass adds, unless it is told another."""
DIVERGENCE: Final = "onnx_fliqs.divergence"
"""The same, for how far outputs are from the float model's."""
LABELS: Final = "onnx_fliqs.labels"
"""Name of the input that cross-entropy (int64) or the error of labels (flat floats) adds."""

_LARGEST_VARIANCE: Final = 1e30
"""Keeps the unit of the squared error a finite float32."""


def teacher_input(output: str) -> str:
    """Name of the input that carries the float model's value of an output."""
    return f"onnx_fliqs.teacher.{output}"


class AddLossPass(ir.passes.InPlacePass):
    """Add the weighted sum of loss terms as a scalar output.

    Before:  => (y) { ... }
    After:   => (y, onnx_fliqs.loss) { ...
             ce, log_prob = SoftmaxCrossEntropyLoss <reduction = "mean"> (logits, labels)
             ...
             onnx_fliqs.loss = Sum of weight_i * term_i }

    Requires: the values that the terms name.
    Ensures: outputs as before and the loss behind them; new inputs: the labels where a term
        needs them, and one teacher input per distilled output. The signature grows: this
        is the one pass that changes it.
    Idempotent: a graph with an output of that name is left alone.
    """

    def __init__(self, terms: Sequence[LossTerm], name: str = LOSS) -> None:
        super().__init__()
        self._terms = tuple(terms)
        self._name = name

    def requires(self, model: ir.Model) -> None:
        """The scored values exist."""
        values = ir.convenience.create_value_mapping(model.graph)
        for term in self._terms:
            if term.scores not in values:
                raise ir.passes.PreconditionError(f"the graph has no value {term.scores!r}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Append the terms and their sum."""
        graph = model.graph
        if any(value.name == self._name for value in graph.outputs):
            return ir.passes.PassResult(model, modified=False)
        values = ir.convenience.create_value_mapping(graph)
        total: ir.Value | None = None
        for index, term in enumerate(self._terms):
            add = _Appender(graph, f"{self._name}.{index}")
            value = _TERMS[term.kind](add, graph, values, term)
            weighted = add("Mul", [value, add.constant("weight", np.float32(term.weight))])
            total = weighted if total is None else add("Add", [total, weighted])
        assert total is not None
        final = ir.node("Identity", [total], name=self._name)
        final.outputs[0].name = self._name
        final.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        final.outputs[0].shape = ir.Shape(())
        graph.append(final)
        graph.outputs.append(final.outputs[0])
        return ir.passes.PassResult(model, modified=True)


class _Appender:
    """Appends nodes whose names start with a prefix."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self._graph = graph
        self._prefix = prefix
        self._count = 0

    def __call__(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        outputs: int = 1,
        **attributes: int | str,
    ) -> ir.Value:
        name = f"{self._prefix}.{op_type}_{self._count}"
        self._count += 1
        node = ir.node(op_type, inputs, attributes, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = f"{name}.{i}"
        self._graph.append(node)
        return node.outputs[0]

    def in_float32(self, value: ir.Value) -> ir.Value:
        """The value itself, or a Cast of it."""
        if value.dtype in (None, ir.DataType.FLOAT):
            return value
        return self("Cast", [value], to=int(ir.DataType.FLOAT))

    def constant(self, name: str, array: npt.ArrayLike) -> ir.Value:
        value = ir.val(f"{self._prefix}.{name}", const_value=ir.tensor(array))
        self._graph.register_initializer(value)
        return value


def _teacher(add: _Appender, graph: ir.Graph, output: ir.Value) -> ir.Value:
    """The float model's value of an output, fed as the float model gives it."""
    name, dtype = teacher_input(str(output.name)), output.dtype or ir.DataType.FLOAT
    return add.in_float32(_input(graph, name, dtype, output.shape))


def _input(graph: ir.Graph, name: str, dtype: ir.DataType, shape: ir.Shape | None) -> ir.Value:
    found = next((value for value in graph.inputs if value.name == name), None)
    if found is None:
        found = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)
        graph.inputs.append(found)
    return found


def _cross_entropy(
    add: _Appender, graph: ir.Graph, values: dict[str, ir.Value], term: LossTerm
) -> ir.Value:
    scores = values[term.scores]
    rank = len(scores.shape) if scores.shape is not None else 2
    names = ["onnx_fliqs.batch", *(f"onnx_fliqs.d{i}" for i in range(2, rank))]
    labels = _input(graph, LABELS, ir.DataType.INT64, ir.Shape(names))
    # The second output, log_prob, is what ONNX Runtime's gradient reads.
    return add(
        "SoftmaxCrossEntropyLoss",
        [add.in_float32(scores), labels],
        outputs=2,
        reduction="mean",
    )


def _divergence(
    add: _Appender, graph: ir.Graph, values: dict[str, ir.Value], term: LossTerm
) -> ir.Value:
    """KL(teacher || student), averaged over everything but the class axis 1."""
    output, scores = values[term.output], values[term.scores]
    teacher = _teacher(add, graph, output)
    axis = add.constant("axis", np.array([1], np.int64))
    if scores is before_cast(output):
        log_p = add("LogSoftmax", [teacher], axis=1)
        p = add("Softmax", [teacher], axis=1)
    else:  # the output is a Softmax of the scores: the teacher gives probabilities
        p = add("Max", [teacher, add.constant("tiny", np.float32(1e-12))])
        log_p = add("Log", [p])
    log_q = add("LogSoftmax", [add.in_float32(scores)], axis=1)
    terms = add("Mul", [p, add("Sub", [log_p, log_q])])
    return add("ReduceMean", [add("ReduceSum", [terms, axis], keepdims=0)], keepdims=0)


def _squared_error(
    add: _Appender, graph: ir.Graph, values: dict[str, ir.Value], term: LossTerm
) -> ir.Value:
    """Mean squared difference in units of the teacher's variance."""
    return _mean_square(add, values, term, _teacher(add, graph, values[term.output]))


def _label_error(
    add: _Appender, graph: ir.Graph, values: dict[str, ir.Value], term: LossTerm
) -> ir.Value:
    """The same for labels, in units of theirs; they are fed flat, as axes may differ."""
    labels = _input(graph, LABELS, ir.DataType.FLOAT, ir.Shape(["onnx_fliqs.numbers"]))
    shape = add("Shape", [values[term.output]])
    return _mean_square(add, values, term, add("Reshape", [labels, shape]))


def _mean_square(
    add: _Appender, values: dict[str, ir.Value], term: LossTerm, wanted: ir.Value
) -> ir.Value:
    difference = add("Sub", [add.in_float32(before_cast(values[term.output])), wanted])
    mean = add("ReduceMean", [add("Mul", [difference, difference])], keepdims=0)
    return add(
        "Div",
        [mean, add.constant("variance", np.float32(min(term.variance, _LARGEST_VARIANCE)))],
    )


_TERMS: Final = {
    LossKind.CROSS_ENTROPY: _cross_entropy,
    LossKind.LABEL_ERROR: _label_error,
    LossKind.DIVERGENCE: _divergence,
    LossKind.SQUARED_ERROR: _squared_error,
}
