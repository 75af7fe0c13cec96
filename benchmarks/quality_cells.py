"""Runs of ``quality.py`` that differ in their seed only, as one figure with its spread."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TypeAlias

from quality_runs import Row

__all__ = ["Cell", "Cells", "Key", "cells_of", "uniform_cells"]


@dataclass(frozen=True)
class Cell:
    """The runs that differ in their seed only; each row has an ``accuracy``, in per cent."""

    rows: tuple[Row, ...]

    @property
    def accuracies(self) -> dict[int, float]:
        """By seed."""
        return {row["seed"]: row["accuracy"] for row in self.rows}

    @property
    def accuracy(self) -> float:
        """Mean over the seeds."""
        return fmean(self.accuracies.values())

    def mean(self, name: str) -> float:
        """Of a figure of the rows."""
        return fmean(row[name] for row in self.rows)

    @property
    def spread(self) -> float:
        """Sample standard deviation; NaN for a single seed."""
        values = list(self.accuracies.values())
        return stdev(values) if len(values) > 1 else math.nan

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.spread / math.sqrt(len(self.rows))


Key: TypeAlias = tuple[str, str, float | None, str]
"""Model, space, budget, strategy."""

Cells: TypeAlias = Mapping[Key, Cell]


def cells_of(rows: Iterable[Row]) -> dict[Key, Cell]:
    """The rows, grouped."""
    groups: dict[Key, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["model"], row["space"], row["bits"], row["strategy"]].append(row)
    return {key: Cell(tuple(group)) for key, group in groups.items()}


def uniform_cells(cells: Cells, model: str, formats: Iterable[str]) -> dict[str, Cell]:
    """The uniform runs of a model by format, of the formats that were run."""
    found = {name: cells.get((model, name, None, "uniform")) for name in formats}
    return {name: cell for name, cell in found.items() if cell is not None}
