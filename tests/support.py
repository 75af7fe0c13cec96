"""What the tests share: models as text, random feeds, and the contract of a pass."""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

from onnx_fliqs.calibrate import (
    Observer,
    activation_scales,
    fit_to_activations,
    negative_shares,
    sample_values,
    weight_scales,
)
from onnx_fliqs.emission import emit_graph
from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.find_layers import find_layers
from onnx_fliqs.formats import FORMATS, IntFormat
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.passes.insert_search_sites import CODES, SCALES, InsertSearchSitesPass
from onnx_fliqs.precision import Precision, PrecisionMap, parse_precision
from onnx_fliqs.report import SearchResult
from onnx_fliqs.sites import ScaleTable, SearchSpace
from onnx_fliqs.strategies import Strategy
from onnx_fliqs.targets import TARGETS, Activations, Target

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
SHARED = Path(__file__).resolve().parents[2] / "shared"

Feeds = dict[str, npt.NDArray[Any]]

PRECISIONS = {
    name: parse_precision(name)
    for name, fmt in FORMATS.items()
    if not isinstance(fmt, IntFormat) or fmt.signed
}
"""Every precision with one format for both operands, by name."""
SEARCHED = tuple(sorted(PRECISIONS.values(), key=lambda precision: precision.order))
"""The same, cheapest first."""
STRATEGIES = tuple(strategy for strategy in Strategy if strategy is not Strategy.FIXED)
"""Those that choose an assignment."""


def model(
    text: str,
    *,
    header: str = HEADER,
    weights: Mapping[str, Sequence[int]] | None = None,
    constants: Mapping[str, float | Sequence[int]] | None = None,
) -> ir.Model:
    """Read a model in ONNX's textual format.

    Args:
        text: The graph, and after it local functions; with a header where ``header`` is empty.
        header: Stands before the text.
        weights: Name to shape of float32 initializers to add, with random values that depend
            on the name and the shape only. Those called ``var...`` are positive.
        constants: Name to value of further initializers: float32 scalars and int64 vectors.
    """
    proto = onnx.parser.parse_model(f"{header}\n{text}" if header else text)
    for name, shape in (weights or {}).items():
        rng = np.random.default_rng([*name.encode(), *shape])
        array = rng.standard_normal(shape).astype(np.float32)
        if name.startswith("var"):
            array = np.abs(array) + np.float32(0.1)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for name, value in (constants or {}).items():
        dtype = np.float32 if isinstance(value, float) else np.int64
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(np.array(value, dtype), name)
        )
    return ir.from_proto(proto)


def random_feeds(model: ir.Model, seed: int = 0, batch: int = 2) -> Feeds:
    """Seeded random input for every graph input.

    A dimension without a number is ``batch``; booleans are all true where ``seed`` is odd and
    all false where it is even, so that two seeds see both branches.
    """
    rng = np.random.default_rng(seed)
    feeds: Feeds = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        assert value.name is not None
        assert value.dtype is not None
        shape = [d if isinstance(d, int) else batch for d in value.shape or ()]
        dtype = value.dtype.numpy()
        if dtype.kind == "b":
            feeds[value.name] = np.full(shape, seed % 2 == 1)
        elif dtype.kind == "f":
            feeds[value.name] = rng.standard_normal(shape).astype(dtype)
        else:
            feeds[value.name] = rng.integers(0, 2, shape).astype(dtype)
    return feeds


def f32(values: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """A float32 array."""
    return np.array(values, np.float32)


def session(data: bytes | str) -> ort.InferenceSession:
    """An ONNX Runtime session that runs the graph as it stands, on one thread."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(model: ir.Model, feeds: Feeds) -> list[npt.NDArray[Any]]:
    """Run in ONNX Runtime, unoptimised."""
    return list(session(ir.to_proto(model).SerializeToString()).run(None, feeds))


def evaluate(models: Sequence[ir.Model], feeds: Feeds) -> list[list[npt.NDArray[Any]]]:
    """Run all in ONNX's reference evaluator or, where that lacks something, in ONNX Runtime.

    The evaluator gives Softmax of opset 11 the meaning of opset 13: ONNX Runtime runs those.
    """
    if all(model.opset_imports.get("", 0) >= 13 for model in models):
        # What the evaluator lacks shows as many kinds of errors, in its constructor or in run.
        with contextlib.suppress(Exception):
            return [_reference(each, feeds) for each in models]
    return [run(model, feeds) for model in models]


def _reference(model: ir.Model, feeds: Feeds) -> list[npt.NDArray[Any]]:
    outputs = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)
    return [np.asarray(output) for output in outputs]


def check_pass(
    pass_: ir.passes.PassBase,
    model: ir.Model,
    feeds: Feeds | None = None,
    *,
    rtol: float = 0,
    atol: float = 0,
    signature: bool = True,
) -> ir.Model:
    """Check that a pass keeps its promises on a model, which is left as it is.

    (1) ``modified`` says whether the serialized bytes differ; (2) the result is valid; (3) the
    graph's inputs and outputs are the same; (4) a second run changes nothing; (5) the outputs
    agree within the tolerances. Without ``signature``, (3) and (5) are up to the caller.

    Returns:
        The result of the pass.
    """
    before = ir.to_proto(model)
    original = ir.from_proto(before)
    # Read back once, so that both sides have been written by the same serializer.
    before = ir.to_proto(original)
    result = pass_(ir.from_proto(before))
    after = ir.to_proto(result.model)

    name = type(pass_).__name__
    assert result.modified == (serialized(before) != serialized(after)), (
        f"{name}.modified lies"
    )
    onnx.checker.check_model(after, full_check=True)
    if signature:
        assert list(after.graph.input) == list(before.graph.input)
        assert list(after.graph.output) == list(before.graph.output)

    second = pass_(ir.from_proto(after))
    assert not second.modified, f"{name} reports a change in its second run"
    assert serialized(ir.to_proto(second.model)) == serialized(after), (
        f"{name} is not idempotent"
    )

    if not signature:
        return ir.from_proto(after)
    for each in (
        [random_feeds(original, seed) for seed in (0, 1)] if feeds is None else [feeds]
    ):
        expected, actual = evaluate((original, ir.from_proto(after)), each)
        for want, got in zip(expected, actual, strict=True):
            assert want.shape == got.shape
            np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)
    return ir.from_proto(after)


def serialized(proto: onnx.ModelProto) -> bytes:
    """The bytes, independent of the order of maps."""
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def ops(model: ir.Model) -> list[str]:
    """The operators of all nodes, subgraphs included, in order."""
    return [node.op_type for node in model.graph.all_nodes()]


def require_shared(*parts: str) -> Path:
    """A file or folder of ``../shared``; skips the test where that is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(('../shared', *parts))} is not here")
    return path


