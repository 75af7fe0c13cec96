"""Accuracy against cost, of what ``quality.py`` ran."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from quality_cells import Cell, Cells, uniform_cells
from quality_runs import SPACES
from tasks import TASKS

__all__ = ["plot"]

_KINDS: Final = {
    "integers": ("int-s", "int-l", "int-low"),
    "minifloats": ("fp-s", "fp-l"),
    "both": ("int+fp",),
}
"""The spaces of each row."""
_MARKERS: Final = dict(zip(SPACES, "sod^v*", strict=True))
_UNITS: Final = {"bops": (1e6, "MBOPs"), "bytes": (1e3, "weights, kB")}


def plot(cells: Cells, cost: str, strategies: Sequence[str], path: Path) -> None:
    """Write a plot: a column per model, a row per kind of format.

    Colours are strategies, markers are spaces, a grey line joins the best uniform formats.

    Args:
        cells: What was measured.
        cost: ``bops`` or ``bytes``.
        strategies: In the order of their colours, without ``uniform``.
        path: The SVG file.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        print("no plots: pip install matplotlib", file=sys.stderr)
        return
    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "onnx-fliqs", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    unit, label = _UNITS[cost]
    panels = {(model, space) for model, space, bits, _ in cells if bits is not None}
    models = [name for name in TASKS if any(model == name for model, _ in panels)]
    kinds = [
        kind for kind, spaces in _KINDS.items() if any(space in spaces for _, space in panels)
    ]
    if not panels:
        return
    figure, axes = plt.subplots(
        *(len(kinds), len(models)),
        squeeze=False,
        figsize=(4.2 * len(models), 3.4 * len(kinds) + 0.6),
        layout="constrained",
    )
    legend = {}
    for row, kind in zip(axes, kinds, strict=True):
        for axis, model in zip(row, models, strict=True):
            axis.set(title=f"{model}, {kind}", xlabel=label)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.grid(alpha=0.2)
            formats = [name for space in _KINDS[kind] for name in SPACES[space].uniform]
            uniform = uniform_cells(cells, model, dict.fromkeys(formats))
            front = _front(uniform.values(), cost)
            xs, ys = [c.mean(cost) / unit for c in front], [c.accuracy for c in front]
            if front:
                (legend["uniform"],) = axis.plot(xs, ys, color="grey", linewidth=1, marker=".")
            for name, cell in uniform.items():
                place = cell.mean(cost) / unit, cell.accuracy
                axis.plot(*place, color="grey", marker=".")
                axis.annotate(
                    name, place, fontsize=7, xytext=(3, -8), textcoords="offset points"
                )
            for number, strategy in enumerate(strategies):
                for space in _KINDS[kind]:
                    points = _points(cells, model, space, strategy)
                    if points:
                        legend[f"{strategy}, {space}"] = axis.errorbar(
                            [cell.mean(cost) / unit for cell in points],
                            [cell.accuracy for cell in points],
                            yerr=[np.nan_to_num(cell.spread) for cell in points],
                            color=f"C{number}",
                            marker=_MARKERS[space],
                            markersize=4,
                            linestyle="none",
                            capsize=2,
                            zorder=3 - number / 10,  # The search lies above its baselines.
                        )
        row[0].set(ylabel="test accuracy, %")
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=5)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _front(cells: Iterable[Cell], cost: str) -> list[Cell]:
    """Those that are better than all that cost less, cheapest first."""
    front: list[Cell] = []
    for cell in sorted(cells, key=lambda cell: (cell.mean(cost), -cell.accuracy)):
        if not front or cell.accuracy > front[-1].accuracy:
            front.append(cell)
    return front


def _points(cells: Cells, model: str, space: str, strategy: str) -> list[Cell]:
    """The cells of a strategy in a space, at all budgets."""
    return [
        cell
        for (m, s, _, name), cell in cells.items()
        if (m, s, name) == (model, space, strategy)
    ]
