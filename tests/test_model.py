"""Models whose weights lie in other files, and models that do not fit one message."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from onnx_fliqs import payload
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.errors import FliqsError, ModelError
from onnx_fliqs.model import atomic_write, fingerprint, load_model, save_model
from onnx_fliqs.runtime import make_session
from onnx_fliqs.search_loop import search
from support import Feeds, f32, initializer, model, random_feeds, run

WEIGHTS = {"w": (64, 64), "v": (64, 8)}
TEXT = """g (float[N,64] x, bool c) => (float[N,8] y) {
    a = MatMul (x, w)
    b = If (c) <
        then_branch = t () => (float[N,64] p) {
            s = Constant <value_float = 2.0> ()
            p = Mul (a, s)
        },
        else_branch = e () => (float[N,64] q) { q = MatMul (a, u) }>
    y = MatMul (b, v)
}"""


def build() -> ir.Model:
    """A model with a weight in a branch."""
    built = model(TEXT, weights=WEIGHTS)
    branch = next(graph for graph in built.graphs() if graph.name == "e")
    weight = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)
    value = ir.val("u", const_value=ir.tensor(weight, name="u"))
    branch.register_initializer(value)
    for node in branch:
        node.replace_input_with(1, value)
    return built


def feeds() -> Feeds:
    """They take the branch with the weight."""
    return random_feeds(build(), 2)


def expected() -> np.ndarray:
    return run(build(), feeds())[0]


def scattered(path: Path, place: Callable[[str], tuple[str, int]]) -> Path:
    """Write the model with each weight in a file, at an offset, that ``place`` chooses."""
    proto = ir.to_proto(build())
    tensors = [*proto.graph.initializer]
    for node in proto.graph.node:
        tensors += [tensor for a in node.attribute for tensor in a.g.initializer]
    path.parent.mkdir(exist_ok=True)
    for tensor in tensors:
        data = numpy_helper.to_array(tensor).tobytes()
        location, offset = place(tensor.name)
        file = path.parent / location
        file.parent.mkdir(parents=True, exist_ok=True)
        content = file.read_bytes() if file.exists() else b""
        file.write_bytes(
            content.ljust(offset, b"\0")[:offset] + data + content[offset + len(data) :]
        )
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", len(data))):
            tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(proto.SerializeToString())
    return path


def in_one_file(folder: Path) -> Path:
    places = {"w": 0, "v": 64 * 64 * 4, "u": 72 * 64 * 4}
    return scattered(folder / "model.onnx", lambda name: ("weights.bin", places[name]))


def change(path: Path, **entries: str | None) -> None:
    """Change what a file says about where the weight w lies."""
    proto = onnx.ModelProto.FromString(path.read_bytes())
    (tensor,) = (t for t in proto.graph.initializer if t.name == "w")
    found = {item.key: item.value for item in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in found.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def load_error(path: Path) -> str:
    with pytest.raises(ModelError) as error:
        load_model(path)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- weights in other files -----------------------------------------------------------------


def test_weights_lie_in_several_files_in_folders_at_offsets(tmp_path: Path) -> None:
    places = {"w": ("one.bin", 12), "v": ("deep/er/two.bin", 0), "u": ("one.bin", 20000)}
    loaded = load_model(scattered(tmp_path / "model.onnx", places.__getitem__))
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor)
    np.testing.assert_array_equal(initializer(loaded, "w"), initializer(build(), "w"))
    found = make_session(loaded).run(None, feeds())[0]
    np.testing.assert_allclose(found, expected(), rtol=1e-4, atol=1e-4)
    # ONNX Runtime reads them where they lie: the message holds none.
    assert len(payload.pack(loaded, absolute=True).graph) < 2000


def test_weights_behind_symbolic_links_are_found(tmp_path: Path) -> None:
    # The cache of Hugging Face: snapshots/<commit>/<name> is a link to blobs/<hash>.
    blobs = in_one_file(tmp_path / "blobs").parent
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for each in blobs.iterdir():
        (snapshot / each.name).symlink_to(Path("..") / "blobs" / each.name)
    loaded = load_model(snapshot / "model.onnx")
    found = make_session(loaded).run(None, feeds())[0]
    np.testing.assert_allclose(found, expected(), rtol=1e-4, atol=1e-4)


def test_weights_with_a_second_name_are_found(tmp_path: Path) -> None:
    path = in_one_file(tmp_path)
    (tmp_path / "backup.bin").hardlink_to(tmp_path / "weights.bin")
    np.testing.assert_array_equal(
        initializer(load_model(path), "w"), initializer(build(), "w")
    )


def test_small_weights_and_constants_are_read_at_once(tmp_path: Path) -> None:
    small = model(
        "g (float[N,4] x) => (float[2,M] y) { y = Reshape (x, s) }", constants={"s": [2, -1]}
    )
    proto = ir.to_proto(small)
    constant = onnx.helper.make_node(
        "Constant", [], ["t"], value=numpy_helper.from_array(f32(range(999)), "t")
    )
    proto.graph.node.append(constant)
    (tmp_path / "weights.bin").write_bytes(
        np.array([2, -1], np.int64).tobytes() + f32(range(999)).tobytes()
    )
    for tensor, offset, length in (
        (proto.graph.initializer[0], 0, None),
        (constant.attribute[0].t, 16, 3996),
    ):
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights.bin")
        tensor.external_data.add(key="offset", value=str(offset))
        if length is not None:
            tensor.external_data.add(key="length", value=str(length))
    proto.graph.node[1].CopyFrom(constant)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    loaded = load_model(path)
    (tmp_path / "weights.bin").unlink()
    assert initializer(loaded, "s").tolist() == [2, -1]
    (node,) = (n for n in loaded.graph if n.op_type == "Constant")
    np.testing.assert_array_equal(
        node.attributes["value"].as_tensor().numpy(), f32(range(999))
    )


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "no.bin"}, "in 'no.bin', which is missing beside it"),
        ({"location": "../weights.bin"}, "in '../weights.bin', outside its folder"),
        ({"location": "/etc/passwd"}, "in '/etc/passwd', outside its folder"),
        ({"length": "16380"}, "it needs 16384 bytes, and 16380 at 0 are given"),
        ({"offset": "-4"}, "it needs 16384 bytes, and 16384 at -4 are given"),
        ({"offset": "one"}, "malformed external weight 'w'"),
        ({"offset": "100000"}, "the weight 'w' ends at byte 116384, the file at"),
        ({"offset": "100000", "length": None}, "the weight 'w' ends at byte 116384"),
        ({"location": None}, "which is missing beside it"),
    ],
)
def test_what_a_file_says_about_its_weights_is_checked(
    tmp_path: Path, entries: dict[str, str | None], message: str
) -> None:
    path = in_one_file(tmp_path)
    change(path, **entries)
    assert message in load_error(path)


def test_the_length_may_be_left_out(tmp_path: Path) -> None:
    path = in_one_file(tmp_path)
    change(path, length=None, offset=None)
    np.testing.assert_array_equal(
        initializer(load_model(path), "w"), initializer(build(), "w")
    )


# -- the fingerprint ------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_content_wherever_it_lies(tmp_path: Path) -> None:
    whole = tmp_path / "whole.onnx"
    save_model(build(), whole)
    places = {"w": ("one.bin", 12), "v": ("two.bin", 0), "u": ("one.bin", 20000)}
    found = {
        fingerprint(load_model(whole)),
        fingerprint(load_model(whole)),
        fingerprint(load_model(in_one_file(tmp_path / "one"))),
        fingerprint(load_model(scattered(tmp_path / "two" / "m.onnx", places.__getitem__))),
    }
    assert len(found) == 1


def test_the_fingerprint_tells_graphs_and_weights_apart() -> None:
    changed = build()
    weight = initializer(changed, "v").copy()
    weight[-1, -1] += 1
    changed.graph.initializers["v"].const_value = ir.tensor(weight, name="v")
    branch = build()
    inner = next(graph for graph in branch.graphs() if graph.name == "e").initializers["u"]
    inner.const_value = ir.tensor(np.zeros((64, 64), np.float32), name="u")
    reshaped = build()
    tensor = ir.tensor(initializer(reshaped, "w").reshape(-1), name="w")
    reshaped.graph.initializers["w"].const_value = tensor
    other = build()
    other.graph[0].op_type = "Add"
    words = model("g (float[1] x) => (float[1] y) { y = Relu (x) }")
    strings = [words.clone(), words.clone()]
    for each, text in zip(strings, (b"a", b"b"), strict=True):
        value = ir.val("s", const_value=ir.StringTensor([text], shape=ir.Shape([1]), name="s"))
        each.graph.register_initializer(value)
    models = (build(), changed, branch, reshaped, other, words, *strings)
    assert len({fingerprint(each) for each in models}) == len(models)


def test_the_fingerprint_leaves_the_model_alone() -> None:
    built = build()
    before = ir.to_proto(built).SerializeToString(deterministic=True)
    fingerprint(built)
    assert ir.to_proto(built).SerializeToString(deterministic=True) == before


# -- saving ---------------------------------------------------------------------------------


def files(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()}


@pytest.fixture
def big(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model be too big for one message."""
    monkeypatch.setattr("onnx_fliqs.payload.INLINE_LIMIT", 1000)


