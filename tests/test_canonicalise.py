"""Models of every age and origin end up in one form that computes the same."""

import logging
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_fliqs.dialects import CONTRIB
from onnx_fliqs.errors import FliqsError, ModelError, UnsupportedError
from onnx_fliqs.model import atomic_write, load_model, save_model
from onnx_fliqs.passes.canonicalise import IR_VERSION, OPSET, canonicalise
from onnx_fliqs.passes.lower_contrib_operators import why_contrib_stays
from pass_models import CASES, old
from support import (
    SHARED,
    evaluate,
    model,
    ops,
    random_feeds,
    require_shared,
    serialized,
    session,
)

REAL = [
    f"{folder}/{path.name}"
    for folder in ("models", "zoo")
    for path in sorted((SHARED / folder).glob("*.onnx"))
]
RELU = "g (float[N,4] x) => (float[N,4] y) { y = Relu (x) }"


# -- small models ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_small_model_becomes_canonical_and_computes_the_same(name: str) -> None:
    original = CASES[name].build()
    result = canonicalise(CASES[name].build())
    assert ops(result) == list(CASES[name].ops)
    assert_canonical(result)
    assert_same_signature(original, result)
    for seed in (0, 1):
        expected, actual = evaluate((original, result), random_feeds(original, seed))
        for want, got in zip(expected, actual, strict=True):
            # Folding batch normalization rounds its products before the sum, not after.
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_canonicalising_again_changes_no_byte(name: str) -> None:
    once = ir.to_proto(canonicalise(CASES[name].build()))
    twice = ir.to_proto(canonicalise(ir.from_proto(once)))
    assert serialized(twice) == serialized(once)


def test_the_same_object_is_returned() -> None:
    original = model(RELU)
    assert canonicalise(original) is original


def test_names_of_layers_and_weights_survive() -> None:
    result = canonicalise(CASES["conv_bn"].build())
    assert set(result.graph.initializers) == {"w", "wb"}
    result = canonicalise(CASES["conv_without_bias_bn_relu"].build())
    assert set(result.graph.initializers) == {"w", "w_bias"}
    assert [node.name for node in result.graph] == ["Conv_n", "Relu_y"]


def test_layers_that_shared_a_weight_get_their_own() -> None:
    result = canonicalise(CASES["shared_weight_two_bns"].build())
    assert set(result.graph.initializers) == {"w_n1", "wb_n1", "w", "wb"}


def test_what_the_converter_adds_is_named_after_its_reader() -> None:
    result = canonicalise(CASES["opset_11"].build())
    assert "s_axes" in result.graph.initializers


def test_the_batch_dimension_stays_dynamic() -> None:
    result = canonicalise(CASES["dynamic_reshape"].build())
    for batch in (1, 3):
        feeds = random_feeds(result, batch=batch)
        assert evaluate((result,), feeds)[0][0].shape == (batch, 12)


def test_shapes_are_inferred() -> None:
    result = canonicalise(CASES["conv_feeds_bn_and_another"].build())
    shapes = [node.outputs[0].shape for node in result.graph]
    assert [str(shape) for shape in shapes] == ["[N,4,3,3]"] * 4


