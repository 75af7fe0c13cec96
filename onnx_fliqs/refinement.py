"""Local search: single changes of an assignment are measured, recombined and verified.

The loss is not a sum over decisions, least of all at few bits, and what training has mended no
longer hurts. Around one assignment, with weights that know it, the loss is close to a sum:
each round measures what single changes do, lets the integer program recombine them within
trust regions of several radii (how many decisions may change), and takes the best of what it
finds if that has a lower loss on other samples. This is sequential programming with a trust
region (Nocedal & Wright, Numerical Optimization, chapter 4) on a discrete space; no round
makes things worse but by what the samples do not tell.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_fliqs.borders import Border, spent
from onnx_fliqs.controller import Choices, Row
from onnx_fliqs.cost import CostTable
from onnx_fliqs.projection import project
from onnx_fliqs.strategies import finite

__all__ = ["MOST_CHANGES", "RADII", "refine"]

Losses: TypeAlias = Callable[[Sequence[Choices], int], Row]
"""Scores assignments on the samples of a number."""

MOST_CHANGES: Final = 3
"""Single changes of a decision that are measured: one cheaper, one dearer, one alike."""
RADII: Final = (1, 2, 3, 4, 6, 8, 12)
"""How many decisions may change at once."""
_ROUNDING: Final = 1e-9


def refine(
    start: Choices,
    costs: CostTable,
    preferences: Sequence[Row],
    losses: Losses,
    *,
    rounds: Sequence[int],
    decisions: int,
    borders: Sequence[Border] = (),
) -> tuple[Choices, float]:
    """Improve an assignment by measured changes until none helps.

    A round scores at most ``MOST_CHANGES`` assignments per decision that it looks at, however
    many choices that has, and at most ``len(RADII) + 1`` to verify.

    Args:
        start: An assignment that meets every budget.
        costs: Of each choice of each decision, as shares of the budgets.
        preferences: Which of several equally dear choices is worth a look.
        losses: Scores assignments; each number stands for samples of its own.
        rounds: Their numbers. Each draws two batches of numbers, twice its own and the next.
        decisions: How many to look at in a round, one window after another.
        borders: What neighbours cost together.

    Returns:
        An assignment that meets every budget, and its loss where it was last verified; NaN
        if it never was.
    """
    current, loss = tuple(start), math.nan
    count = len(current)
    for number in rounds:
        window = {(number * decisions + i) % count for i in range(min(decisions, count))}
        options = [
            _options(row, preference, choice) if decision in window else [choice]
            for decision, (row, preference, choice) in enumerate(
                zip(costs, preferences, current, strict=True)
            )
        ]
        changed = _single_changes(current, options)
        damage = _damage(options, losses([current, *changed], 2 * number))
        found = dict.fromkeys(_recombined(options, damage, costs, borders))
        candidates = [current, *(choices for choices in found if choices != current)]
        verified = finite(losses(candidates, 2 * number + 1))
        best = int(np.argmin(verified))
        current, loss = candidates[best], float(verified[best])
        if best == 0 and decisions >= count:
            break
    return current, loss


def _options(row: npt.NDArray[np.float64], preference: Row, current: int) -> list[int]:
    """The choice that is made, and one of the next cheaper, next dearer and same cost."""
    cost = row.reshape(len(row), -1).sum(axis=1)
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


def _single_changes(current: Choices, options: Sequence[Sequence[int]]) -> list[Choices]:
    return [
        (*current[:i], choice, *current[i + 1 :])
        for i, own in enumerate(options)
        for choice in own[1:]
    ]


def _damage(options: Sequence[Sequence[int]], losses: Row) -> list[Row]:
    """What each option adds to the loss; 0 for the first, which is what is chosen.

    Args:
        options: Of each decision.
        losses: Of what is chosen, then of all single changes.
    """
    found = finite(losses)
    added = iter(found[1:] - found[0])
    return [np.array([0.0, *(next(added) for _ in own[1:])]) for own in options]


def _recombined(
    options: Sequence[Sequence[int]],
    damage: Sequence[Row],
    costs: CostTable,
    borders: Sequence[Border],
) -> list[Choices]:
    """For each radius, the least sum of damages with at most so many changes."""
    preferences = [row.min() - row for row in damage]
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
        # The radius is one budget more: a change costs one part of it.
        limited = tuple(
            np.column_stack([row, np.where(np.arange(len(row)) > 0, 1 / radius, 0.0)])
            for row in own
        )
        places = project(preferences, limited, slack=0.0, borders=kept_borders)
        found = tuple(own[place] for own, place in zip(options, places, strict=True))
        if spent(costs, borders, found) <= 1 + _ROUNDING:
            result.append(found)
    return result
