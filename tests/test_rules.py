"""Rules for single layers: which layers they are for, what they do, what is refused."""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

import onnx_fliqs
import support
from onnx_fliqs import api
from onnx_fliqs.assignment import Assignment
from onnx_fliqs.cli.main import main
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.cost import Budget, BudgetKind
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.errors import ConfigError, FliqsError, UnsupportedError
from onnx_fliqs.find_layers import find_layers
from onnx_fliqs.layer_operators import LAYER_OPERATORS
from onnx_fliqs.layer_positions import Position, layer_positions
from onnx_fliqs.model import save_model
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.precision import parse_space
from onnx_fliqs.rules import Rule, read_rules, rules_from_json
from onnx_fliqs.search_loop import search
from onnx_fliqs.sites import SearchSpace
from onnx_fliqs.strategies import Strategy
from onnx_fliqs.target_files import parse_target
from support import STRATEGIES, random_feeds, run

NETWORK = """g (float[N,4,16] x) => (float[N,5] y) {
    [stem] a = Conv <kernel_shape = [3], pads = [1, 1]> (x, w1)
    b = Relu (a)
    [block_one] c = Conv <kernel_shape = [1]> (b, w2)
    [block_two] d = Conv <kernel_shape = [1]> (c, w3)
    e = Add (b, d)
    [inner] p = MatMul (e, q)
    f = Flatten (p)
    [head] y = Gemm (f, w4, b4) }"""
WEIGHTS = {
    "w1": (8, 4, 3),
    "w2": (8, 8, 1),
    "w3": (8, 8, 1),
    "q": (16, 16),
    "w4": (128, 5),
    "b4": (5,),
}
LAYERS = ("stem", "block_one", "block_two", "inner", "head")
QUICK = SearchConfig(
    space="int4,int6,int8", steps=8, batch_size=8, held_out_batch=8, draws=2, workers=1
)


def network() -> ir.Model:
    return support.model(NETWORK, weights=WEIGHTS)


def samples(count: int = 24) -> Dataset:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, 4, 16)).astype(np.float32)
    return Dataset({"x": x}, rng.integers(0, 5, count), input_specs(network()))


def space_of(
    *rules: Rule,
    space: str = "int4,int6,int8",
    target: str = "generic",
    model: ir.Model | None = None,
) -> SearchSpace:
    profile = parse_target(target)
    canonical = canonicalise(model or network())
    return find_layers(canonical, profile, parse_space(space), rules)


def choices(space: SearchSpace) -> dict[str, list[str]]:
    return {name: [p.name for p in found] for name, found in space.choices_of.items()}


# --- which layers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        ({"layers": ("stem",)}, ["stem"]),
        ({"layers": ("block_*", "head")}, ["block_one", "block_two", "head"]),
        ({"layers": ("*_[ot]*",)}, ["block_one", "block_two"]),
        ({"ops": ("Conv",)}, ["stem", "block_one", "block_two"]),
        ({"ops": ("Gemm", "MatMul")}, ["inner", "head"]),
        ({"positions": ("first",)}, ["stem"]),
        ({"positions": ("first", "last")}, ["stem", "head"]),
        ({"layers": ("*",), "ops": ("Conv",), "positions": ("first", "last")}, ["stem"]),
    ],
)
def test_a_rule_is_for_what_all_its_selectors_admit(
    selectors: dict[str, tuple[str, ...]], expected: list[str]
) -> None:
    space = space_of(Rule(fix="int8", **selectors))  # type: ignore[arg-type]
    found = choices(space)
    assert tuple(found) == LAYERS
    for name in LAYERS:
        assert found[name] == (["int8"] if name in expected else ["int4", "int6", "int8"])
        assert (space.layer[name].rule is not None) == (name in expected)


