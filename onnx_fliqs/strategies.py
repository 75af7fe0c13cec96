"""Ways to an assignment: FLIQS's search, and the baselines it has to beat.

The baselines choose before training, from what is known of the float model, and then train the
assignment for all of the steps: the same step, data, thresholds and emission as the search.
Two of them need the *damage* of each choice: how much the loss on held-out samples
grows when that decision alone leaves its reference, the choice that distorts it least. Where
formats of weights and of activations are chosen apart, it is the sum of what each operand adds
alone.
"""

import enum
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from onnx_fliqs.borders import Border, shares, spent
from onnx_fliqs.controller import Choices, Row
from onnx_fliqs.cost import CostTable
from onnx_fliqs.errors import InfeasibleError
from onnx_fliqs.operand_lines import OperandLine, references
from onnx_fliqs.projection import project

__all__ = [
    "Strategy",
    "finite",
    "greedy_choices",
    "measure_damage",
    "program_choices",
    "random_choices",
    "single_changes",
    "uniform_choices",
]


class Strategy(enum.Enum):
    """How the assignment is chosen."""

    FLIQS = "fliqs"
    """By the policy controller, from measured single changes."""
    ILP = "ilp"
    """The least sum of damages within the budget, by an integer program (HAWQ-V3)."""
    GREEDY = "greedy"
    """The least harmful saving first, one at a time (AIMET's automatic mixed precision)."""
    UNIFORM = "uniform"
    """The most precise format for every layer that meets the budget; of equally dear ones,
    that which distorts least."""
    RANDOM = "random"
    """Any assignment that spends the budget."""
    FIXED = "fixed"
    """The one that is given: nothing is chosen, so there is no budget."""


def single_changes(start: Choices, others: Sequence[Iterable[int]]) -> list[Choices]:
    """An assignment, then each that differs from it in one decision.

    Args:
        start: The assignment.
        others: For each decision, what it is changed to.
    """
    changed = [
        (*start[:i], choice, *start[i + 1 :])
        for i, choices in enumerate(others)
        for choice in choices
    ]
    return [start, *changed]


def finite(losses: Sequence[float] | Row) -> Row:
    """Losses; one that is not finite counts as the largest that is, or 0 if none is."""
    found = np.asarray(losses, np.float64)
    known = np.isfinite(found)
    result: Row = np.where(known, found, np.max(found[known], initial=0.0))
    return result


def measure_damage(
    costs: CostTable,
    lines: Sequence[Sequence[OperandLine]],
    as_precise: Sequence[npt.NDArray[np.bool_]],
    losses: Callable[[Sequence[Choices]], Sequence[float]],
) -> tuple[Row, ...]:
    """What each choice of each decision adds to the loss when it stands alone.

    Args:
        costs: For the number of choices of each decision.
        lines: For each decision, the choices that are measured; what they add is summed.
        as_precise: For each decision, [choices, choices]: whether the second is at least as
            precise as the first, in both operands.
        losses: Scores assignments on the same samples.

    Returns:
        For each decision, the damage of its choices: never negative, 0 for the reference,
        and, since noise is no merit, never less than that of a more precise choice. A loss
        that is not finite counts as the largest that is.
    """
    lower = [[choice for line in own for choice in line.choices[:-1]] for own in lines]
    found = finite(losses(single_changes(references(lines), lower)))
    added = iter(found[1:] - found[0])
    rows = []
    for row, own, finer in zip(costs, lines, as_precise, strict=True):
        damage = np.zeros(len(row))
        for line in own:
            raw = np.maximum([*(next(added) for _ in line.choices[:-1]), 0.0], 0.0)
            along = finer[np.ix_(line.choices, line.choices)]
            damage += np.where(along, raw, 0.0).max(axis=1)[list(line.positions)]
        rows.append(damage)
    return tuple(rows)


