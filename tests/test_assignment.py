"""The assignment file: round trips, the same bytes, and one line for every fault."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_fliqs.assignment import Assignment
from onnx_fliqs.errors import ConfigError
from onnx_fliqs.formats import FORMATS, IntFormat
from onnx_fliqs.precision import parse_space
from onnx_fliqs.sites import Layer, SearchSpace

CHOICES = [
    name for name, fmt in FORMATS.items() if not isinstance(fmt, IntFormat) or fmt.signed
]
NAMES = st.text(st.characters(codec="utf-8"), max_size=20)

VALID: dict[str, Any] = {"schema": 1, "target": "generic", "layers": {"a": "int4"}}


def space(*names: str, groups: tuple[tuple[str, ...], ...] = ()) -> SearchSpace:
    layers = (Layer(name=name, op_type="Gemm", weights=("w",), params=1) for name in names)
    return SearchSpace(tuple(layers), (), parse_space("int-l"), groups=groups)


@given(layers=st.dictionaries(NAMES, st.sampled_from(CHOICES), max_size=6), target=NAMES)
def test_what_is_written_is_read_again(layers: dict[str, str], target: str) -> None:
    assignment = Assignment(layers, target)
    text = assignment.to_json()
    again = Assignment.from_json(text)
    assert again == assignment
    assert list(again.layers) == list(layers)
    assert again.to_json().encode() == text.encode()


def test_the_text_is_readable_and_versioned() -> None:
    text = Assignment({"/conv/größe": "int4", "head": "e4m3"}, "ort-cpu").to_json()
    assert text == (
        '{\n  "schema": 1,\n  "target": "ort-cpu",\n  "layers": {\n'
        '    "/conv/größe": "int4",\n    "head": "e4m3"\n  }\n}\n'
    )


def test_a_file_without_a_target_is_for_the_generic_one() -> None:
    assert Assignment.from_json('{"schema": 1, "layers": {}}').target == "generic"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "not json",
        "\ufeff{}",
        "[" * 100_000,
        '{"schema": ' + "9" * 5000 + "}",
        "null",
        "[]",
        '"text"',
        "{}",
        *(
            json.dumps({**VALID, **change})
            for change in (
                {"schema": 2},
                {"schema": 0},
                {"schema": "1"},
                {"schema": None},
                {"schema": True},
                {"schema": [1]},
                {"layers": None},
                {"layers": ["int4"]},
                {"layers": "int4"},
                {"target": None},
                {"target": 3},
                {"budget": 4},
                {"layers": {"a": 4}},
                {"layers": {"a": None}},
                {"layers": {"a": ["int4"]}},
                {"layers": {"a": ""}},
                {"layers": {"a": "int4,int8"}},
                {"layers": {"a": "int-l"}},
                {"layers": {"a": "int9"}},
                {"layers": {"a": "line\nbreak"}},
                {"layers": {"line\nbreak": "int9"}},
                {"layers": {"a": "uint4"}},
            )
        ),
        json.dumps({"schema": 1, "target": "generic"}),
    ],
    ids=lambda text: text[:60],
)
def test_every_malformed_text_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        Assignment.from_json(text, "the file")
    assert str(error.value).startswith("the file")
    assert "\n" not in str(error.value)


def test_a_format_that_does_not_exist_is_named_with_its_layer() -> None:
    with pytest.raises(ConfigError, match=r"layer 'a'.*'int9'.*known: .*int4"):
        Assignment.from_json(json.dumps({**VALID, "layers": {"a": "int9"}}))


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assignment = Assignment({"größe": "int5"})
    path.write_bytes(assignment.to_json().encode())
    assert Assignment.read(path) == assignment


@pytest.mark.parametrize("content", [None, b"\xff\xfe{}", b"{}", b""])
def test_a_file_that_is_missing_or_no_assignment_is_named(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        Assignment.read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_layer_that_stands_there_twice_is_refused() -> None:
    text = '{"schema": 1, "layers": {"a": "int4", "b": "int8", "a": "int8"}}'
    with pytest.raises(ConfigError, match="'a' stands there twice"):
        Assignment.from_json(text)


def test_a_folder_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        Assignment.read(tmp_path)


def test_formats_follow_the_layers_of_the_model() -> None:
    chosen = Assignment({"b": "INT8", "a": "e2m1"}).precisions(space("a", "b"))
    assert {name: fmt.name for name, fmt in chosen.items()} == {"a": "e2m1", "b": "int8"}
    assert list(chosen) == ["a", "b"]


def test_a_layer_without_a_format_is_named() -> None:
    with pytest.raises(ConfigError, match="no format for layer 'b' of the model"):
        Assignment({"a": "int4"}).precisions(space("a", "b"))


def test_a_layer_that_the_model_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match="names layer 'c', which the model does not have"):
        Assignment({"a": "int4", "c": "int4"}).precisions(space("a"))


def test_layers_that_share_a_format_cannot_have_two() -> None:
    tied = space("a", "b", "c", groups=(("a", "c"),))
    formats = Assignment({"a": "int4", "b": "int8", "c": "int4"}).precisions(tied)
    assert [fmt.name for fmt in formats.values()] == ["int4", "int8", "int4"]
    with pytest.raises(
        ConfigError, match="gives layer 'a' int4 and layer 'c' int8, but the two"
    ):
        Assignment({"a": "int4", "b": "int4", "c": "int8"}).precisions(tied)
