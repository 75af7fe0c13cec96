"""What the runs of ``quality.py`` show: tables, verdicts and a plot; reads the test data.

Accuracies are those of the emitted files on test data. Their spread is the sample standard
deviation over seeds. Differences are taken seed by seed, since runs of one seed share their
split of the data and their batches, and ± is the standard error of the mean.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final

from common import provenance
from quality_cells import Cell, Cells, Key, cells_of, uniform_cells
from quality_plot import plot
from quality_runs import SPACES, Row, Run, data_file, model_file, read_rows
from tasks import TASKS

from onnx_fliqs import evaluate
from onnx_fliqs.formats import parse_format

__all__ = ["report"]

_SEARCH: Final = "fliqs"
_BASELINES: Final = ("uniform", "ilp", "greedy", "random", "ptq")
_CHOSEN: Final = (_SEARCH, *_BASELINES[1:], "retrain")
_STRATEGIES: Final = (*_CHOSEN, "uniform")
_FREE: Final = 0.5
"""Points between floor and ceiling below which the floor is nearly free: a share of so small
a gap is mostly noise."""
_LEAST_SPENT: Final = 0.98


# --- accuracies ----------------------------------------------------------------------------


def _tested(rows: Iterable[Row], folder: Path) -> list[Row]:
    """Accuracy of every emitted file on the test data, each measured once.

    Rows of ``results.jsonl`` bring it along.
    """
    store = _Tests(folder)
    return [
        row
        if "accuracy" in row
        else {**row, "accuracy": 100 * store.accuracy(row["model"], folder / f"{name}.onnx")}
        for name, row in ((Run.of(row).name, row) for row in rows)
        if "refused" not in row
    ]


class _Tests:
    """Accuracies on test data, kept by the digest of the file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "tested.jsonl"
        self._known = {(r["model"], r["digest"]): r["accuracy"] for r in read_rows(self._path)}

    def accuracy(self, model: str, path: Path) -> float:
        key = model, hashlib.sha256(path.read_bytes()).hexdigest()
        if key not in self._known:
            self._known[key] = evaluate(path, data_file(self._folder, model, "test")).value
            row = {"model": model, "digest": key[1], "accuracy": self._known[key]}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps({**row, 'file': path.name})}\n")
        return float(self._known[key])


@dataclass(frozen=True)
class _Difference:
    """Between two cells, in points."""

    mean: float
    error: float
    """NaN for a single seed."""

    @classmethod
    def of(cls, first: Cell, second: Cell) -> "_Difference | None":
        """First minus second, over the seeds that both have."""
        one, other = first.accuracies, second.accuracies
        found = [one[seed] - other[seed] for seed in one if seed in other]
        if not found:
            return None
        error = stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
        return cls(fmean(found), error)

    @property
    def below(self) -> bool:
        """Beyond one standard error, as far as there is one."""
        return self.mean + (0.0 if math.isnan(self.error) else self.error) < 0

    def __str__(self) -> str:
        return f"{self.mean:+.2f}{_plus_minus(self.error)}"


def _plus_minus(value: float, digits: int = 2) -> str:
    return "" if math.isnan(value) else f" ± {value:.{digits}f}"


# --- tables --------------------------------------------------------------------------------


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _order(key: Key) -> tuple[Any, ...]:
    model, space, bits, strategy = key
    names = list(SPACES)
    place = names.index(space) if space in names else len(names)
    return (
        list(TASKS).index(model),
        place,
        bits or 0.0,
        _STRATEGIES.index(strategy),
        space,
    )


def _runs_table(cells: Cells) -> str:
    return _markdown(
        (
            *("model", "space", "budget", "strategy", "seeds", "accuracy ± deviation"),
            *("standard error", "effective bits", "MBOPs", "kB", "s"),
        ),
        (
            (
                *(model, space, "-" if bits is None else f"{bits:g}", strategy),
                *(str(len(cell.rows)), f"{cell.accuracy:.2f}{_plus_minus(cell.spread)}"),
                *("" if math.isnan(cell.error) else f"{cell.error:.2f}",),
                *(f"{cell.mean('effective_bits'):.2f}", f"{cell.mean('bops') / 1e6:.4g}"),
                *(f"{cell.mean('bytes') / 1000:.4g}", f"{cell.mean('seconds'):.0f}"),
            )
            for (model, space, bits, strategy), cell in sorted(
                cells.items(), key=lambda item: _order(item[0])
            )
        ),
    )


def _accuracies(cells: Cells) -> str:
    """A column per model: mean ± deviation, in brackets how many seeds."""
    models = [name for name in TASKS if any(name == model for model, *_ in cells)]

    def text(cell: Cell | None) -> str:
        if cell is None:
            return ""
        return f"{cell.accuracy:.2f}{_plus_minus(cell.spread)} ({len(cell.rows)})"

    rows = (
        (
            *(space, "-" if bits is None else f"{bits:g}", strategy),
            *(text(cells.get((model, space, bits, strategy))) for model in models),
        )
        for space, bits, strategy in dict.fromkeys(
            key[1:] for key in sorted(cells, key=lambda key: _order(key)[1:])
        )
    )
    return _markdown(("space", "budget", "strategy", *models), rows)