@pytest.mark.usefixtures("big")
def test_a_big_model_keeps_its_weights_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save_model(build(), path)
    assert files(tmp_path) == {"model.onnx", "model.onnx.data"}
    loaded = load_model(path)
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor)
    np.testing.assert_array_equal(run_file(path), expected())


def run_file(path: Path) -> np.ndarray:
    onnx.checker.check_model(os.fspath(path), full_check=True)
    return run(load_model_into_memory(path), feeds())[0]


def load_model_into_memory(path: Path) -> ir.Model:
    loaded = load_model(path)
    ir.external_data.load_to_model(loaded)
    return loaded


@pytest.mark.usefixtures("big")
def test_the_model_that_a_big_one_replaces_is_whole_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save_model(build(), path)
    # Its own weights are in the file that would be replaced.
    save_model(load_model(path), path)
    assert files(tmp_path) == {"model.onnx", "model.onnx.1.data"}
    np.testing.assert_array_equal(run_file(path), expected())
    save_model(load_model(path), path)
    assert files(tmp_path) == {"model.onnx", "model.onnx.data"}
    np.testing.assert_array_equal(run_file(path), expected())


@pytest.mark.usefixtures("big")
@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()]
)
def test_a_big_model_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException
) -> None:
    path = tmp_path / "model.onnx"
    save_model(build(), path)
    changed = build()
    changed.graph.initializers["w"].const_value = ir.tensor(np.zeros((64, 64), np.float32))
    calls = []

    def fails(name: str) -> Callable[..., object]:
        real = getattr(Path if name == "replace" else os, name)

        def call(*args: object) -> object:
            calls.append(name)
            if len(calls) > step:
                raise error
            return real(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fails("fsync"))
        patch.setattr(Path, "replace", fails("replace"))
        with pytest.raises((FliqsError, KeyboardInterrupt)) as found:
            save_model(changed, path)
    if isinstance(found.value, FliqsError):
        assert str(found.value).startswith(f"cannot write {path}: no space left")
    np.testing.assert_array_equal(run_file(path), expected())
    assert not [name for name in files(tmp_path) if name.endswith(".tmp")]
    save_model(changed, path)  # what was left does not stand in the way
    assert len(files(tmp_path)) == 2
    assert not initializer(load_model(path), "w").any()


