"""Shapes that a file notes and the graph does not compute."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

import support
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.passes.infer_shapes_afresh import InferShapesAfreshPass, reconciled
from onnx_fliqs.search_loop import search
from support import check_pass

Sizes = Sequence[int | str | None]

TEXT = """g (float[N,3,8,8] x) => (float[OUT] y)
    <float[1,4,6,6] c, float[1,144] f> {
    [c] c = Conv (x, w)
    [f] f = Flatten (c)
    [m] y = MatMul (f, v) }"""


def network(output: str = "N,5") -> ir.Model:
    """The batch was made free in the input alone."""
    text = TEXT.replace("OUT", output)
    return support.model(text, weights={"w": (4, 3, 3, 3), "v": (144, 5)})


def sizes(shape: ir.Shape | None) -> list[int | str | None] | None:
    if shape is None:
        return None
    return [each if isinstance(each, int) else each.value for each in shape]


def values(model: ir.Model) -> dict[str, ir.Value]:
    return {str(v.name): v for node in model.graph for v in node.outputs}


def test_what_follows_from_the_inputs_wins() -> None:
    found = values(check_pass(InferShapesAfreshPass(), network()))
    assert sizes(found["c"].shape) == ["N", 4, 6, 6]
    assert sizes(found["f"].shape) == ["N", 144]


def test_notes_that_are_right_stay() -> None:
    model = support.model(
        "g (float[N,4] x) => (float[M,3] y) <float[K,3] a> { a = MatMul (x, w) y = Relu (a) }",
        weights={"w": (4, 3)},
    )
    assert not InferShapesAfreshPass()(model).modified
    assert sizes(values(model)["a"].shape) == ["K", 3]


def test_what_inference_cannot_know_stays_as_noted() -> None:
    model = support.model(
        "g (float[N,4] x, int64[2] s) => (float[N,K] y) <float[N,6] a, float[N,7] b>"
        " { a = Reshape (x, s) b = my.domain.Widen (a) y = Relu (b) }",
        header='<ir_version: 10, opset_import: ["" : 21, "my.domain" : 1]>',
    )
    result = InferShapesAfreshPass()(model).model
    found = values(result)
    assert sizes(found["a"].shape) == ["N", 6]
    assert sizes(found["b"].shape) == ["N", 7]


@pytest.mark.parametrize(
    ("inferred", "noted", "expected"),
    [
        (None, [1, 2], [1, 2]),
        ([1, 2], None, [1, 2]),
        ([1, 2], [1, 2, 3], [1, 2]),
        (["N", 2], [1, 2], ["N", 2]),
        (["N", 2], ["M", 2], ["M", 2]),
        ([4, 2], ["M", 3], [4, 2]),
        ([None, 2], [7, 2], [7, 2]),
        (["unk__3", 2], [7, 2], [7, 2]),
        ([], [1], []),
    ],
)
def test_sizes_are_reconciled_one_by_one(
    inferred: Sizes | None, noted: Sizes | None, expected: Sizes
) -> None:
    shapes = (None if each is None else ir.Shape(each) for each in (inferred, noted))
    assert sizes(reconciled(*shapes)) == expected


@pytest.mark.parametrize("output", ["N,5", "1,5", "1,1,5", ""])
def test_a_declared_output_that_is_not_computed_is_corrected(output: str) -> None:
    model = canonicalise(network(output))
    assert sizes(model.graph.outputs[0].shape) == ["N", 5]


@pytest.mark.parametrize("target", ["generic", "ort-cpu"])
def test_a_model_whose_batch_was_freed_by_hand_is_searched(target: str) -> None:
    model = network("1,5")
    x = np.random.default_rng(0).standard_normal((60, 3, 8, 8)).astype(np.float32)
    data = Dataset({"x": x}, None, input_specs(model))
    config = SearchConfig(target=target, steps=2, batch_size=8, workers=1)
    result = search(model, data, config)
    assert sizes(result.model.graph.outputs[0].shape) == ["N", 5]
    (found,) = support.run(result.model, {"x": x[:7]})
    assert found.shape == (7, 5)