def _searched(cells: Cells) -> list[tuple[str, str, float, Cell]]:
    """The cells of the search."""
    return [
        (model, space, bits, cells[model, space, bits, strategy])
        for model, space, bits, strategy in sorted(cells, key=_order)
        if strategy == _SEARCH and bits is not None
    ]


def _within(formats: Mapping[str, Cell], bits: float) -> dict[str, Cell]:
    """The uniform formats that a budget has room for."""
    limit = bits * (1 + 1e-9)
    return {n: cell for n, cell in formats.items() if cell.mean("effective_bits") <= limit}


def _best(formats: Mapping[str, Cell]) -> str | None:
    return max(formats, key=lambda name: formats[name].accuracy, default=None)


def _gaps(cells: Cells) -> str:
    """Gap recovered: (search - floor) / (ceiling - floor)."""
    rows = []
    for model, space, bits, cell in _searched(cells):
        floors = _within(uniform_cells(cells, model, SPACES[space].floors), bits)
        widest = max((parse_format(name).bits for name in floors), default=0)
        floor = _best({n: c for n, c in floors.items() if parse_format(n).bits == widest})
        ceilings = uniform_cells(cells, model, SPACES[space].ceilings)
        ceiling = _best(ceilings)
        if floor is None or ceiling is None:
            continue
        low, high = floors[floor], ceilings[ceiling]
        rows.append(
            (
                *(model, space, f"{bits:g}"),
                f"{cell.mean('bops') / low.mean('bops'):.2f} x",
                *(f"{floor} {low.accuracy:.2f}", f"{cell.accuracy:.2f}"),
                *(f"{ceiling} {high.accuracy:.2f}", _gap(cell, low, high)),
            )
        )
    head = "model", "space", "budget", "BOPs / floor's", "floor", "search", "ceiling", "gap"
    return _markdown(head, rows)


def _gap(cell: Cell, low: Cell, high: Cell) -> str:
    """With its standard error to first order, the three means taken as independent."""
    gap = high.accuracy - low.accuracy
    if gap < _FREE:
        return f"floor nearly free ({gap:+.2f} points to the ceiling)"
    share = (cell.accuracy - low.accuracy) / gap
    error = math.hypot(cell.error, (1 - share) * low.error, share * high.error) / gap
    return f"{share:.0%}{'' if math.isnan(error) else f' ± {error:.0%}'}"


_Comparisons = dict[str, list[tuple[str, _Difference]]]
"""For each baseline: the model and the difference of each cell."""


def _compared(cells: Cells) -> tuple[str, _Comparisons]:
    """The search less each baseline at equal or lower BOPs, cell by cell."""
    rows: list[list[str]] = []
    found: _Comparisons = defaultdict(list)
    for model, space, bits, cell in _searched(cells):
        line = [model, space, f"{bits:g}", f"{cell.accuracy:.2f}"]
        for baseline in _BASELINES:
            other, note = cells.get((model, space, bits, baseline)), ""
            if baseline == "uniform":
                formats = _within(uniform_cells(cells, model, SPACES[space].uniform), bits)
                name = _best(formats)
                other, note = (formats[name], f" ({name})") if name else (None, "")
            difference = None if other is None else _Difference.of(cell, other)
            if difference is None:
                line.append("")
                continue
            found[baseline].append((model, difference))
            line.append(f"{difference}{note}{' **below**' if difference.below else ''}")
        rows.append(line)
    head = "model", "space", "budget", "search", *(f"less {name}" for name in _BASELINES)
    return _markdown(head, rows), found


def _advantage(compared: _Comparisons) -> str:
    """Mean differences over spaces and budgets."""
    rows = []
    for baseline, found in compared.items():
        for model in (*dict.fromkeys(model for model, _ in found), "all"):
            chosen = [d for name, d in found if model in (name, "all")]
            means = [difference.mean for difference in chosen]
            error = stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
            below = sum(difference.below for difference in chosen)
            rows.append(
                (
                    *(baseline, model, str(len(chosen))),
                    f"{fmean(means):+.2f}{_plus_minus(error)}",
                    f"{min(means):+.2f}",
                    str(below),
                )
            )
    return _markdown(
        ("baseline", "model", "cells", "mean advantage", "worst", "below by > 1 SE"), rows
    )


def _retrained(cells: Cells) -> str:
    """Training what was found alone, less the search as served."""
    rows = []
    found = []
    for model, space, bits, cell in _searched(cells):
        other = cells.get((model, space, bits, "retrain"))
        difference = None if other is None else _Difference.of(other, cell)
        if difference is not None:
            found.append(difference.mean)
            rows.append((model, space, f"{bits:g}", str(difference)))
    if found:
        rows.append(("**mean**", "", "", f"**{fmean(found):+.2f}**"))
    return _markdown(("model", "space", "budget", "retrained less searched"), rows)


