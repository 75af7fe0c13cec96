"""A session computes the same wherever the weights of its model lie."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import support
from onnx_fliqs import runtime
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.model import load_model, save_model
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.payload import is_plain, pack, skeleton
from onnx_fliqs.runtime import OptimizationLevel, make_session
from onnx_fliqs.search_loop import search
from onnx_fliqs.verify import compare
from pass_models import LAYERED

BRANCHES = """g (float[2,64] x, bool c) => (float[2,64] y) {
    y = If (c) <
        then_branch = t () => (float[2,64] a) { a = MatMul (x, w) },
        else_branch = e () => (float[2,64] b) { b = MatMul (x, v) }>
}"""


@pytest.fixture
def borrowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every weight be one that is not copied."""
    monkeypatch.setattr("onnx_fliqs.payload.COPY_LIMIT", 0)
    monkeypatch.setattr("onnx_fliqs.payload.INLINE_LIMIT", 0)
    monkeypatch.setattr("onnx_fliqs.payload._SMALL", 8)


def branches() -> ir.Model:
    """A model with a weight in each branch, both of the same name."""
    built = support.model(BRANCHES)
    for index, graph in enumerate(g for g in built.graphs() if g.name in ("t", "e")):
        array = np.random.default_rng(index).standard_normal((64, 64)).astype(np.float32)
        value = ir.val("weight", const_value=ir.tensor(array, name="weight"))
        graph.register_initializer(value)
        for node in graph:
            node.replace_input_with(1, value)
    return built


def in_file(model: ir.Model, folder: Path) -> ir.Model:
    """The same with the weights in a file."""
    path = folder / "model.onnx"
    ir.save(model, path, external_data="weights.bin", size_threshold_bytes=0)
    return ir.load(path)


def outputs(
    model: ir.Model, feeds: support.Feeds, level: OptimizationLevel
) -> list[np.ndarray]:
    return list(make_session(model, level=level, threads=1).run(None, feeds))


def assert_same(model: ir.Model, feeds: support.Feeds, moved: ir.Model) -> None:
    for level in OptimizationLevel:
        want = make_session(
            ir.to_proto(model).SerializeToString(), level=level, threads=1
        ).run(None, feeds)
        for a, b in zip(want, outputs(moved, feeds, level), strict=True):
            # Without prepacked weights, sums are taken in another order.
            difference = compare({"y": b}, {"y": a})
            assert difference.rms < 1e-5, level


@pytest.mark.usefixtures("borrowing")
@pytest.mark.parametrize("place", ["array", "file"])
@pytest.mark.parametrize("name", sorted(LAYERED))
def test_float_models(name: str, place: str, tmp_path: Path) -> None:
    model = canonicalise(LAYERED[name].build())
    moved = in_file(model, tmp_path) if place == "file" else model
    assert not is_plain(moved) or not model.graph.initializers
    assert_same(model, support.random_feeds(model), moved)


@pytest.mark.usefixtures("borrowing")
@pytest.mark.parametrize("place", ["array", "file"])
@pytest.mark.parametrize(
    ("target", "format_"),
    [("generic", name) for name in ("int8", "int4", "int6", "e3m2", "bf16")]
    + [("ort-cpu", "int8")],
)
def test_emitted_models(target: str, format_: str, place: str, tmp_path: Path) -> None:
    case = support.calibrated_case("residual", target)
    model = case.emitted(case.space.uniform(support.PRECISIONS[format_]))
    moved = in_file(model, tmp_path) if place == "file" else model
    assert_same(model, support.random_feeds(model), moved)


@pytest.mark.usefixtures("borrowing")
def test_searchable_models_with_functions() -> None:
    case = support.calibrated_case("residual")
    model = case.searchable(case.random_mix(1))
    assert_same(model, support.random_feeds(model), model)


@pytest.mark.usefixtures("borrowing")
@pytest.mark.parametrize("place", ["array", "file"])
@pytest.mark.parametrize("branch", [True, False])
def test_weights_in_branches(place: str, branch: bool, tmp_path: Path) -> None:
    model = branches()
    moved = in_file(model, tmp_path) if place == "file" else model
    feeds = support.random_feeds(model) | {"c": np.array(branch)}
    assert_same(model, feeds, moved)
    names = [list(graph.initializers) for graph in model.graphs()]
    assert sorted(map(len, names)) == [0, 1, 1]  # the model is as it was