def test_a_name_is_no_pattern_to_itself() -> None:
    text = "g (float[N,8] x) => (float[N,8] y) { y = MatMul (x, w) }"
    model = support.model(text, weights={"w": (8, 8)})
    (node,) = list(model.graph)
    node.name = "block[0]/MatMul"
    space = space_of(Rule(layers=("block[0]/MatMul",), fix="int8"), model=model)
    assert choices(space) == {"block[0]/MatMul": ["int8"]}


POSITIONS = {
    "chain": (
        """g (float[N,8] x) => (float[N,8] y) {
        [a] p = MatMul (x, w) r = Relu (p) [b] q = MatMul (r, w) [c] y = MatMul (q, w) }""",
        "a",
        "c",
    ),
    "two inputs and two outputs, named against their order": (
        """g (float[N,8] x, float[N,8] z) => (float[N,8] y, float[N,8] u) {
        [a] p = MatMul (x, w) [b] q = MatMul (z, w) s = Add (p, q)
        [c] u = MatMul (s, w) [d] m = MatMul (s, w) [e] y = MatMul (m, w) }""",
        "ab",
        "ce",
    ),
    "a skip past the only layer": (
        "g (float[N,8] x) => (float[N,8] y) { [a] p = MatMul (x, w) y = Add (p, x) }",
        "a",
        "a",
    ),
    "shapes are no data": (
        """g (float[N,8] x) => (float[N,8] y) {
        [a] p = MatMul (x, w) s = Shape (p) t = Expand (x, s) [b] q = MatMul (t, w)
        y = Add (p, q) }""",
        "ab",
        "ab",
    ),
    "inside a branch": (
        """g (float[N,8] x, bool c) => (float[N,8] y) {
        [a] p = MatMul (x, w)
        q = If (c) <
            then_branch = t () => (float[N,8] m) { [b] m = MatMul (p, w) },
            else_branch = e () => (float[N,8] n) { n = Relu (p) }>
        [d] y = MatMul (q, w) }""",
        "a",
        "d",
    ),
}


@pytest.mark.parametrize("name", list(POSITIONS))
def test_positions_follow_the_data(name: str) -> None:
    text, first, last = POSITIONS[name]
    model = support.model(text, weights={"w": (8, 8)})
    names = {str(n.name) for n in model.graph.all_nodes() if n.op_type == "MatMul"}
    found = layer_positions(model.graph, names)
    assert {n for n, where in found.items() if Position.FIRST in where} == set(first)
    assert {n for n, where in found.items() if Position.LAST in where} == set(last)


# --- what they do --------------------------------------------------------------------------


def test_later_rules_change_what_earlier_ones_said() -> None:
    found = choices(
        space_of(
            Rule(layers=("*",), allow=("int8", "int4:int8")),
            Rule(ops=("Conv",), forbid=("int4:int8", "int2")),
            Rule(positions=("first",), fix="float32"),
        )
    )
    assert found["stem"] == ["float32"]
    assert found["block_one"] == found["block_two"] == ["int8"]
    assert found["inner"] == found["head"] == ["int4:int8", "int8"]


def test_a_format_is_forbidden_for_either_operand() -> None:
    pairs = ["int4", "int4:int8", "int8:int4", "int8", "int8:float32", "float32"]
    space = ",".join(pairs)
    for forbidden, left in (
        ("int4", ["int8", "int8:float32", "float32"]),
        ("int4:int8", ["int4", "int8:int4", "int8", "int8:float32", "float32"]),
        ("float32", pairs[:-1]),
    ):
        found = choices(space_of(Rule(layers=("head",), forbid=(forbidden,)), space=space))
        assert found["head"] == left
        assert set(found["stem"]) == set(pairs)


def test_precisions_outside_the_space_are_for_the_ruled_layers_alone() -> None:
    space = space_of(Rule(positions=("first",), fix="e4m3"), space="int4,int8")
    assert [p.name for p in space.precisions] == ["int4", "e4m3", "int8"]
    found = choices(space)
    assert found.pop("stem") == ["e4m3"]
    assert set(map(tuple, found.values())) == {("int4", "int8")}
    # What nobody can take does not widen the space.
    narrow = space_of(
        Rule(layers=("head",), allow=("int4", "int8")), space="int8", target="ort-cpu"
    )
    assert [p.name for p in narrow.precisions] == ["int8"]


