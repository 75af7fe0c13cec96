"""Graphs rewritten for fast kernels have the loss and the gradient that they had."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnx_fliqs import kernels, runtime
from onnx_fliqs.gradient import GRADIENT, build_gradient, promote_initializers
from onnx_fliqs.kernels import block_of_channels, for_fast_kernels
from onnx_fliqs.model import load_model
from onnx_fliqs.objective import LossKind, LossTerm
from onnx_fliqs.passes.add_loss import LOSS, AddLossPass, teacher_input
from onnx_fliqs.passes.insert_search_sites import CODES, SCALES
from onnx_fliqs.passes.specialise_sites import SpecialiseSitesPass
from onnx_fliqs.precision import parse_space
from onnx_fliqs.runtime import make_session, quiet_options
from onnx_fliqs.signs import positive_sites
from onnx_fliqs.site_functions import DOMAIN
from onnx_fliqs.trainability import trainable_parameters
from support import Calibrated, Feeds, calibrated, initializer, model, require_shared

BATCH = 6

_TEXT = """g (float[N,3,12,12] x) => (float[N,5] y) {
    [stem] c0 = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
    r0 = Relu (c0)
    [depthwise] c1 = Conv <pads = [1, 1, 1, 1], group = 16> (r0, w1, b1)
    r1 = Clip (c1, zero, six)
    [point] c2 = Conv (r1, w2, b2)
    a = Add (c2, r0)
    r2 = Relu (a)
    [down] c3 = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (r2, w3, b3)
    r3 = Relu (c3)
    [main] c4 = Conv <pads = [1, 1, 1, 1]> (r3, w4)
    [short] c5 = Conv <strides = [2, 2]> (r2, w5, b5)
    s = Add (c4, c5)
    r4 = Relu (s)
    [thin] c6 = Conv <pads = [1, 1, 1, 1], strides = [2, 2], group = 32> (r4, w6, b6)
    h = Sigmoid (c6)
    t = Mul (h, c6)
    p = MaxPool <kernel_shape = [2, 2]> (t)
    m = GlobalAveragePool (p)
    f = Flatten (m)
    [head] y = Gemm (f, w7, b7) }"""
_BIASES = {"b0": 16, "b1": 16, "b2": 16, "b3": 32, "b5": 32, "b6": 32, "b7": 5}
_SHAPES: dict[str, tuple[int, ...]] = {
    "w0": (16, 3, 3, 3),
    "w1": (16, 1, 3, 3),
    "w2": (16, 16, 1, 1),
    "w3": (32, 16, 3, 3),
    "w4": (32, 32, 3, 3),
    "w5": (32, 16, 1, 1),
    "w6": (32, 1, 3, 3),
    "w7": (32, 5),
    **{name: (size,) for name, size in _BIASES.items()},
}


def residual_network() -> ir.Model:
    """Every kind of convolution, and most of what lies between them."""
    built = model(_TEXT, weights=_SHAPES, constants={"zero": 0.0, "six": 6.0})
    for name, shape in _SHAPES.items():
        # The variance stays about what it is.
        array = initializer(built, name) / np.sqrt(np.prod(shape[1:]) or 1)
        built.graph.initializers[name].const_value = ir.tensor(array.astype(np.float32))
    return built


def resnet8() -> ir.Model:
    return load_model(require_shared("models", "mlperftiny_resnet8_cifar10_bnfold.onnx"))


def mobilenet() -> ir.Model:
    return load_model(require_shared("models", "mobilenetv2_fmnist.onnx"))


NETWORKS: dict[str, Callable[[], ir.Model]] = {
    network.__name__: network for network in (residual_network, resnet8, mobilenet)
}


@dataclass(frozen=True)
class Task:
    """The gradient of a searchable model, as it is and for fast kernels."""

    calibrated: Calibrated
    plain: ir.Model
    fast: ir.Model
    sessions: tuple[ort.InferenceSession, ort.InferenceSession]

    def feeds(self, precision: str, batch: int = BATCH) -> Feeds:
        space = self.calibrated.space
        (chosen,) = parse_space(precision)
        values = space.values(space.uniform(chosen), self.calibrated.scales)
        rng = np.random.default_rng(5)
        graph = self.calibrated.canonical.graph
        (image,), (output,) = graph.inputs, graph.outputs
        assert image.shape is not None
        assert output.shape is not None
        sizes = [int(size) for size in image.shape[1:]]  # type: ignore[arg-type]
        teacher = rng.standard_normal((batch, int(output.shape[1])))  # type: ignore[arg-type]
        return {
            CODES: values.codes.reshape(-1),
            SCALES: values.scales,
            str(image.name): rng.standard_normal((batch, *sizes)).astype(np.float32),
            teacher_input(str(output.name)): teacher.astype(np.float32),
            **self.parameters,
        }

    @functools.cached_property
    def parameters(self) -> Feeds:
        canonical = self.calibrated.canonical
        names = trainable_parameters(canonical, [str(canonical.graph.outputs[0].name)])
        return {name: initializer(canonical, name) for name in names}

    def both(self, feeds: Feeds) -> list[tuple[float, npt.NDArray[Any]]]:
        """Loss and gradient, without and with the fast kernels."""
        found = []
        for session in self.sessions:
            loss, gradient = session.run([LOSS, GRADIENT], feeds)
            found.append((float(loss), gradient.astype(np.float64)))
        return found


@functools.cache
def task(network: str, formats: str) -> Task:
    prepared = calibrated(NETWORKS[network](), "generic", parse_space(formats))
    searchable = prepared.searchable()
    SpecialiseSitesPass(
        prepared.space.byte_sites, positive_sites(prepared.canonical, prepared.space)
    )(searchable)
    output = str(prepared.canonical.graph.outputs[0].name)
    parameters = trainable_parameters(prepared.canonical, [output])
    promote_initializers(searchable, [*parameters, CODES, SCALES])
    AddLossPass([LossTerm(kind=LossKind.SQUARED_ERROR, output=output, scores=output)])(
        searchable
    )
    plain = ir.from_proto(build_gradient(searchable, LOSS, parameters))
    fast = for_fast_kernels(plain.clone(), BATCH)
    sessions = [
        make_session(
            graph, threads=1, disabled=["GatherSliceToSplitFusion"], fuse_quantized=False
        )
        for graph in (plain, fast)
    ]
    return Task(prepared, plain, fast, (sessions[0], sessions[1]))


def off(gradients: list[tuple[float, npt.NDArray[Any]]]) -> float:
    """How far apart two gradients are, as a share of their length."""
    (_, plain), (_, fast) = gradients
    assert plain.shape == fast.shape
    return float(np.linalg.norm(plain - fast) / np.linalg.norm(plain))


def in_blocks(graph: ir.Model) -> int:
    return sum(node.domain == "com.microsoft.nchwc" for node in graph.graph)


def test_the_block_is_that_of_a_vector_register() -> None:
    assert block_of_channels() in (1, 4, 8, 16)


@pytest.mark.parametrize("network", NETWORKS)
def test_loss_and_gradient_stay_but_for_float_rounding(network: str) -> None:
    built = task(network, "int4,int8,float32")
    assert bool(in_blocks(built.fast)) == (block_of_channels() > 1)
    found = built.both(built.feeds("float32"))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    # Tens of layers, each with sums of up to some thousand products.
    assert off(found) < 1e-5


def test_the_gradient_of_every_weight_stays() -> None:
    built = task("residual_network", "int4,int8,float32")
    (_, plain), (_, fast) = built.both(built.feeds("float32"))
    start = 0
    for name, array in built.parameters.items():
        part = slice(start, start + array.size)
        start += array.size
        scale = np.abs(plain[part]).max()
        assert scale > 0, name
        np.testing.assert_allclose(fast[part], plain[part], atol=1e-5 * scale, err_msg=name)
    assert start == plain.size


def test_sixteen_bits_move_by_few_steps() -> None:
    built = task("residual_network", "int8,int16")
    found = built.both(built.feeds("int16"))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert off(found) < 1e-3


@pytest.mark.parametrize("formats", ["int4,int8", "int8,float32", "e4m3,int8"])
def test_eight_bits_hardly_ever_round_the_other_way(formats: str) -> None:
    built = task("residual_network", formats)
    names = {node.op_type for node in built.plain.graph}
    assert ("SearchByteQDQ" in names) == (formats == "int4,int8")
    found = built.both(built.feeds("int8"))
    # A rounding error moves a value by a whole step where it lies beside a tie.
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    assert off(found) < 0.02
    (_, plain), (_, fast) = found
    moved = np.abs(plain - fast) > 0.01 * np.abs(plain).max()
    assert moved.mean() < 0.01


def test_parts_have_the_gradient_of_the_whole() -> None:
    built = task("residual_network", "int4,int8,float32")
    feeds = built.feeds("float32")
    session = built.sessions[1]
    loss, whole = session.run([LOSS, GRADIENT], feeds)
    rows = [
        name for name in feeds if len(feeds[name]) == BATCH and name not in built.parameters
    ]
    assert len(rows) == 2
    found = []
    for part in (slice(0, 1), slice(1, 3), slice(3, BATCH)):
        result = session.run(
            [LOSS, GRADIENT], feeds | {name: feeds[name][part] for name in rows}
        )
        found.append([(part.stop - part.start) / BATCH * array for array in result])
    losses, gradients = zip(*found, strict=True)
    assert float(sum(losses)) == pytest.approx(float(loss), rel=1e-5)
    assert np.linalg.norm(sum(gradients) - whole) < 1e-5 * np.linalg.norm(whole)


def test_without_blocks_masks_are_merged_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "block_of_channels", lambda: 1)
    built = task("residual_network", "int4,int8,float32")
    fast = for_fast_kernels(built.plain.clone(), BATCH)
    assert not in_blocks(fast)
    assert all(node.domain != DOMAIN for node in fast.graph)
    kinds = [node.op_type for node in fast.graph]
    assert "ConvGrad" in kinds
    assert "DequantizeLinear" in kinds
    feeds = built.feeds("float32")
    loss, gradient = make_session(fast, threads=1, fuse_quantized=False).run(
        [LOSS, GRADIENT], feeds
    )
    ((wanted, plain), _) = built.both(feeds)
    assert float(loss) == pytest.approx(wanted, rel=1e-6)
    assert np.linalg.norm(gradient - plain) < 1e-6 * np.linalg.norm(plain)


def test_each_site_of_bytes_is_dequantized_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = task("residual_network", "int4,int8")
    space, written = built.calibrated.space, tmp_path / "optimised.onnx"
    searchable = built.calibrated.searchable()
    SpecialiseSitesPass(space.byte_sites, [])(searchable)
    promote_initializers(searchable, [*built.parameters, CODES, SCALES])

    def options() -> Any:
        made = quiet_options()
        made.optimized_model_filepath = str(written)
        return made

    monkeypatch.setattr(runtime, "quiet_options", options)
    make_session(for_fast_kernels(searchable, BATCH), threads=1, fuse_quantized=False)
    kinds = [node.op_type for node in onnx.load(written).graph.node]
    assert space.byte_sites
    assert kinds.count("QuantizeLinear") == len(space.byte_sites)
    assert kinds.count("DequantizeLinear") == len(space.byte_sites)


def test_numbers_have_the_rank_of_kernels_of_one_place() -> None:
    built = task("residual_network", "int4,int8,float32")
    checked = 0
    for node in built.fast.graph:
        shapes = [v.shape for v in node.inputs if v is not None and v.shape is not None]
        if node.op_type not in ("Mul", "Max", "Min", "Div", "Sub", "Add", "Equal"):
            continue
        tensors = [shape for shape in shapes if len(shape) == 4 and shape[0] != 1]
        if any(shape[-1] == 1 for shape in tensors):
            assert all(len(shape) == 4 for shape in shapes), node.name
            checked += 1
    assert checked
