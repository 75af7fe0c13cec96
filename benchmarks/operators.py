"""What single operators cost in ONNX Runtime on one core: why the step is built as it is.

Elementwise operators on a tensor as large as those of ResNet-20's first stage, in nanoseconds
per element, and the gradient of convolutions by ConvGrad and in blocked channels, in
milliseconds. Prints Markdown tables, and provenance as JSON::

    python benchmarks/operators.py --rounds 40
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from common import provenance
from onnx import TensorProto, helper, numpy_helper

from onnx_fliqs.kernels import block_of_channels
from onnx_fliqs.passes.block_channels import BlockChannelsPass
from onnx_fliqs.runtime import load_onnxruntime, make_session

Array = npt.NDArray[Any]

_RNG = np.random.default_rng(0)
_SHAPE = (32, 16, 32, 32)
_X = (3 * _RNG.standard_normal(_SHAPE)).astype(np.float32)
_MASK = _X > 0
_BYTES = _RNG.integers(0, 255, _SHAPE).astype(np.uint8)
_NUMBER, _ZERO = np.float32(0.7), np.uint8(0)
_UINT8, _FLOAT = TensorProto.UINT8, TensorProto.FLOAT

_ELEMENTWISE: dict[str, tuple[str, Sequence[Array], Mapping[str, Any]]] = {
    "Mul by a number": ("Mul", [_X, _NUMBER], {}),
    "Mul": ("Mul", [_X, _X], {}),
    "Div by a number": ("Div", [_X, _NUMBER], {}),
    "Max with a number": ("Max", [_X, _NUMBER], {}),
    "Clip": ("Clip", [_X, -_NUMBER, _NUMBER], {}),
    "Abs": ("Abs", [_X], {}),
    "Sign": ("Sign", [_X], {}),
    "Round": ("Round", [_X], {}),
    "Equal": ("Equal", [_X, _X], {}),
    "Where": ("Where", [_MASK, _X, _NUMBER], {}),
    "ReluGrad": ("com.microsoft.ReluGrad", [_X, _X], {}),
    "Cast, truth value to float": ("Cast", [_MASK], {"to": _FLOAT}),
    "Cast, truth value to byte": ("Cast", [_MASK], {"to": _UINT8}),
    "QuantizeLinear, to bytes": ("QuantizeLinear", [_X, _NUMBER, _ZERO], {}),
    "DequantizeLinear, of bytes": ("DequantizeLinear", [_BYTES, _NUMBER, _ZERO], {}),
}
_CONVOLUTIONS = {
    # batch, channels in, channels out, size, kernel, stride, groups
    "ResNet-20, first stage": (32, 16, 16, 32, 3, 1, 1),
    "ResNet-20, second stage": (32, 32, 32, 16, 3, 1, 1),
    "ResNet-20, third stage": (32, 64, 64, 8, 3, 1, 1),
    "ResNet-18, first stage": (4, 64, 64, 56, 3, 1, 1),
    "ResNet-18, last stage": (4, 512, 512, 7, 3, 1, 1),
    "one place": (4, 96, 32, 56, 1, 1, 1),
    "depthwise": (4, 32, 32, 112, 3, 1, 32),
    "depthwise, stride 2": (4, 96, 96, 112, 3, 2, 96),
}


def _model(node: onnx.NodeProto, feeds: Mapping[str, Array], fixed: Sequence[str]) -> Any:
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
        )
        for name, array in feeds.items()
        if name not in fixed
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
    constants = [numpy_helper.from_array(np.asarray(feeds[name]), name) for name in fixed]
    graph = helper.make_graph([node], "operator", inputs, outputs, constants)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, ir_version=10, opset_imports=imports)


def _seconds(model: Any, feeds: Mapping[str, Array], rounds: int) -> float:
    """Median time of a run on one core, without copies of inputs and outputs."""
    session = make_session(model, threads=1)
    binding = session.io_binding()
    make = load_onnxruntime().OrtValue.ortvalue_from_numpy
    values = {value.name: make(feeds[value.name]) for value in session.get_inputs()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    times = []
    for _ in range(rounds + 3):
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def _elementwise(label: str, rounds: int) -> float:
    """Nanoseconds per element."""
    op_type, arrays, attributes = _ELEMENTWISE[label]
    domain, _, name = op_type.rpartition(".")
    feeds = {f"x{index}": np.asarray(array) for index, array in enumerate(arrays)}
    node = helper.make_node(name, list(feeds), ["y"], domain=domain, name="n", **attributes)
    fixed = [key for key, array in feeds.items() if array.ndim == 0]
    return _seconds(_model(node, feeds, fixed), feeds, rounds) * 1e9 / _X.size


def _gradient(label: str, rounds: int) -> tuple[float, float]:
    """Milliseconds with ConvGrad, and in blocked channels, rearrangements included."""
    batch, channels, filters, size, kernel, stride, groups = _CONVOLUTIONS[label]
    pad = kernel // 2
    out = (size + 2 * pad - kernel) // stride + 1
    shapes = {
        "dy": (batch, filters, out, out),
        "x": (batch, channels, size, size),
        "w": (filters, channels // groups, kernel, kernel),
    }
    feeds = {
        name: _RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    node = helper.make_node(
        "ConvGrad",
        ["dy", "x", "w"],
        ["dx", "dw"],
        domain="com.microsoft",
        name="n",
        kernel_shape=[kernel] * 2,
        strides=[stride] * 2,
        pads=[pad] * 4,
        dilations=[1, 1],
        group=groups,
    )
    model = _model(node, feeds, [])
    blocked = ir.from_proto(model)
    BlockChannelsPass(block_of_channels(), batch)(blocked)
    return (
        _seconds(model, feeds, rounds) * 1e3,
        _seconds(blocked, feeds, rounds) * 1e3,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    print("| operator | ns per element |\n|---|---|")
    for label in _ELEMENTWISE:
        print(f"| {label} | {_elementwise(label, options.rounds):.2f} |")
    print(
        "\n| gradient of | ConvGrad, ms | in blocked channels, ms | ratio |\n|---|---|---|---|"
    )
    for label in _CONVOLUTIONS:
        plain, blocked = _gradient(label, options.rounds)
        print(f"| {label} | {plain:.2f} | {blocked:.2f} | {blocked / plain:.2f} |")
    print(
        f"\n{json.dumps({'benchmark': 'operators', 'rounds': options.rounds, **provenance()})}"
    )


if __name__ == "__main__":
    main()