def test_libraries_log_nothing_and_levels_are_restored(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger("onnxscript").setLevel(logging.NOTSET)
    canonicalise(CASES["opset_7"].build())
    assert not caplog.records
    assert logging.getLogger("onnxscript").level == logging.NOTSET


def test_an_infinite_mask_or_bound_is_accepted() -> None:
    text = """g (float[N,2] x) => (float[N,2] y) {
        mask = Constant <value = float[2] {0.0, 0.0}> ()
        low = Log (mask)
        y = Max (x, low) }"""
    result = canonicalise(model(text))
    (initializer,) = result.graph.initializers.values()
    assert initializer.const_value is not None
    assert np.isneginf(initializer.const_value.numpy()).all()


@pytest.mark.parametrize(
    "maker",
    [
        "w = Transpose (v)",
        "w = Reshape (v, shape)",
        "a = Cast <to = 11> (v) b = Cast <to = 1> (a) w = Reshape (b, shape)",
        "a, b = Split <axis = 1> (v, parts) c = Concat <axis = 1> (b, a) w = Transpose (c)",
    ],
)
def test_a_weight_is_stored_as_it_is_used_whatever_its_size(
    maker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnx_fliqs.passes.canonicalise._FOLD_LIMIT", 4)
    text = f"""g (float[N,4] x) => (float[N,3] y, float[3,4] z) {{
        {maker} y = MatMul (x, w) z = Exp (v) }}"""
    constants = {"shape": [4, 3], "parts": [1, 3]}
    result = canonicalise(model(text, weights={"v": (3, 4)}, constants=constants))
    (layer,) = (node for node in result.graph if node.op_type == "MatMul")
    weight = layer.inputs[1]
    assert weight is not None
    assert weight.is_initializer()


def test_what_would_grow_the_file_stays_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = """g (float[N,4] x) => (float[N,4] y) {
        w = Expand (v, shape)
        y = MatMul (x, w) }"""
    weights, constants = {"v": (1, 4)}, {"shape": [4, 4]}
    assert ops(canonicalise(model(text, weights=weights, constants=constants))) == ["MatMul"]
    monkeypatch.setattr("onnx_fliqs.passes.canonicalise._FOLD_LIMIT", 15)
    result = canonicalise(model(text, weights=weights, constants=constants))
    assert ops(result) == ["Expand", "MatMul"]


# -- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "node"),
    [
        (
            """g (float[N,4] x) => (float[N,4] y) <float s = {0.1}, int8 z = {0}> {
            [quant0] q = QuantizeLinear (x, s, z)
            y = DequantizeLinear (q, s, z) }""",
            "QuantizeLinear 'quant0'",
        ),
        (
            """g (uint8[2,2] x, uint8[2,2] w) => (int32[2,2] y) {
            y = MatMulInteger (x, w) }""",
            "MatMulInteger 'y'",
        ),
        (
            """g (float[N,4] x, bool c) => (float[N,4] y) <float s = {0.1}, int8 z = {0}> {
            y = If (c) <
                then_branch = t () => (float[N,4] p) { p = Neg (x) },
                else_branch = e () => (float[N,4] q) {
                    k = QuantizeLinear (x, s, z)
                    q = DequantizeLinear (k, s, z) }> }""",
            "QuantizeLinear 'k'",
        ),
        (
            """g (float[N,4] x) => (float[N,4] y) { y = local.quantized (x) }
            <domain: "local", opset_import: ["" : 21]>
            quantized (v) => (r) {
                s = Constant <value_float = 0.1> ()
                q = QuantizeLinear (v, s)
                r = DequantizeLinear (q, s) }""",
            "QuantizeLinear",
        ),
        (
            """g (float[N,4] x, uint8[4,1,2] w, float[4] s) => (float[N,4] y) {
            y = com.microsoft.MatMulNBits <K = 4, N = 4> (x, w, s) }""",
            "MatMulNBits 'y'",
        ),
    ],
)
def test_a_quantized_model_is_refused(text: str, node: str) -> None:
    header = '<ir_version: 10, opset_import: ["" : 21, "local" : 1, "com.microsoft" : 1]>'
    with pytest.raises(UnsupportedError) as error:
        canonicalise(model(text, header=header))
    assert str(error.value).startswith("the model is already quantized (first such node: ")
    assert node in str(error.value)


@pytest.mark.parametrize(
    ("opset", "text"),
    [
        (
            21,
            """g (float[N,4] x) => (float[N,4] y) {
            [bn] y, m1, v1 = BatchNormalization <training_mode = 1> (x, s, b, m, var) }""",
        ),
        (
            9,
            """g (float[N,4] x) => (float[N,4] y) {
            [bn] y, m1, v1, m2, v2 = BatchNormalization (x, s, b, m, var) }""",
        ),
    ],
)
def test_batch_normalization_in_training_mode_is_refused(opset: int, text: str) -> None:
    weights = {"s": (4,), "b": (4,), "m": (4,), "var": (4,)}
    with pytest.raises(UnsupportedError, match="BatchNormalization 'bn' is in training mode"):
        canonicalise(model(text, header=old(opset), weights=weights))


def test_dropout_in_training_mode_is_refused() -> None:
    text = """g (float[N,4] x) => (float[N,4] y) <float r = {0.5}, bool t = {1}> {
        y = Dropout (x, r, t) }"""
    with pytest.raises(UnsupportedError, match="Dropout 'y' is in training mode"):
        canonicalise(model(text))


def test_a_negative_variance_is_an_error() -> None:
    text = """g (float[N,1] x) => (float[N,1] y)
        <float[1] s = {1}, float[1] b = {0}, float[1] m = {0}, float[1] v = {-1}> {
        y = BatchNormalization (x, s, b, m, v) }"""
    with pytest.raises(ModelError, match="BatchNormalization 'y' has a negative"):
        canonicalise(model(text))


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (np.nan, "^initializer 'w' holds NaN$"),
        (np.inf, "^initializer 'w' is a weight and holds infinity$"),
    ],
)
def test_a_weight_that_is_not_finite_is_an_error(number: float, message: str) -> None:
    text = "g (float[N,2] x) => (float[N,2] y) { y = MatMul (x, w) }"
    original = model(text, weights={"w": (2, 2)})
    array = np.array([[1, number], [2, 3]], np.float32)
    original.graph.initializers["w"].const_value = ir.tensor(array, name="w")
    with pytest.raises(ModelError, match=message):
        canonicalise(original)


