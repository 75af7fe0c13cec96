"""Accuracy of fully quantized graphs: uniform precisions, and a short search.

Of each model: float, every uniform precision of the target without training, and a search of
the target's whole space. What is measured is the graph with fixed shapes that a user gets, on
the test data, in ONNX Runtime, unoptimised (the hardware itself is not at hand). ::

    python benchmarks/fully_quantized.py FOLDER --models resnet20 vit --steps 60
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from common import provenance
from tasks import TASKS

from onnx_fliqs import (
    Assignment,
    Budget,
    BudgetKind,
    SearchConfig,
    emit,
    evaluate,
    search,
)
from onnx_fliqs.api import inspect

_TRAINING = 6000
"""Samples to calibrate and to search on."""


def _data(folder: Path, model: str, part: str, most: int) -> Path:
    path = folder / f"{model}_{part}_{most}.npz"
    if not path.exists():
        arrays = TASKS[model].arrays(part)
        np.savez(path, **{name: array[:most] for name, array in arrays.items()})
    return path


def _measure(model: str, options: argparse.Namespace) -> None:
    task, folder = TASKS[model], Path(options.folder)
    train = _data(folder, model, "train", _TRAINING)
    test = _data(folder, model, "test", options.samples)

    def row(name: str, value: float, started: float, **more: object) -> None:
        seconds = round(time.monotonic() - started)
        line = {"model": model, "graph": name, "accuracy": round(value, 4), **more}
        print(json.dumps({**line, "seconds": seconds}), flush=True)

    started = time.monotonic()
    row("float", evaluate(task.model, test).value, started)
    found = inspect(task.model, target=options.target)
    for precision in found.precisions:
        started = time.monotonic()
        layers = {layer.name: precision for layer in found.layers}
        result = emit(task.model, Assignment(layers, options.target), train)
        assert result.verification.searched is not None
        difference = result.verification.searched.rms
        value = evaluate(result.model, test).value
        row(precision, value, started, differs_from_simulation=difference)
    for bits in options.bits:
        started = time.monotonic()
        budget = Budget(BudgetKind.BITS, bits)
        config = SearchConfig(
            target=options.target, steps=options.steps, seed=options.seed, budget=budget
        )
        result = search(task.model, train, config)
        assert result.verification.searched is not None
        row(
            f"searched, {bits:g} bits",
            evaluate(result.model, test).value,
            started,
            effective_bits=round(result.cost.effective_bits, 2),
            differs_from_simulation=result.verification.searched.rms,
            precisions={
                name: list(result.assignment.layers.values()).count(name)
                for name in found.precisions
            },
        )


def main() -> None:
    """Measure every model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("folder", help="for data files")
    parser.add_argument("--models", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--target", default="qnn")
    parser.add_argument("--bits", nargs="+", type=float, default=[6.5, 8.0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=10_000, help="of test data")
    options = parser.parse_args()
    Path(options.folder).mkdir(parents=True, exist_ok=True)
    print(json.dumps(provenance()))
    for model in options.models:
        _measure(model, options)


if __name__ == "__main__":
    main()