def test_groups_take_one_precision() -> None:
    space = space_of(
        Rule(layers=("block_*",), share=True),
        Rule(layers=("block_two",), forbid=("int6",)),
    )
    assert ("block_one", "block_two") in space.decisions
    assert choices(space)["block_one"] == ["int4", "int8"]


def test_a_group_keeps_what_is_the_same_to_some_of_its_layers() -> None:
    text = """g (float[N,8,8] x) => (float[N,8,8] y) {
        [fc] a = MatMul (x, w) [inner] y = MatMul (a, a) }"""
    model = support.model(text, weights={"w": (8, 8)})
    options = {"space": "int4,int4:int8,int8", "model": model}
    assert choices(space_of(**options))["inner"] == ["int4", "int8"]  # type: ignore[arg-type]
    tied = space_of(Rule(layers=("*",), share=True), **options)  # type: ignore[arg-type]
    assert choices(tied)["inner"] == ["int4", "int4:int8", "int8"]


@pytest.fixture
def mine(tmp_path: Path) -> str:
    """A target with kernels for some operators, each in a precision of its own."""
    kernels = [
        {"ops": ["Gemm"], "precisions": ["int4"]},
        {"ops": ["Conv"], "precisions": ["int8"]},
    ]
    profile = {"schema": 1, "name": "mine", "default_space": "int4", "kernels": kernels}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(profile), encoding="utf-8")
    return str(path)


def test_what_has_no_kernel_stays_float_beside_a_rule_that_brings_one(mine: str) -> None:
    space = space_of(Rule(layers=("stem",), fix="int8"), space="int4", target=mine)
    assert choices(space) == {"stem": ["int8"], "head": ["int4"]}
    # In the order of the graph.
    assert [item.name for item in space.skipped] == ["block_one", "block_two", "inner"]


# --- what is refused -----------------------------------------------------------------------

SHARED = """g (float[N,8] x) => (float[N,8] y) {
    [one] a = MatMul (x, w) [two] y = MatMul (a, w) }"""


