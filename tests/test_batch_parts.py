"""Batches are cut evenly, into parts that do not take more memory than they must."""

import math

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_fliqs.batch_parts import part_sizes, values_per_sample

_MANY = 2**25
"""Values of a sample so large that it makes a part of its own."""


@given(st.integers(1, 500), st.integers(1, 16), st.integers(0, 2 * _MANY))
def test_parts_make_up_the_batch_evenly(batch: int, workers: int, values: int) -> None:
    sizes = part_sizes(batch, workers, values)
    assert sum(sizes) == batch
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= 32
    assert max(sizes) == 1 or max(sizes) * values <= _MANY
    assert len(sizes) % workers == 0 or len(sizes) == batch


@pytest.mark.parametrize(
    ("values", "largest"), [(0, 32), (_MANY // 32, 32), (_MANY // 8, 8), (_MANY, 1)]
)
def test_large_samples_are_run_in_small_parts(values: int, largest: int) -> None:
    assert max(part_sizes(64, 2, values)) == largest


def test_values_of_a_sample_are_those_of_all_nodes_with_a_known_shape() -> None:
    x = ir.Value(name="x", shape=ir.Shape(["N", 3, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    first = ir.node("Relu", [x])
    second = ir.node("Transpose", first.outputs, {"perm": [0, 2, 1]})
    unknown = ir.node("Relu", second.outputs)
    first.outputs[0].shape = ir.Shape(["N", 3, 4])
    second.outputs[0].shape = ir.Shape(["N", 4, 3])
    unknown.outputs[0].shape = ir.Shape(["N", "M"])
    graph = ir.Graph(
        [x], unknown.outputs, nodes=[first, second, unknown], opset_imports={"": 20}
    )
    assert values_per_sample(ir.Model(graph, ir_version=10)) == 2 * math.prod((3, 4))