@pytest.mark.usefixtures("big")
def test_permissions_are_kept_and_links_followed(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    path.chmod(0o640)
    link = tmp_path / "link.onnx"
    link.symlink_to(path)
    save_model(build(), link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert files(tmp_path) == {"model.onnx", "model.onnx.data", "link.onnx"}


def test_saving_weights_from_files_leaves_the_model_alone(tmp_path: Path) -> None:
    loaded = load_model(in_one_file(tmp_path / "in"))
    path = tmp_path / "whole.onnx"
    save_model(loaded, path)
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert files(tmp_path) == {"in", "whole.onnx"}
    np.testing.assert_array_equal(run_file(path), expected())


def test_content_can_be_written_piece_by_piece(tmp_path: Path) -> None:
    path = tmp_path / "pieces"
    atomic_write(path, lambda file: [file.write(b"one "), file.write(b"two")])
    assert path.read_bytes() == b"one two"


@pytest.mark.parametrize("which", ["input", "output"])
def test_a_signature_without_shapes_is_read(which: str, tmp_path: Path) -> None:
    """Exporters leave out the shape of what they do not know the rank of."""
    path = tmp_path / "m.onnx"
    proto = ir.to_proto(
        model(
            "g (float[N,4] x) => (float[N,3] y) { y = MatMul (x, w) }", weights={"w": (4, 3)}
        )
    )
    getattr(proto.graph, which)[0].type.tensor_type.ClearField("shape")
    onnx.save(proto, path)
    loaded = load_model(path)
    assert getattr(loaded.graph, f"{which}s")[0].shape is None
    x = np.random.default_rng(0).standard_normal((80, 4)).astype(np.float32)
    config = SearchConfig(steps=2, batch_size=8, workers=1)
    result = search(loaded, Dataset({"x": x}, None, input_specs(loaded)), config)
    (found,) = run(result.model, {"x": x[:5]})
    assert found.shape == (5, 3)