# -- searchable and emitted graphs ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A canonical model with its sites and their scales in every format it may take."""

    canonical: ir.Model
    space: SearchSpace
    scales: ScaleTable
    target: Target

    def searchable(self, chosen: PrecisionMap | None = None) -> ir.Model:
        """The graph with sites; at float32 where no formats are given."""
        model = self.canonical.clone()
        InsertSearchSitesPass(self.space)(model)
        if chosen is not None:
            values = self.space.values(chosen, self.scales)
            for name, array in ((CODES, values.codes.reshape(-1)), (SCALES, values.scales)):
                model.graph.initializers[name].const_value = ir.tensor(array, name=name)
        return model

    def emitted(self, chosen: PrecisionMap) -> ir.Model:
        """The graph that is shipped."""
        return emit_graph(self.canonical, self.space, chosen, self.scales, self.target)

    def eight_bits(self) -> dict[str, Precision]:
        """The cheapest of 8 bits that every layer can have, or what comes closest."""
        names = [precision.name for precision in self.space.precisions]
        name = next(n for n in ("int7:int8", "int8") if n in names)
        return self.space.assign(self.space.levels[names.index(name)])

    def random_mix(self, seed: int) -> dict[str, Precision]:
        """A random choice for every decision."""
        rng = np.random.default_rng(seed)
        sizes = [len(choices) for choices in self.space.choices]
        return self.space.assign([int(choice) for choice in rng.integers(sizes)])


def runnable(target: Target) -> list[Precision]:
    """What a target runs, cheapest first."""
    if target.precisions is None:
        return list(SEARCHED)
    found = map(parse_precision, target.precisions)
    return sorted(found, key=lambda precision: precision.order)


class Buildable(Protocol):
    """A case of ``pass_models`` or ``layer_forms``."""

    def build(self) -> ir.Model:
        """The model, new each time."""


def on_targets(cases: Mapping[str, Buildable]) -> list[tuple[str, str]]:
    """The names of every case, and of every target that runs a layer of it."""

    def runs(canonical: ir.Model, target: Target) -> bool:
        try:
            find_layers(canonical, target, runnable(target))
        except UnsupportedError:
            return False
        return True

    canonical = {name: canonicalise(case.build()) for name, case in cases.items()}
    return [
        (c, t) for t, target in TARGETS.items() for c in cases if runs(canonical[c], target)
    ]


def calibrated(
    model: ir.Model,
    target: str | Target = "generic",
    precisions: Sequence[Precision] | None = None,
) -> Calibrated:
    """Canonicalise a model and calibrate its sites on random inputs.

    Args:
        model: It is changed.
        target: The target, or its name.
        precisions: Cheapest first; by default all that the target runs.
    """
    profile = TARGETS[target] if isinstance(target, str) else target
    if precisions is None:
        precisions = runnable(profile)
    canonicalise(model)
    space = find_layers(model, profile, precisions)
    observer = Observer(model, [site.tensor for site in space.sites if not site.is_weight])
    samples = sample_values([observer.run(random_feeds(model, 1))], 1, seed=0)
    if profile.activations is Activations.ASYMMETRIC:
        shares = negative_shares(space, samples)
        sites = (
            replace(s, negative=shares.get(s.same_scale_as or s.name, s.negative))
            for s in space.sites
        )
        space = replace(space, sites=tuple(sites))
    weights = {
        site.tensor: initializer(model, site.tensor) for site in space.sites if site.is_weight
    }
    scales = activation_scales(space, samples) | weight_scales(space, weights, seed=0)
    return Calibrated(model, space, fit_to_activations(space, scales, weights), profile)


@functools.cache
def calibrated_case(name: str, target: str = "generic") -> Calibrated:
    """One of the models with layers, with every format of the target; shared by the tests."""
    from pass_models import LAYERED

    return calibrated(LAYERED[name].build(), target)


def formats(result: SearchResult) -> dict[str, str]:
    """The precision of every layer, those that stay float included."""
    left = {item.name: "float32" for item in result.skipped}
    return left | {layer.name: layer.format for layer in result.layers}


def initializer(model: ir.Model, name: str) -> npt.NDArray[Any]:
    """The content of an initializer."""
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()