@pytest.mark.parametrize("role", ["x", "w", "inner", "y"])
def test_reserved_names_are_refused(role: str) -> None:
    text = "g (float[N,2] x) => (float[N,2] y) { inner = MatMul (x, w) y = Relu (inner) }"
    original = model(text, weights={"w": (2, 2)})
    graph = original.graph
    values = [*graph.inputs, *graph.initializers.values(), *(n.outputs[0] for n in graph)]
    next(value for value in values if value.name == role).name = "onnx_fliqs.scales"
    with pytest.raises(ModelError, match=r"^'onnx_fliqs.scales': names that begin with"):
        canonicalise(original)


def test_an_operator_of_a_newer_opset_is_refused_by_name() -> None:
    text = "g (float[N,4] x, int64 axis) => (float[N,4] y) { y = CumProd (x, axis) }"
    original = model(text, header='<ir_version: 12, opset_import: ["" : 26]>')
    with pytest.raises(UnsupportedError) as error:
        canonicalise(original)
    assert str(error.value) == (
        "the model uses opset 26 and CumProd 'y' does not exist in opset 21; export it with"
        " opset 21 or lower"
    )


def test_an_attribute_of_a_newer_opset_is_refused_by_name() -> None:
    text = """g (float[N,4] x) => (float16[N,4] y) {
        y = Cast <to = 10, round_mode = "down"> (x) }"""
    header = '<ir_version: 11, opset_import: ["" : 24]>'
    with pytest.raises(UnsupportedError, match="Cast 'y' has no attribute 'round_mode'"):
        canonicalise(model(text, header=header))


def test_a_type_of_a_newer_opset_is_refused() -> None:
    text = """g (int32[N,3] x) => (int32[N,3] y) {
        y = BitShift <direction = "LEFT"> (x, x) }"""
    with pytest.raises(UnsupportedError, match="uses opset 28 and is not valid in opset 21"):
        canonicalise(model(text, header=old(28)))


# -- files ----------------------------------------------------------------------------------


