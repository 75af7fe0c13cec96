"""Predicted and measured latency of an emitted graph, side by side."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from onnx_fliqs.data import Dataset
from onnx_fliqs.errors import FliqsError
from onnx_fliqs.latency import LatencyTable
from onnx_fliqs.latency_profile import conditions_of
from onnx_fliqs.runners import Clock, Runtime, runtime_named, time_pairs
from onnx_fliqs.runtime import OptimizationLevel

__all__ = ["LatencyReport", "report_latency"]

_SECONDS: Final = 5.0
_ERROR: Final = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyReport:
    """Milliseconds of a run."""

    predicted_ms: float
    """Of the emitted graph, by the table."""
    float_ms: float
    """Of the float model, as it was profiled."""
    measured_ms: float | None
    """Of the emitted graph, at the end of the search; None where the table was made under
    other conditions."""
    measured_float_ms: float | None
    """Of the float model, in turn with the emitted graph."""
    runtime: str
    """Name and version, of the table."""


def report_latency(
    table: LatencyTable,
    chosen: Mapping[str, str],
    float_model: ir.Model,
    graph: ir.Model,
    level: OptimizationLevel,
    data: Dataset,
    *,
    runtime: Runtime | None = None,
    clock: Clock = time.perf_counter,
) -> tuple[LatencyReport, tuple[str, ...]]:
    """Predict the latency of an emitted graph and, under the table's conditions, measure it.

    Args:
        table: Of the float model.
        chosen: Layer name → name of its precision.
        float_model: The canonical model.
        graph: What was emitted for it.
        level: How much ONNX Runtime may rewrite the graph.
        data: Samples to run.
        runtime: Where to run; None: the target's.
        clock: Tells seconds.

    Returns:
        The report; and a warning where nothing was measured.
    """
    threads = table.conditions.threads
    feeds = data.batch(np.arange(data.fixed_batch or table.batch_size) % len(data))
    ours: float | None = None
    theirs: float | None = None
    try:
        runtime = runtime or runtime_named(table.conditions.runtime)
        reason = table.conditions.why_not(conditions_of(runtime, feeds, threads))
        if reason is None:
            pairs = time_pairs(
                runtime.load(float_model, feeds, threads, OptimizationLevel.DEFAULT),
                runtime.load(graph, feeds, threads, level),
                seconds=_SECONDS,
                error=_ERROR,
                clock=clock,
            )
            theirs, ours = (1e3 * statistics.median(x) for x in (pairs.reference, pairs.other))
    except FliqsError as error:
        # No reason to lose what was searched.
        reason = str(error)
    report = LatencyReport(
        predicted_ms=table.predict(chosen),
        float_ms=table.float_model.ms,
        measured_ms=ours,
        measured_float_ms=theirs,
        runtime=f"{table.conditions.runtime} {table.conditions.version}",
    )
    return report, () if reason is None else (f"latency was not measured: {reason}",)
