"""Search against the baselines, at equal cost, steps and data.

For each model, space and budget: the search, and every baseline of the tool (``--strategy``),
and the search's own assignment without training (``ptq``); several seeds. What is emitted is
kept in the folder; only when all runs are done, test data is read, and a table and a plot are
written there. Stopped, it goes on where it was. ::

    python benchmarks/quality.py FOLDER --models resnet20 --spaces int-l --bits 4.28 5
    python benchmarks/quality.py FOLDER --quick        # few steps, one budget, one seed
"""

import argparse
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from common import provenance
from tasks import TASKS

from onnx_fliqs import (
    Assignment,
    Budget,
    BudgetKind,
    SearchConfig,
    Strategy,
    emit,
    evaluate,
    search,
)
from onnx_fliqs.errors import InfeasibleError

SPACES = {
    "int-s": "int-s",
    "int-l": "int-l",
    "fp-s": "fp-s",
    "fp-l": "fp-l",
    "int+fp": "int4,int5,int6,int8,e2m1,e3m2,e4m3",
}
PTQ = "ptq"
_QUICK_STEPS = 60


@dataclass(frozen=True)
class Run:
    """One cell of the table, for one seed."""

    model: str
    space: str
    bits: float
    strategy: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.model}_{self.space}_{self.bits:g}_{self.strategy}_{self.seed}"


def _runs(options: argparse.Namespace) -> Iterator[Run]:
    """The search first: without it there is no assignment for ``ptq``."""
    strategies = sorted(options.strategies, key=lambda name: (name == PTQ, name != "fliqs"))
    yield from (
        Run(model, space, bits, strategy, seed)
        for seed, model, space, bits, strategy in itertools.product(
            options.seeds, options.models, options.spaces, options.bits, strategies
        )
    )


def _execute(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Search or emit; nothing here reads test data."""
    folder = Path(options.folder)
    data = _data_file(folder, run.model, "train")
    output = folder / f"{run.name}.onnx"
    model = TASKS[run.model].model
    if run.strategy == PTQ:
        searched = Run(run.model, run.space, run.bits, "fliqs", run.seed)
        text = (folder / f"{searched.name}.assignment.json").read_text(encoding="utf-8")
        result = emit(model, Assignment.from_json(text), data)
    else:
        config = SearchConfig(
            space=SPACES[run.space],
            budget=Budget(BudgetKind.BITS, run.bits),
            strategy=Strategy(run.strategy),
            steps=options.steps,
            batch_size=options.batch_size,
            seed=run.seed,
        )
        result = search(model, data, config)
    result.save(output)
    return {
        **vars(run),
        "effective_bits": result.cost.effective_bits,
        "bops": result.cost.bops,
        "bytes": result.cost.weight_bytes,
        "held_out": result.quantized_quality,
        "entropy": result.entropy,
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
    }


def _data_file(folder: Path, model: str, part: str) -> Path:
    path = folder / f"{model}.{part}.npz"
    if not path.exists():
        np.savez(path, **TASKS[model].arrays(part))
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _run_all(options: argparse.Namespace, log: Path) -> list[dict[str, Any]]:
    done = {_key(row) for row in _rows(log)}
    for run in _runs(options):
        if _key(vars(run)) in done:
            continue
        try:
            row = _execute(run, options)
        except InfeasibleError as error:
            row = {**vars(run), "refused": str(error)}
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, **provenance()}) + "\n")
        print(run.name, row.get("held_out", row.get("refused")), file=sys.stderr, flush=True)
    wanted = {_key(vars(run)) for run in _runs(options)}
    return [row for row in _rows(log) if _key(row) in wanted]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "space", "bits", "strategy", "seed"))


def _tested(rows: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Read the test data: every emitted model, and the float models."""
    found = []
    for row in rows:
        if "refused" in row:
            continue
        data = _data_file(folder, row["model"], "test")
        model = folder / f"{Run(*_key(row)).name}.onnx"
        found.append({**row, "accuracy": evaluate(model, data).value})
    return found


# --- the report ----------------------------------------------------------------------------


def _table(rows: Sequence[dict[str, Any]]) -> str:
    cells: dict[tuple[str, str, float, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cells[row["model"], row["space"], row["bits"], row["strategy"]].append(row)
    lines = [
        "| model | space | budget | strategy | seeds | accuracy | effective bits | kB | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, space, bits, strategy), group in sorted(cells.items()):
        accuracies = [100 * row["accuracy"] for row in group]
        spread = f" ± {stdev(accuracies):.2f}" if len(group) > 1 else ""
        lines.append(
            f"| {model} | {space} | {bits:g} | {strategy} | {len(group)}"
            f" | {fmean(accuracies):.2f}{spread}"
            f" | {fmean(row['effective_bits'] for row in group):.2f}"
            f" | {fmean(row['bytes'] for row in group) / 1000:.1f}"
            f" | {fmean(row['seconds'] for row in group):.0f} |"
        )
    return "\n".join(lines)


def _plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against BOPs and against bytes, a row of axes for each model."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    models = sorted({row["model"] for row in rows})
    figure, axes = plt.subplots(
        len(models), 2, squeeze=False, figsize=(11, 4 * len(models)), layout="constrained"
    )
    for line, model in zip(axes, models, strict=True):
        for axis, cost in zip(line, ("bops", "bytes"), strict=True):
            for strategy in sorted({row["strategy"] for row in rows}):
                chosen = [r for r in rows if r["model"] == model and r["strategy"] == strategy]
                axis.scatter(
                    [r[cost] for r in chosen],
                    [100 * r["accuracy"] for r in chosen],
                    label=strategy,
                    s=16,
                )
            axis.set(xlabel=cost, ylabel="test accuracy, %", title=model, xscale="log")
        line[0].legend()
    figure.savefig(path)


def main() -> None:
    """Run what is missing, then test and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", choices=TASKS, default=["resnet20"])
    parser.add_argument("--spaces", nargs="+", choices=SPACES, default=["int-l"])
    parser.add_argument("--bits", nargs="+", type=float, default=[4.28, 4.5, 5.0, 6.0])
    names = [*(strategy.value for strategy in Strategy), PTQ]
    parser.add_argument("--strategies", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="few steps, one budget, one seed")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.seeds, options.bits = _QUICK_STEPS, [0], [4.5]
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = _tested(_run_all(options, folder / "runs.jsonl"), folder)
    table = _table(rows)
    (folder / "quality.md").write_text(f"{table}\n", encoding="utf-8")
    _plot(rows, folder / "quality.svg")
    print(table)
    print(json.dumps({"steps": options.steps, **provenance()}))


if __name__ == "__main__":
    main()