def program_choices(
    costs: CostTable,
    damage: Sequence[Row],
    borders: Sequence[Border] = (),
    to_spend: Sequence[int] | None = None,
) -> Choices:
    """The assignment with the least sum of damages among those that spend a budget.

    HAWQ-V3 (Yao et al. 2021, section 3.4) weighs squared weight errors by the trace of the
    Hessian; a measured difference of losses sees the activations as well.

    Args:
        costs: Of each choice of each decision, as shares of the budgets.
        damage: Of each choice of each decision, not negative.
        borders: What neighbours cost together.
        to_spend: As for :func:`~onnx_fliqs.projection.project`.
    """
    chosen = project([-row for row in damage], costs, borders=borders, to_spend=to_spend)
    if borders:
        return chosen
    # What costs nothing takes, of equally harmless choices, the most precise.
    return tuple(
        choice if row.any() else int(np.flatnonzero(harm == harm[choice])[-1])
        for row, harm, choice in zip(costs, damage, chosen, strict=True)
    )


def greedy_choices(
    start: Choices,
    costs: CostTable,
    damage: Sequence[Row],
    borders: Sequence[Border] = (),
) -> Choices:
    """Take what saves something at the least damage, step by step, until every budget is met.

    The step of a decision is the least harmful of the choices that leave less beyond the
    budgets, of equals the one that is nearest. Where choices are in a line, that is the next
    one down. Where neighbours cost something together and no such step is left, any lower
    choice is one.

    Args:
        start: The reference of every decision.
        costs: Of each choice of each decision, as shares of the budgets.
        damage: Of each choice of each decision, not negative.
        borders: What neighbours cost together.

    Raises:
        InfeasibleError: Lowered as far as it helps, the formats cost more than a budget.
    """
    chosen = list(start)
    # With borders, a step may pay only together with a later one, and what saved something may
    # cost more again: from then on every step is one down.
    only_down = False
    taken = 0
    while (total := shares(costs, borders, chosen)).max() > 1 + 1e-9:
        steps: list[tuple[float, float, int, int]] = []
        for i, current in enumerate(chosen):
            row = costs[i].reshape(len(costs[i]), -1)
            saved = (row[current] - row).T[total > 1].sum(axis=0)
            beyond = np.maximum(total - row[current] + row - 1, 0.0).sum(axis=1)
            saving = np.flatnonzero(beyond < beyond[current]).tolist()
            able = list(range(current)) if only_down else saving
            choice = min(reversed(able), key=damage[i].__getitem__, default=None)
            if choice is not None:
                steps.append((float(damage[i][choice]), -float(saved[choice]), i, choice))
        if not steps and borders and not only_down:
            only_down = True
            continue
        if not steps:
            raise InfeasibleError("lowering formats step by step never meets the budget")
        *_, decision, choice = min(steps)
        chosen[decision] = choice
        taken += 1
        only_down |= bool(borders) and taken > sum(map(len, costs))
    return tuple(chosen)


def uniform_choices(
    costs: CostTable,
    levels: Sequence[Choices],
    distortions: Sequence[npt.NDArray[np.float64]],
    borders: Sequence[Border] = (),
) -> Choices:
    """The most precise uniform assignment that meets every budget.

    Of those that cost the same (int8 and e5m2, say), it is the one that distorts least.

    Args:
        costs: Cost of each choice as a share of each budget.
        levels: The uniform assignments, the least precise first.
        distortions: For each decision, [choices, operands].
        borders: What neighbours cost together.

    Raises:
        InfeasibleError: Even the cheapest costs more than the budget.
    """

    def distorts(choices: Choices) -> float:
        return sum(float(rows[c].sum()) for rows, c in zip(distortions, choices, strict=True))

    met = [tuple(choices) for choices in levels if spent(costs, borders, choices) <= 1 + 1e-9]
    if not met:
        raise InfeasibleError("no uniform format meets the budget")
    cost = shares(costs, borders, met[-1])
    alike = [c for c in met if np.allclose(shares(costs, borders, c), cost, rtol=1e-9, atol=0)]
    return min(reversed(alike), key=distorts)


def random_choices(
    costs: CostTable, rng: np.random.Generator, borders: Sequence[Border] = ()
) -> Choices:
    """A random assignment that spends a budget: random preferences, projected."""
    return project([-rng.exponential(size=len(row)) for row in costs], costs, borders=borders)
