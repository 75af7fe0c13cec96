"""Products with masks are merged, and truth values become floats by way of bytes."""

import numpy as np
import onnx_ir as ir
import pytest

from onnx_fliqs.passes.merge_masks import MergeMasksPass
from pass_models import CASES
from support import check_pass, model, ops, run
from test_passes_contract import with_shapes


def merged(text: str) -> ir.Model:
    built = model(f"g (float[N,4] x, float[4] t) => (float[N,4] y) {{ {text} }}")
    return check_pass(MergeMasksPass(), with_shapes(built))


def test_products_with_masks_of_one_shape_become_one() -> None:
    after = check_pass(MergeMasksPass(), with_shapes(CASES["masks"].build()))
    # The mask that an Add reads as well becomes a number for it alone. ONNX Runtime would also
    # run what nothing reads.
    expected = ["Mul", "Add", *["Less"] * 2, "Greater", *["And"] * 2]
    found = [op for op in ops(after) if op not in ("Constant", "Cast", "DequantizeLinear")]
    assert sorted(found) == sorted(expected)
    assert ops(after).count("DequantizeLinear") == 2
    assert all(v.uses() or v.is_graph_output() for node in after.graph for v in node.outputs)


def test_masks_of_other_shapes_or_with_other_readers_stay() -> None:
    case = CASES["masks_that_two_see_or_that_are_broadcast"].build()
    after = check_pass(MergeMasksPass(), with_shapes(case))
    assert ops(after).count("Mul") == 4
    assert "And" not in ops(after)


@pytest.mark.parametrize(
    "text",
    [
        # Not a truth value; not a float; no mask at all.
        "i = Cast <to = 6> (x) m = Cast <to = 1> (i) a = Mul (x, m) y = Mul (a, m)",
        "p = Cast <to = 9> (x) d = Cast <to = 11> (p) y = Cast <to = 1> (d)",
        "a = Mul (x, t) y = Mul (a, t)",
    ],
)
def test_what_is_no_mask_stays(text: str) -> None:
    after = merged(text)
    assert ops(after) == [word for word in text.split() if word in ("Cast", "Mul")]


def test_a_mask_of_what_is_not_finite_is_the_same_product() -> None:
    text = "p = Cast <to = 9> (x) m = Cast <to = 1> (p) a = Mul (x, m) y = Mul (a, m)"
    x = np.array([[np.inf, -np.inf, np.nan, -0.0]], np.float32)
    feeds = {"x": x, "t": x[0]}
    built = model(f"g (float[N,4] x, float[4] t) => (float[N,4] y) {{ {text} }}")
    np.testing.assert_array_equal(run(merged(text), feeds)[0], run(built, feeds)[0])


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        # As behind a Relu, as behind a Clip, and from three sides.
        ("p = Greater (x, zero) q = Greater (x, s)", "Max Greater"),
        ("p = Less (x, one) q = LessOrEqual (x, s)", "Min LessOrEqual"),
        ("p = GreaterOrEqual (x, s) q = Greater (x, zero)", "Max GreaterOrEqual"),
        (
            "c = Less (x, one) d = Greater (x, zero) p = And (c, d) q = LessOrEqual (x, s)",
            "Greater Min LessOrEqual And",
        ),
        # The neighbour of a number that is computed is not known; several tensors.
        ("p = Less (x, s) q = LessOrEqual (x, one)", "Less LessOrEqual And"),
        ("p = Less (x, one) q = Less (t, s)", "Less Less And"),
        ("p = Less (x, one) q = Less (x, t)", "Less Less And"),
        ("p = Less (x, one) q = Greater (x, s)", "Less Greater And"),
    ],
)
def test_a_tensor_is_compared_once_from_each_side(masks: str, expected: str) -> None:
    built = with_shapes(
        model(
            f"""g (float[N,4] x, float[N,4] t, float s) => (float[N,4] y) {{ {masks}
                m = Cast <to = 1> (p) a = Mul (t, m)
                n = Cast <to = 1> (q) y = Mul (a, n) }}""",
            constants={"zero": 0.0, "one": 1.0},
        )
    )
    numbers = [-1.0, -0.0, 0.0, 1e-45, 0.5, 1.0, np.nextafter(1, 2), np.inf]
    x = np.array(numbers, np.float32).reshape(2, 4)
    for bound in (-1.0, 0.0, 0.5, 1.0, 2.0):
        feeds = {"x": x, "t": x[::-1] + 3, "s": np.array(bound, np.float32)}
        after = check_pass(MergeMasksPass(), built, feeds)
    left = ("Constant", "Cast", "DequantizeLinear", "Mul")
    assert " ".join(op for op in ops(after) if op not in left) == expected


def test_a_comparison_that_something_else_reads_stays() -> None:
    built = model(
        """g (float[N,4] x, float s) => (float[N,4] y, bool[N,4] p) {
            p = Less (x, s)
            q = Less (x, one)
            m = And (p, q)
            n = Cast <to = 1> (m)
            y = Mul (x, n) }""",
        constants={"one": 1.0},
    )
    assert ops(check_pass(MergeMasksPass(), with_shapes(built))).count("Less") == 2
