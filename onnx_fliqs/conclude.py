"""The end of a search: the best weights are emitted, verified, measured and reported."""

import math
import time
from collections.abc import Mapping
from typing import Final

from onnx_fliqs.assignment import Assignment
from onnx_fliqs.budget_shares import budget_reports
from onnx_fliqs.controller import Choices
from onnx_fliqs.convergence import Convergence, Evidence, doubts
from onnx_fliqs.cost import cost_of
from onnx_fliqs.emission import Emitted, emit, ship
from onnx_fliqs.evaluation import not_finite, run_dataset
from onnx_fliqs.judged import exposed
from onnx_fliqs.latency_report import LatencyReport, report_latency
from onnx_fliqs.objective import quality
from onnx_fliqs.prepare import with_weights
from onnx_fliqs.report import SearchResult, layer_reports
from onnx_fliqs.runtime import make_session
from onnx_fliqs.schedule import Schedule
from onnx_fliqs.scoring import Scoring
from onnx_fliqs.search_setup import Setup
from onnx_fliqs.search_state import Best, SearchState

__all__ = ["conclude"]

_VERIFIED_BATCHES: Final = 2


def conclude(
    setup: Setup,
    scoring: Scoring,
    schedule: Schedule,
    state: SearchState,
    *,
    favourites: Choices | None,
    started: float,
) -> SearchResult:
    """Emit the best weights, verify the graph and measure it.

    Args:
        setup: Of the search.
        scoring: The held-out samples, and what the float model makes of them.
        schedule: The times of the search.
        state: After the last step.
        favourites: What the policy likes best, where weights trained on its draws.
        started: When the search began, by ``time.monotonic``.

    Raises:
        VerificationError: The emitted graph computes something else.
    """
    final, best = state.final, state.best
    assert final is not None and best is not None  # noqa: PT018 - after the loop
    space = setup.prepared.space
    chosen = space.assign(final)
    trained = with_weights(setup.prepared.canonical, best.weights)
    emitted = emit(
        trained,
        space,
        chosen,
        best.scales,
        setup.target,
        [batch.inputs for batch in scoring.batches[:_VERIFIED_BATCHES]],
    )
    names = setup.objective.outputs
    session = make_session(exposed(emitted.graph, names), level=emitted.level)
    names_chosen = {name: fmt.name for name, fmt in chosen.items()}
    latency, unmeasured = _latency(setup, names_chosen, emitted)
    measure = {"labels": setup.held_out.labels, "teacher": scoring.teacher}
    outputs = run_dataset(session, setup.held_out, names)
    metric = setup.objective.metric
    float_quality = quality(metric, scoring.teacher, **measure)  # type: ignore[arg-type]
    quantized_quality = quality(metric, outputs, **measure)  # type: ignore[arg-type]
    lost = float_quality - quantized_quality
    convergence = _convergence(setup, schedule, state, final, best, favourites, lost)
    shipped, notes = ship(emitted.graph, setup.target, setup.held_out)
    return SearchResult(
        model=shipped,
        trained=trained,
        assignment=Assignment.of(space, chosen, setup.target.name),
        layers=layer_reports(space, chosen),
        skipped=space.skipped,
        cost=cost_of(space, chosen),
        budgets=budget_reports(setup.budgets, setup.costs, setup.borders, final),
        metric=metric.value,
        samples=len(setup.held_out),
        float_quality=float_quality,
        quantized_quality=quantized_quality,
        untrained_loss=state.untrained_loss,
        loss=best.loss,
        verification=emitted.verification,
        optimization_level=emitted.level,
        steps=setup.config.steps,
        seconds=time.monotonic() - started,
        seed=setup.config.seed,
        entropy=None if math.isnan(state.entropy) else state.entropy,
        convergence=convergence,
        strategy=setup.config.strategy,
        latency=latency,
        warnings=(
            *setup.warnings,
            *emitted.warnings,
            *unmeasured,
            *notes,
            *_lost_steps(state, setup.config.steps),
            *not_finite(scoring.teacher, outputs),
            *convergence.warnings,
        ),
    )


def _lost_steps(state: SearchState, steps: int) -> tuple[str, ...]:
    if not state.lost:
        return ()
    return (f"{state.lost} of {steps} steps changed nothing: their gradient was not finite",)


def _convergence(
    setup: Setup,
    schedule: Schedule,
    state: SearchState,
    final: Choices,
    best: Best,
    favourites: Choices | None,
    lost: float,
) -> Convergence:
    """Whether the search has come to an end, from all that is known of it."""
    curves = state.history.curves(schedule.reports, schedule.rounds)
    evidence = Evidence(
        curves=curves,
        choices=[len(row) for row in setup.costs],
        final=final,
        entropy=state.entropy,
        favourites=favourites,
        earlier=state.earlier,
        frozen=schedule.freeze,
        steps=schedule.steps,
        trained=bool(state.train.parameters),
        untrained_loss=state.untrained_loss,
        loss=best.loss,
        lost=lost,
    )
    return Convergence(doubts(evidence), curves)


def _latency(
    setup: Setup, chosen: Mapping[str, str], emitted: Emitted
) -> tuple[LatencyReport | None, tuple[str, ...]]:
    """Predicted and measured, if there is a table to predict it."""
    table = setup.config.latency_table
    if table is None:
        return None, ()
    return report_latency(
        table, chosen, setup.prepared.canonical, emitted.graph, emitted.level, setup.train
    )
