"""Which runtimes have to compute a graph right, and what is said of those that are missing."""

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
from click.testing import CliRunner

from onnx_fliqs import api, openvino_runtime
from onnx_fliqs.cli.main import main
from onnx_fliqs.errors import EnvironmentMissingError
from onnx_fliqs.targets import TARGETS
from support import PRECISIONS, calibrated_case


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> ir.Model:
    """For a target of two runtimes, one of which is not installed."""
    both = replace(TARGETS["ort-cpu"], name="two", runtimes=("onnxruntime", "openvino"))
    monkeypatch.setitem(TARGETS, "two", both)
    monkeypatch.setattr(openvino_runtime, "is_installed", lambda: False)
    monkeypatch.setattr(
        openvino_runtime, "load_openvino", openvino_runtime.load_openvino.__wrapped__
    )
    case = calibrated_case("residual", "ort-cpu")
    emitted = case.emitted(case.space.uniform(PRECISIONS["int8"]))
    emitted.metadata_props["onnx_fliqs.target"] = "two"
    return emitted


def test_a_runtime_of_the_target_that_is_missing_is_reported(graph: ir.Model) -> None:
    found = api.validate(graph)
    assert found.unchecked == {"openvino": "openvino is not installed"}
    report = found.to_dict()
    assert report["unchecked"] == found.unchecked
    assert set(report["versions"]) == {"onnxruntime"}
    assert report["verification"]["runtimes"] == {}
    assert report["verification"]["levels"]["default"]["agrees"]


def test_the_command_says_so_in_plain_words(graph: ir.Model, tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    ir.save(graph, path)
    result = CliRunner().invoke(main, ["validate", str(path)])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines[:3]] == ["onnxruntime", "onnxruntime", "openvino"]
    assert lines[1][2:4] == ["default", "agrees"]
    assert " ".join(lines[2]) == "openvino not checked: openvino is not installed"


def test_a_missing_runtime_that_was_asked_for_is_an_error(graph: ir.Model) -> None:
    with pytest.raises(EnvironmentMissingError, match=r"pip install .*\[openvino\]"):
        api.validate(graph, runtimes=["openvino"])


def test_other_runtimes_may_be_chosen_than_the_target_has(graph: ir.Model) -> None:
    found = api.validate(graph, runtimes=["onnxruntime"])
    assert found.unchecked == {}
    assert [check.name for check in found.verification.levels] == ["basic", "default"]


def test_a_target_without_a_runtime_at_hand_asks_for_the_unoptimised_run_alone(
    graph: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TARGETS, "two", replace(TARGETS["two"], runtimes=()))
    found = api.validate(graph)
    assert found.verification.levels == ()
    assert found.unchecked == {}
