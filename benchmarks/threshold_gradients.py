"""What it costs to learn clipping thresholds by gradient, as LSQ does.

The sites' straight-through gradient is a function of its own, which yields none for the scale.
That of LSQ (Esser et al. 2020) is the rounded less the unrounded value inside the range, the
end of the range outside. ``AddThresholdGradientsPass`` makes it of two inner products;
differentiated operator by operator, a site yields it as well. Timed are the gradients of one
batch without thresholds, with the pass, and by operators, in turn. ::

    python benchmarks/threshold_gradients.py resnet20 vit mobilenetv2
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import onnx_ir as ir
from common import provenance
from onnx_ir.passes.common import InlinePass
from tasks import TASKS

from onnx_fliqs import Dataset, SearchConfig
from onnx_fliqs.data import input_specs
from onnx_fliqs.gradient import GRADIENT, build_gradient, promote_initializers
from onnx_fliqs.judged import exposed
from onnx_fliqs.kernels import for_fast_kernels
from onnx_fliqs.learned_thresholds import learned_thresholds
from onnx_fliqs.model import load_model
from onnx_fliqs.passes.add_loss import LABELS, LOSS, AddLossPass
from onnx_fliqs.passes.add_threshold_gradients import AddThresholdGradientsPass
from onnx_fliqs.passes.insert_search_sites import CODES, SCALES, InsertSearchSitesPass
from onnx_fliqs.prepare import make_batch
from onnx_fliqs.runtime import load_training, make_session, run_session
from onnx_fliqs.search_setup import Setup, set_up
from onnx_fliqs.trainability import trainable_parameters

_SAMPLES = 1000
_WAYS = ("without", "with the pass", "by operators")


def _setup(name: str) -> Setup:
    """Cross-entropy alone: a teacher would only add to both times."""
    arrays = TASKS[name].arrays("train")
    specs = input_specs(load_model(TASKS[name].model))
    labels = np.asarray(arrays["labels"][:_SAMPLES], np.int64)
    data = Dataset({specs[0].name: arrays["x"][:_SAMPLES]}, labels, specs)
    config = SearchConfig(space="int-l", distillation=0.0, workers=1)
    return set_up(TASKS[name].model, data, config)


def _gradient(setup: Setup, batch_size: int, way: str) -> Callable[[], int]:
    """A run of the gradient graph; gives back how many numbers it computed."""
    canonical, space = setup.prepared.canonical, setup.prepared.space
    outputs = setup.objective.outputs
    parameters = list(trainable_parameters(exposed(canonical, outputs), outputs))
    model = canonical.clone()
    weights = {name: model.graph.initializers[name].const_value for name in parameters}
    InsertSearchSitesPass(space)(model)
    promote_initializers(model, [*parameters, CODES, SCALES])
    model = exposed(model, outputs).clone()
    AddLossPass(setup.objective.terms)(model)
    if way == "by operators":
        InlinePass()(model)
        parameters.append(SCALES)
    gradient = ir.from_proto(build_gradient(model, LOSS, parameters))
    if way == "with the pass":
        AddThresholdGradientsPass(learned_thresholds(space))(gradient)
    session = make_session(
        for_fast_kernels(gradient, batch_size),
        threads=1,
        disabled=["GatherSliceToSplitFusion"],
        fuse_quantized=False,
    )
    values = space.values(space.assign(space.levels[0]), setup.scales)
    batch = make_batch(setup.train, np.arange(batch_size))
    feeds = {
        **batch.inputs,
        **{name: tensor.numpy() for name, tensor in weights.items() if tensor is not None},
        CODES: values.codes.reshape(-1),
        SCALES: values.scales,
        LABELS: batch.labels,
    }
    known = {value.name for value in session.get_inputs()}
    taken = {name: array for name, array in feeds.items() if name in known}
    return lambda: int(run_session(session, [GRADIENT], taken)[0].size)


def _seconds(run: Callable[[], int]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    """Time both gradients of every model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", choices=TASKS)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=20)
    options = parser.parse_args()
    load_training()
    print(f"| model | without, s | {' | '.join(f'{way}, s' for way in _WAYS[1:])} | ratios |")
    print("|---|---|---|---|---|")
    for name in options.models:
        setup = _setup(name)
        runs = [_gradient(setup, options.batch_size, way) for way in _WAYS]
        rounds = [[_seconds(run) for run in runs] for _ in range(options.repetitions + 2)][2:]
        times = [f"{median(column):.3f}" for column in zip(*rounds, strict=True)]
        ratios = [f"{median(r[way] / r[0] for r in rounds):.2f}" for way in (1, 2)]
        print(f"| {name} | {' | '.join(times)} | {', '.join(ratios)} |", flush=True)
    print(json.dumps({"batch_size": options.batch_size, **provenance()}))


if __name__ == "__main__":
    main()
