"""Paths and what was read from them: the verbs take either."""

from pathlib import Path

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
