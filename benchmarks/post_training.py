"""Post-training accuracy with and without cross-layer equalization and bias correction.

Every layer takes one format, with scales per channel or per tensor of weights. The searchable
network is run, which computes what would be emitted. Thresholds and biases come from 256
training samples. ``--part train`` evaluates on other training samples: by those defaults are
chosen; ``--part test`` prints the figures of the documentation. ::

    python benchmarks/post_training.py --part train --samples 2000
    python benchmarks/post_training.py --part test
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from common import provenance
from tasks import TASKS, Arrays, Task

from onnx_fliqs.bias_correction import corrected_biases
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.emission import searchable
from onnx_fliqs.evaluation import run_dataset
from onnx_fliqs.model import load_model
from onnx_fliqs.precision import parse_space
from onnx_fliqs.prepare import calibrate, calibration_batches, prepare, with_weights
from onnx_fliqs.runtime import OptimizationLevel, make_session
from onnx_fliqs.targets import TARGETS

_CALIBRATION = 256
_SEED = 0


def _datasets(task: Task, model: ir.Model, part: str, samples: int) -> tuple[Dataset, Dataset]:
    """For calibration, and to evaluate on."""
    specs = input_specs(model)

    def dataset(arrays: Arrays, rows: npt.ArrayLike) -> Dataset:
        chosen = np.asarray(rows)
        labels = np.asarray(arrays["labels"][chosen], np.int64)
        return Dataset({specs[0].name: arrays["x"][chosen]}, labels, specs)

    train = task.arrays("train")
    order = np.random.default_rng(_SEED).permutation(len(train["x"]))
    calibration = dataset(train, order[:_CALIBRATION])
    if part == "train":
        return calibration, dataset(train, order[_CALIBRATION:][:samples])
    test = task.arrays("test")
    return calibration, dataset(test, np.arange(len(test["x"]))[:samples])


def _accuracy(model: ir.Model, data: Dataset, level: OptimizationLevel) -> float:
    name = str(model.graph.outputs[0].name)
    scores = run_dataset(make_session(model, level=level), data, [name])[name]
    return 100 * float((scores.argmax(axis=1) == data.labels).mean())


def _row(
    model: ir.Model,
    datasets: tuple[Dataset, Dataset],
    formats: Sequence[str],
    per_channel: bool,
    equalize: bool,
) -> dict[str, list[float]]:
    """For each format, the accuracy without and with bias correction."""
    calibration, evaluated = datasets
    target = TARGETS["generic"]
    if not per_channel:
        target = replace(target, per_channel_ops=())
    space = parse_space(",".join(formats))
    prepared = prepare(
        model, calibration, target, space, equalize=equalize, separate_biases=True
    )
    prepared, scales, _ = calibrate(prepared, target, calibration, _SEED)
    batches = [batch.inputs for batch in calibration_batches(calibration)]
    found = {}
    for fmt in space:
        chosen = prepared.space.uniform(fmt)
        biases = corrected_biases(prepared.canonical, prepared.space, chosen, scales, batches)
        found[fmt.name] = [
            _accuracy(
                searchable(
                    with_weights(prepared.canonical, new), prepared.space, chosen, scales
                ),
                evaluated,
                OptimizationLevel.NONE,
            )
            for new in ({}, biases)
        ]
    return found


def main() -> None:
    """Print a table for each model, and where it comes from."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--formats", nargs="+", default=["int8", "int6", "int5", "int4"])
    parser.add_argument("--part", choices=("train", "test"), default="test")
    parser.add_argument("--samples", type=int, default=10_000)
    options = parser.parse_args()
    print(json.dumps(provenance() | {"seed": _SEED, "part": options.part}))
    columns = [f"{fmt}{more}" for fmt in options.formats for more in ("", " corrected")]
    print(f"| model | weight scales | equalized | {' | '.join(columns)} |")
    print("|" + "---|" * (3 + len(columns)))
    for name in options.models:
        model = load_model(TASKS[name].model)
        datasets = _datasets(TASKS[name], model, options.part, options.samples)
        value = _accuracy(model, datasets[1], OptimizationLevel.DEFAULT)
        print(f"| {name}, float: {value:.2f} |" + " |" * (2 + len(columns)))
        for per_channel, equalize in itertools.product((True, False), repeat=2):
            found = _row(model, datasets, options.formats, per_channel, equalize)
            cells = [f"{value:.2f}" for fmt in options.formats for value in found[fmt]]
            granularity = "per channel" if per_channel else "per tensor"
            equalized = "yes" if equalize else "no"
            print(
                f"| {name} | {granularity} | {equalized} | {' | '.join(cells)} |", flush=True
            )


if __name__ == "__main__":
    main()
