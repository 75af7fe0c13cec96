"""Latency as cost: how well tables predict, and what a search within a budget of it gets.

For each model: the table of ``onnx-fliqs profile``; then the latency that it predicts beside
the measured one, of random assignments and of assignments that are served within random
budgets. The random ones are also predicted from single changes, as a simpler profile would:
the latency of one layer in float32 among int8, or in int8 among float32. ::

    python benchmarks/latency.py --threads 1

With ``--training-python`` the models that have data are also searched there within two
budgets; the emitted files are then timed here, in the runtime of the table. Needs the models
beside the project. Prints one JSON line per model, and one per search.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, SHARED, provenance
from tasks import TASKS

from onnx_fliqs.controller import Choices
from onnx_fliqs.cost import Budget, BudgetKind
from onnx_fliqs.emission import emit_graph
from onnx_fliqs.latency import LatencyTable
from onnx_fliqs.latency_budget import latency_shares
from onnx_fliqs.latency_profile import ProfileConfig, profile
from onnx_fliqs.model import load_model
from onnx_fliqs.prepare import Prepared, calibrate, prepare, synthetic_data
from onnx_fliqs.runners import Runner, runtime_named, time_pairs
from onnx_fliqs.runtime import OptimizationLevel
from onnx_fliqs.strategies import random_choices
from onnx_fliqs.target_files import parse_target

MODELS = {
    "resnet20": SHARED / "models" / "resnet20_cifar10_jpegft_bnfold.onnx",
    "resnet8": SHARED / "models" / "mlperftiny_resnet8_cifar10_bnfold.onnx",
    "mobilenetv2": SHARED / "models" / "mobilenetv2_fmnist.onnx",
    "vit": SHARED / "models" / "vit_fmnist.onnx",
    "squeezenet": SHARED / "zoo" / "squeezenet_v1.1_f16w.onnx",
}
_TARGET = "ort-cpu"
_SECONDS = 0.5
_ERROR = 0.003


@dataclass(frozen=True)
class Bench:
    """A model, ready to be emitted and timed."""

    prepared: Prepared
    scales: Mapping[tuple[str, str], Any]
    feeds: Mapping[str, Any]
    reference: Runner
    threads: int

    @classmethod
    def of(cls, path: Path, threads: int) -> "Bench":
        """Prepare a model on made-up samples."""
        target = parse_target(_TARGET)
        prepared = prepare(load_model(path), None, target, target.space(None))
        data = synthetic_data(prepared.canonical, 8, 0)
        prepared, scales, _ = calibrate(prepared, target, data, 0)
        feeds = data.batch(np.arange(data.fixed_batch or 1))
        level = OptimizationLevel.DEFAULT
        reference = runtime_named("onnxruntime").load(
            prepared.canonical, feeds, threads, level
        )
        return cls(prepared, scales, feeds, reference, threads)

    def names(self, choices: Choices) -> dict[str, str]:
        """The format of each layer, as a table wants it."""
        chosen = self.prepared.space.assign(choices)
        return {name: fmt.name for name, fmt in chosen.items()}

    def latency(self, choices: Choices) -> float:
        """Of an assignment, as a share of the float model's."""
        space = self.prepared.space
        return self.ratio(
            emit_graph(
                self.prepared.canonical,
                space,
                space.assign(choices),
                self.scales,
                parse_target(_TARGET),
            )
        )

    def ratio(self, graph: Any) -> float:
        """Latency of a graph as a share of the float model's."""
        level = OptimizationLevel.DEFAULT
        runner = runtime_named("onnxruntime").load(graph, self.feeds, self.threads, level)
        return time_pairs(self.reference, runner, seconds=_SECONDS, error=_ERROR).ratio


