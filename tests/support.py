"""What the tests share: models as text, random feeds, and the contract of a pass."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
SHARED = Path(__file__).resolve().parents[2] / "shared"

Feeds = dict[str, npt.NDArray[Any]]


def model(
    text: str, *, header: str = HEADER, weights: Mapping[str, Sequence[int]] | None = None
) -> ir.Model:
    """Read a model in ONNX's textual format.

    Args:
        text: The graph, and after it local functions; with a header where ``header`` is empty.
        header: Stands before the text.
        weights: Name to shape of float32 initializers to add, with random values that depend
            on the name and the shape only. Those called ``var...`` are positive.
    """
    proto = onnx.parser.parse_model(f"{header}\n{text}" if header else text)
    for name, shape in (weights or {}).items():
        rng = np.random.default_rng([*name.encode(), *shape])
        array = rng.standard_normal(shape).astype(np.float32)
        if name.startswith("var"):
            array = np.abs(array) + np.float32(0.1)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def random_feeds(model: ir.Model, seed: int = 0, batch: int = 2) -> Feeds:
    """Seeded random input for every graph input.

    A dimension without a number is ``batch``; booleans are all true where ``seed`` is odd and
    all false where it is even, so that two seeds see both branches.
    """
    rng = np.random.default_rng(seed)
    feeds: Feeds = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        assert value.name is not None
        assert value.dtype is not None
        shape = [d if isinstance(d, int) else batch for d in value.shape or ()]
        dtype = value.dtype.numpy()
        if dtype.kind == "b":
            feeds[value.name] = np.full(shape, seed % 2 == 1)
        elif dtype.kind == "f":
            feeds[value.name] = rng.standard_normal(shape).astype(dtype)
        else:
            feeds[value.name] = rng.integers(0, 2, shape).astype(dtype)
    return feeds


def session(data: bytes | str) -> ort.InferenceSession:
    """An ONNX Runtime session that runs the graph as it stands, on one thread."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(model: ir.Model, feeds: Feeds) -> list[npt.NDArray[Any]]:
    """Run in ONNX Runtime, unoptimised."""
    return list(session(ir.to_proto(model).SerializeToString()).run(None, feeds))


def evaluate(models: Sequence[ir.Model], feeds: Feeds) -> list[list[npt.NDArray[Any]]]:
    """Run all in ONNX's reference evaluator or, where that lacks something, in ONNX Runtime.

    The evaluator gives Softmax of opset 11 the meaning of opset 13: ONNX Runtime runs those.
    """
    if all(model.opset_imports.get("", 0) >= 13 for model in models):
        # What the evaluator lacks shows as many kinds of errors, in its constructor or in run.
        with contextlib.suppress(Exception):
            return [_reference(each, feeds) for each in models]
    return [run(model, feeds) for model in models]


def _reference(model: ir.Model, feeds: Feeds) -> list[npt.NDArray[Any]]:
    outputs = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)
    return [np.asarray(output) for output in outputs]


def check_pass(
    pass_: ir.passes.PassBase,
    model: ir.Model,
    feeds: Feeds | None = None,
    *,
    rtol: float = 0,
    atol: float = 0,
    signature: bool = True,
) -> ir.Model:
    """Check that a pass keeps its promises on a model, which is left as it is.

    (1) ``modified`` says whether the serialized bytes differ; (2) the result is valid; (3) the
    graph's inputs and outputs are the same (unless ``signature`` is false); (4) a second run
    changes nothing; (5) the outputs agree within the tolerances.

    Returns:
        The result of the pass.
    """
    before = ir.to_proto(model)
    original = ir.from_proto(before)
    # Read back once, so that both sides have been written by the same serializer.
    before = ir.to_proto(original)
    result = pass_(ir.from_proto(before))
    after = ir.to_proto(result.model)

    name = type(pass_).__name__
    assert result.modified == (serialized(before) != serialized(after)), (
        f"{name}.modified lies"
    )
    onnx.checker.check_model(after, full_check=True)
    if signature:
        assert list(after.graph.input) == list(before.graph.input)
        assert list(after.graph.output) == list(before.graph.output)

    second = pass_(ir.from_proto(after))
    assert not second.modified, f"{name} reports a change in its second run"
    assert serialized(ir.to_proto(second.model)) == serialized(after), (
        f"{name} is not idempotent"
    )

    for each in (
        [random_feeds(original, seed) for seed in (0, 1)] if feeds is None else [feeds]
    ):
        expected, actual = evaluate((original, ir.from_proto(after)), each)
        for want, got in zip(expected, actual, strict=True):
            assert want.shape == got.shape
            np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)
    return ir.from_proto(after)


def serialized(proto: onnx.ModelProto) -> bytes:
    """The bytes, independent of the order of maps."""
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def ops(model: ir.Model) -> list[str]:
    """The operators of all nodes, subgraphs included, in order."""
    return [node.op_type for node in model.graph.all_nodes()]


def require_shared(*parts: str) -> Path:
    """A file or folder of ``../shared``; skips the test where that is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(('../shared', *parts))} is not here")
    return path
