"""Where ONNX Runtime multiplies faster with quantized weights beside float activations.

Times graphs that compute the same MatMul or Gemm, in turn, on one thread (the processor's
time), and prints one JSON line per size, then a table; needs only onnx and onnxruntime, and so
runs in any environment::

    RUNTIME/bin/python benchmarks/weight_only.py

* ``int4 g32``: int4 weights in groups of 32 along the reduced axis, a DequantizeLinear of
  opset 21 with ``axis = 0, block_size = 32`` in front of the MatMul; 128 and int8 likewise;
* ``int8 channel``: one scale per output channel, ``axis = 1``;
* ``/ 1``: the same with ``session.qdq_matmulnbits_accuracy_level = 1``; at the default, 4,
  ONNX Runtime quantizes the activations to int8 as it goes;
* ``QDQ``: int8 weights per channel and uint8 activations, as the target ``ort-cpu`` emits.
"""

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from common import provenance
from onnx import helper, numpy_helper

Array = npt.NDArray[Any]

_OPSET: Final = 21
_SHORTEST: Final = 2e-3
_FORMS: Final = {
    "float": (None, 0, None),
    "int4 g32": (4, 32, None),
    "int4 g32 / 1": (4, 32, 1),
    "int4 g128": (4, 128, None),
    "int4 g128 / 1": (4, 128, 1),
    "int8 g32": (8, 32, None),
    "int8 g32 / 1": (8, 32, 1),
    "int8 channel": (8, 0, None),
    "int8 channel / 1": (8, 0, 1),
    "QDQ": (None, 0, None),
}
"""Form → bits of the weights, group (0: a channel), accuracy level (None: the default)."""


def _graph(form: str, size: int, gemm: bool) -> bytes:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((size, size)).astype(np.float32)
    bits, group, _ = _FORMS[form]
    nodes, initializers = [], {}
    left, right = "x", "w"
    if bits is None:
        initializers["w"] = numpy_helper.from_array(weight, "w")
    if bits is not None or form == "QDQ":
        attributes = {"axis": 0, "block_size": group} if group else {"axis": 1}
        rows = weight.reshape(-1, group, size) if group else weight[None]
        end = 7 if bits == 4 else 127
        scale = np.abs(rows).max(axis=1) / end
        codes = np.rint(rows / scale[:, None]).reshape(size, size).astype(np.int8)
        dtype = onnx.TensorProto.INT4 if bits == 4 else onnx.TensorProto.INT8
        initializers["w"] = helper.make_tensor("w", dtype, codes.shape, codes.reshape(-1))
        initializers["ws"] = numpy_helper.from_array(scale if group else scale[0], "ws")
        operands, right = ["w", "ws"], "wf"
        if form == "QDQ":
            zero = np.zeros(size, np.int8)
            initializers["wz"] = numpy_helper.from_array(zero, "wz")
            initializers["xs"] = numpy_helper.from_array(np.float32(4 / 127), "xs")
            initializers["xz"] = numpy_helper.from_array(np.uint8(128), "xz")
            operands.append("wz")
            nodes.append(helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]))
            nodes.append(helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xf"]))
            left = "xf"
        nodes.append(helper.make_node("DequantizeLinear", operands, ["wf"], **attributes))
    if gemm and form == "QDQ":
        initializers["b8"] = numpy_helper.from_array(np.zeros(size, np.int32), "b8")
        initializers["bs"] = numpy_helper.from_array(scale[0] * np.float32(4 / 127), "bs")
        nodes.append(helper.make_node("DequantizeLinear", ["b8", "bs"], ["b"], axis=0))
    elif gemm:
        initializers["b"] = numpy_helper.from_array(np.zeros(size, np.float32), "b")
    operator = ("Gemm", [left, right, "b"]) if gemm else ("MatMul", [left, right])
    nodes.append(helper.make_node(*operator, ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", size])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", size])],
        list(initializers.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)])
    model.ir_version = 10
    data: bytes = model.SerializeToString()
    return data


def _session(data: bytes, level: int | None, optimized: str = "") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = optimized
    if level is not None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _operators(data: bytes, level: int | None) -> list[str]:
    """What the default session makes of a graph."""
    path = "/dev/shm/onnx-fliqs-weight-only.onnx"
    _session(data, level, path)
    nodes = onnx.load(path).graph.node
    return [node.op_type for node in nodes]


def _seconds(session: ort.InferenceSession, x: Array, times: int) -> float:
    started = time.process_time()
    for _ in range(times):
        session.run(None, {"x": x})
    return (time.process_time() - started) / times


def _measured(size: int, gemm: bool, rows: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    """One row of results for each number of rows of the activations."""
    graphs = {form: _graph(form, size, gemm) for form in _FORMS}
    sessions = {form: _session(graphs[form], _FORMS[form][2]) for form in _FORMS}
    for count in rows:
        x = np.random.default_rng(1).standard_normal((count, size)).astype(np.float32)
        outputs = {form: session.run(None, {"x": x})[0] for form, session in sessions.items()}
        least = {form: _seconds(session, x, 2) for form, session in sessions.items()}
        times = {
            form: max(1, round(_SHORTEST / (took + 1e-9))) for form, took in least.items()
        }
        table = np.array(
            [
                [_seconds(session, x, times[form]) for form, session in sessions.items()]
                for _ in range(rounds)
            ]
        )
        ratios = np.median(table / table[:, :1], axis=0)
        yield {
            "benchmark": "weight_only",
            "operator": "Gemm" if gemm else "MatMul",
            "size": size,
            "rows": count,
            "float_microseconds": round(float(np.median(table[:, 0]) * 1e6), 1),
            "ratios": dict(zip(_FORMS, ratios.round(3).tolist(), strict=True)),
            "differences": {
                form: round(float(np.std(y - outputs["float"]) / np.std(outputs["float"])), 4)
                for form, y in outputs.items()
            },
        }


def main() -> None:
    """Measure every size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 128])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--gemm", action="store_true", help="a Gemm with a bias")
    options = parser.parse_args()
    for form in _FORMS:
        operators = _operators(_graph(form, 256, options.gemm), _FORMS[form][2])
        print(json.dumps({"form": form, "runs_as": operators}))
    lines = [f"| size | rows | float, µs | {' | '.join(list(_FORMS)[1:])} |"]
    lines.append("|" + "---|" * (2 + len(_FORMS)))
    for size in options.sizes:
        for row in _measured(size, options.gemm, options.rows, options.rounds):
            print(json.dumps({**row, **provenance()}), flush=True)
            ratios = [f"{ratio:.2f}" for ratio in list(row["ratios"].values())[1:]]
            lines.append(
                f"| {size} | {row['rows']} | {row['float_microseconds']}"
                f" | {' | '.join(ratios)} |"
            )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
