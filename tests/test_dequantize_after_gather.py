"""Codes are gathered where Gather can carry them, and the numbers stay the same."""

import numpy as np
import onnx_ir as ir
import pytest

from layer_forms import FORMS
from onnx_fliqs.passes.dequantize_after_gather import DequantizeAfterGatherPass
from onnx_fliqs.runtime import OptimizationLevel, make_session
from support import PRECISIONS, calibrated, check_pass, model, ops, random_feeds, run

PASS = DequantizeAfterGatherPass()
CODES = """<int8[3,2] codes = {1, -2, 3, 4, -5, 6}, int8 zero = {1}, int8[2] zeros = {0, 1},
    float[2] steps = {0.5, 2}, float16[2,2] half = {1, 2, 3, 4}>"""


def check(text: str, outputs: str = "float[N,2] y") -> ir.Model:
    built = model(
        f"g (int64[N] i) => ({outputs}) {CODES} {{ {text} }}", constants={"step": 0.5}
    )
    return check_pass(PASS, built)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "t = DequantizeLinear (codes, step, zero) y = Gather (t, i)",
            ["Gather", "DequantizeLinear"],
        ),
        (
            "t = DequantizeLinear (codes, step) y = Gather (t, i)",
            ["Gather", "DequantizeLinear"],
        ),
        ("t = Cast <to = 1> (half) y = Gather (t, i)", ["Gather", "Cast"]),
        (
            "t = Cast <to = 1> (half) u = Mul (t, step) y = Gather (u, i)",
            ["Gather", "Cast", "Mul"],
        ),
        (
            "t = DequantizeLinear (codes, step) a = Gather (t, i) y = Relu (a)",
            ["Gather", "DequantizeLinear", "Relu"],
        ),
    ],
)
def test_a_gather_reads_codes(text: str, expected: list[str]) -> None:
    assert ops(check(text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        # A scale for each row or column.
        "t = DequantizeLinear <axis = 1> (codes, steps, zeros) y = Gather (t, i)",
        "t = Cast <to = 1> (half) u = Mul (t, steps) y = Gather (u, i)",
        # Not of one constant.
        "t = Mul (steps, step) u = Add (t, steps) z = Expand (u, two) y = Gather (z, i)",
        "t = DequantizeLinear (codes, step) y = GatherElements <axis = 0> (t, k)",
    ],
)
def test_other_tables_are_left_alone(text: str) -> None:
    built = model(
        f"""g (int64[N] i) => (float[A,B] y) {CODES} {{
            k = Unsqueeze (i, one)
            {text} }}""",
        constants={"step": 0.5, "two": [3, 2], "one": [1]},
    )
    before = ops(built)
    assert ops(check_pass(PASS, built)) == before


@pytest.mark.parametrize("dtype", ["int4", "float8e4m3fn"])
def test_what_gather_cannot_carry_is_dequantized_first(dtype: str) -> None:
    built = model(
        f"""g (int64[N] i) => (float[N,2] y) <{dtype}[3,2] codes = {{1, 2, 3, 4, 5, 6}}> {{
            t = DequantizeLinear (codes, step)
            y = Gather (t, i) }}""",
        constants={"step": 0.5},
    )
    assert not PASS(built).modified


def test_other_readers_keep_the_table() -> None:
    after = check(
        "t = DequantizeLinear (codes, step) y = Gather (t, i) z = Neg (t)",
        "float[N,2] y, float[3,2] z",
    )
    assert ops(after) == ["DequantizeLinear", "Gather", "DequantizeLinear", "Neg"]


def test_a_gather_in_a_body_reads_codes_from_outside() -> None:
    built = model(
        f"""g (int64[N] i, bool c) => (float[N,2] y) {CODES} {{
            t = DequantizeLinear (codes, step)
            y = If (c) <
                then_branch = u () => (float[N,2] p) {{ p = Gather (t, i) }},
                else_branch = v () => (float[N,2] q) {{
                    r = Gather (t, i)
                    q = Neg (r) }}> }}""",
        constants={"step": 0.5},
    )
    after = check_pass(PASS, built)
    assert ops(after) == [
        "If",
        "Gather",
        "DequantizeLinear",
        "Gather",
        "DequantizeLinear",
        "Neg",
    ]


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        *(("int8", "INT8"), ("int6", "INT8"), ("int16", "INT16"), ("bf16", "BFLOAT16")),
        *(("e2m3", "INT8"), ("e3m4", "BFLOAT16"), ("int4", None), ("e4m3", None)),
    ],
)
def test_an_emitted_embedding_dequantizes_the_rows_that_it_reads(
    name: str, stored: str | None
) -> None:
    case = calibrated(FORMS["embedding"].build(), precisions=[PRECISIONS[name]])
    graph = case.emitted(case.space.uniform(PRECISIONS[name]))
    gathers = [node for node in graph.graph if node.op_type == "Gather"]
    assert len(gathers) == 2
    for node in gathers:
        assert node.inputs[0] is not None
        dtype = node.inputs[0].dtype if node.inputs[0].is_initializer() else None
        assert (None if dtype is None else dtype.name) == stored
    feeds = random_feeds(case.canonical)
    # ONNX Runtime 1.19 cannot load float8 beyond the basic level.
    levels = [OptimizationLevel.BASIC, *([OptimizationLevel.DEFAULT] if stored else [])]
    plain = run(graph, feeds)
    for level in levels:
        found = make_session(graph, level=level).run(None, feeds)
        for want, got in zip(plain, found, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-2 * np.abs(want).max())
