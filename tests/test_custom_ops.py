"""Operators of domains that nobody but their library knows are left as they are."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

import support
from onnx_fliqs import api
from onnx_fliqs.assignment import Assignment
from onnx_fliqs.cli.main import main
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.errors import UnknownOperatorError
from onnx_fliqs.model import save_model
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.search_loop import search

TEXT = """g (float[N,8] x) => (float[N,4] y) {
    a = MatMul (x, w1)
    b = acme.vision.Fancy <strength = 2> (a)
    y = MatMul (b, w2)
}"""
WEIGHTS = {"w1": (8, 8), "w2": (8, 4)}
HEADER = (
    '<ir_version: 8, opset_import: ["" : {opset}, "acme.vision" : 3, "com.microsoft" : 1]>'
)
LINE = (
    "ONNX Runtime does not know the operator Fancy of the domain 'acme.vision': name the"
    " library that implements it with --custom-ops"
)


def build(text: str = TEXT, opset: int = 17) -> ir.Model:
    return support.model(text, header=HEADER.format(opset=opset), weights=WEIGHTS)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The model, data for it, and an assignment."""
    found = {
        name: tmp_path / name for name in ("model.onnx", "data.npz", "a.json", "out.onnx")
    }
    save_model(build(), found["model.onnx"])
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 8)).astype(np.float32)
    np.savez(found["data.npz"], x=x, labels=rng.integers(0, 4, 8))
    layers = {layer.name: "int8" for layer in api.inspect(build()).layers}
    found["a.json"].write_text(Assignment(layers, "generic").to_json())
    return found


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("opset", [11, 17, 21])
def test_canonicalising_leaves_them_as_they_are(opset: int) -> None:
    model = canonicalise(build(opset=opset))
    (node,) = (node for node in model.graph if node.domain == "acme.vision")
    assert node.op_type == "Fancy"
    assert node.attributes["strength"].as_int() == 2
    assert model.opset_imports["acme.vision"] == 3
    onnx.checker.check_model(ir.to_proto(model))


def test_inspect_does_without_the_library(files: dict[str, Path]) -> None:
    result = invoke("inspect", files["model.onnx"])
    assert result.exit_code == 0, result.output
    assert f"warning: multiply-accumulates are not counted: {LINE}" in result.stderr
    assert "2 layers" in result.stdout


def commands() -> dict[str, Callable[[dict[str, Path]], Result]]:
    return {
        "search": lambda f: invoke("search", f["model.onnx"], "--data", f["data.npz"]),
        "emit": lambda f: invoke(
            "emit", f["model.onnx"], "--assignment", f["a.json"], "-o", f["out.onnx"]
        ),
        "evaluate": lambda f: invoke("evaluate", f["model.onnx"], "--data", f["data.npz"]),
    }


@pytest.mark.parametrize("command", commands())
def test_what_has_to_run_them_names_them(command: str, files: dict[str, Path]) -> None:
    result = commands()[command](files)
    assert result.exit_code == UnknownOperatorError.exit_code == 3
    assert result.stderr.splitlines()[-1] == f"Error: {LINE}"


def test_validate_names_them_as_well(files: dict[str, Path]) -> None:
    result = invoke("validate", files["model.onnx"])
    assert result.exit_code == 3
    assert result.stderr == f"Error: {LINE}\n"


@pytest.mark.parametrize("command", ["search", "emit", "evaluate", "validate", "inspect"])
def test_a_library_that_cannot_be_loaded_is_a_wrong_option(
    command: str, files: dict[str, Path]
) -> None:
    arguments: dict[str, list[object]] = {
        "emit": ["--assignment", files["a.json"], "-o", files["out.onnx"]],
        "evaluate": ["--data", files["data.npz"]],
    }
    library = files["data.npz"]
    result = invoke(
        command,
        files["model.onnx"],
        *arguments.get(command, []),
        "--custom-ops",
        library,
    )
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: {library} is no library of custom operators: ")


def test_layers_behind_an_operator_of_unknown_shape_are_trained() -> None:
    # ONNX knows nothing of it; ONNX Runtime has it built in.
    text = """g (float[N,8,8] x) => (float[N,8,4] y) {
        a = MatMul (x, w1)
        b = com.microsoft.Inverse (a)
        y = MatMul (b, w2)
    }"""
    model = build(text)
    x = np.random.default_rng(0).standard_normal((16, 8, 8)).astype(np.float32)
    data = Dataset({"x": x}, None, input_specs(model))
    config = SearchConfig(steps=4, batch_size=4, space="int8,int16", workers=1)
    result = search(model, data, config)
    first, second = result.layers
    assert not first.trained
    assert first.reason is not None
    assert "Inverse" in first.reason
    assert second.trained