def _spent(cells: Cells) -> str:
    """Cost as a share of the budget, over all runs of the search."""
    rows = []
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for model, space, bits, cell in _searched(cells):
        groups[model, space] += [(row["effective_bits"] / bits) ** 2 for row in cell.rows]
    for (model, space), shares in groups.items():
        rows.append(
            (
                *(model, space, str(len(shares)), f"{min(shares):.3f} to {max(shares):.3f}"),
                str(sum(share < _LEAST_SPENT for share in shares)),
                str(sum(share > 1 + 1e-9 for share in shares)),
            )
        )
    head = "model", "space", "runs", "cost / budget", f"below {_LEAST_SPENT}", "above 1"
    return _markdown(head, rows)


def _converged(cells: Cells) -> str:
    """Policy entropy at the end, and what the searches themselves say."""
    rows = []
    for model, space, bits, cell in _searched(cells):
        doubts = [doubt for row in cell.rows for doubt in row.get("doubts") or ()]
        entropy = max(row["entropy"] for row in cell.rows)
        rows.append((model, space, f"{bits:g}", f"{entropy:.3f}", "; ".join(doubts)))
    return _markdown(("model", "space", "budget", "largest entropy", "doubts"), rows)


def _times(cells: Cells) -> str:
    """Seconds of a search, over those of uniform training with as many steps."""
    rows = []
    for model in TASKS:
        uniform = [
            row["seconds"]
            for (name, _, _, strategy), cell in cells.items()
            if (name, strategy) == (model, "uniform")
            for row in cell.rows
        ]
        seconds: dict[str, list[float]] = defaultdict(list)
        for name, space, _, cell in _searched(cells):
            if name == model:
                seconds[space] += [row["seconds"] for row in cell.rows]
        if uniform:
            rows += [
                (
                    *(model, space, f"{fmean(found):.0f}", f"{fmean(uniform):.0f}"),
                    f"{fmean(found) / fmean(uniform):.2f}",
                )
                for space, found in seconds.items()
            ]
    return _markdown(("model", "space", "search, s", "uniform, s", "ratio"), rows)


# --- all of it -----------------------------------------------------------------------------


def report(folder: Path) -> str:
    """Write ``quality.md`` and the plots of everything in the folder; returns the text.

    ``results.jsonl`` holds the runs with their accuracies: all that a report needs.

    Runs of other numbers of steps or samples are reported apart.
    """
    rows = read_rows(folder / "runs.jsonl")
    refused = {(r["model"], r["space"], r["refused"]) for r in rows if "refused" in r}
    groups: dict[tuple[int, int], list[Row]] = defaultdict(list)
    tested = _tested(rows, folder)
    kept = [*tested, *(row for row in rows if "refused" in row)]
    lines = (f"{json.dumps(row)}\n" for row in kept)
    (folder / "results.jsonl").write_text("".join(lines), encoding="utf-8")
    for row in tested:
        groups[row["steps"], row["batch_size"]].append(row)
    parts = [f"# Quality\n\n{_floats(rows, folder)}"]
    for (steps, batch), found in sorted(groups.items()):
        cells = cells_of(found)
        parts.append(_section(f"{steps} steps of batch {batch}", cells))
        for cost in ("bops", "bytes"):
            plot(cells, cost, _CHOSEN, folder / f"quality_{steps}x{batch}_{cost}.svg")
    if refused:
        reasons = (f"- {model}, {space}: {why}" for model, space, why in sorted(refused))
        parts.append("## Refused\n\n" + "\n".join(reasons))
    commits = sorted({row["commit"] for row in rows})
    parts.append(f"Runs made at {', '.join(commits)}; report: {json.dumps(provenance())}")
    text = "\n\n".join(parts)
    (folder / "quality.md").write_text(f"{text}\n", encoding="utf-8")
    return text


def _floats(rows: Iterable[Row], folder: Path) -> str:
    """Accuracy of the float models."""
    store = _Tests(folder)
    models = [name for name in TASKS if any(row["model"] == name for row in rows)]
    return "Float models: " + ", ".join(
        f"{name} {100 * store.accuracy(name, model_file(folder, name)):.2f} %"
        for name in models
    )


def _section(title: str, cells: Cells) -> str:
    compared, differences = _compared(cells)
    tables = {
        "Accuracy": _accuracies(cells),
        "Gap recovered": _gaps(cells),
        "Search against baselines at equal or lower BOPs": compared,
        "Mean advantage of the search": _advantage(differences),
        "No-retraining gap": _retrained(cells),
        "Budget": _spent(cells),
        "Convergence": _converged(cells),
        "Time": _times(cells),
        "Runs": _runs_table(cells),
    }
    parts = (f"### {name}\n\n{table}" for name, table in tables.items())
    return f"## {title}\n\n" + "\n\n".join(parts)
