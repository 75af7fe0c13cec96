"""The package of QONNX computes on what is shipped as QONNX what was searched."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from onnx_fliqs.formats import FORMATS, Format, fake_quantize, is_passthrough
from onnx_fliqs.model import load_model
from onnx_fliqs.precision import Precision, parse_space
from onnx_fliqs.verify import EXACT, compare
from pass_models import LAYERED
from support import (
    PRECISIONS,
    Calibrated,
    calibrated,
    model,
    random_feeds,
    require_shared,
    run,
)

qonnx = pytest.importorskip("qonnx", reason="needs the package qonnx: pip install qonnx")
# Its own code warns of what it does: shapes that it only learns when it runs, NumPy's 2^128.
pytestmark = pytest.mark.filterwarnings("ignore")

Array = npt.NDArray[Any]

DIGITS = Path(__file__).parents[2] / "examples" / "digits_cnn.onnx"
BATCH = 2
# QONNX's executor does not enter the bodies of control flow.
CASES = [name for name in LAYERED if not name.endswith("in_a_branch")]


@pytest.fixture(autouse=True)
def loadable_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the single-node models that QONNX hands to ONNX Runtime an IR version it knows.

    QONNX takes the newest of the installed onnx, which may be newer than ONNX Runtime.
    """
    from qonnx.core import onnx_exec

    make_model = onnx_exec.qonnx_make_model
    monkeypatch.setattr(
        onnx_exec, "qonnx_make_model", lambda graph, **k: make_model(graph, ir_version=8, **k)
    )


def fixed(plain: ir.Model) -> ir.Model:
    """The model with a number in place of every size that has only a name."""
    for value in (*plain.graph.inputs, *plain.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else BATCH for d in value.shape])
    return plain


def wrapped(graph: ir.Model) -> Any:
    """The graph as QONNX reads it from a file."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.infer_shapes import InferShapes

    return ModelWrapper(ir.to_proto(graph).SerializeToString()).transform(InferShapes())


def executed(graph: Any, feeds: dict[str, Array]) -> list[Array]:
    from qonnx.core.onnx_exec import execute_onnx

    return list(execute_onnx(graph, feeds).values())


def assert_conforms(prepared: Calibrated, chosen: dict[str, Precision]) -> Any:
    graph = wrapped(prepared.emitted(chosen))
    feeds = random_feeds(prepared.canonical, 3, batch=BATCH)
    expected = run(prepared.searchable(chosen), feeds)
    for want, got in zip(expected, executed(graph, feeds), strict=True):
        assert compare({"y": got}, {"y": want}).rms <= EXACT
    return graph


# -- networks -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_small_networks_of_mixed_formats(case: str, seed: int) -> None:
    prepared = calibrated(fixed(LAYERED[case].build()), "qonnx")
    assert_conforms(prepared, prepared.random_mix(seed))


@pytest.mark.parametrize("space", ["int-l", "fp-l", "int2,int3,int16,e2m1,e4m3,fp16,bf16"])
def test_a_cnn_of_mixed_formats(space: str) -> None:
    prepared = calibrated(fixed(load_model(DIGITS)), "qonnx", parse_space(space))
    assert_conforms(prepared, prepared.random_mix(0))


@pytest.mark.parametrize(
    "name",
    ["resnet20_cifar10_jpegft_bnfold", "mlperftiny_resnet8_cifar10_bnfold", "vit_fmnist"],
)
@pytest.mark.parametrize("space", ["int-l", "fp-l"])
def test_real_networks_of_mixed_formats(name: str, space: str) -> None:
    path = require_shared("models", f"{name}.onnx")
    prepared = calibrated(fixed(load_model(path)), "qonnx", parse_space(space))
    assert_conforms(prepared, prepared.random_mix(0))


# -- what its tools see ---------------------------------------------------------------------


def test_the_clean_up_that_every_tool_begins_with_changes_nothing() -> None:
    from qonnx.util.cleanup import cleanup_model

    prepared = calibrated(fixed(load_model(DIGITS)), "qonnx", parse_space("int-l"))
    chosen = prepared.random_mix(1)
    feeds = random_feeds(prepared.canonical, 3, batch=BATCH)
    (want,) = run(prepared.searchable(chosen), feeds)
    cleaned = cleanup_model(wrapped(prepared.emitted(chosen)))
    (feed,) = feeds.values()
    (got,) = executed(cleaned, {cleaned.graph.input[0].name: feed})
    assert compare({"y": got}, {"y": want}).rms <= EXACT


def test_widths_and_signs_are_inferred() -> None:
    from qonnx.custom_op.registry import getCustomOp

    prepared = calibrated(fixed(LAYERED["conv_relu_conv"].build()), "qonnx")
    chosen = {"c1": PRECISIONS["int7"], "c2": PRECISIONS["int3"]}
    graph = wrapped(prepared.emitted(chosen))
    found = {
        node.input[0]: str(getCustomOp(node).get_integer_datatype(graph))
        for node in graph.get_nodes_by_op_type("Quant")
    }
    assert found == {"x": "INT7", "w1": "INT7", "r": "UINT3", "w2": "INT3"}


# -- nodes ----------------------------------------------------------------------------------


def values_of(fmt: Format) -> Iterator[Array]:
    """Numbers of all sizes, all ties that are near, and what lies beyond the ends."""
    rng = np.random.default_rng(7)
    yield rng.standard_normal(2000) * min(fmt.max, 1e30)
    yield rng.standard_normal(2000) * np.exp2(rng.integers(-20, 10, 2000))
    yield np.arange(-64, 64) / 8
    yield np.array([0.0, 2 * min(fmt.max, 1e30), -2 * min(fmt.max, 1e30), 1e-30])


@pytest.mark.parametrize("fmt", [FORMATS[name] for name in PRECISIONS], ids=PRECISIONS)
def test_a_node_computes_the_reference_quantizer(fmt: Format) -> None:
    if fmt.name == "float32":
        pytest.skip("float32 has no node")
    columns = [np.resize(values, 4200).astype(np.float32) for values in values_of(fmt)]
    weight = np.stack(columns)
    plain = model(
        "g (float[2,4] x) => (float[2,4200] y) { [layer] y = MatMul (x, w) }",
        weights={"w": weight.shape},
    )
    plain.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    prepared = calibrated(plain, "qonnx", [Precision(fmt, fmt)])
    graph = prepared.emitted(prepared.space.uniform(Precision(fmt, fmt)))
    # The weight as it was: what is stored lies on the grid already.
    graph.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    read = wrapped(graph)
    (node,) = (node for node in read.graph.node if node.input[0] == "w")
    scale = read.get_initializer(node.input[1])
    assert is_passthrough(fmt) or scale.size == weight.shape[1]
    from qonnx.custom_op.registry import getCustomOp

    context = {name: read.get_initializer(name) for name in node.input}
    getCustomOp(node).execute_node(context, read.graph)
    np.testing.assert_array_equal(context[node.output[0]], fake_quantize(weight, scale, fmt))