@pytest.mark.usefixtures("borrowing")
@pytest.mark.parametrize("absolute", [True, False])
def test_the_graph_names_files_as_onnx_runtime_wants_them(
    absolute: bool, tmp_path: Path
) -> None:
    model = in_file(branches(), tmp_path)
    packed = pack(model, absolute=absolute)
    graph = onnx.ModelProto.FromString(packed.graph).graph
    for tensor in graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = Path(entries["location"])
        assert location.is_absolute() == absolute
        root = Path() if packed.folder is None else packed.folder
        assert (root / location).samefile(tmp_path / "weights.bin")
    assert len(graph.initializer) == 2
    assert not packed.borrowed


@pytest.mark.usefixtures("borrowing")
def test_borrowed_values_live_as_long_as_their_session() -> None:
    model = canonicalise(LAYERED["gemms"].build())
    feeds = support.random_feeds(model)
    before = len(runtime._borrowed)
    session = make_session(model)
    assert len(runtime._borrowed) == before + 1
    expected = support.run(model, feeds)[0]
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(np.zeros(1, np.float32))
    np.testing.assert_allclose(session.run(None, feeds)[0], expected, rtol=1e-4, atol=1e-5)
    del session
    assert len(runtime._borrowed) == before


def test_few_weights_go_into_the_message() -> None:
    packed = pack(canonicalise(LAYERED["gemms"].build()), absolute=True)
    assert (packed.folder, packed.borrowed) == (None, {})


def test_the_skeleton_has_the_signature_and_types_without_the_numbers() -> None:
    model = branches()
    proto = skeleton(model)
    onnx.checker.check_model(proto, full_check=True)
    assert len(proto.SerializeToString()) < 1000
    assert [value.name for value in proto.graph.input][:2] == ["x", "c"]
    assert len(proto.graph.input) == 4


@pytest.mark.usefixtures("borrowing")
def test_what_neither_fits_nor_can_be_lent_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_big(*_: object, **__: object) -> bytes:
        raise ValueError("Message onnx.ModelProto exceeds maximum protobuf size of 2GB")

    monkeypatch.setattr("onnx_fliqs.runtime.pack", too_big)
    with pytest.raises(UnsupportedError, match=r"too big for one message: .* of 2GB"):
        make_session(branches())


# -- training -------------------------------------------------------------------------------

# Its first product is not trained: nothing differentiates Floor.
MIXED = """g (float[N,16] x) => (float[N,4] y) {
    a = MatMul (x, frozen)
    s = Floor (a)
    b = MatMul (s, w1)
    r = Relu (b)
    y = MatMul (r, w2)
}"""
SHAPES = {"frozen": (16, 24), "w1": (24, 16), "w2": (16, 4)}


def searched(model: ir.Model) -> tuple[list[np.ndarray], float | None]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, 16)).astype(np.float32)
    data = Dataset({"x": x}, rng.integers(0, 4, 32), input_specs(model))
    config = SearchConfig(steps=8, batch_size=8, workers=2, space="int4,int8")
    result = search(model, data, config)
    reasons = {layer.name: layer.reason for layer in result.layers}
    assert sum(reason is not None for reason in reasons.values()) == 1
    return support.run(result.model, {"x": x}), result.loss


@pytest.mark.parametrize("place", ["array", "file"])
def test_a_search_gives_the_same_wherever_the_weights_lie(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = support.model(MIXED, weights=SHAPES)
    expected, loss = searched(model)
    monkeypatch.setattr("onnx_fliqs.payload.COPY_LIMIT", 0)
    monkeypatch.setattr("onnx_fliqs.payload.INLINE_LIMIT", 0)
    monkeypatch.setattr("onnx_fliqs.payload._SMALL", 8)
    if place == "file":
        save_model(model, tmp_path / "model.onnx")
        model = load_model(tmp_path / "model.onnx")
    found, found_loss = searched(model)
    assert found_loss == pytest.approx(loss, rel=1e-4)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
