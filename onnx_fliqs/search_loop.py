"""The one-shot search: an assignment, and the weights and thresholds that serve it.

1. *observe*: the critic is told how far each layer alone takes the float network's outputs
   away from what they were (:mod:`~onnx_fliqs.sensitivity`). It may observe rounds of draws as
   well, from a policy that cools down until it is deterministic;
2. *delay* and *search*, if the search is by draws (``SearchConfig.freeze``): formats are drawn
   uniformly at first, while the policy does not learn. Then the weights train on draws of the
   policy, which learns from the loss of several draws on held-out samples;
3. *train*: what the policy prefers within the budget is fixed, and the weights train on it.
   The best weights on the held-out samples are what is served.

By default there is no second phase. The baselines (see :mod:`~onnx_fliqs.strategies`) have the
third only, and REINFORCE lacks the first.

Everything a step does is a function of its number, the seed and one :class:`SearchState`, so a
search that continues from a checkpoint ends with the same bytes as one that never stopped.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Final

import numpy as np

from onnx_fliqs.batch_parts import part_sizes, values_per_sample
from onnx_fliqs.borders import spent
from onnx_fliqs.checkpoint import Checkpoint
from onnx_fliqs.choose_formats import FormatChooser, make_controller
from onnx_fliqs.conclude import conclude
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.controller import (
    Choices,
    Controller,
    Policy,
    Row,
    entropy,
    expected_cost,
    most_probable,
    sample,
    uniform,
)
from onnx_fliqs.convergence import History
from onnx_fliqs.doubtful_data import doubtful_data
from onnx_fliqs.errors import FliqsError, InterruptedSearchError
from onnx_fliqs.judged import exposed
from onnx_fliqs.learned_thresholds import Growth, learned_thresholds
from onnx_fliqs.prepare import make_batch, with_sites
from onnx_fliqs.progress import Progress
from onnx_fliqs.refit_thresholds import refit_thresholds
from onnx_fliqs.report import SearchResult
from onnx_fliqs.runtime import load_training
from onnx_fliqs.sampling import batch_indices
from onnx_fliqs.schedule import Phase, Schedule
from onnx_fliqs.scoring import Scoring
from onnx_fliqs.search_setup import Setup, set_up
from onnx_fliqs.search_state import (
    Best,
    Scales,
    SearchState,
    from_arrays,
    measurements,
    to_arrays,
)
from onnx_fliqs.sources import DataSource, ModelSource
from onnx_fliqs.strategies import Strategy
from onnx_fliqs.train_step import TrainStep
from onnx_fliqs.trainability import trainable_parameters

__all__ = ["search"]

logger = logging.getLogger(__name__)

_MOST_SKIPPED: Final = 20
"""Steps in a row without a finite gradient after which a search gives up."""


def search(
    model: ModelSource,
    data: DataSource | None = None,
    config: SearchConfig | None = None,
    *,
    checkpoint: str | PathLike[str] | None = None,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> SearchResult:
    """Search a mixed-precision assignment and train the weights for it.

    Args:
        model: A float ONNX model; it is not changed.
        data: Training samples (an ``.npz`` file, arrays by input name, or a data set), with or
            without labels. None: synthetic inputs are made up, with a warning in the result.
        config: Settings.
        checkpoint: A folder for checkpoints; None: none are written. It is left in place;
            remove it once the result is saved. One that is there and not continued is
            renamed, with ``.old`` behind its name.
        resume: Continue from the folder's checkpoint, if it has one.
        progress: Called after every step, and before the first one after every batch of
            measurements and every round of observation (see ``Phase``).

    Returns:
        The emitted graph, verified in ONNX Runtime, and the report.

    Raises:
        ConfigError: Target, space, rules or assignment do not exist, or do not fit the model
            (exit code 2).
        ModelError: The model cannot be read or quantized (exit code 3).
        DataError: The data does not fit the model.
        InfeasibleError: A budget cannot be met, alone or with another (exit code 4).
        VerificationError: The emitted graph computes something else (exit code 5).
        InterruptedSearchError: The user pressed Ctrl-C; the checkpoint is written.
        EnvironmentMissingError: There is no ONNX Runtime with training kernels.
    """
    config = config or SearchConfig()
    load_training()
    started = time.monotonic()
    setup = set_up(model, data, config)
    store = None
    if checkpoint is not None:
        store = Checkpoint(Path(checkpoint), setup.identity)
        note = store.begin(resume)
        setup = replace(setup, warnings=(*setup.warnings, *note))
    try:
        run = _Run(setup, store, progress or _ignore)
    except KeyboardInterrupt:
        raise InterruptedSearchError("stopped before the first step") from None
    try:
        state = run.loop(run.begin(resume))
        try:
            return run.conclude(state, started)
        except KeyboardInterrupt:
            raise InterruptedSearchError("stopped after the last step") from None
    finally:
        run.close()


def _ignore(_: Progress) -> None:
    """Where nobody wants to be told."""


# --- the loop ------------------------------------------------------------------------------


class _Run:
    """The sessions of one search, and its step as a function of a SearchState."""

    _controller: Controller[Any]
    """Made when what it starts from is known."""

    def __init__(
        self, setup: Setup, store: Checkpoint | None, progress: Callable[[Progress], None]
    ) -> None:
        config, space = setup.config, setup.prepared.space
        self._setup = setup
        self._store = store
        self._progress = progress
        self._space = space
        self._schedule = Schedule.of(config)
        self._costs, self._borders = setup.costs, setup.borders
        self._uniform = uniform([len(row) for row in self._costs])
        self._parts = _part_sizes(setup)
        learned = learned_thresholds(self._space) if config.threshold_rate > 0 else ()
        self._growth = Growth(learned, setup.scales)
        outputs = setup.objective.outputs
        self._step = TrainStep(
            with_sites(setup.prepared),
            objective=setup.objective,
            parameters=trainable_parameters(
                exposed(setup.prepared.canonical, outputs), outputs
            ),
            teacher=setup.prepared.canonical,
            parts=self._parts,
            workers=config.threads,
            optimizer=config.optimizer,
            thresholds=learned,
            threshold_rate=config.threshold_rate,
        )
        try:
            self._scoring = Scoring(setup, self._step)
            self._chooser = FormatChooser(setup, self._scoring, self._measured)
        except BaseException:
            self.close()
            raise
        doubt = doubtful_data(setup.objective.metric, self._scoring.teacher, setup.held_out)
        if doubt is not None:
            # The result has it as well, but that may be hours away.
            logger.warning(doubt)
            self._setup = replace(setup, warnings=(*setup.warnings, doubt))

    def close(self) -> None:
        self._step.close()

    def begin(self, resume: bool) -> SearchState:
        """The state of the checkpoint, or the one before the first step."""
        arrays = self._store.read() if self._store is not None and resume else None
        try:
            known = self._known() if arrays is None else measurements(arrays)
            self._controller = make_controller(self._setup, known)
            if arrays is not None:
                return from_arrays(arrays, self._step, self._controller)
            return self._observe(self.initial(known))
        except KeyboardInterrupt:
            raise InterruptedSearchError("stopped before the first step") from None

    def _known(self) -> tuple[Row, ...]:
        """What is measured of single layers before the first step, if that counts."""
        return self._chooser.measure(self._step.initial()) if self._schedule.measures else ()

    def initial(self, known: tuple[Row, ...]) -> SearchState:
        """Nothing observed: calibrated thresholds, and what the policy knows by then."""
        return SearchState(
            0,
            self._step.initial(),
            self._controller.initial(),
            self._setup.scales,
            History.empty(self._schedule.reports),
            known,
        )

    def _observe(self, state: SearchState) -> SearchState:
        """Rounds of draws on the float network, from a policy that cools down."""
        schedule = self._schedule
        for number in range(schedule.rounds):
            policy = self._controller.policy(state.controller, schedule.observed(number))
            rng = np.random.default_rng([self._setup.config.seed, number, 1])
            state, held_out = self._learn(state, policy, rng, number)
            report = Progress(
                step=number + 1,
                steps=schedule.rounds,
                phase=Phase.OBSERVE,
                loss=math.nan,
                held_out=held_out,
                cost=expected_cost(policy, self._costs),
                entropy=entropy(policy),
                quality=None,
            )
            state = self._noted(state, number + 1, report)
            self._progress(report)
        return state

    def loop(self, state: SearchState) -> SearchState:
        """Run the remaining steps; on Ctrl-C, write a checkpoint and stop."""
        config = self._setup.config
        try:
            while state.step < config.steps:
                state, report = self._advance(state)
                if state.step % config.checkpoint_every == 0 or state.step == config.steps:
                    self._save(state)
                self._progress(report)
        except KeyboardInterrupt:
            self._save(state)
            raise InterruptedSearchError(
                f"stopped after {state.step} of {config.steps} steps"
            ) from None
        return state

    def _advance(self, state: SearchState) -> tuple[SearchState, Progress]:
        config, schedule, step = self._setup.config, self._schedule, state.step
        held_out = math.nan
        if step == schedule.freeze:
            state = self._fix(state)
        elif step == schedule.look_back:
            state = replace(state, earlier=self._chooser.choose(state, self._controller))
        if config.refresh is not None and step % config.refresh == 0 and step > 0:
            state = replace(state, scales=self._refitted(state))
        rng = np.random.default_rng([config.seed, step, 0])
        policy = self._policy(state)
        state, loss = self._train(state, state.final or sample(policy, rng))
        if state.final is None:
            state, held_out = self._learn(state, policy, rng, schedule.rounds + step)
        state = replace(state, step=step + 1)
        measured = None
        if schedule.evaluates(state.step):
            state, measured, held_out = self._measure(state)
        report = Progress(
            step=state.step,
            steps=schedule.steps,
            phase=schedule.phase(step),
            loss=loss,
            held_out=held_out,
            cost=self._expected_cost(state, policy),
            entropy=entropy(policy) if state.final is None else state.entropy,
            quality=measured,
        )
        return self._noted(state, schedule.rounds + state.step, report), report

    def _noted(self, state: SearchState, number: int, report: Progress) -> SearchState:
        """The state with a report in its history, of which rounds are the first steps."""
        history = state.history.added(
            number,
            self._schedule.reports,
            loss=report.loss,
            held_out=report.held_out,
            cost=report.cost,
            entropy=report.entropy,
        )
        return replace(state, history=history)

    def _policy(self, state: SearchState) -> Policy:
        """The policy of the coming step: uniform during the delay."""
        if state.step < self._schedule.delay:
            return self._uniform
        return self._controller.policy(state.controller, self._schedule.cooled(state.step))

    def _expected_cost(self, state: SearchState, policy: Policy) -> float:
        if state.final is not None:
            return spent(self._costs, self._borders, state.final)
        return expected_cost(policy, self._costs)

    def _train(self, state: SearchState, choices: Choices) -> tuple[SearchState, float]:
        """One step on weights and thresholds; nothing where nothing trains."""
        config, step = self._setup.config, state.step
        if not state.train.parameters:
            return state, math.nan
        data = self._setup.train
        indices = batch_indices(len(data), sum(self._parts), step, config.seed)
        parts = [
            make_batch(data, rows) for rows in np.split(indices, np.cumsum(self._parts)[:-1])
        ]
        values = self._setup.values(choices, state.scales)
        train, report = self._step.step(state.train, parts, values, self._schedule.rate(step))
        skipped = 0 if report.applied else state.skipped + 1
        if not report.applied:
            logger.warning("step %d: the gradient is not finite; skipped", step + 1)
        if skipped >= _MOST_SKIPPED:
            raise FliqsError(
                f"training diverged: no finite gradient for {skipped} steps in a row;"
                " try a smaller --learning-rate"
            )
        scales = state.scales
        if report.applied and len(report.growth):
            taken = self._space.formats_taken(self._space.assign(choices))
            scales = self._growth(scales, report.growth, taken)
        lost = state.lost + (not report.applied)
        state = replace(state, train=train, scales=scales, skipped=skipped, lost=lost)
        return state, report.loss

    def _learn(
        self, state: SearchState, policy: Policy, rng: np.random.Generator, number: int
    ) -> tuple[SearchState, float]:
        """Score several draws of the policy on one held-out batch; learn from them.

        Args:
            state: Before.
            policy: What is drawn from.
            rng: What draws with.
            number: Of the held-out batch.
        """
        draws = [sample(policy, rng) for _ in range(self._setup.config.draws)]
        losses, scores = self._scoring.scores(draws, state.train, state.scales, number)
        if state.step < self._schedule.delay:
            learned = self._controller.observe(state.controller, draws, scores)
        else:
            learned = self._controller.update(
                state.controller, draws, scores, self._schedule.cooled(state.step)
            )
        return replace(state, controller=learned), float(np.mean(losses))

    def _fix(self, state: SearchState) -> SearchState:
        """Fix the assignment; the untrained weights are the first candidate, to be beaten."""
        fixed = replace(state, final=self._chooser.choose(state, self._controller))
        if self._setup.config.strategy is Strategy.FLIQS:
            policy = self._controller.policy(state.controller, 1.0)
            fixed = replace(fixed, entropy=entropy(policy))
        untrained = replace(fixed, train=self._step.initial(), scales=self._setup.scales)
        best = self._measure(untrained)[0].best
        assert best is not None
        return replace(fixed, best=best, untrained_loss=best.loss)

    def _measure(self, state: SearchState) -> tuple[SearchState, float, float]:
        """Quality and loss of the fixed assignment on the held-out samples.

        The best weights are remembered.
        """
        assert state.final is not None
        value, loss = self._scoring.judge(state.final, state.train, state.scales)
        best = state.best
        # Quality is counted in samples: of several weights, it says less than the loss.
        if best is None or not math.isfinite(best.loss) or loss <= best.loss:
            weights = {name: v.numpy() for name, v in state.train.parameters.items()}
            best = Best(loss, weights, state.scales)
        return replace(state, best=best), value, loss

    def _refitted(self, state: SearchState) -> Scales:
        """Thresholds that follow the weights, for what they train on or the likeliest draw."""
        policy = self._controller.policy(state.controller, self._schedule.cooled(state.step))
        choices = state.final or most_probable(policy)
        return refit_thresholds(self._setup, self._step, state.train, state.scales, choices)

    def _measured(self, done: int, batches: int) -> None:
        """Tell that single changes have been scored on so many batches."""
        unknown = math.nan
        self._progress(
            Progress(
                step=done,
                steps=batches,
                phase=Phase.MEASURE,
                loss=unknown,
                held_out=unknown,
                cost=unknown,
                entropy=unknown,
                quality=None,
            )
        )

    # --- the end ---------------------------------------------------------------------------

    def conclude(self, state: SearchState, started: float) -> SearchResult:
        """The result, after the last step."""
        favourites = None
        if self._schedule.draws:
            favourites = most_probable(self._controller.policy(state.controller, 1.0))
        return conclude(
            self._setup,
            self._scoring,
            self._schedule,
            state,
            favourites=favourites,
            started=started,
        )

    # --- checkpoints -----------------------------------------------------------------------

    def _save(self, state: SearchState) -> None:
        if self._store is not None:
            self._store.write(to_arrays(state, self._controller))


def _part_sizes(setup: Setup) -> list[int]:
    """How a training batch is cut."""
    config, data = setup.config, setup.train
    fixed = data.fixed_batch
    if fixed is not None:
        return [fixed] * max(1, round(config.batch_size / fixed))
    values = values_per_sample(setup.prepared.canonical)
    return part_sizes(min(config.batch_size, len(data)), config.threads, values)
