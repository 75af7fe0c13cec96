"""What a search did over its steps, and whether it had come to an end.

A search counts as converged where nothing suggests that more steps would serve a better
model. Each reason to doubt it is one line with its figures. No doubt is no proof: the learning
rate falls to a twentieth however few the steps are, which flattens the end of every curve.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from onnx_fliqs.controller import Choices

__all__ = ["Convergence", "Curves", "Evidence", "History", "doubts"]

_POINTS: Final = 50
"""Points of a curve, at most."""
_MEASURES: Final = 4
"""The columns of a history: loss, held_out, cost, entropy."""
_MOST_ENTROPY: Final = 0.2
"""Share of a uniform policy's entropy. Among five formats, that is a favourite of 90 % with
one rival: draws differ from what is served in about one layer of ten."""
_MOST_CHANGED: Final = 0.25
"""Share of the decisions that may still change late. Some always do: neighbouring formats of a
layer that hardly matters are worth the same."""
_FEW: Final = 2
"""So many decisions may change in any network: a swap, to spend the rest of the budget."""
_LEAST_FROZEN: Final = 20
"""Steps on the fixed assignment alone, as many as the learning rate takes to warm up."""
_MOST_FALLING: Final = 0.1
"""Relative fall of the training loss within the last quarter of the steps, in which the
learning rate is small: what falls that much there was cut off, not finished."""
_ERRORS: Final = 2.0
"""Standard errors by which the fall has to be larger, since batches differ."""
_LOSSLESS: Final = 0.005
"""Quality below the float model's, under which there is nothing left to train for."""


@dataclass(frozen=True, slots=True)
class Curves:
    """Means over a few neighbouring steps each; None where nothing was measured."""

    step: tuple[int, ...]
    """The last step of each point; rounds of observation count up to 0."""
    loss: tuple[float | None, ...]
    """On the training batches."""
    held_out: tuple[float | None, ...]
    """On held-out samples: of the policy's draws, then of what the weights train on."""
    cost: tuple[float | None, ...]
    """Expected cost as a share of the budget."""
    entropy: tuple[float | None, ...]
    """Mean entropy of the policy, in nats."""


@dataclass(frozen=True, slots=True)
class Convergence:
    """How a search went."""

    doubts: tuple[str, ...]
    """Why it has not converged, one line each."""
    curves: Curves

    @property
    def converged(self) -> bool:
        """Whether there is no doubt."""
        return not self.doubts

    @property
    def warnings(self) -> tuple[str, ...]:
        """The plain statement, if it has not converged."""
        if self.converged:
            return ()
        return (f"not converged, try more --steps: {'; '.join(self.doubts)}",)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "converged": self.converged,
            "doubts": list(self.doubts),
            "curves": asdict(self.curves),
        }


