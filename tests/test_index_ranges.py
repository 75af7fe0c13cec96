"""Made-up integers are values that the model can take."""

import pytest

import support
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.index_ranges import index_ranges
from onnx_fliqs.search_loop import search

TABLE = "float[7,3] t = {" + ",".join("0.5" for _ in range(21)) + "}"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Gather (t, i)", (0, 6)),
        ("y = Gather <axis = -1> (t, i)", (0, 2)),
        ("j = Cast <to = 7> (i) k = Unsqueeze (j, one) y = Gather (t, k)", (0, 6)),
        (
            "a = Gather (t, i) b = Gather <axis = 1> (t, i) y = Concat <axis = 0> (a, b)",
            (0, 2),
        ),
        ("y = OneHot (i, depth, values)", (0, 8)),
        ("y = Equal (i, switch)", (16000, 16000)),
        ("y = Cast <to = 1> (i)", (1, 1)),
    ],
)
def test_ranges_are_read_from_the_graph(body: str, expected: tuple[int, int]) -> None:
    model = support.model(
        f"g (int32[N,4] i) => (float[?,?] y) <{TABLE}, int64[1] one = {{1}},"
        " int64 depth = {9}, float[2] values = {0, 1}, int32 switch = {16000}>"
        f" {{ {body} }}"
    )
    assert index_ranges(model) == {"i": expected}


def test_pixels_and_floats_are_left_alone() -> None:
    model = support.model(
        "g (uint8[N,4] p, float[N,4] x) => (float[N,4] y)"
        " { f = Cast <to = 1> (p) y = Add (f, x) }"
    )
    assert index_ranges(model) == {}


def test_a_model_of_text_is_searched_without_data() -> None:
    model = support.model(
        """g (int64[N,5] ids, int64[N,5] mask) => (float[N,5,3] y) {
            e = Gather (table, ids)
            m = Cast <to = 1> (mask)
            u = Unsqueeze (m, last)
            p = Mul (e, u)
            y = MatMul (p, w) }""",
        weights={"table": (300, 4), "w": (4, 3)},
        constants={"last": [-1]},
    )
    result = search(model, None, SearchConfig(steps=2, batch_size=4, workers=1))
    assert [layer.op for layer in result.layers] == ["Gather", "MatMul"]
    assert any("no data was given" in warning for warning in result.warnings)
