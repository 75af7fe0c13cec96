"""Profiles of targets: as files, by name, in what carries a name, and on the command line."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from onnx_fliqs import api
from onnx_fliqs.assignment import Assignment
from onnx_fliqs.cli import options
from onnx_fliqs.cli.main import main
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.emission import TARGET_KEY
from onnx_fliqs.errors import ConfigError, FliqsError, VerificationError
from onnx_fliqs.lint import lint
from onnx_fliqs.model import load_model, save_model
from onnx_fliqs.search_loop import search
from onnx_fliqs.target_files import (
    parse_target,
    recorded_target,
    target_from_json,
    target_to_json,
)
from onnx_fliqs.targets import (
    TARGETS,
    Activations,
    Bias,
    FixedRange,
    Kernels,
    OperandTypes,
    Placement,
    Target,
)
from pass_models import LAYERED
from support import model

BUILT_IN = pytest.mark.parametrize("name", TARGETS)
DOCS = Path(__file__).parents[1] / "docs" / "targets.md"
NPU: dict[str, Any] = {
    "schema": 1,
    "name": "my-npu",
    "kernels": [{"ops": ["Conv", "MatMul"], "precisions": ["int8", "int4:int8"]}],
    "default_space": "int8,int4:int8",
    "qdq_types": ["INT8", "UINT8", "INT4", "INT32"],
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def write(path: Path, **fields: Any) -> Path:
    path.write_text(json.dumps(NPU | fields))
    return path


def small_model() -> ir.Model:
    return model(
        """g (float[N,4] x) => (float[N,3] y) {
            [fc1] a = MatMul (x, w1)
            r = Relu (a)
            [fc2] y = MatMul (r, w2) }""",
        weights={"w1": (4, 8), "w2": (8, 3)},
    )


# --- round trips ---------------------------------------------------------------------------


@BUILT_IN
def test_every_built_in_target_comes_back_from_its_json(name: str) -> None:
    mine = dataclasses.replace(TARGETS[name], name="mine")
    assert target_from_json(target_to_json(mine)) == mine


@BUILT_IN
def test_base_gives_every_field_that_is_left_out(name: str) -> None:
    text = json.dumps({"schema": 1, "name": "mine", "base": name, "default_bits": 7})
    expected = dataclasses.replace(
        TARGETS[name], name="mine", description=f"like {name}", default_bits=7.0
    )
    assert target_from_json(text) == expected


def test_without_a_base_fields_have_their_defaults() -> None:
    found = target_from_json('{"schema": 1, "name": "mine"}')
    assert found == Target(name="mine", description="")


PRECISIONS = st.sampled_from(
    ["int8", "int4", "int7:int8", "e4m3", "int4g64:float32", "float32", "bf16"]
)
OPERATORS = st.sampled_from(["Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "Gather"])
TYPES = st.sampled_from(["UINT8", "INT8", "INT16", "INT4", "FLOAT8E4M3FN", "INT32"])


def some(items: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(items, max_size=3).map(tuple)


@st.composite
def profiles(draw: st.DrawFn) -> Target:
    kernels = st.builds(
        Kernels, ops=some(OPERATORS), precisions=some(PRECISIONS), least_channels=st.just(8)
    )
    given_kernels = draw(st.none() | some(kernels))
    known = [p for k in given_kernels or () for p in k.precisions] or ["float32"]
    # Where every tensor is quantized, nothing may stay float.
    placements = [p for p in Placement if "float32" not in known] or [
        Placement.LAYER_INPUTS,
        Placement.TENSORS,
    ]
    return Target(
        name=draw(st.from_regex(r"my-[a-z0-9._-]{1,8}", fullmatch=True)),
        description=draw(st.text(max_size=20)),
        kernels=given_kernels,
        default_space=",".join(known),
        default_bits=draw(st.floats(0.5, 16)),
        placement=draw(st.sampled_from(placements)),
        residual_adds=draw(st.booleans()),
        between_ops=draw(some(st.sampled_from(["Add", "Mul", "Softmax"]))),
        fixed_ranges=draw(some(st.just(FixedRange(op="Tanh", low=-1.0, high=1.0)))),
        activations=draw(st.sampled_from(Activations)),
        activation_type=draw(st.sampled_from([None, "UINT8", "INT8"])),
        per_channel_ops=draw(st.none() | some(OPERATORS)),
        bias=draw(st.sampled_from(Bias)),
        qdq_types=draw(st.none() | some(TYPES)),
        operand_types=draw(
            st.none() | some(st.builds(OperandTypes, activations=TYPES, weights=some(TYPES)))
        ),
        runtimes=draw(some(st.sampled_from(["onnxruntime", "openvino"]))),
    )


@given(profile=profiles())
def test_any_profile_comes_back_from_its_json(profile: Target) -> None:
    assert target_from_json(target_to_json(profile)) == profile


# --- mistakes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"colour": 1}, "colour: is no field; known: "),
        ({"name": ""}, "name: needs letters"),
        ({"name": "../npu"}, "name: needs letters"),
        ({"name": "tensorrt"}, "name: tensorrt is a built-in target"),
        ({"name": 3}, "name: needs a string, got 3"),
        ({"base": "npu"}, "base: 'npu' is none of generic, "),
        ({"base": ["generic"]}, "base: ['generic'] is none of generic, "),
        ({"default_bits": "8"}, 'default_bits: needs a number, got "8"'),
        ({"default_bits": True}, "default_bits: needs a number, got true"),
        ({"default_bits": 0}, "default_bits: needs a positive number, got 0"),
        ({"default_bits": 10**400}, "default_bits: 1000"),
        ({"default_bits": float("nan")}, "default_bits: needs a positive number, got nan"),
        ({"zero_points": 1}, "zero_points: needs true or false, got 1"),
        (
            {"placement": "everywhere"},
            "placement: needs one of layer inputs, tensors, every",
        ),
        ({"bias": None}, "bias: needs one of int32, int32 always, float"),
        ({"between_ops": "Add"}, 'between_ops: needs a list, got "Add"'),
        ({"between_ops": ["Add", "Plus"]}, "between_ops: 'Plus' is no operator of ONNX"),
        ({"float_output_ops": ["Add"]}, "float_output_ops: 'Add' is none of Conv"),
        ({"integer_output_ops": ["Cnv"]}, "integer_output_ops: 'Cnv' is none of Conv"),
        ({"per_channel_ops": ["Add"]}, "per_channel_ops: 'Add' is none of Conv, "),
        ({"kernels": [3]}, "kernels[0]: needs an object, got 3"),
        ({"kernels": [{"ops": []}]}, "kernels[0].precisions: is missing"),
        ({"kernels": [{"ops": ["Add"], "precisions": []}]}, "kernels[0].ops: 'Add' is none"),
        (
            {"kernels": [{"ops": ["Conv"], "precisions": ["int8", "int9"]}]},
            "kernels[0].precisions[1]: unknown format 'int9'",
        ),
        (
            {"kernels": [{"ops": ["Conv"], "precisions": ["INT8"]}]},
            "kernels[0].precisions[0]: write 'INT8' as 'int8'",
        ),
        (
            {"kernels": [{"ops": ["Conv"], "precisions": ["int8"], "least_channels": 0}]},
            "kernels[0].least_channels: needs at least 1, got 0",
        ),
        ({"default_space": "int16"}, "default_space: target my-npu cannot run int16"),
        ({"default_space": "int99"}, "default_space: unknown format 'int99'"),
        ({"activation_type": "INT16"}, "activation_type: 'INT16' is none of UINT8, INT8"),
        ({"qdq_types": ["INT8", "INT7"]}, "qdq_types: 'INT7' is none of "),
        ({"per_channel_types": ["FLOAT"]}, "per_channel_types: 'FLOAT' is none of "),
        (
            {"operand_types": [{"activations": "INT8", "weights": ["I8"]}]},
            "operand_types[0].weights: 'I8' is none of ",
        ),
        (
            {"fixed_ranges": [{"op": "Tanh", "low": 1, "high": -1}]},
            "fixed_ranges[0]: needs low < high, got 1.0 and -1.0",
        ),
        ({"fixed_ranges": [{"op": "Tan", "low": 0, "hi": 1}]}, "fixed_ranges[0].hi: is no"),
        ({"runtimes": ["tvm"]}, "runtimes: 'tvm' is none of onnxruntime, openvino"),
    ],
)
def test_a_mistake_is_named_with_file_and_field(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "npu.json", **fields)
    with pytest.raises(ConfigError) as caught:
        parse_target(str(path))
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "npu is not JSON"),
        ("[" * 100_000, "npu is not JSON"),
        ("[]", "npu is not a target profile of schema 1"),
        ("{}", "npu is not a target profile of schema 1"),
        ('{"schema": true, "name": "mine"}', "npu is not a target profile of schema 1"),
        ('{"schema": 2, "name": "mine"}', "npu is not a target profile of schema 1"),
        ('{"schema": 1}', "npu: name: is missing"),
    ],
)
def test_what_is_no_profile_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        target_from_json(text, "npu")


@given(
    field=st.sampled_from([field.name for field in dataclasses.fields(Target)]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner),
        max_leaves=3,
    ),
)
def test_whatever_a_field_holds_is_read_or_refused(field: str, value: Any) -> None:
    with contextlib.suppress(ConfigError):
        target_from_json(json.dumps(NPU | {field: value}), "npu")


def test_every_field_of_a_target_is_documented() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert [name for name in get_type_hints(Target) if f"`{name}`" not in text] == []
    assert [name for name in TARGETS if f"## {name}\n" not in text] == []


@pytest.mark.parametrize("precision", ["int8", "int4:int8"])
def test_the_profile_of_the_documentation_works(precision: str, tmp_path: Path) -> None:
    (example,) = re.findall(r"```json\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "npu.json"
    path.write_text(example)
    source = LAYERED["gemms"].build()
    chosen = Assignment(dict.fromkeys(("plain", "trans"), precision))
    emitted = api.emit(source, chosen, target=str(path))
    assert lint(emitted.model, parse_target(str(path))) == ()


# --- names and paths -----------------------------------------------------------------------


@BUILT_IN
def test_a_name_is_a_built_in_target(name: str) -> None:
    assert parse_target(name) is TARGETS[name]


def test_a_path_is_a_profile_whatever_its_suffix(tmp_path: Path) -> None:
    assert parse_target(str(write(tmp_path / "npu.json"))).name == "my-npu"
    assert parse_target(str(write(tmp_path / "npu"))).name == "my-npu"


def test_a_name_that_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown target 'npu'; known: generic, ort-cpu"):
        parse_target("npu")
    missing = tmp_path / "npu.json"
    with pytest.raises(ConfigError, match=r"cannot read the target .*npu\.json"):
        parse_target(str(missing))
    for name in ("a" * 5000, "\0.json"):
        with pytest.raises(ConfigError, match="cannot read the target"):
            parse_target(name)
    missing.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"cannot read the target .*npu\.json"):
        parse_target(str(missing))


def test_a_name_that_a_file_carries_is_never_a_path(tmp_path: Path) -> None:
    path = write(tmp_path / "npu.json")
    with pytest.raises(
        ConfigError, match=r"the model is for the target .* --target FILE.json"
    ):
        recorded_target(str(path), "the model")
    assert recorded_target("generic", "the model") is TARGETS["generic"]


# --- what a profile does -------------------------------------------------------------------


def test_a_model_for_a_profile_carries_its_name_and_asks_for_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "npu.json")
    chosen = Assignment({"fc1": "int4:int8", "fc2": "int8"}, "my-npu")
    with pytest.raises(ConfigError, match="the assignment is for the target 'my-npu'"):
        api.emit(small_model(), chosen)
    emitted = api.emit(small_model(), chosen, target=str(path))
    assert emitted.model.metadata_props[TARGET_KEY] == "my-npu"
    assert emitted.assignment.target == "my-npu"
    saved = tmp_path / "quantized.onnx"
    save_model(emitted.model, saved)
    with pytest.raises(ConfigError, match="the model is for the target 'my-npu'"):
        api.validate(saved)
    found = api.validate(saved, target=str(path))
    assert found.problems == ()
    assert found.target == "my-npu"


def test_a_profile_limits_what_layers_choose(tmp_path: Path) -> None:
    path = write(tmp_path / "npu.json")
    with pytest.raises(ConfigError, match="target my-npu cannot run e4m3"):
        api.emit(small_model(), Assignment({"fc1": "e4m3", "fc2": "int8"}), target=str(path))
    assert api.inspect(small_model(), target=str(path)).precisions == ("int4:int8", "int8")


def test_a_profile_that_contradicts_itself_is_told_so(tmp_path: Path) -> None:
    path = write(tmp_path / "npu.json", qdq_types=["INT8", "INT32"])
    chosen = Assignment({"fc1": "int8", "fc2": "int8"})
    with pytest.raises(VerificationError, match="the profile lets layers choose what its rul"):
        api.emit(small_model(), chosen, target=str(path))


def test_a_search_does_not_resume_with_an_edited_profile(tmp_path: Path) -> None:
    path, folder = write(tmp_path / "npu.json"), tmp_path / "checkpoint"
    config = SearchConfig(target=str(path), steps=2, batch_size=4, workers=1)
    first = search(small_model(), None, config, checkpoint=folder)
    assert first.assignment.target == "my-npu"
    write(path, zero_points=True)
    with pytest.raises(FliqsError, match="another settings"):
        search(small_model(), None, config, checkpoint=folder, resume=True)


# --- the command line ----------------------------------------------------------------------


def test_the_help_names_the_built_in_targets() -> None:
    assert tuple(TARGETS) == options.TARGET_NAMES
    shown = " ".join(run("search", "--help").output.split())
    assert "generic, ort-cpu, " in shown


def test_targets_lists_all() -> None:
    shown = run("targets")
    assert shown.exit_code == 0
    assert [line.split()[0] for line in shown.stdout.splitlines() if line[:1].strip()] == [
        "target",
        *TARGETS,
    ]
    found = json.loads(run("targets", "--json").stdout)
    assert found["schema"] == 1
    assert [row["name"] for row in found["targets"]] == list(TARGETS)
    rows = {row["name"]: row for row in found["targets"]}
    assert rows["generic"]["precisions"] is None
    assert "int4g128:float32" in rows["tensorrt"]["precisions"]


@BUILT_IN
def test_a_shown_profile_is_a_target_once_it_is_renamed(name: str, tmp_path: Path) -> None:
    shown = run("targets", name)
    assert shown.exit_code == 0
    assert run("targets", name, "--json").stdout == shown.stdout
    path = tmp_path / "mine.json"
    path.write_text(shown.stdout)
    refused = run("targets", path)
    assert refused.exit_code == 2
    assert f"{path}: name: {name} is a built-in target; choose another name" in refused.stderr
    path.write_text(shown.stdout.replace(f'"name": "{name}"', '"name": "mine"'))
    again = run("targets", path)
    assert again.exit_code == 0, again.output
    assert parse_target(str(path)) == dataclasses.replace(TARGETS[name], name="mine")


def test_a_profile_works_on_the_command_line(tmp_path: Path) -> None:
    source, output = tmp_path / "m.onnx", tmp_path / "q.onnx"
    save_model(small_model(), source)
    assignment, path = tmp_path / "a.json", write(tmp_path / "npu.json")
    assignment.write_text(Assignment({"fc1": "int8", "fc2": "int8"}, "my-npu").to_json())
    arguments = ("emit", source, "--assignment", assignment, "-o", output)
    assert "pass its profile, --target FILE.json" in run(*arguments).stderr
    assert run(*arguments, "--target", path).exit_code == 0
    assert load_model(output).metadata_props[TARGET_KEY] == "my-npu"
    refused = run("validate", output)
    assert refused.exit_code == 2
    assert "pass its profile, --target FILE.json" in refused.stderr
    valid = run("validate", output, "--target", path)
    assert valid.exit_code == 0, valid.output
    assert "valid for my-npu" in valid.stdout