@pytest.mark.parametrize(
    ("rules", "target", "message"),
    [
        (
            [Rule(layers=("head", "nothing*"), fix="int8")],
            "generic",
            r"^rule 1 \(head, nothing\*: fix int8\): no layer is named 'nothing\*'$",
        ),
        (
            [Rule(ops=("Conv",), fix="int8"), Rule(ops=("LSTM",), forbid=("int4",))],
            "generic",
            r"^rule 2 \(LSTM: forbid int4\) is for no layer$",
        ),
        (
            [Rule(ops=("Gemm",), positions=("first",), fix="int8")],
            "generic",
            r"^rule 1 \(Gemm & first: fix int8\) is for no layer$",
        ),
        (
            [Rule(positions=("last",), forbid=("int4", "int6", "int8"))],
            "generic",
            r"leaves layer 'head' nothing that it may take$",
        ),
        (
            [Rule(positions=("last",), fix="int4")],
            "ort-cpu",
            r"leaves layer 'head' nothing that it may take: ort-cpu does not run int4 there",
        ),
        (
            [Rule(positions=("first",), fix="float32")],
            "qnn",
            r"qnn does not run float32 there",
        ),
        (
            [Rule(layers=("head",), share=True)],
            "generic",
            r"^rule 1 \(head: share\) is for one layer only, 'head'$",
        ),
        (
            [Rule(positions=("last",), fix="float32"), Rule(layers=("*",), share=True)],
            "generic",
            r"and rule 2 .* leave layers that share .* common \(stem: int8; head: float32\)$",
        ),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused_by_name(
    rules: Sequence[Rule], target: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        space_of(*rules, space="int8", target=target)


def test_a_rule_for_what_stays_float_is_refused_with_the_reason(mine: str) -> None:
    message = (
        r"^rule 1 \(inner: fix int8\) is for no layer: 'inner' stays float: target mine has no"
        " kernel for it in int4, int8$"
    )
    with pytest.raises(ConfigError, match=message):
        space_of(Rule(layers=("inner",), fix="int8"), space="int4", target=mine)


def test_a_rule_is_refused_also_where_every_tensor_is_quantized(tmp_path: Path) -> None:
    # The constants of what is no layer have sites there.
    kernels = [{"ops": ["Gemm"], "precisions": ["int8"]}]
    profile = {"schema": 1, "name": "mine", "base": "qnn", "kernels": kernels}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(profile | {"default_space": "int8"}), encoding="utf-8")
    with pytest.raises(ConfigError, match="is for no layer: 'stem' stays float"):
        space_of(Rule(layers=("stem",), fix="int8"), space="int8", target=str(path))


def test_layers_that_share_a_weight_follow_a_rule_together() -> None:
    model = support.model(SHARED, weights={"w": (8, 8)})
    space = space_of(Rule(layers=("one",), fix="int6"), model=model)
    assert choices(space) == {"one": ["int6"], "two": ["int6"]}
    with pytest.raises(
        ConfigError, match=r"^rule 1 .* leaves layers .*one: float32; two: int4"
    ):
        space_of(Rule(layers=("one",), fix="float32"), model=model)


def test_without_rules_the_target_is_to_blame() -> None:
    with pytest.raises(UnsupportedError, match="no quantizable layer"):
        space_of(target="ort-cpu", space="int4")


# --- files ---------------------------------------------------------------------------------


def test_a_file_holds_rules(tmp_path: Path) -> None:
    content = {
        "schema": 1,
        "rules": [
            {"positions": ["first", "last"], "fix": "int8"},
            {"layers": ["block_*"], "ops": ["Conv"], "allow": ["int4", "int4:int8"]},
            {"ops": ["Gemm"], "forbid": ["int2"]},
            {"layers": ["q", "k"], "share": True},
        ],
    }
    path = tmp_path / "rules.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert read_rules(path) == (
        Rule(positions=("first", "last"), fix="int8"),
        Rule(layers=("block_*",), ops=("Conv",), allow=("int4", "int4:int8")),
        Rule(ops=("Gemm",), forbid=("int2",)),
        Rule(layers=("q", "k"), share=True),
    )
    assert onnx_fliqs.Rule is Rule


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"positions": ["first"], "fix": "int99"}, "fix: unknown format 'int99'"),
        ({"positions": ["first"], "fix": "uint8"}, "fix: uint8 cannot be searched"),
        ({"layers": ["*"], "allow": ["int4", "x"]}, "allow: unknown format 'x'"),
        ({"layers": ["*"], "forbid": ["x"]}, "forbid: unknown format 'x'"),
        ({"fix": "int8"}, "needs one of layers, ops, positions"),
        ({"layers": ["*"]}, "needs exactly one of fix, allow, forbid, share"),
        ({"layers": ["*"], "fix": "int8", "share": True}, "needs exactly one of fix"),
        ({"layers": "*", "fix": "int8"}, 'layers needs a list of strings, got "\\*"'),
        ({"layers": ["*"], "fix": ["int8"]}, "fix needs a string, got"),
        ({"layers": ["*"], "allow": [8]}, "allow needs a list of strings"),
        ({"layers": ["*"], "share": False}, "share needs true, got false"),
        ({"layers": ["*"], "share": 1}, "share needs true, got 1"),
        ({"layers": ["*"], "precision": "int8"}, "precision is no field; known: layers, ops"),
        (
            {"positions": ["middle"], "fix": "int8"},
            "positions: 'middle' is none of first, last",
        ),
        ({"ops": ["Relu"], "fix": "int8"}, "ops: 'Relu' is none of Conv"),
        ("int8", "is not an object"),
    ],
)
def test_a_wrong_rule_is_named(rules: Any, message: str) -> None:
    good = {"layers": ["*"], "fix": "int8"}
    text = json.dumps({"schema": 1, "rules": [good, rules]})
    with pytest.raises(ConfigError, match=rf"^my\.json: rules\[1\]:? {message}"):
        rules_from_json(text, "my.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is not a list of rules of schema 1"),
        ('{"schema": 2, "rules": []}', "is not a list of rules of schema 1"),
        ('{"schema": 1}', "needs a list `rules` and nothing else"),
        ('{"schema": 1, "rules": [], "target": "x"}', "needs a list `rules` and nothing else"),
        ("{", "is not JSON"),
    ],
)
def test_a_file_of_something_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rules_from_json(text)


