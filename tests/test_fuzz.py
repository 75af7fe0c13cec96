"""Random small models: the same numbers from the original to the emitted graph.

The default suite tries the same few models every time. ``ONNX_FLIQS_FUZZ=5000`` tries that
many new ones; ``--hypothesis-seed`` then repeats a run.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from fuzz_builder import BATCH, FuzzModel
from fuzz_models import fuzz_models
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.emission import emit
from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.evaluation import run_dataset
from onnx_fliqs.judged import exposed, judged_values
from onnx_fliqs.objective import choose_objective
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.passes.insert_search_sites import CODES, SCALES, InsertSearchSitesPass
from onnx_fliqs.precision import Precision, PrecisionMap
from onnx_fliqs.prepare import Prepared, calibrate, prepare
from onnx_fliqs.runtime import make_session
from onnx_fliqs.sites import ScaleTable
from onnx_fliqs.targets import TARGETS, Target
from onnx_fliqs.train_step import Batch, TrainStep
from onnx_fliqs.trainability import trainable_parameters, why_frozen
from support import PRECISIONS, Feeds, runnable

_EXAMPLES: Final = int(os.environ.get("ONNX_FLIQS_FUZZ", "0"))
_FOLDED: Final = 1e-4
"""Largest change by canonicalisation, as a share of an output's largest number: folding and
the kernels of another opset add in another order."""
_LAST_BIT: Final = 1e-6
"""Largest difference of an emitted graph: a bias of more than 2^24 steps is rounded once more
where it is dequantized."""
_LAYER_OPS: Final = frozenset(
    ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN")
)


@settings(
    max_examples=_EXAMPLES or 100,
    derandomize=not _EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(case=fuzz_models(), target=st.sampled_from([*TARGETS]), seed=st.integers(0, 999))
def test_a_random_model_keeps_its_numbers(case: FuzzModel, target: str, seed: int) -> None:
    note(str(case))
    check_canonical(case, seed)
    network = calibrated_network(case, TARGETS[target], seed)
    if network is not None:
        check_layers(network.prepared)
        check_float_format(network)
        check_emission(network, seed)
        check_training(network, seed)


# --- the properties ------------------------------------------------------------------------


def check_canonical(case: FuzzModel, seed: int) -> None:
    """A canonical model computes what the original does."""
    original = ir.from_proto(case.proto)
    canonical = canonicalise(ir.from_proto(case.proto))
    for batch in (BATCH, BATCH + 1):
        feeds = case.feeds(seed + batch, batch)
        for got, want in zip(run(canonical, feeds), run(original, feeds), strict=True):
            assert_near(got, want, _FOLDED)


@dataclass(frozen=True)
class Network:
    """A canonical model with what was found in it, its thresholds and some inputs."""

    prepared: Prepared
    scales: ScaleTable
    target: Target
    feeds: Feeds

    def searchable(self, chosen: PrecisionMap) -> ir.Model:
        """The graph with sites under an assignment."""
        model = self.prepared.canonical.clone()
        InsertSearchSitesPass(self.prepared.space)(model)
        values = self.prepared.space.values(chosen, self.scales)
        for name, array in ((CODES, values.codes.reshape(-1)), (SCALES, values.scales)):
            model.graph.initializers[name].const_value = ir.tensor(array, name=name)
        return model

    def random_mix(self, seed: int) -> dict[str, Precision]:
        """A random choice for every decision."""
        rng, space = np.random.default_rng(seed), self.prepared.space
        sizes = [len(choices) for choices in space.choices]
        return space.assign([int(choice) for choice in rng.integers(sizes)])


def calibrated_network(case: FuzzModel, target: Target, seed: int) -> Network | None:
    """What a search starts from; None where there is no layer."""
    model, feeds = ir.from_proto(case.proto), case.feeds(seed)
    data = Dataset(feeds, None, input_specs(model))
    try:
        prepared = prepare(model, data, target, runnable(target))
    except UnsupportedError as error:
        if "no quantizable layer" not in str(error):
            raise
        return None
    prepared, scales, _ = calibrate(prepared, target, data, 0)
    return Network(prepared, scales, target, feeds)


def check_layers(prepared: Prepared) -> None:
    """What looks like a layer is one, or was left out for a reason."""
    known = set(prepared.space.layer) | {item.name for item in prepared.space.skipped}
    assert all(item.reason for item in prepared.space.skipped)
    for node, holders in nodes_with_holders(prepared.canonical.graph):
        if node.op_type in _LAYER_OPS or is_embedding(node):
            names = {str(each.name) for each in (node, *holders)}
            assert names & known, f"nothing is said about {node.op_type} {node.name}"


def check_float_format(network: Network) -> None:
    """Sites of the float format change no bit."""
    canonical, space = network.prepared.canonical, network.prepared.space
    inserted = canonical.clone()
    InsertSearchSitesPass(space)(inserted)
    plain = run(canonical, network.feeds)
    for model in (inserted, network.searchable(space.uniform(PRECISIONS["float32"]))):
        for got, want in zip(run(model, network.feeds), plain, strict=True):
            np.testing.assert_array_equal(got, want)


def check_emission(network: Network, seed: int) -> None:
    """An emitted graph computes what was searched, is valid, and runs optimised."""
    chosen = network.random_mix(seed)
    prepared = network.prepared
    operands = prepared.canonical, prepared.space, chosen, network.scales, network.target
    emitted = emit(*operands, [network.feeds])
    searched = run(network.searchable(chosen), network.feeds)
    for got, want in zip(run(emitted.graph, network.feeds), searched, strict=True):
        assert_near(got, want, _LAST_BIT)


def check_training(network: Network, seed: int) -> None:
    """A step gives a finite loss and gradient; layers that it does not reach have a reason."""
    canonical, space = network.prepared.canonical, network.prepared.space
    feeds, chosen = network.feeds, network.random_mix(seed)
    outputs = [judged.name for judged in judged_values(canonical)]
    judged = exposed(canonical, outputs)
    data = Dataset(feeds, None, input_specs(canonical))
    teacher = run_dataset(make_session(judged), data, outputs)
    objective = choose_objective(canonical, teacher, labels=None, distillation=0.5)
    parameters = trainable_parameters(judged, objective.outputs)
    frozen = why_frozen(judged, space.layers, objective.outputs)
    for layer in space.layers:
        assert set(layer.weights) <= set(parameters) or frozen.get(layer.name), layer.name
    searchable = canonical.clone()
    InsertSearchSitesPass(space)(searchable)
    step = TrainStep(
        searchable,
        objective=objective,
        parameters=parameters,
        teacher=canonical,
        parts=[4],
        workers=1,
    )
    size = max(len(array) for array in feeds.values() if array.ndim)
    values, batch = space.values(chosen, network.scales), Batch(feeds, None, size)
    try:
        assert np.isfinite(step.losses(step.initial(), batch, [values])).all()
        if parameters:
            report = step.step(step.initial(), [batch], values, 1e-3)[1]
            assert np.isfinite(report.loss)
            assert report.applied
    finally:
        step.close()


# --- helpers -------------------------------------------------------------------------------


def run(model: ir.Model, feeds: Feeds) -> list[npt.NDArray[Any]]:
    """Run unoptimised, with the same kernels for constant as for computed weights.

    ONNX Runtime packs constant weights beforehand, and sums packed ones in another order.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, feeds))


def assert_near(got: npt.NDArray[Any], want: npt.NDArray[Any], share: float) -> None:
    """Equal to within a share of the largest number (or of a thousandth, if all are less)."""
    assert got.shape == want.shape
    largest = max(1e-3, float(np.abs(want).max(initial=0.0)))
    np.testing.assert_allclose(got, want, rtol=0, atol=share * largest)


def nodes_with_holders(
    graph: ir.Graph, holders: tuple[ir.Node, ...] = ()
) -> Iterator[tuple[ir.Node, tuple[ir.Node, ...]]]:
    """Every node, and the control flow that it stands in."""
    for node in graph:
        yield node, holders
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH:
                yield from nodes_with_holders(attribute.as_graph(), (*holders, node))


def is_embedding(node: ir.Node) -> bool:
    """Whether a Gather reads rows of a constant float matrix."""
    value = node.inputs[0] if node.op_type == "Gather" else None
    tensor = None if value is None else value.const_value
    return tensor is not None and tensor.dtype is ir.DataType.FLOAT and len(tensor.shape) == 2