def _errors(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    errors = np.array(predicted) / np.array(measured) - 1
    return {
        "mean": round(float(np.abs(errors).mean()), 3),
        "largest": round(float(np.abs(errors).max()), 3),
        "bias": round(float(errors.mean()), 3),
        "within_15_percent": round(float((np.abs(errors) <= 0.15).mean()), 3),
    }


def _random(decisions: int, count: int) -> list[Choices]:
    """Random assignments of int8 (0) and float32 (1), in random proportions."""
    rng = np.random.default_rng(1)
    rows = (rng.uniform(size=decisions) < rng.uniform() for _ in range(count))
    return [tuple(int(x) for x in row) for row in rows]


def _served(bench: Bench, table: LatencyTable, count: int) -> Iterator[Choices]:
    """What is served within random budgets for random preferences."""
    rng = np.random.default_rng(2)
    space = bench.prepared.space
    uniform = table.predict(bench.names((0,) * len(space.decisions))) / table.float_model.ms
    for _ in range(count):
        fraction = rng.uniform(min(0.97, uniform) + 0.02, 1.0)
        costs, borders = latency_shares(space, Budget(BudgetKind.LATENCY, fraction), table)
        yield random_choices(costs, rng, borders)


def _single_changes(bench: Bench, wanted: Sequence[Choices]) -> dict[str, list[float]]:
    """Predictions by sums of single changes from a uniform assignment."""
    count = len(bench.prepared.space.decisions)
    found = {}
    for name, base in (("among int8", 0), ("among float32", 1)):
        everywhere = bench.latency((base,) * count)
        change = [
            bench.latency(tuple(1 - base if i == j else base for j in range(count)))
            - everywhere
            for i in range(count)
        ]
        found[name] = [
            everywhere + sum(change[i] for i, choice in enumerate(row) if choice != base)
            for row in wanted
        ]
    return found


def predictions(name: str, table: LatencyTable, bench: Bench, count: int) -> dict[str, Any]:
    """Predicted against measured."""
    unit = table.float_model.ms
    count_of_layers = len(bench.prepared.space.decisions)
    row: dict[str, Any] = {
        "benchmark": "latency",
        "model": name,
        "float_ms": round(unit, 4),
        "int8": round(bench.latency((0,) * count_of_layers), 3),
        "graphs": table.assignments,
        "borders": len(table.borders),
        "left_out": [round(table.median_error, 3), round(table.p90_error, 3)],
    }
    random = _random(count_of_layers, count)
    for kind, wanted in (("random", random), ("served", list(_served(bench, table, count)))):
        measured = [bench.latency(choices) for choices in wanted]
        predicted = [table.predict(bench.names(choices)) / unit for choices in wanted]
        row[kind] = _errors(predicted, measured)
        row[f"{kind}_range"] = [round(min(measured), 3), round(max(measured), 3)]
        if kind == "random":
            simpler = _single_changes(bench, wanted)
            row["single_changes"] = {k: _errors(v, measured) for k, v in simpler.items()}
    return row


def searches(
    name: str, table: LatencyTable, bench: Bench, python: Path, steps: int
) -> Iterator[dict[str, Any]]:
    """Search within two budgets in the training environment; time the files here."""
    uniform = (0,) * len(bench.prepared.space.decisions)
    least = min(0.94, table.predict(bench.names(uniform)) / table.float_model.ms)
    for part in (0.25, 0.6):
        fraction = round(least + part * (1 - least), 2)
        with tempfile.TemporaryDirectory() as folder:
            path, output = Path(folder) / "table.json", Path(folder) / "out.onnx"
            path.write_text(table.to_json(), encoding="utf-8")
            np.savez(Path(folder) / "train.npz", **TASKS[name].arrays("train"))
            command = [
                *(str(python), "-c", "from onnx_fliqs.cli.main import main; main()"),
                *("search", str(MODELS[name]), "--data", f"{folder}/train.npz"),
                *("--target", _TARGET, "--latency", str(fraction), "--latency-table", path),
                *("--steps", str(steps), "-o", output, "--json"),
            ]
            done = subprocess.run(
                list(map(str, command)), capture_output=True, text=True, check=True, cwd=ROOT
            )
            found = json.loads(done.stdout)
            measured = bench.ratio(load_model(output))
        predicted = found["latency"]["predicted_ms"] / found["latency"]["float_ms"]
        yield {
            "benchmark": "latency, searched",
            "model": name,
            "budget": fraction,
            "predicted": round(predicted, 3),
            "measured": round(measured, 3),
            "error": round(predicted / measured - 1, 3),
            "float32_layers": sum(x["format"] == "float32" for x in found["layers"]),
            "layers": len(found["layers"]),
            "steps": steps,
        }


def main() -> None:
    """Profile, predict, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--assignments", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--training-python", type=Path)
    options = parser.parse_args()
    settings = {"threads": options.threads, "seconds": options.seconds, "seed": options.seed}
    for name in options.models:
        config = ProfileConfig(target=_TARGET, **settings)
        table, warnings = profile(MODELS[name], None, config)
        bench = Bench.of(MODELS[name], options.threads)
        rows = [predictions(name, table, bench, options.assignments)]
        if options.training_python and name in TASKS:
            rows += searches(name, table, bench, options.training_python, options.steps)
        for row in rows:
            print(
                json.dumps({**row, **settings, "warnings": warnings, **provenance()}),
                flush=True,
            )


if __name__ == "__main__":
    main()