@dataclass(frozen=True, slots=True)
class History:
    """The curves of a search under way: for each point, sums over its steps."""

    sums: npt.NDArray[np.float64]
    """Shape [points, measures]."""
    counts: npt.NDArray[np.int64]
    """Of the numbers in each sum."""

    @classmethod
    def empty(cls, steps: int) -> "History":
        """Before the first of so many steps."""
        shape = min(steps, _POINTS), _MEASURES
        return cls(np.zeros(shape), np.zeros(shape, np.int64))

    def added(
        self,
        step: int,
        steps: int,
        *,
        loss: float,
        held_out: float,
        cost: float,
        entropy: float,
    ) -> "History":
        """With one more step; numbers that are not finite leave no trace.

        Args:
            step: 1 for the first.
            steps: Of the whole search.
            loss: On the training batch.
            held_out: On held-out samples.
            cost: As a share of the budget.
            entropy: Of the policy.
        """
        point = (step - 1) * len(self.sums) // steps
        values = np.array([loss, held_out, cost, entropy])
        known = np.isfinite(values)
        sums, counts = self.sums.copy(), self.counts.copy()
        sums[point] += np.where(known, values, 0.0)
        counts[point] += known
        return History(sums, counts)

    def curves(self, steps: int, before: int = 0) -> Curves:
        """The means, up to the last step that was added.

        Args:
            steps: That it was made for.
            before: How many of them, at the start, were rounds of observation.
        """
        points = len(self.sums)
        reached = int(np.max(np.flatnonzero(self.counts.any(axis=1)), initial=-1)) + 1
        last = tuple(-(-(point + 1) * steps // points) - before for point in range(reached))
        columns = (
            tuple(
                float(total) / int(count) if count else None
                for total, count in zip(sums, counts, strict=True)
            )
            for sums, counts in zip(
                self.sums[:reached].T, self.counts[:reached].T, strict=True
            )
        )
        return Curves(last, *columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What tells whether a search has converged."""

    curves: Curves
    choices: Sequence[int]
    """Number of choices of each decision."""
    final: Choices
    """What is served."""
    entropy: float
    """Mean entropy of the policy when the assignment was fixed; NaN without a policy."""
    favourites: Choices | None
    """The likeliest choice of each decision by then, whatever they cost together."""
    earlier: Choices | None
    """What would have been served at three quarters of the search phase."""
    frozen: int
    """The step at which the assignment was fixed."""
    steps: int
    trained: bool
    """Whether there are weights to train."""
    untrained_loss: float
    """On held-out samples, with the float model's weights."""
    loss: float
    """The same of what is served."""
    lost: float
    """Quality on held-out samples that the float model has and the served one lacks."""


def doubts(found: Evidence) -> tuple[str, ...]:
    """Reasons to doubt that a search has converged, one line each.

    Where nothing measurable is lost, only an undecided policy is one: among assignments that
    lose nothing it is no matter which is taken, and there is nothing to train for.
    """
    reasons = [_undecided(found)]
    if not found.lost < _LOSSLESS:
        reasons += [_moving(found), _overruled(found)]
        if found.trained:
            reasons += [_short(found), _useless(found), _falling(found)]
    return tuple(reason for reason in reasons if reason is not None)


def _undecided(found: Evidence) -> str | None:
    """Entropy left in the policy.

    One decision between two choices is not counted: the policy mixes them to spend exactly the
    budget.
    """
    most = sum(math.log(count) for count in found.choices)
    total = found.entropy * len(found.choices) - math.log(2)
    if math.isnan(found.entropy) or total <= _MOST_ENTROPY * most:
        return None
    return (
        f"the policy was undecided when the assignment was fixed (entropy {found.entropy:.2f},"
        f" {total / most:.0%} of a uniform policy's; at most {_MOST_ENTROPY:.0%})"
    )


def _moving(found: Evidence) -> str | None:
    changed = _changed(found.earlier, found.final)
    return changed and f"{changed} changed in the last quarter of the search phase"


def _overruled(found: Evidence) -> str | None:
    changed = _changed(found.favourites, found.final)
    return changed and f"{changed} differ from the policy's favourites, to meet the budget"


def _changed(before: Choices | None, after: Choices) -> str | None:
    """How many decisions differ, if they are many."""
    if before is None:
        return None
    count = sum(a != b for a, b in zip(before, after, strict=True))
    if count <= max(_FEW, _MOST_CHANGED * len(after)):
        return None
    return f"{count} of {len(after)} decisions"


def _short(found: Evidence) -> str | None:
    alone = found.steps - found.frozen
    if alone >= _LEAST_FROZEN:
        return None
    return f"only {alone} steps trained the fixed assignment alone (at least {_LEAST_FROZEN})"


def _useless(found: Evidence) -> str | None:
    """What is served is the float model's own weights."""
    if found.loss != found.untrained_loss:
        return None
    return (
        f"no trained weights did better on held-out samples than the float model's own, which"
        f" are served (loss {found.loss:.4g})"
    )


def _falling(found: Evidence) -> str | None:
    """The training loss, from one half of the last quarter of the steps to the other."""
    start = max(found.frozen, 0.75 * found.steps)
    points = zip(found.curves.step, found.curves.loss, strict=True)
    losses = [loss for step, loss in points if loss is not None and step > start]
    halves = np.array_split(np.array(losses), 2)
    if min(map(len, halves)) < 2:
        return None
    before, after = (float(half.mean()) for half in halves)
    noise = math.sqrt(sum(float(half.var(ddof=1)) / len(half) for half in halves))
    if before - after - _ERRORS * noise <= _MOST_FALLING * before:
        return None
    return (
        f"the training loss was still falling, by {1 - after / before:.0%} within the last"
        f" quarter of the steps (from {before:.4g} to {after:.4g})"
    )