def test_a_saved_model_loads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    original = canonicalise(CASES["conv_bn"].build())
    save_model(original, path)
    assert serialized(ir.to_proto(load_model(path))) == serialized(ir.to_proto(original))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"hello, this is no model", "is not an ONNX model"),
        (b"\x08\x0a\x12\x04test", "holds no graph"),
        (
            onnx.ModelProto(ir_version=8, graph=onnx.GraphProto(name="g")).SerializeToString(),
            "without nodes",
        ),
    ],
)
def test_a_file_that_is_no_model_is_an_error(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    assert message in load_error(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    assert load_error(tmp_path / "no.onnx").endswith("no.onnx: no such file or directory")
    assert "is not a file" in load_error(tmp_path)


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save_model(CASES["conv_bn"].build(), path)
    path.write_bytes(path.read_bytes()[:-40])
    assert "is damaged or cut short" in load_error(path)


def test_a_model_without_opset_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    proto = ir.to_proto(model(RELU))
    del proto.opset_import[:]
    path.write_bytes(proto.SerializeToString())
    assert "does not say which opset" in load_error(path)


def test_an_invalid_model_is_an_error_of_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    proto = ir.to_proto(model(RELU))
    proto.graph.node[0].op_type = "NoSuchOperator"
    path.write_bytes(proto.SerializeToString())
    assert "is not a valid ONNX model: No Op registered for NoSuchOperator" in load_error(path)


def external(path: Path) -> None:
    original = CASES["conv_bn"].build()
    ir.save(original, path, external_data="weights.bin", size_threshold_bytes=0)


def test_external_weights_are_found_and_can_be_saved_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    external(path)
    copy = tmp_path / "elsewhere" / "model.onnx"
    copy.parent.mkdir()
    save_model(canonicalise(load_model(path)), copy)
    assert list(copy.parent.iterdir()) == [copy]
    expected = canonicalise(CASES["conv_bn"].build())
    for name, value in load_model(copy).graph.initializers.items():
        want = expected.graph.initializers[name].const_value
        assert want is not None
        assert value.const_value is not None
        np.testing.assert_array_equal(value.const_value.numpy(), want.numpy())


def test_missing_or_short_external_weights_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    external(path)
    weights = tmp_path / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert "weights.bin is cut short" in load_error(path)
    weights.unlink()
    assert "in 'weights.bin', which is missing beside it" in load_error(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FliqsError, match=r"^cannot write .*result\.json: no space left"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_writing_needs_a_folder_that_exists(tmp_path: Path) -> None:
    with pytest.raises(FliqsError, match="no such file or directory"):
        atomic_write(tmp_path / "no" / "file", b"")
    with pytest.raises(FliqsError, match="it is a folder"):
        atomic_write(tmp_path, b"")


def test_a_link_is_followed_and_permissions_are_kept(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(target)
    atomic_write(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640


# -- real models ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL or ["models"])
def test_a_real_model_becomes_canonical_and_computes_the_same(name: str) -> None:
    path = require_shared(name)
    result = canonicalise(load_model(path))
    assert_canonical(result)
    once = ir.to_proto(result)
    twice = ir.to_proto(canonicalise(ir.from_proto(once)))
    assert serialized(twice) == serialized(once)

    feeds = random_feeds(result, batch=16 if "vdsr" in name else 2)
    if "sr" in feeds:  # silero_vad: the sampling rate chooses the branch
        feeds |= {"sr": np.array(16000), "input": np.ones((2, 512), np.float32)}
    expected = session(str(path)).run(None, feeds)
    actual = session(once.SerializeToString()).run(None, feeds)
    for want, got in zip(expected, actual, strict=True):
        # Batch normalization moves into weights, one rounding per layer.
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


# -- helpers --------------------------------------------------------------------------------


def assert_canonical(result: ir.Model) -> None:
    """What canonicalise promises, looked up anew in the graph."""
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    assert result.opset_imports[""] == OPSET
    assert result.ir_version == IR_VERSION
    assert not result.functions
    nodes = list(result.graph.all_nodes())
    assert not {"BatchNormalization", "Dropout"} & {node.op_type for node in nodes}
    for node in nodes:
        if node.op_type in ("Identity", "Constant"):
            assert node.outputs[0].is_graph_output()
        assert node.domain != CONTRIB or why_contrib_stays(node) is not None
        if node.op_type == "MatMul":
            assert all(v is None or v.shape is None or len(v.shape) > 1 for v in node.inputs)
    assert {node.domain for node in nodes} | {""} == set(result.opset_imports)
    for graph in result.graphs():
        assert not any(value.is_initializer() for value in graph.inputs)
        for value in graph.initializers.values():
            assert value.uses() or value.is_graph_output()
    node_names = [node.name for node in nodes]
    assert all(node_names)
    assert len(set(node_names)) == len(node_names)
    value_names = [value.name for node in nodes for value in node.outputs if value.name]
    value_names += [name for graph in result.graphs() for name in graph.initializers]
    assert len(set(value_names)) == len(value_names)


def assert_same_signature(original: ir.Model, result: ir.Model) -> None:
    inputs = [value for value in original.graph.inputs if not value.is_initializer()]
    for before, after in (
        *zip(inputs, result.graph.inputs, strict=True),
        *zip(original.graph.outputs, result.graph.outputs, strict=True),
    ):
        assert before.name == after.name
        assert before.type == after.type
        assert before.shape is None or before.shape == after.shape


def load_error(path: Path) -> str:
    """The message with which a file is refused."""
    with pytest.raises(ModelError) as error:
        load_model(path)
    message = str(error.value)
    assert "\n" not in message
    return message
