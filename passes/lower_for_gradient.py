"""Replaces operators without a gradient by others that have one."""

import logging
from collections.abc import Collection
from typing import Final

import onnx_ir as ir
from onnx_ir.passes import common

from onnx_fliqs.passes._gradient_flow import REFUSAL, varying
from onnx_fliqs.passes._gradient_rule import NoGradientError
from onnx_fliqs.passes._gradient_table import LOWERINGS
from onnx_fliqs.passes._graph import require_opset
from onnx_fliqs.passes._native_gradients import native_inputs
from onnx_fliqs.passes._ops import Ops

__all__ = ["LowerForGradientPass"]

_LOWERED: Final = "onnx_fliqs.lowered"
"""Metadata key of a node that a lowering of the same operator wrote."""
_SHAPES: Final = common.ShapeInferencePass(check_type=False, strict_mode=False)

logger = logging.getLogger(__name__)


class LowerForGradientPass(ir.passes.InPlacePass):
    """Write operators that ONNX Runtime cannot differentiate in terms of those it can.

    Before:  y = InstanceNormalization (x, s, b)
    After:   r = Reshape (x, [0, 0, -1]);  n = LayerNormalization (r, 1, 0)
             y = Reshape (n * s + b, Shape (x))

    It is meant for the graph that is differentiated and for no other: the original operators
    have the faster kernels. Only nodes that change with the parameters are replaced.

    Requires: opset >= 20; inferred shapes.
    Ensures: where a lowering exists and nothing better, it was applied, or the node's metadata
        tells why not; results change by float32 rounding only; the graph's signature is
        unchanged.
    Idempotent: what a lowering writes is not lowered again.
    """

    def __init__(self, parameters: Collection[str]) -> None:
        super().__init__()
        self._parameters = frozenset(parameters)

    def requires(self, model: ir.Model) -> None:
        """Refuse older opsets, whose operators the lowerings do not write."""
        require_opset(model, 20)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower until nothing is left to lower: one lowering may use the other."""
        modified = False
        while self._lower_all(model):
            modified = True
            _infer_shapes(model)
        return ir.passes.PassResult(model, modified=modified)

    def _lower_all(self, model: ir.Model) -> bool:
        changed = False
        affected = varying(model, self._parameters)
        for node in list(model.graph):
            if affected.isdisjoint(node.outputs) or not _can_be_lowered(node):
                continue
            changed |= _lower(model, node)
        return changed


def _infer_shapes(model: ir.Model) -> None:
    """Without the library's warnings: where it fails, sizes are found when the graph runs."""
    library = logging.getLogger("onnx_ir")
    level = library.level
    library.setLevel(logging.ERROR)
    try:
        _SHAPES(model)
    finally:
        library.setLevel(level)


def _can_be_lowered(node: ir.Node) -> bool:
    return (
        not node.domain
        and node.op_type in LOWERINGS
        and node.metadata_props.keys().isdisjoint({REFUSAL, _LOWERED})
        and native_inputs(node) is None
    )


def _lower(model: ir.Model, node: ir.Node) -> bool:
    name = next(value.name for value in node.outputs if value.name)
    op = Ops(node.outputs[0].dtype, f"{name}.lowered/")
    try:
        results = LOWERINGS[node.op_type](op, node)
    except NoGradientError as error:
        op.discard()
        node.metadata_props[REFUSAL] = str(error)
        return False
    if results is None:
        return False
    for new in op.nodes:
        model.opset_imports.setdefault(new.domain, 1)
        if new.op_type == node.op_type:
            new.metadata_props[_LOWERED] = ""
    old: list[ir.Value] = []
    made: list[ir.Value] = []
    for before, after in zip(node.outputs, results, strict=False):
        if before.name:
            old.append(before)
            made.append(after if after.producer() in op.nodes else op.Identity(after))
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], op.nodes, old, made)
    logger.debug("lowered %s", node.name)
    return True
