"""From an assignment and trained weights to the graph that is shipped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from onnx_fliqs._version import __version__
from onnx_fliqs.data import Dataset
from onnx_fliqs.errors import ModelError, VerificationError
from onnx_fliqs.judged import compared_names, exposed
from onnx_fliqs.lint import lint
from onnx_fliqs.passes.dequantize_after_gather import DequantizeAfterGatherPass
from onnx_fliqs.passes.fix_shapes import FixShapesPass, is_static
from onnx_fliqs.passes.insert_search_sites import CODES, SCALES, InsertSearchSitesPass
from onnx_fliqs.passes.lower_opset import LowerOpsetPass
from onnx_fliqs.passes.lower_sites import LowerSitesPass
from onnx_fliqs.passes.lower_sites_to_qonnx import LowerSitesToQonnxPass
from onnx_fliqs.passes.pad_codes import PadCodesPass
from onnx_fliqs.passes.remove_redundant_clips import RemoveRedundantClipsPass
from onnx_fliqs.passes.remove_unused import RemoveUnusedPass
from onnx_fliqs.passes.spell_out_windows import SpellOutWindowsPass
from onnx_fliqs.passes.transpose_compressed_weights import TransposeCompressedWeightsPass
from onnx_fliqs.precision import PrecisionMap
from onnx_fliqs.runtime import OptimizationLevel, load_onnxruntime, make_session, run_session
from onnx_fliqs.sites import ScaleTable, SearchSpace
from onnx_fliqs.targets import TARGETS, Dialect, Placement, Target
from onnx_fliqs.verify import ONNX_RUNTIME, Verification, verify_graph

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

_QDQ_OPSET: Final = 20
"""ONNX Runtime 1.19.2 has its 8-bit MatMul kernel only for it."""
_QONNX_OPSET: Final = 13
"""What FINN's and hls4ml's releases read for certain; their onnx may be years old."""


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
        target: What it is for.
        batches: Feeds to compare on.

    Raises:
        VerificationError: The graph does not compute what was searched, or breaks a rule of
            the target.
    """
    graph = emit_graph(canonical, space, chosen, scales, target)
    _check_rules(graph, target)
    searched = simulate(canonical, space, chosen, scales, batches)
    verification = verify_graph(graph, batches, searched)
    if ONNX_RUNTIME not in target.runtimes:
        right = [
            OptimizationLevel(check.name) for check in verification.levels if check.agrees
        ]
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


def _check_rules(graph: ir.Model, target: Target) -> None:
    """Raise if the target refuses a graph that legality let through."""
    # Sizes are the user's, and what optimising sessions do is measured, not guessed.
    problems = lint(graph, replace(target, static_shapes=False), OptimizationLevel.NONE)
    if problems:
        mistake = (
            "please report this as a bug of onnx-fliqs"
            if target.name in TARGETS
            else "the profile lets layers choose what its rules refuse"
        )
        raise VerificationError(
            f"the emitted graph breaks a rule of {target.name}: {problems[0]}; {mistake}"
        )


def simulate(
    canonical: ir.Model,
    space: SearchSpace,
    chosen: PrecisionMap,
    scales: ScaleTable,
    batches: Sequence[Mapping[str, Array]],
) -> list[dict[str, Array]]:
    """The judged values of the searchable network under an assignment, batch by batch."""
    model = searchable(canonical, space, chosen, scales)
    names = compared_names(canonical)
    session = make_session(exposed(model, names), level=OptimizationLevel.NONE)
    return [dict(zip(names, run_session(session, names, f), strict=True)) for f in batches]


def searchable(
    canonical: ir.Model, space: SearchSpace, chosen: PrecisionMap, scales: ScaleTable
) -> ir.Model:
    """The searchable network under an assignment."""
    model = canonical.clone()
    InsertSearchSitesPass(space)(model)
    values = space.values(chosen, scales)
    initializers = model.graph.initializers
    initializers[CODES].const_value = ir.tensor(values.codes.reshape(-1), name=CODES)
    initializers[SCALES].const_value = ir.tensor(values.scales, name=SCALES)
    return model


def emit_graph(
    canonical: ir.Model,
    space: SearchSpace,
    chosen: PrecisionMap,
    scales: ScaleTable,
    target: Target,
) -> ir.Model:
    """Emit the graph of an assignment in the dialect of the target.

    Args:
        canonical: The canonical model with the weights to ship; it is not changed.
        space: Its layers and sites.
        chosen: A precision for every layer.
        scales: Scales for every site in the format it takes.
        target: What it is for.
    """
    model = canonical.clone()
    lowering: tuple[ir.passes.PassBase, ...]
    if target.dialect is Dialect.QONNX:
        lowering = (LowerSitesToQonnxPass(space, chosen, scales), SpellOutWindowsPass())
        oldest = _QONNX_OPSET
    else:
        tidying: tuple[ir.passes.PassBase, ...] = (
            DequantizeAfterGatherPass(),
            PadCodesPass(),
            # One zero point for all, and one scale for tensors that share it.
            common.DeduplicateInitializersPass(),
        )
        if target.placement is Placement.EVERY_TENSOR:
            # Gather and Pad are operators like others, between quantizers of their own.
            tidying = (RemoveRedundantClipsPass(),)
        lowering = (
            LowerSitesPass(space, chosen, scales, target),
            *tidying,
            TransposeCompressedWeightsPass(),
        )
        oldest = _QDQ_OPSET
    for step in (
        InsertSearchSitesPass(space),
        *lowering,
        RemoveUnusedPass(),
        LowerOpsetPass(oldest=oldest),
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
