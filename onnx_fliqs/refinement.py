"""Local search: single changes of an assignment are measured, recombined and confirmed.

The loss is not a sum over decisions, least of all at few bits, and what training has mended no
longer hurts. Around one assignment, with weights that know it, the loss is close to a sum:
each round measures what single changes do, lets the integer program recombine them within
trust regions of several radii (how many decisions may change), and takes the best of what it
finds if more samples, which none of this has seen, confirm that it is better. This is
sequential programming with a trust region (Nocedal & Wright, Numerical Optimization, chapter
4) on a discrete space.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_fliqs.borders import Border, shares, spent
from onnx_fliqs.controller import Choices, Row
from onnx_fliqs.cost import CostTable
from onnx_fliqs.projection import LEAST_SPENT, project
from onnx_fliqs.strategies import finite, single_changes

__all__ = ["FEWEST_BATCHES", "MOST_CHANGES", "RADII", "Effort", "plan", "refine"]

Matrix: TypeAlias = npt.NDArray[np.float64]
Losses: TypeAlias = Callable[[Sequence[Choices], Sequence[tuple[int, int]]], Matrix]
"""Scores assignments on batches of samples, each given by the number of a round and its own in
it: [batches, assignments]."""

MOST_CHANGES: Final = 3
"""Single changes of a decision that are measured: one cheaper, one dearer, one alike."""
RADII: Final = (1, 2, 3, 4, 6, 8, 12)
"""How many decisions may change at once."""
_ROUNDING: Final = 1e-9
_HINT: Final = 1e-3
"""What preferences count for, as a share of the largest damage: where nothing measurable is
lost, they spend what is left of the budget."""
_CONFIRMING: Final = 8
"""Batches that confirm an improvement, for each that measures single changes."""
FEWEST_BATCHES: Final = 2 + _CONFIRMING
"""Without a common sample: what the smallest round takes."""
_ERRORS: Final = 1.0
"""Standard errors by which a change has to be an improvement: it is the best of several, and
weights that have to get used to it lose steps."""
_MOST_ROUNDS: Final = 3
_MOST_BATCHES: Final = 8
_FEWEST_DECISIONS: Final = 4
"""To be looked at together: what one gains, others have to pay for."""


@dataclass(frozen=True, slots=True)
class Effort:
    """What a refinement takes."""

    rounds: int
    decisions: int
    """That a round looks at, one window after another."""
    batches: int
    """On which single changes are scored, and once more what they recombine to."""

    @property
    def confirming(self) -> int:
        """Batches on which an improvement is confirmed."""
        return _CONFIRMING * self.batches

    @property
    def drawn(self) -> int:
        """Batches of a round, for all purposes."""
        return 2 * self.batches + self.confirming


def plan(evaluations: float, decisions: int, available: int) -> Effort:
    """The best use of so many evaluations on a batch, in one refinement.

    A round on one batch comes first, then one on two, then up to three rounds, then more
    batches. If there is not even enough for the first, it looks at a few decisions only.

    Args:
        evaluations: Of one assignment on one batch, in all; some more are made where these
            are hardly any.
        decisions: Of the network.
        available: Batches without a common sample, at least ``FEWEST_BATCHES``: what confirms
            a change has to be news.
    """
    fixed = len(RADII) + 2 + 2 * _CONFIRMING
    whole = MOST_CHANGES * decisions + fixed
    if evaluations < whole:
        window = max(_FEWEST_DECISIONS, int((evaluations - fixed) / MOST_CHANGES))
        return Effort(1, min(window, decisions), 1)
    rounds = min(max(1, int(evaluations / (2 * whole))), _MOST_ROUNDS)
    most = min(available // FEWEST_BATCHES, _MOST_BATCHES)
    return Effort(rounds, decisions, min(int(evaluations / whole / rounds), most))


def refine(
    start: Choices,
    costs: CostTable,
    preferences: Sequence[Row],
    losses: Losses,
    *,
    effort: Effort,
    first: int = 0,
    borders: Sequence[Border] = (),
    to_spend: Sequence[int] | None = None,
) -> tuple[Choices, float]:
    """Improve an assignment by measured changes until none helps.

    A round scores at most ``MOST_CHANGES`` assignments per decision that it looks at, however
    many choices that has, and at most ``len(RADII) + 1`` of what they recombine to.

    Args:
        start: An assignment that meets every budget.
        costs: Of each choice of each decision, as shares of the budgets.
        preferences: Which of several equally dear choices is worth a look, and which of
            equally harmful ones is taken.
        losses: Scores assignments; those of one round should have no sample in common.
        effort: How often, on how much.
        first: Number of the first round; each has batches and a window of its own.
        borders: What neighbours cost together.
        to_spend: Numbers of the budgets that buy precision; None: all do.

    Returns:
        An assignment that meets every budget and spends no less than the first, or at least
        0.98 of one, of those that buy precision; and its loss where it was last scored, NaN
        if it never was.
    """
    current, loss = tuple(start), math.nan
    budgets = range(costs[0].reshape(len(costs[0]), -1).shape[1])
    buying = list(budgets if to_spend is None else to_spend)

    def used(choices: Choices) -> float:
        return float(shares(costs, borders, choices)[buying].max(initial=0.0))

    count = len(current)
    for number in range(first, first + effort.rounds):
        begin = number * effort.decisions
        window = {(begin + i) % count for i in range(min(effort.decisions, count))}
        drawn = [(number, batch) for batch in range(effort.drawn)]
        options = [
            _options(row, preference, choice) if decision in window else [choice]
            for decision, (row, preference, choice) in enumerate(
                zip(costs, preferences, current, strict=True)
            )
        ]
        changed = single_changes(current, [own[1:] for own in options])
        measured = losses(changed, drawn[: effort.batches]).mean(axis=0)
        bought = [row.reshape(len(row), -1)[:, buying].sum(axis=1) for row in costs]
        gains = _gains(options, _damage(options, bought, measured), preferences)
        least = min(LEAST_SPENT, used(current))
        # Once a budget is spent, it stays so.
        slack = math.inf if least == LEAST_SPENT else 0.0
        found = dict.fromkeys(_recombined(options, gains, costs, borders, slack, buying))
        candidates = [
            current,
            *(c for c in found if c != current and used(c) >= least),
        ]
        scored = losses(candidates, drawn[effort.batches : 2 * effort.batches]).mean(axis=0)
        best = int(np.argmin(np.where(np.isfinite(scored), scored, math.inf)))
        loss = float(scored[0])
        improves = False
        if best > 0:
            both = losses([current, candidates[best]], drawn[2 * effort.batches :])
            improves = _improves(both)
            current = candidates[best] if improves else current
            loss = float(both[:, int(improves)].mean())
        if not improves and effort.decisions >= count:
            break
    return current, loss


def _improves(losses: Matrix) -> bool:
    """Whether the second of two assignments is better than the first, as far as can be told.

    Args:
        losses: [batches, 2]
    """
    if not np.isfinite(losses[:, 1]).all():
        return False
    gains = losses[:, 0] - losses[:, 1]
    if not np.isfinite(gains).all():
        return True
    error = float(gains.std(ddof=1)) / math.sqrt(len(gains))
    return float(gains.mean()) > _ERRORS * error


def _options(row: npt.NDArray[np.float64], preference: Row, current: int) -> list[int]:
    """The choice that is made, and one of the next cheaper, next dearer and same cost.

    Where no choice costs anything, the most precise was taken and stays: that another is
    better would be chance.
    """
    cost = row.reshape(len(row), -1).sum(axis=1)
    if not cost.any():
        return [current]
    differs = cost - cost[current]
    alike = np.abs(differs) <= _ROUNDING * max(1.0, float(cost[current]))
    alike[current] = False
    groups = [np.flatnonzero(alike)]
    for side in (differs < 0, differs > 0):
        others = np.flatnonzero(side & ~alike)
        if len(others):
            gap = np.abs(differs[others])
            groups.append(others[gap <= gap.min() * (1 + _ROUNDING)])
    best = [int(max(group, key=preference.__getitem__)) for group in groups if len(group)]
    return [current, *best]


def _damage(options: Sequence[Sequence[int]], bought: Sequence[Row], losses: Row) -> list[Row]:
    """What each option adds to the loss; 0 for the first, which is what is chosen.

    That a cheaper choice does good, or a dearer one harm, is noise: without this, where hardly
    anything is lost, the budget would be left unspent.

    Args:
        options: Of each decision.
        bought: What each choice costs of the budgets that buy precision, together.
        losses: Of what is chosen, then of all single changes.
    """
    found = finite(losses)
    added = iter(found[1:] - found[0])
    rows = []
    for own, row in zip(options, bought, strict=True):
        raw = np.array([0.0, *(next(added) for _ in own[1:])])
        cost = row[list(own)]
        raw[cost < cost[0]] = np.maximum(raw[cost < cost[0]], 0.0)
        raw[cost > cost[0]] = np.minimum(raw[cost > cost[0]], 0.0)
        rows.append(raw)
    return rows


def _gains(
    options: Sequence[Sequence[int]], damage: Sequence[Row], preferences: Sequence[Row]
) -> list[Row]:
    """What each option is worth: damage avoided, and among equals what is preferred."""
    hints = [
        preference[list(own)] - preference[own[0]]
        for own, preference in zip(options, preferences, strict=True)
    ]
    largest, longest = (
        max((float(np.abs(row).max()) for row in rows), default=0.0)
        for rows in (damage, hints)
    )
    weight = _HINT * (largest or 1.0) / (longest or 1.0)
    return [weight * hint - row for hint, row in zip(hints, damage, strict=True)]


def _recombined(
    options: Sequence[Sequence[int]],
    gains: Sequence[Row],
    costs: CostTable,
    borders: Sequence[Border],
    slack: float,
    to_spend: Sequence[int],
) -> list[Choices]:
    """For each radius, the largest sum of gains with at most so many changes."""
    preferences = [row - row.max() for row in gains]
    own = [
        row.reshape(len(row), -1)[list(kept)] for row, kept in zip(costs, options, strict=True)
    ]
    kept_borders = [
        replace(
            border,
            kinds=(
                tuple(border.kinds[0][choice] for choice in options[border.first]),
                tuple(border.kinds[1][choice] for choice in options[border.second]),
            ),
        )
        for border in borders
    ]
    result = []
    for radius in RADII:
        # The radius is one budget more, of which a change costs a part; with half a change
        # left, it is never held to be spent.
        limited = tuple(
            np.column_stack([row, np.where(np.arange(len(row)) > 0, 1 / (radius + 0.5), 0.0)])
            for row in own
        )
        places = project(preferences, limited, slack, kept_borders, to_spend)
        found = tuple(own[place] for own, place in zip(options, places, strict=True))
        if spent(costs, borders, found) <= 1 + _ROUNDING:
            result.append(found)
    return result
