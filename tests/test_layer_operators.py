"""Multiply-accumulates against hand counts (those of plain layers are in ``test_cost``)."""

import onnx_ir as ir
import pytest

from layer_forms import FORMS
from onnx_fliqs.calibrate import Observer
from onnx_fliqs.layer_operators import LAYER_OPERATORS, macs
from onnx_fliqs.passes.canonicalise import canonicalise
from support import random_feeds


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        # Outputs times multiplications for each.
        ("conv_1d", {"conv": (4 * 4) * (3 * 3)}),
        ("conv_with_computed_weight", {"maker": 3 * 18 * 18, "conv": (3 * 9) * (2 * 9)}),
        ("conv_of_a_constant_image", {"conv": (3 * 16) * (2 * 4)}),
        ("convtranspose_1d_grouped", {"up": (4 * 5) * (3 * 3)}),
        ("gemms_of_every_kind", {"both": 3 * 5 * 4, "scaled": 3 * 2 * 5, "left": 2 * 4 * 3}),
        ("stacks_of_matrices", {"right": (5 * 2) * 3 * 6 * 4, "left": 2 * 7 * 4 * 3}),
        ("scalar_product", {"dot": 4}),
        # Steps times directions times gates times hidden times inputs and states.
        ("lstm", {"cell": 3 * 1 * 4 * 2 * (4 + 2)}),
        ("lstm_both_ways", {"cell": 3 * 2 * 2 * 4 * 2 * (4 + 2)}),
        ("last_state_of_a_gru", {"cell": 3 * 1 * 3 * 2 * (4 + 2), "fc": 2 * 3}),
        ("two_rnns_of_one_weight", {"first": 3 * 2 * (2 + 2), "second": 3 * 2 * (2 + 2)}),
        # All labels.
        ("einsums", {"diagonal": 3 * 4 * 5, "three": (3 * 3) * 4 * 4 * 2}),
        ("embedding", {"words": 0, "fc": 3 * 16 * 4, "word": 0}),
    ],
)
def test_macs_equal_the_hand_count(form: str, expected: dict[str, int]) -> None:
    model = canonicalise(FORMS[form].build())
    nodes = [node for node in model.graph if node.op_type in LAYER_OPERATORS]
    values = {v.name: v for n in nodes for v in (*n.inputs, *n.outputs) if v and v.name}
    seen = Observer(model, [n for n, v in values.items() if n and not v.is_initializer()]).run(
        random_feeds(model, batch=1)
    )

    def shape_of(value: ir.Value) -> tuple[int, ...] | None:
        if value.name in seen:
            return seen[value.name].shape
        static = value.shape is not None and value.shape.is_static()
        return tuple(value.shape.numpy()) if static else None  # type: ignore[union-attr]

    assert {node.name: macs(node, shape_of) for node in nodes} == expected


def test_macs_are_unknown_where_a_shape_is() -> None:
    for form in ("conv_1d", "lstm", "einsums", "convtranspose_1d_grouped", "scalar_product"):
        for node in FORMS[form].build().graph:
            assert macs(node, lambda _: None) is None
