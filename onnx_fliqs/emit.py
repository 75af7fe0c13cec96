"""From an assignment and trained weights to the graph that is shipped."""

import onnx_ir as ir
from onnx_ir.passes import common

from onnx_fliqs._version import __version__
from onnx_fliqs.passes.insert_search_sites import InsertSearchSitesPass
from onnx_fliqs.passes.lower_sites import LowerSitesPass
from onnx_fliqs.passes.remove_unused import RemoveUnusedPass
from onnx_fliqs.runtime import OptimizationLevel
from onnx_fliqs.sites import FormatMap, ScaleTable, SearchSpace
from onnx_fliqs.targets import Target

__all__ = ["LEVEL_KEY", "TARGET_KEY", "emit_graph", "required_level"]

LEVEL_KEY = "onnx_fliqs.optimization_level"
"""Metadata: the highest optimisation level at which ONNX Runtime computes the graph right."""
TARGET_KEY = "onnx_fliqs.target"
"""Metadata: the target that the graph was emitted for."""


def emit_graph(
    canonical: ir.Model,
    space: SearchSpace,
    chosen: FormatMap,
    scales: ScaleTable,
    target: Target,
) -> ir.Model:
    """Emit the standard QDQ graph of an assignment.

    Args:
        canonical: The canonical model with the weights to ship; it is not changed.
        space: Its layers and sites.
        chosen: A format for every layer.
        scales: Scales for every site in the format it takes.
        target: The dialect.
    """
    model = canonical.clone()
    for step in (
        InsertSearchSitesPass(space),
        LowerSitesPass(space, chosen, scales, target),
        RemoveUnusedPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        step(model)
    model.producer_name, model.producer_version = "onnx-fliqs", __version__
    model.metadata_props[TARGET_KEY] = target.name
    return model


def required_level(model: ir.Model) -> OptimizationLevel:
    """The optimisation level that the emitter recorded; the default where it did not."""
    return OptimizationLevel(model.metadata_props.get(LEVEL_KEY, "default"))
