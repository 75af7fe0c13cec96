"""How good assignments are on the held-out samples, with the weights as they are."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_fliqs.controller import Choices, Signal
from onnx_fliqs.data import Dataset
from onnx_fliqs.evaluation import without_filling
from onnx_fliqs.objective import Metric, quality
from onnx_fliqs.prepare import make_batch
from onnx_fliqs.sampling import batch_indices
from onnx_fliqs.search_setup import Setup
from onnx_fliqs.sites import ScaleTable, SiteValues
from onnx_fliqs.train_step import Batch, TrainState, TrainStep

__all__ = ["EVALUATION_BATCH", "Scoring"]

Outputs: TypeAlias = Mapping[str, npt.NDArray[Any]]
Told: TypeAlias = Callable[[int, int], None]
"""Is told after each batch how many have been scored, and of how many."""

EVALUATION_BATCH: Final = 64
_LEAST_LOSS: Final = 1e-30
"""Of which there is a logarithm."""


class Scoring:
    """The held-out samples of a search, and the sessions that run them."""

    def __init__(self, setup: Setup, step: TrainStep) -> None:
        self._setup = setup
        self._step = step
        self.batches = _batches(setup.held_out, EVALUATION_BATCH)
        """All held-out samples."""
        data, config = setup.held_out, setup.config
        self._drawn_part = data.batch_within(config.held_out_batch)
        parts = max(1, min(config.held_out_batch, len(data)) // self._drawn_part)
        self._drawn_size = parts * self._drawn_part
        self.teacher = self._without_filling(step.teacher_outputs(self.batches))
        """The float model's judged outputs for all of them."""

    def losses(
        self,
        candidates: Sequence[Choices],
        train: TrainState,
        scales: ScaleTable,
        samples: int,
        told: Told,
    ) -> list[float]:
        """Mean losses over the first samples."""
        return self._means(self._step.losses, candidates, train, scales, samples, told)

    def divergences(
        self,
        candidates: Sequence[Choices],
        train: TrainState,
        scales: ScaleTable,
        samples: int,
        told: Told,
    ) -> list[float]:
        """Mean divergences from the float model over the first samples."""
        return self._means(self._step.divergences, candidates, train, scales, samples, told)

    def scores(
        self, draws: Sequence[Choices], train: TrainState, scales: ScaleTable, number: int
    ) -> tuple[list[float], list[float]]:
        """The losses of a policy's draws, and what the controller is told: less is better.

        Args:
            draws: Assignments.
            train: The weights.
            scales: The thresholds.
            number: Of the batch, which is drawn.
        """
        batches = self._drawn(number)
        values = [self._setup.values(draw, scales) for draw in draws]
        signal = self._setup.config.controller.signal
        if signal in (Signal.LOSS, Signal.LOG_LOSS):
            losses = self._mean_losses(train, batches, values)
            if signal is Signal.LOSS:
                return losses, losses
            return losses, [math.log(max(loss, _LEAST_LOSS)) for loss in losses]
        metric = Metric(signal.value)
        qualities, losses_of = [], []
        for batch in batches:
            teacher = self._step.teacher_outputs([batch])
            judged = self._step.judge_each(train, batch, values)
            qualities.append(
                [
                    quality(metric, outs, labels=batch.labels, teacher=teacher)
                    for outs, _ in judged
                ]
            )
            losses_of.append([loss for _, loss in judged])
        # Shares of batches of one size: their mean is that of all samples.
        losses, found = (np.mean(rows, axis=0) for rows in (losses_of, qualities))
        return losses.tolist(), (-found).tolist()

    def judge(
        self, choices: Choices, train: TrainState, scales: ScaleTable
    ) -> tuple[float, float]:
        """Quality and loss of an assignment on all held-out samples."""
        values = self._setup.values(choices, scales)
        outputs, loss = self._step.judge(train, self.batches, values)
        value = quality(
            self._setup.objective.metric,
            self._without_filling(outputs),
            labels=self._setup.held_out.labels,
            teacher=self.teacher,
        )
        return value, loss

    def _means(
        self,
        score: Callable[[TrainState, Batch, Sequence[SiteValues]], Sequence[float]],
        candidates: Sequence[Choices],
        train: TrainState,
        scales: ScaleTable,
        samples: int,
        told: Told,
    ) -> list[float]:
        """Means over the first samples, in whole batches, of what each is scored by."""
        values = [self._setup.values(choices, scales) for choices in candidates]
        size = self.batches[0].size
        seen = self.batches[: max(1, samples // size)]
        rows = []
        for number, batch in enumerate(seen, start=1):
            rows.append(score(train, batch, values))
            told(number, len(seen))
        means = np.average(rows, axis=0, weights=[batch.size for batch in seen])
        return [float(mean) for mean in means]

    def _mean_losses(
        self, train: TrainState, batches: Sequence[Batch], values: Sequence[SiteValues]
    ) -> list[float]:
        """Over batches of one size."""
        rows = [self._step.losses(train, batch, values) for batch in batches]
        return [float(loss) for loss in np.mean(rows, axis=0)]

    def _drawn(self, number: int) -> list[Batch]:
        """Samples by number, of another stream than those that train."""
        data, seed = self._setup.held_out, self._setup.config.seed
        rows = batch_indices(len(data), self._drawn_size, number, seed + 1)
        return [make_batch(data, part) for part in rows.reshape(-1, self._drawn_part)]

    def _without_filling(self, outputs: Outputs) -> dict[str, npt.NDArray[Any]]:
        """What the held-out samples gave, each once."""
        fed, samples = sum(b.size for b in self.batches), len(self._setup.held_out)
        return {name: without_filling(array, fed, samples) for name, array in outputs.items()}


def _batches(data: Dataset, size: int) -> list[Batch]:
    """The whole data set; a fixed batch size is filled up from its beginning."""
    size = data.batch_within(size)
    rows = [np.arange(start, start + size) for start in range(0, len(data), size)]
    if data.fixed_batch is None:
        rows[-1] = rows[-1][rows[-1] < len(data)]
    return [make_batch(data, row % len(data)) for row in rows]