def test_the_documentation_says_what_is_read() -> None:
    text = (Path(__file__).parents[1] / "docs" / "rules.md").read_text(encoding="utf-8")
    examples = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert [len(rules_from_json(example)) for example in examples] == [1, 4]
    assert ", ".join(LAYER_OPERATORS) in text
    assert all(f"| `{field.name}` |" in text for field in dataclasses.fields(Rule))


# --- search, inspect, emit -----------------------------------------------------------------

ENDS = Rule(positions=("first", "last"), fix="int8")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_follows_rules_within_its_budget(strategy: Strategy) -> None:
    rules = (
        Rule(positions=("first",), fix="float32"),
        Rule(positions=("last",), fix="int8"),
        Rule(layers=("block_*",), share=True),
        Rule(layers=("inner",), forbid=("int8",)),
    )
    budget = Budget(BudgetKind.SIZE, 1.6)
    config = replace(QUICK, rules=rules, budget=budget, strategy=strategy, separate=False)
    result = search(network(), samples(), config)
    chosen = result.assignment.layers
    assert chosen["stem"] == "float32"
    assert chosen["head"] == "int8"
    assert chosen["block_one"] == chosen["block_two"]
    assert chosen["inner"] in ("int4", "int6")
    # What is fixed counts: 96 weights of 32 bits, 640 of 8.
    rest = sum(
        int(chosen[name][3:]) * n
        for name, n in (("block_one", 64), ("block_two", 64), ("inner", 256))
    )
    assert result.cost.weight_bytes == (96 * 32 + 640 * 8 + rest) / 8
    rows = {layer["name"]: layer for layer in result.to_dict()["layers"]}
    assert rows["stem"]["rule"] == "rule 1 (first: fix float32)"
    assert rows["block_one"]["rule"] is None


def test_fixed_layers_can_make_a_budget_infeasible() -> None:
    config = replace(QUICK, budget=Budget(BudgetKind.BITS, 4.5), rules=(ENDS,))
    search(network(), samples(), replace(config, rules=()))
    with pytest.raises(FliqsError, match=r"--bits 4\.5 cannot be met: .* reaches --bits"):
        search(network(), samples(), config)


def test_a_search_does_not_resume_with_other_rules(tmp_path: Path) -> None:
    config = replace(QUICK, rules=(ENDS,), budget=Budget(BudgetKind.BITS, 7))
    search(network(), samples(), config, checkpoint=tmp_path)
    other = replace(config, rules=(replace(ENDS, fix="int6"),))
    with pytest.raises(FliqsError, match="of a search with another settings"):
        search(network(), samples(), other, checkpoint=tmp_path, resume=True)
    again = search(network(), samples(), config, checkpoint=tmp_path, resume=True)
    assert again.assignment.layers["head"] == "int8"


def test_a_network_that_is_fixed_throughout_is_trained_and_emitted() -> None:
    rules = (Rule(layers=("*",), fix="int6"), Rule(positions=("last",), fix="e4m3"))
    result = search(network(), samples(), replace(QUICK, rules=rules))
    assert dict(result.assignment.layers) == dict.fromkeys(LAYERS, "int6") | {"head": "e4m3"}


