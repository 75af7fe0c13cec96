"""From an assignment and trained weights to the graph that is shipped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from onnx_fliqs._version import __version__
from onnx_fliqs.data import Dataset
from onnx_fliqs.errors import ModelError
from onnx_fliqs.judged import compared_names, exposed
from onnx_fliqs.passes.dequantize_after_gather import DequantizeAfterGatherPass
from onnx_fliqs.passes.fix_shapes import FixShapesPass, is_static
from onnx_fliqs.passes.insert_search_sites import CODES, SCALES, InsertSearchSitesPass
from onnx_fliqs.passes.lower_opset import LowerOpsetPass
from onnx_fliqs.passes.lower_sites import LowerSitesPass
from onnx_fliqs.passes.remove_redundant_clips import RemoveRedundantClipsPass
from onnx_fliqs.passes.remove_unused import RemoveUnusedPass
from onnx_fliqs.precision import PrecisionMap
from onnx_fliqs.runtime import OptimizationLevel, load_onnxruntime, make_session, run_session
from onnx_fliqs.sites import ScaleTable, SearchSpace
from onnx_fliqs.targets import Placement, Target
from onnx_fliqs.verify import Verification, verify_levels

__all__ = [
    "LEVEL_KEY",
    "TARGET_KEY",
    "Emitted",
    "emit",
    "emit_graph",
    "required_level",
    "ship",
    "simulate",
]

Array: TypeAlias = npt.NDArray[Any]

LEVEL_KEY: Final = "onnx_fliqs.optimization_level"
"""Metadata: the highest optimisation level at which ONNX Runtime computes the graph right."""
TARGET_KEY: Final = "onnx_fliqs.target"
"""Metadata: the target that the graph was emitted for."""


@dataclass(frozen=True, slots=True)
class Emitted:
    """A graph to ship, and what was found out about it."""

    graph: ir.Model
    verification: Verification
    level: OptimizationLevel
    """The highest level at which ONNX Runtime computes the graph right."""
    warnings: tuple[str, ...]


def emit(
    canonical: ir.Model,
    space: SearchSpace,
    chosen: PrecisionMap,
    scales: ScaleTable,
    target: Target,
    batches: Sequence[Mapping[str, Array]],
) -> Emitted:
    """Emit a graph and verify it against the searchable network.

    Args:
        canonical: The canonical model with the weights to ship; it is not changed.
        space: Its layers and sites.
        chosen: A precision for every layer.
        scales: Scales for every site in the format it takes.
        target: The dialect.
        batches: Feeds to compare on.

    Raises:
        VerificationError: The graph does not compute what was searched.
    """
    graph = emit_graph(canonical, space, chosen, scales, target)
    searched = simulate(canonical, space, chosen, scales, batches)
    verification = verify_levels(graph, batches, searched)
    if "onnxruntime" not in target.runtimes:
        right = [check.level for check in verification.levels if check.agrees]
        level = right[-1] if right else OptimizationLevel.NONE
        graph.metadata_props[LEVEL_KEY] = level.value
        return Emitted(graph, verification, level, ())
    level = verification.level
    warnings: tuple[str, ...] = ()
    if level is not OptimizationLevel.DEFAULT:
        graph.metadata_props[LEVEL_KEY] = level.value
        version = load_onnxruntime().__version__
        advice = (
            f"run this graph at ONNX Runtime's optimisation level {level.value!r}: {version}"
            f" does not compute it right at higher ones ({verification.why()})"
        )
        warnings = (advice,)
    return Emitted(graph, verification, level, warnings)


def simulate(
    canonical: ir.Model,
    space: SearchSpace,
    chosen: PrecisionMap,
    scales: ScaleTable,
    batches: Sequence[Mapping[str, Array]],
) -> list[dict[str, Array]]:
    """The judged values of the searchable network under an assignment, batch by batch."""
    model = canonical.clone()
    InsertSearchSitesPass(space)(model)
    values = space.values(chosen, scales)
    initializers = model.graph.initializers
    initializers[CODES].const_value = ir.tensor(values.codes.reshape(-1), name=CODES)
    initializers[SCALES].const_value = ir.tensor(values.scales, name=SCALES)
    names = compared_names(canonical)
    session = make_session(exposed(model, names), level=OptimizationLevel.NONE)
    return [dict(zip(names, run_session(session, names, f), strict=True)) for f in batches]


def emit_graph(
    canonical: ir.Model,
    space: SearchSpace,
    chosen: PrecisionMap,
    scales: ScaleTable,
    target: Target,
) -> ir.Model:
    """Emit the standard QDQ graph of an assignment.

    Args:
        canonical: The canonical model with the weights to ship; it is not changed.
        space: Its layers and sites.
        chosen: A precision for every layer.
        scales: Scales for every site in the format it takes.
        target: The dialect.
    """
    model = canonical.clone()
    # Where every tensor is quantized, Gather is an operator like others.
    full = target.placement is Placement.EVERY_TENSOR
    tidying = RemoveRedundantClipsPass() if full else DequantizeAfterGatherPass()
    for step in (
        InsertSearchSitesPass(space),
        LowerSitesPass(space, chosen, scales, target),
        tidying,
        RemoveUnusedPass(),
        LowerOpsetPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        step(model)
    model.producer_name, model.producer_version = "onnx-fliqs", __version__
    model.metadata_props[TARGET_KEY] = target.name
    return model


def ship(
    model: ir.Model, target: Target, dataset: Dataset
) -> tuple[ir.Model, tuple[str, ...]]:
    """The graph as a user gets it, once it has been verified and measured.

    Args:
        model: What was emitted; it is not changed.
        target: If it runs fixed shapes only, the sizes of one sample are fixed.
        dataset: Has that sample.

    Returns:
        The graph, and what to warn of.
    """
    free = [value.name for value in model.graph.inputs if not is_static(value)]
    if not (target.static_shapes and free):
        return model, ()
    feeds = dataset.batch(np.arange(dataset.fixed_batch or 1) % len(dataset))
    sizes = {name: array.shape for name, array in feeds.items()}
    fixed = FixShapesPass(sizes)(model.clone()).model
    listing = "; ".join(f"{name} {list(sizes[str(name)])}" for name in free)
    return fixed, (f"{target.name} runs fixed shapes only; the graph has those of {listing}",)


def required_level(model: ir.Model) -> OptimizationLevel:
    """The optimisation level that the emitter recorded; the default where it did not.

    Raises:
        ModelError: The model names a level that does not exist.
    """
    name = model.metadata_props.get(LEVEL_KEY, "default")
    known = [level.value for level in OptimizationLevel]
    if name not in known:
        raise ModelError(
            f"the model's metadata {LEVEL_KEY} is {name!r}, not one of {', '.join(known)}"
        )
    return OptimizationLevel(name)
