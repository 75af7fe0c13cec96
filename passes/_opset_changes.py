"""Operators that changed their meaning, and that ONNX's converter hands on as they are."""

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

import numpy as np
import onnx_ir as ir

from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.passes._graph import (
    changed_constant,
    constant_of,
    formula_for,
    is_standard,
    label,
    replace_node,
    used_names,
)

__all__ = ["after_conversion", "before_conversion"]

_Rewrite: TypeAlias = Callable[[ir.Node, set[str]], None]


def before_conversion(model: ir.Model, opset: int) -> None:
    """Rewrite in the old opset what the converter would break.

    Raises:
        UnsupportedError: A node has no counterpart.
    """
    _rewrite(model, opset, _BEFORE)


def after_conversion(model: ir.Model, opset: int) -> None:
    """Make up in the new opset for what the converter forgets.

    Args:
        model: The converted model.
        opset: What it was converted from.

    Raises:
        UnsupportedError: A node has no counterpart.
    """
    _rewrite(model, opset, _AFTER)


def _rewrite(model: ir.Model, opset: int, changes: Mapping[str, tuple[int, _Rewrite]]) -> None:
    taken = used_names(model)
    for node in list(model.graph.all_nodes()):
        if is_standard(node, *changes):
            changed_in, rewrite = changes[node.op_type]
            if opset < changed_in:
                rewrite(node, taken)


# --- before --------------------------------------------------------------------------------


def _hardmax(node: ir.Node, _: set[str]) -> None:
    """Until opset 13, all axes from ``axis`` on counted as one."""
    source, axis = node.inputs[0], node.attributes.get_int("axis", 1)
    if source is not None and source.shape is not None:
        last = len(source.shape) - 1
        if axis in (-1, last):
            return
    op = formula_for(node)
    flat = op.Flatten(source, axis=axis)
    chosen = op.Hardmax(flat, axis=1)
    replace_node(node, op, [op.Reshape(chosen, op.Shape(source))], heir=chosen)


def _batch_normalization(node: ir.Node, _: set[str]) -> None:
    """Until opset 9, ``spatial = 0`` meant parameters for each element of a sample."""
    if node.attributes.get_int("spatial", 1):
        return
    op = formula_for(node)
    source, scale, bias, mean, variance = node.inputs
    deviation = op.Sqrt(op.Add(variance, node.attributes.get_float("epsilon", 1e-5)))
    normalized = op.Div(op.Sub(source, mean), deviation)
    replace_node(node, op, [op.Add(op.Mul(normalized, scale), bias)])


def _scan(node: ir.Node, _: set[str]) -> None:
    raise UnsupportedError(
        f"{label(node)} is of opset 8, in which it runs over a batch; export the model with"
        " opset 9 or newer"
    )


_BEFORE: Final[Mapping[str, tuple[int, _Rewrite]]] = {
    "BatchNormalization": (9, _batch_normalization),
    "Hardmax": (13, _hardmax),
    "Scan": (9, _scan),
}


# --- after ---------------------------------------------------------------------------------


def _resize(node: ir.Node, _: set[str]) -> None:
    """Before opset 11, as in Upsample, coordinates were not a choice.

    Opset 10 does not say how to round; ONNX Runtime rounds down to enlarge and up to shrink.
    """
    scales = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
    shrinks = scales is not None and bool((scales.astype(np.float64) < 1).any())
    for name, text in (
        ("coordinate_transformation_mode", "asymmetric"),
        ("nearest_mode", "ceil" if shrinks else "floor"),
    ):
        node.attributes.setdefault(name, ir.AttrString(name, text))


def _group_normalization(node: ir.Node, taken: set[str]) -> None:
    """Until opset 21, scale and bias had one number per group."""
    source, *parameters = node.inputs
    channels = source.shape[1] if source is not None and source.shape is not None else None
    if not isinstance(channels, int):
        raise UnsupportedError(
            f"the number of channels of {label(node)} is unknown; export the model with opset"
            " 21, or with 17, which has no such operator"
        )
    groups = node.attributes.get_int("num_groups", 1)
    group_of = np.repeat(np.arange(groups), channels // groups)
    op = formula_for(node)
    for index, value in enumerate(parameters, 1):
        assert value is not None
        array = constant_of(value)
        new = (
            op.Gather(value, group_of)
            if array is None
            else changed_constant(node, value, array[group_of], str(node.name), taken)
        )
        node.replace_input_with(index, new)
    assert node.graph is not None
    node.graph.insert_before(node, op.nodes)


_AFTER: Final[Mapping[str, tuple[int, _Rewrite]]] = {
    "GroupNormalization": (21, _group_normalization),
    "Resize": (11, _resize),
}