def test_what_was_searched_by_rules_can_be_emitted_again() -> None:
    text = """g (float[N,8,8] x) => (float[N,8,8] y) {
        [fc] a = MatMul (x, w) [inner] b = MatMul (a, a) [head] y = MatMul (b, v) }"""
    model = support.model(text, weights={"w": (8, 8), "v": (8, 8)})
    x = np.random.default_rng(0).standard_normal((24, 8, 8)).astype(np.float32)
    data = Dataset({"x": x}, None, input_specs(model))
    # To a product of two activations the two are the same; it may be told to take either.
    config = replace(
        QUICK, space="int4:int8,int8", rules=(Rule(layers=("inner",), fix="int8"),)
    )
    result = search(model, data, config)
    assert result.assignment.layers["inner"] == "int8"
    everywhere = {"fc": "int4:int8", "inner": "int8", "head": "int4:int8"}
    emitted = api.emit(model, Assignment(everywhere), data)
    assert dict(emitted.assignment.layers) == everywhere
    same = api.emit(model, Assignment(everywhere | {"inner": "int4:int8"}), data)
    feeds = random_feeds(model)
    for one, other in zip(run(emitted.model, feeds), run(same.model, feeds), strict=True):
        np.testing.assert_array_equal(one, other)
    for assignment in (emitted.assignment, same.assignment):
        given = replace(
            QUICK, space=None, budget=None, strategy=Strategy.FIXED, assignment=assignment
        )
        trained = search(model, data, given)
        assert trained.assignment == assignment


def test_inspect_lists_what_rules_leave() -> None:
    rules = (ENDS, Rule(layers=("block_*",), share=True))
    found = api.inspect(network(), space="int4,int6", separate=False, rules=rules)
    content = json.loads(json.dumps(found.to_dict()))
    rows = {layer["name"]: layer for layer in content["layers"]}
    assert rows["stem"]["precisions"] == rows["head"]["precisions"] == ["int8"]
    assert rows["stem"]["rule"] == "rule 1 (first, last: fix int8)"
    assert rows["inner"]["precisions"] == ["int4", "int6"]
    assert content["formats"] == ["int4", "int6"]
    assert content["shared"] == [["block_one", "block_two"]]


def test_the_command_line_reads_rules(tmp_path: Path) -> None:
    model, rules, data = (tmp_path / name for name in ("m.onnx", "rules.json", "data.npz"))
    save_model(network(), model)
    np.savez(data, x=samples().stored_inputs["x"])
    both = '{"schema": 1, "rules": [{"positions": ["first", "last"], "fix": "int8"}]}'
    rules.write_text(both, encoding="utf-8")

    def call(*arguments: object) -> Any:
        return CliRunner().invoke(main, [str(a) for a in arguments])

    listed = call("inspect", model, "--space", "int-s", "--rules", rules)
    assert listed.exit_code == 0, listed.output
    assert "by rule: stem, head (int8)" in listed.stdout
    assert "searches int4, int8 (weights and activations apart)" in listed.stdout
    fast = ("--space", "int4", "--steps", 4, "--batch-size", 8, "--threads", 1)
    found = call("search", model, "--data", data, "--rules", rules, *fast)
    assert found.exit_code == 0, found.output
    assert found.stdout.count("int8 (by rule)") == 2
    rules.write_text(both.replace("first", "second"), encoding="utf-8")
    refused = call("search", model, "--data", data, "--rules", rules, *fast)
    assert refused.exit_code == 2
    assert "rules.json: rules[0]: positions: 'second' is none of" in refused.stderr
    missing = call("inspect", model, "--rules", tmp_path / "none.json")
    assert missing.exit_code == 2
    assert missing.stderr.splitlines()[-1].startswith("Error: cannot read")
