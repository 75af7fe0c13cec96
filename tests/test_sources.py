"""Paths, and what was read from them or made in memory: the verbs take either."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnx_fliqs
import support
from onnx_fliqs.errors import DataError, ModelError


def network() -> ir.Model:
    return support.model(
        "g (float[N,4] x) => (float[N,3] y) { y = MatMul (x, w) }", weights={"w": (4, 3)}
    )


@pytest.mark.parametrize("kind", [str, Path])
def test_every_verb_takes_a_path_of_any_kind(kind: type[str | Path], tmp_path: Path) -> None:
    model, data = kind(tmp_path / "m.onnx"), kind(tmp_path / "d.npz")
    onnx.save(ir.to_proto(network()), model)
    rng = np.random.default_rng(0)
    np.savez(data, x=rng.standard_normal((40, 4)), labels=rng.integers(0, 3, 40))
    config = onnx_fliqs.SearchConfig(steps=2, batch_size=8, workers=1)
    result = onnx_fliqs.search(model, data, config, checkpoint=kind(tmp_path / "state"))
    assert (tmp_path / "state").is_dir()
    output = kind(tmp_path / "q.onnx")
    written = result.save(output)
    assert written == tmp_path / "q.assignment.json"
    assert result.to_dict(output)["output"] == str(output)
    assignment = onnx_fliqs.Assignment.read(kind(written))
    assert [row.name for row in onnx_fliqs.inspect(model).layers] == list(assignment.layers)
    assert onnx_fliqs.emit(model, assignment, data).assignment == assignment
    assert onnx_fliqs.evaluate(output, data, against=model).samples == 40
    assert not onnx_fliqs.validate(output, reference=model, data=data).problems


def test_a_path_of_nothing_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read nowhere"):
        onnx_fliqs.inspect("nowhere.onnx")
    with pytest.raises(DataError, match="does not exist"):
        onnx_fliqs.search(network(), str(tmp_path / "nowhere.npz"))


def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((40, 4), np.float32),
        "labels": rng.integers(0, 3, 40),
    }


def test_what_is_in_memory_gives_the_result_of_the_files(tmp_path: Path) -> None:
    proto = ir.to_proto(network())
    before = proto.SerializeToString()
    onnx.save(proto, tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", **arrays())
    config = onnx_fliqs.SearchConfig(steps=2, batch_size=8, workers=1)
    first = onnx_fliqs.search(tmp_path / "m.onnx", tmp_path / "d.npz", config)
    second = onnx_fliqs.search(proto, arrays(), config)
    third = onnx_fliqs.search(proto, {k: v.tolist() for k, v in arrays().items()}, config)
    results = [ir.to_proto(r.model).SerializeToString() for r in (first, second, third)]
    assert results[0] == results[1] == results[2]
    assert proto.SerializeToString() == before


def test_the_trained_model_is_saved_beside_the_graph(tmp_path: Path) -> None:
    config = onnx_fliqs.SearchConfig(steps=2, batch_size=8, workers=1)
    result = onnx_fliqs.search(network(), arrays(), config)
    result.save(tmp_path / "q.onnx", trained=tmp_path / "t.onnx")
    emitted = onnx_fliqs.emit(tmp_path / "t.onnx", result.assignment, arrays())
    with pytest.raises(ValueError, match="nothing was trained"):
        emitted.save(tmp_path / "e.onnx", trained=tmp_path / "none.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {
        "q.onnx",
        "q.assignment.json",
        "t.onnx",
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": None}, "the data has no array 'x': the model needs 'x', and there is 'labels'"),
        ({"z": np.zeros(40)}, "the data has arrays that nothing uses: 'z'"),
        ({"x": np.zeros((40, 5))}, r"'x' has shape \[40,5\]"),
        ({"x": [[1.0], [1.0, 2.0]]}, "'x' is no array: "),
        ({"x": np.full((40, 4), None)}, "wants float32, not object"),
        ({"labels": [0.5] * 40}, r"labels are floats of the shape \[N\], which no output has"),
        ({"labels": [0] * 39}, "differ in their number of samples"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changed: dict[str, Any], message: str) -> None:
    given = {k: v for k, v in (arrays() | changed).items() if v is not None}
    with pytest.raises(DataError, match=message) as raised:
        onnx_fliqs.evaluate(network(), given)
    assert "\n" not in str(raised.value)


def test_a_model_in_memory_is_checked_as_a_file_is(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the model is not an ONNX model"):
        onnx_fliqs.inspect(onnx.ModelProto())
    proto = ir.to_proto(network())
    proto.graph.node[0].op_type = "NoSuch"
    with pytest.raises(ModelError, match=r"the model is not a valid ONNX model: .*NoSuch"):
        onnx_fliqs.inspect(proto)


def test_a_model_without_its_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(ir.to_proto(network()), path, save_as_external_data=True, size_threshold=0)
    proto = onnx.load(path, load_external_data=False)
    with pytest.raises(ModelError, match="the model keeps the weight 'w' in a file: give the"):
        onnx_fliqs.inspect(proto)
    assert onnx_fliqs.inspect(onnx.load(path)).layers


def test_a_model_beyond_the_limit_of_protobuf_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("onnx_fliqs.model._fits_in_a_message", lambda _: False)
    with pytest.raises(ModelError, match="more than 2 GB: save it, and give the path"):
        onnx_fliqs.inspect(ir.to_proto(network()))
