"""GRU and LSTM in terms of the cells that ONNX Runtime can train.

Those run forwards only, want states to start from, know nothing but the usual activations, and
go through every sequence to its end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from onnx_fliqs.passes._gradient_rule import Lowering, NoGradientError, input_of
from onnx_fliqs.passes._ops import Ops

__all__ = ["LOWERINGS"]

_ACTIVATIONS: Final[Mapping[str, Sequence[str]]] = {
    "GRU": ("sigmoid", "tanh"),
    "LSTM": ("sigmoid", "tanh", "tanh"),
}
_GATES: Final = {"GRU": 3, "LSTM": 4}
_BIAS, _LENGTHS, _STATE, _CELL_STATE, _PEEPHOLES = 3, 4, 5, 6, 7
_BEFORE_THE_START: Final = np.iinfo(np.int64).min


@dataclass(frozen=True, slots=True)
class _Cell:
    """The operands of a cell, time first; the first axis of the others is the direction."""

    op_type: str
    x: ir.Value
    weights: Sequence[ir.Value]
    """Those of the input, the recurrent ones, and the bias."""
    states: Sequence[ir.Value]
    hidden: int
    directions: int
    backwards: Sequence[bool]
    """For each direction."""
    lengths: ir.Value | None
    """Of the sequences, int64, where they end at different times."""
    linear_before_reset: int


def _recurrent(op: Ops, node: ir.Node) -> list[ir.Value]:
    """One training cell per direction."""
    cell = _read(op, node)
    results = [_run(op, cell, direction) for direction in range(cell.directions)]
    y, *finals = [
        _joined(op, parts, axis=0 if index else 1)
        for index, parts in enumerate(zip(*results, strict=True))
    ]
    return [y, *finals]


# -- reading --------------------------------------------------------------------------------


def _read(op: Ops, node: ir.Node) -> _Cell:
    hidden, directions = _checked(node)
    x, weight, recurrence = node.inputs[:3]
    assert x is not None and weight is not None and recurrence is not None  # noqa: PT018
    bias = input_of(node, _BIAS)
    size = 2 * _GATES[node.op_type] * hidden
    places = (_STATE, _CELL_STATE) if node.op_type == "LSTM" else (_STATE,)
    states = [input_of(node, place) for place in places]
    batch = op.Shape(x, start=1, end=2)
    lengths = input_of(node, _LENGTHS)
    mode = node.attributes.get_string("direction", "forward")
    return _Cell(
        node.op_type,
        x,
        [weight, recurrence, op.zeros([directions, size]) if bias is None else bias],
        [
            op.zeros(op.Concat([directions], batch, [hidden], axis=0))
            if state is None
            else state
            for state in states
        ],
        hidden,
        directions,
        [mode == "reverse", True],
        None if lengths is None else op.Cast(lengths, to=int(ir.DataType.INT64)),
        node.attributes.get_int("linear_before_reset", 0),
    )


def _checked(node: ir.Node) -> tuple[int, int]:
    """Hidden size and number of directions.

    Raises:
        NoGradientError: The training cells cannot do what this one does.
    """
    attributes = node.attributes
    weight = node.inputs[2]
    shape = list(weight.shape) if weight is not None and weight.shape is not None else []
    sizes = [size for size in shape if isinstance(size, int)]
    if len(sizes) < 3:
        raise NoGradientError("the size of its weights is not known")
    directions, _, hidden = sizes
    usual = list(_ACTIVATIONS[node.op_type]) * directions
    if [name.lower() for name in attributes.get_strings("activations", usual)] != usual:
        raise NoGradientError("it has unusual activations")
    if input_of(node, _PEEPHOLES) is not None:
        raise NoGradientError("it has peepholes")
    for name in ("clip", "input_forget", "layout"):
        if name in attributes and attributes[name].value:
            raise NoGradientError(f"it has {name}")
    ends_early = input_of(node, _LENGTHS) is not None and node.op_type == "LSTM"
    if ends_early and len(node.outputs) > 2 and node.outputs[2].uses():
        raise NoGradientError("its sequences have lengths, and its last cell state is read")
    return hidden, directions


# -- writing --------------------------------------------------------------------------------


def _run(op: Ops, cell: _Cell, direction: int) -> list[ir.Value]:
    """All states of one direction, and the last ones."""
    operands = [
        value if cell.directions == 1 else op.Slice(value, [direction], [direction + 1], [0])
        for value in (*cell.weights, *cell.states)
    ]
    backwards = cell.backwards[direction]
    attributes = {"hidden_size": cell.hidden}
    if cell.op_type == "GRU":
        attributes["linear_before_reset"] = cell.linear_before_reset
    y, *last = op.contrib(
        f"{cell.op_type}Training",
        _reversed(op, cell.x, cell.lengths) if backwards else cell.x,
        *operands[:3],
        None,
        *operands[3:],
        # Behind the usual ones, these cells give what their gradient needs.
        outputs=5 if cell.op_type == "LSTM" else 3,
        **attributes,
    )
    finals = list(last[: len(cell.states)])
    if cell.lengths is not None:
        y, finals[0] = _ended(op, y, cell.lengths)
    if backwards:
        y = op.Unsqueeze(_reversed(op, op.Squeeze(y, [1]), cell.lengths), [1])
    return [y, *finals]


def _ended(op: Ops, y: ir.Value, lengths: ir.Value) -> tuple[ir.Value, ir.Value]:
    """States [time, 1, batch, hidden] that are zero behind each end, and those at the ends."""
    steps = op.Range(0, op.Gather(op.Shape(y), 0), 1)
    running = op.Less(op.Unsqueeze(steps, [1]), lengths)
    states = op.Squeeze(op.Where(op.Unsqueeze(running, [1, 3]), y, 0.0), [1])
    samples = op.Range(0, op.Size(lengths), 1)
    ends = op.Concat(op.Unsqueeze(op.Sub(lengths, 1), [1]), op.Unsqueeze(samples, [1]), axis=1)
    return op.Unsqueeze(states, [1]), op.Unsqueeze(op.GatherND(states, ends), [0])


def _reversed(op: Ops, x: ir.Value, lengths: ir.Value | None) -> ir.Value:
    if lengths is not None:
        return op.ReverseSequence(x, lengths, time_axis=0, batch_axis=1)
    return op.Slice(x, [-1], [_BEFORE_THE_START], [0], [-1])


def _joined(op: Ops, parts: Sequence[ir.Value], axis: int) -> ir.Value:
    return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=axis)


LOWERINGS: Final[dict[str, Lowering]] = dict.fromkeys(_GATES, _recurrent)
