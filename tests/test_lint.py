"""Every rule of a target: a graph that obeys it, graphs that break it, and what we emit."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from click.testing import CliRunner

from onnx_fliqs import api
from onnx_fliqs.cli.main import main
from onnx_fliqs.emission import emit
from onnx_fliqs.errors import UnsupportedError, VerificationError
from onnx_fliqs.lint import RULES, lint
from onnx_fliqs.model import save_model
from onnx_fliqs.precision import Precision, parse_precision
from onnx_fliqs.runtime import OptimizationLevel
from onnx_fliqs.targets import TARGETS, FixedRange
from pass_models import LAYERED
from support import Calibrated, calibrated, calibrated_case, model, random_feeds, runnable

TENSOR = onnx.TensorProto
QNN_LIKE = replace(
    TARGETS["xnnpack"],
    name="qnn-like",
    qdq_types=None,
    operand_types=None,
    static_shapes=True,
    between_ops=("Add", "Sigmoid", "Tanh"),
    fixed_ranges=(
        FixedRange(op="Sigmoid", low=0.0, high=1.0),
        FixedRange(op="Tanh", low=-1.0, high=1.0),
    ),
)
BUILT_IN_AND_MORE = TARGETS | {"qnn-like": QNN_LIKE}


# --- building QDQ graphs -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How a tensor of a test is quantized."""

    dtype: str = "INT8"
    scale: Any = 0.5
    zero: Any = 0
    """None: it is left out."""
    axis: int | None = None
    block: int = 0
    scale_dtype: str = "FLOAT"


@dataclass
class Qdq:
    """A graph that grows node by node."""

    opset: int = 21
    sizes: tuple[int | str, ...] = (2, 4, 6, 6)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    extra_inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    domain: str = ""

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        domain = attributes.pop("domain", "")
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(
            onnx.helper.make_node(op, inputs, [name], name=name, domain=domain, **attributes)
        )
        return name

    def constant(self, dtype: str, numbers: Any, name: str | None = None) -> str:
        name = name or f"c{len(self.constants)}"
        array = np.array(numbers)
        self.constants[name] = onnx.helper.make_tensor(
            name, TENSOR.DataType.Value(dtype), array.shape, array.reshape(-1).tolist()
        )
        return name

    def _operands(self, grid: Grid) -> tuple[list[str], dict[str, int]]:
        scale = self.constant(grid.scale_dtype, grid.scale)
        operands = [scale]
        if grid.zero is not None:
            zeros = np.broadcast_to(grid.zero, np.shape(grid.scale))
            operands.append(self.constant(grid.dtype, zeros))
        attributes = {} if grid.axis is None else {"axis": grid.axis}
        return operands, attributes | ({"block_size": grid.block} if grid.block else {})

    def quantize(self, value: str, grid: Grid) -> str:
        """Q and DQ."""
        operands, attributes = self._operands(grid)
        typed = (
            {}
            if grid.zero is not None
            else {"output_dtype": TENSOR.DataType.Value(grid.dtype)}
        )
        domain = {"domain": self.domain}
        codes = self.node("QuantizeLinear", value, *operands, **typed, **attributes, **domain)
        return self.node("DequantizeLinear", codes, *operands, **attributes, **domain)

    def stored(self, shape: Sequence[int], grid: Grid, code: int = 1) -> str:
        """DQ of constant codes."""
        operands, attributes = self._operands(grid)
        codes = self.constant(grid.dtype, np.full(shape, code))
        return self.node("DequantizeLinear", codes, *operands, **attributes)

    def finish(self, *outputs: str) -> ir.Model:
        domains = [onnx.helper.make_opsetid("", self.opset)]
        if self.domain:
            domains.append(onnx.helper.make_opsetid(self.domain, 1))
        graph = onnx.helper.make_graph(
            self.nodes,
            "g",
            [
                onnx.helper.make_tensor_value_info("x", TENSOR.FLOAT, self.sizes),
                *self.extra_inputs,
            ],
            [onnx.helper.make_tensor_value_info(name, TENSOR.FLOAT, None) for name in outputs],
            list(self.constants.values()),
        )
        return ir.from_proto(
            onnx.helper.make_model(graph, opset_imports=domains, ir_version=10)
        )


X, W, B = Grid(), Grid(scale=0.25), Grid(dtype="INT32", scale=0.125)


def conv(
    x: Grid = X,
    w: Grid = W,
    y: Grid | None = X,
    bias: Grid | str | None = B,
    *,
    op: str = "Conv",
    code: int = 1,
    **graph: Any,
) -> ir.Model:
    """A QDQ convolution of 4 channels to 4; ``bias="float"`` for one that is not quantized."""
    g = Qdq(**graph)
    operands = [g.quantize("x", x), g.stored((4, 4, 1, 1), w, code)]
    if isinstance(bias, Grid):
        operands.append(g.stored((4,), bias))
    elif bias is not None:
        operands.append(g.constant("FLOAT", [1.0] * 4))
    out = g.node(op, *operands)
    return g.finish(out if y is None else g.quantize(out, y))


def matmul(
    x: Grid | None = X,
    w: Grid = W,
    y: Grid | None = None,
    *,
    op: str = "MatMul",
    shape: tuple[int, int] = (128, 4),
    attributes: Mapping[str, Any] | None = None,
    code: int = 1,
    **graph: Any,
) -> ir.Model:
    """A product with a stored matrix; float activations where ``x`` is None."""
    g = Qdq(sizes=(2, 128), **graph)
    first = "x" if x is None else g.quantize("x", x)
    out = g.node(op, first, g.stored(shape, w, code), **(attributes or {}))
    return g.finish(out if y is None else g.quantize(out, y))


def chain(op: str, x: Grid, y: Grid, **attributes: Any) -> ir.Model:
    """Q, DQ, an operator of one operand, Q, DQ."""
    g = Qdq(**{key: attributes.pop(key) for key in ("opset", "domain") if key in attributes})
    out = g.node(op, g.quantize("x", x), **attributes)
    return g.finish(g.quantize(out, y))


def two(op: str, a: Grid, b: Grid, y: Grid, **attributes: Any) -> ir.Model:
    """An operator of two quantized operands."""
    g = Qdq()
    out = g.node(op, g.quantize("x", a), g.quantize("x", b), **attributes)
    return g.finish(g.quantize(out, y))


def relu(grid: Grid, *, read_twice: bool = False, op: str = "Relu") -> ir.Model:
    g = Qdq()
    value = g.node(op, "x")
    return g.finish(g.quantize(value, grid), *([g.node("Neg", value)] if read_twice else []))


def computed(what: str) -> ir.Model:
    """A quantizer whose scale or zero point is an input of the graph."""
    g = Qdq()
    dtype = TENSOR.FLOAT if what == "scale" else TENSOR.INT8
    g.extra_inputs.append(onnx.helper.make_tensor_value_info("free", dtype, []))
    scale = "free" if what == "scale" else g.constant("FLOAT", 0.5)
    zero = "free" if what == "zero" else g.constant("INT8", 0)
    codes = g.node("QuantizeLinear", "x", scale, zero)
    return g.finish(g.node("DequantizeLinear", codes, scale, zero))


def constant_nodes() -> ir.Model:
    """A quantizer whose scale and zero point are outputs of Constant nodes."""
    g = Qdq()
    scale = g.node("Constant", value=onnx.helper.make_tensor("", TENSOR.FLOAT, [], [0.5]))
    zero = g.node("Constant", value=onnx.helper.make_tensor("", TENSOR.INT8, [], [0]))
    codes = g.node("QuantizeLinear", "x", scale, zero)
    return g.finish(g.node("DequantizeLinear", codes, scale, zero))


def high_precision_weights(w: Grid) -> ir.Model:
    """Weights as float constants with Q and DQ behind them, as TensorRT's exporters write."""
    g = Qdq()
    weights = g.quantize(g.constant("FLOAT", np.ones((4, 4, 1, 1))), w)
    return g.finish(g.node("Conv", g.quantize("x", X), weights))


def channels(axis: int, **changes: Any) -> Grid:
    return Grid(scale=[0.5, 0.25, 0.5, 0.25], axis=axis, **changes)


def blocks(size: int, shape: tuple[int, int], axis: int = 0, dtype: str = "INT4") -> Grid:
    return Grid(dtype=dtype, scale=np.full(shape, 0.5), zero=None, axis=axis, block=size)


U8 = Grid(dtype="UINT8", zero=128)
FP8 = Grid(dtype="FLOAT8E4M3FN", zero=None)
POWERS = Grid(scale=0.25)
PER_CHANNEL_BIAS = Grid(dtype="INT32", scale=[0.25, 0.125, 0.25, 0.125], axis=0)
SIGMOID = Grid(dtype="UINT16", scale=1 / 65536, zero=0)
TANH = Grid(dtype="UINT16", scale=1 / 32768, zero=32768)

Build = Callable[[], ir.Model]


# Rule, target, graph that obeys it.
def qonnx_quantizer(zero: float) -> ir.Model:
    return model(
        f"""g (float[2] x) => (float[2] y)
            <float s = {{0.5}}, float z = {{{zero}}}, float b = {{8.0}}> {{
            y = qonnx.custom_op.general.Quant <signed = 1> (x, s, z, b) }}""",
        header='<ir_version: 10, opset_import: ["" : 21, "qonnx.custom_op.general" : 1]>',
    )


OBEYED: list[tuple[str, str, Build]] = [
    ("types", "tensorrt", lambda: conv(bias=None)),
    ("types", "generic", lambda: conv(x=Grid(dtype="INT16"))),
    ("opset", "generic", lambda: conv(opset=13)),
    ("opset", "generic", lambda: conv(x=Grid(dtype="FLOAT8E5M2"), w=W, bias=None, opset=19)),
    (
        "opset",
        "generic",
        lambda: chain("Neg", *[Grid(dtype="INT16")] * 2, opset=13, domain="com.microsoft"),
    ),
    ("block-shapes", "generic", lambda: matmul(None, blocks(50, (3, 4)))),
    ("block-shapes", "generic", lambda: conv(w=channels(0), bias=None)),
    ("static-shapes", "qnn-like", conv),
    ("static-shapes", "xnnpack", lambda: conv(sizes=("N", 4, 6, 6))),
    ("constant-scales", "tensorrt", constant_nodes),
    ("constant-scales", "generic", lambda: computed("scale")),
    ("normal-scales", "generic", lambda: conv(x=Grid(scale=1.2e-38))),
    ("symmetric", "tensorrt", lambda: conv(bias=None)),
    ("symmetric", "xnnpack", lambda: conv(x=Grid(zero=3))),
    ("symmetric-weights", "xnnpack", lambda: conv(x=U8, w=U8)),
    ("power-of-two-scales", "vitis-ai", lambda: conv(bias=Grid(scale=2.0**-9))),
    ("per-tensor-activations", "xnnpack", lambda: conv(x=Grid(scale=[0.5], axis=1))),
    ("per-tensor-activations", "generic", lambda: conv(x=channels(1), bias=None)),
    ("per-tensor-activations", "tensorrt", lambda: high_precision_weights(channels(0))),
    ("channels", "xnnpack", lambda: conv(w=channels(0), bias=PER_CHANNEL_BIAS)),
    ("channels", "xnnpack", lambda: conv(w=channels(-4), bias=PER_CHANNEL_BIAS)),
    ("channels", "tensorrt", lambda: conv(w=channels(1), op="ConvTranspose", bias=None)),
    ("channels", "tensorrt", lambda: matmul(w=channels(1))),
    (
        "channels",
        "tensorrt",
        lambda: matmul(w=channels(0), op="Gemm", shape=(4, 128), attributes={"transB": 1}),
    ),
    ("channels", "xnnpack", lambda: conv(x=U8, w=U8)),
    ("channels", "xnnpack", lambda: matmul(w=channels(1))),
    ("channels", "generic", lambda: conv(w=channels(1), bias=None)),
    ("blocks", "tensorrt", lambda: matmul(None, blocks(64, (2, 4)))),
    (
        "blocks",
        "tensorrt",
        lambda: matmul(
            None,
            blocks(128, (4, 1), axis=1),
            op="Gemm",
            shape=(4, 128),
            attributes={"transB": 1},
        ),
    ),
    ("blocks", "generic", lambda: matmul(None, blocks(32, (4, 4)))),
    ("operand-types", "ort-cpu", lambda: conv(x=U8)),
    ("operand-types", "ort-cpu", lambda: conv(x=U8, w=U8)),
    ("operand-types", "tensorrt", lambda: matmul(FP8, FP8)),
    ("operand-types", "generic", lambda: conv(x=Grid(dtype="INT16"))),
    ("one-activation-type", "xnnpack", lambda: conv(x=U8, w=U8, y=U8)),
    ("one-activation-type", "ort-cpu", lambda: two("Add", U8, U8, U8)),
    ("one-activation-type", "xnnpack", lambda: matmul(U8, W, X)),
    ("one-activation-type", "generic", lambda: conv(x=U8, y=X)),
    ("weight-range", "ort-cpu-avx2", lambda: conv(x=U8, code=-64)),
    ("weight-range", "ort-cpu", lambda: conv(x=U8, code=-128)),
    ("bias", "xnnpack", conv),
    ("bias", "xnnpack", lambda: conv(bias="float")),
    ("bias", "ort-cpu", lambda: conv(w=channels(0), bias=PER_CHANNEL_BIAS)),
    (
        "bias",
        "xnnpack",
        lambda: conv(w=Grid(dtype="INT4"), bias=Grid(dtype="INT32", scale=1.0)),
    ),
    ("bias", "tensorrt", lambda: conv(bias="float")),
    ("bias", "vitis-ai", lambda: conv(bias=Grid(scale=0.5))),
    ("bias", "vitis-ai", lambda: conv(bias=None)),
    ("bias", "generic", lambda: conv(bias=Grid(dtype="INT32", scale=2.0**-20))),
    ("shared-scales", "xnnpack", lambda: chain("MaxPool", X, X, kernel_shape=[2, 2])),
    ("shared-scales", "tensorrt", lambda: chain("MaxPool", X, W, kernel_shape=[2, 2])),
    ("shared-scales", "ort-cpu", lambda: two("Concat", U8, U8, U8, axis=1)),
    # One has a sign, the other none: a shared scale would cost a bit.
    ("shared-scales", "ort-cpu", lambda: two("Concat", U8, replace(U8, zero=0), U8, axis=1)),
    ("quantizers-of-qonnx", "qonnx", lambda: qonnx_quantizer(0.0)),
    ("shared-scales", "xnnpack", lambda: chain("Transpose", X, U8)),
    ("shared-scales", "xnnpack", lambda: two("Concat", X, W, X, axis=1)),
    ("fixed-ranges", "qnn-like", lambda: chain("Sigmoid", SIGMOID, SIGMOID)),
    ("fixed-ranges", "qnn-like", lambda: chain("Tanh", TANH, TANH)),
    ("fixed-ranges", "qnn-like", lambda: chain("Sigmoid", X, Grid(scale=1 / 128))),
    ("fixed-ranges", "xnnpack", lambda: chain("Sigmoid", X, X)),
    ("kept-relu", "generic", lambda: relu(FP8)),
    ("kept-relu", "generic", lambda: relu(Grid(dtype="FLOAT8E4M3FN", zero=0.0), op="Abs")),
    (
        "kept-relu",
        "generic",
        lambda: relu(Grid(dtype="FLOAT8E4M3FN", zero=0.0), read_twice=True),
    ),
    ("kept-relu", "generic", lambda: relu(Grid(dtype="UINT4"))),
    ("kept-relu", "generic", lambda: relu(Grid(dtype="INT8"))),
    ("kept-relu", "tensorrt", lambda: relu(Grid(dtype="FLOAT8E4M3FN", zero=0.0))),
    ("loaded-groups", "generic", lambda: conv(FP8, FP8, None, None)),
    ("loaded-groups", "generic", lambda: chain("Sigmoid", X, X)),
    ("loaded-groups", "generic", lambda: conv(X, Grid(dtype="INT4"), X, None)),
    ("loaded-groups", "generic", lambda: chain("Neg", FP8, FP8)),
    ("loaded-groups", "tensorrt", lambda: chain("Sigmoid", FP8, FP8)),
]

# Rule, target, graph that breaks it, words of the message.
BROKEN: list[tuple[str, str, Build, str]] = [
    ("types", "tensorrt", lambda: conv(x=U8, bias=None), "UINT8 is not among INT8, FLOAT8E4M"),
    ("types", "tensorrt", lambda: chain("Neg", *[Grid(dtype="FLOAT8E5M2")] * 2), "FLOAT8E5M2"),
    ("types", "xnnpack", lambda: chain("Neg", *[Grid(dtype="INT16", zero=None)] * 2), "INT16"),
    ("opset", "generic", lambda: conv(x=FP8, w=W, bias=None, opset=18), "this type needs ops"),
    (
        "opset",
        "generic",
        lambda: chain("Neg", *[Grid(dtype="INT16")] * 2, opset=20),
        "this type needs opset 21, the model declares 20",
    ),
    (
        "opset",
        "generic",
        lambda: conv(w=channels(0), bias=None, opset=12),
        "a scale per chann",
    ),
    (
        "opset",
        "generic",
        lambda: matmul(None, blocks(64, (2, 4), dtype="INT8"), opset=20),
        "a scale per block needs opset 21",
    ),
    (
        "block-shapes",
        "generic",
        lambda: matmul(None, blocks(64, (2, 1))),
        "its scales have the shape [2, 1], not [2, 4]",
    ),
    ("static-shapes", "qnn-like", lambda: conv(sizes=("N", 4, 6, 6)), "input x has the shape"),
    ("constant-scales", "tensorrt", lambda: computed("scale"), "its scale is not constant"),
    ("constant-scales", "tensorrt", lambda: computed("zero"), "its zero point is not const"),
    *(
        ("normal-scales", "generic", lambda s=s: conv(x=Grid(scale=s)), "positive normal num")
        for s in (0.0, -0.5, float("inf"), float("nan"), 1e-39)
    ),
    ("normal-scales", "generic", lambda: conv(w=Grid(scale=[1, 0, 1, 1], axis=0)), "the sca"),
    (
        "normal-scales",
        "generic",
        lambda: chain("Neg", *[Grid(scale=1e-5, scale_dtype="FLOAT16")] * 2),
        "the scale 1",
    ),
    ("symmetric", "tensorrt", lambda: conv(x=Grid(zero=1), bias=None), "zero point is not 0"),
    ("symmetric", "vitis-ai", lambda: conv(w=Grid(zero=1), bias=None), "zero point is not 0"),
    ("symmetric-weights", "xnnpack", lambda: conv(w=Grid(zero=1)), "zero point is not 0"),
    ("power-of-two-scales", "vitis-ai", lambda: conv(x=Grid(scale=0.3)), "no power of two"),
    ("per-tensor-activations", "tensorrt", lambda: conv(x=channels(1), bias=None), "one sca"),
    (
        "channels",
        "tensorrt",
        lambda: conv(w=channels(1), bias=None),
        "its weights have scales along axis 1, not scales along axis 0",
    ),
    (
        "channels",
        "tensorrt",
        lambda: conv(w=channels(0), op="ConvTranspose", bias=None),
        "its weights have scales along axis 0, not scales along axis 1",
    ),
    (
        "channels",
        "ort-cpu",
        lambda: matmul(U8, channels(0), shape=(4, 128)),
        "not scales alon",
    ),
    (
        "channels",
        "xnnpack",
        lambda: conv(w=channels(1), op="ConvTranspose", bias=None),
        "its weights need one scale for the whole tensor",
    ),
    (
        "channels",
        "xnnpack",
        lambda: conv(x=U8, w=channels(0, dtype="UINT8"), bias=None),
        "weights of UINT8 have no scale per channel, only INT8",
    ),
    ("channels", "tensorrt", lambda: high_precision_weights(channels(1)), "along axis 1"),
    (
        "blocks",
        "tensorrt",
        lambda: matmul(None, blocks(32, (4, 4))),
        "reads INT4 in blocks of 32; the target has INT4 in blocks of 64, INT4 in blocks of 1",
    ),
    (
        "blocks",
        "tensorrt",
        lambda: matmul(None, blocks(64, (2, 4), dtype="INT8")),
        "reads INT8 in blocks of 64",
    ),
    (
        "blocks",
        "tensorrt",
        lambda: matmul(None, blocks(64, (128, 2), axis=1), shape=(128, 128)),
        "reads blocks along axis 1, over which it does not sum",
    ),
    ("blocks", "vitis-ai", lambda: matmul(None, blocks(64, (2, 4))), "has no blocks there"),
    ("operand-types", "xnnpack", lambda: conv(x=U8), "multiplies UINT8 x INT8, which is not"),
    ("operand-types", "ort-cpu", lambda: conv(x=X, w=U8), "multiplies INT8 x UINT8"),
    ("operand-types", "tensorrt", lambda: matmul(X, Grid(dtype="INT4")), "INT8 x INT4"),
    ("one-activation-type", "ort-cpu", lambda: conv(x=U8, y=X), "are of INT8 and UINT8"),
    ("one-activation-type", "ort-cpu", lambda: two("Add", U8, X, U8), "are of INT8 and UI"),
    (
        "one-activation-type",
        "xnnpack",
        lambda: chain("AveragePool", U8, X, kernel_shape=[2, 2]),
        "are of INT8 and UINT8",
    ),
    ("one-activation-type", "xnnpack", lambda: chain("Transpose", U8, X), "are of INT8 and"),
    (
        "weight-range",
        "ort-cpu-avx2",
        lambda: conv(x=U8, code=-65),
        "codes of its weights reach from -65 to -65; the target takes 7 bits",
    ),
    ("bias", "ort-cpu", lambda: conv(bias=Grid(dtype="INT32", scale=0.1)), "not the product"),
    ("bias", "ort-cpu", lambda: conv(bias=Grid(dtype="INT8", scale=0.125)), "not INT32 with"),
    ("bias", "ort-cpu", lambda: conv(bias=replace(B, zero=1)), "not INT32 with zero point 0"),
    ("bias", "ort-cpu", lambda: conv(w=channels(0), bias=B), "not the product of the scales"),
    ("bias", "tensorrt", conv, "its bias is quantized, it has to stay float"),
    ("bias", "vitis-ai", lambda: conv(bias="float"), "its bias is float, it has to be INT8"),
    ("bias", "vitis-ai", lambda: conv(bias=B), "its bias is INT32, not INT8 like weights"),
    ("bias", "vitis-ai", lambda: conv(bias=channels(0)), "its bias needs one scale"),
    ("shared-scales", "xnnpack", lambda: chain("MaxPool", X, W, kernel_shape=[2, 2]), "diffe"),
    (
        "shared-scales",
        "ort-cpu",
        lambda: two("Concat", U8, replace(U8, scale=0.25), U8, axis=1),
        "what it reads and writes differs in scale or zero point",
    ),
    ("shared-scales", "tensorrt", lambda: two("Concat", X, W, X, axis=1), "differs in scale"),
    (
        "quantizers-of-qonnx",
        "qonnx",
        lambda: qonnx_quantizer(1.0),
        "a zero point other than 0",
    ),
    ("quantizers-of-qonnx", "qonnx", lambda: conv(bias=None), "it is no quantizer of QONNX"),
    (
        "fixed-ranges",
        "qnn-like",
        lambda: chain("Sigmoid", SIGMOID, replace(SIGMOID, scale=0.1)),
        "its output needs the scale 1.52588e-05 and the zero point 0",
    ),
    (
        "fixed-ranges",
        "qnn-like",
        lambda: chain("Tanh", TANH, replace(TANH, zero=0)),
        "its output needs the scale 3.05176e-05 and the zero point 32768",
    ),
    *(
        ("kept-relu", "generic", lambda t=t, z=z: relu(Grid(dtype=t, zero=z)), f"give {t} as")
        for t, z in (("FLOAT8E4M3FN", 0.0), ("FLOAT8E5M2", 0.0), ("INT4", 0), ("UINT4", 8))
    ),
    (
        "loaded-groups",
        "generic",
        lambda: conv(FP8, FP8, FP8, None),
        "quantizers of FLOAT8E4M3",
    ),
    ("loaded-groups", "generic", lambda: chain("Sigmoid", FP8, FP8), "quantizers of FLOAT8E4"),
    (
        "loaded-groups",
        "generic",
        lambda: conv(Grid(dtype="INT4"), W, Grid(dtype="INT4"), None),
        "quantizers of INT4 and INT8",
    ),
    (
        "loaded-groups",
        "ort-cpu",
        lambda: chain("Sigmoid", *[Grid(zero=None)] * 2),
        "refuses to load it between quantizers of INT8 without zero points",
    ),
]


def broken(graph: ir.Model, target: str) -> dict[str, str]:
    """The rules that a graph breaks, with one of their messages."""
    return {each.rule: str(each) for each in lint(graph, BUILT_IN_AND_MORE[target])}


@pytest.mark.parametrize(("rule", "target", "build"), OBEYED)
def test_a_graph_that_obeys_a_rule(rule: str, target: str, build: Build) -> None:
    assert rule not in broken(build(), target)


@pytest.mark.parametrize(("rule", "target", "build", "words"), BROKEN)
def test_a_graph_that_breaks_a_rule(rule: str, target: str, build: Build, words: str) -> None:
    found = broken(build(), target)
    assert words in found.get(rule, ""), found
    assert "\n" not in found[rule]


def test_every_rule_is_tested_both_ways() -> None:
    names = {rule.__name__.replace("_", "-") for rule in RULES}
    assert {rule for rule, *_ in OBEYED} == names
    assert {rule for rule, *_ in BROKEN} == names


def test_a_good_graph_obeys_all_rules_of_its_target() -> None:
    assert broken(conv(x=U8, y=U8), "ort-cpu") == {}
    assert broken(conv(w=channels(0), bias=PER_CHANNEL_BIAS), "xnnpack") == {}
    assert broken(conv(w=channels(0), bias="float"), "tensorrt") == {}
    assert broken(conv(bias=POWERS), "vitis-ai") == {}


def test_a_problem_names_rule_node_and_reason() -> None:
    (problem,) = lint(conv(bias=B), replace(TARGETS["tensorrt"], qdq_types=None))
    assert problem.rule == "bias"
    assert problem.node == "Conv conv4"
    assert str(problem) == "Conv conv4: its bias is quantized, it has to stay float [bias]"


def test_quantizers_inside_a_body_are_seen() -> None:
    graph = model(
        """g (float[4] x, bool c) => (float[4] y) <float s = {-1.0}, int8 z = {0}> {
            y = If (c) <
                then_branch = t () => (float[4] p) {
                    q = QuantizeLinear (x, s, z) p = DequantizeLinear (q, s, z) },
                else_branch = e () => (float[4] n) { n = Neg (x) }> }"""
    )
    assert [each.rule for each in lint(graph, TARGETS["generic"])] == ["normal-scales"] * 2


# --- what ONNX Runtime really does ---------------------------------------------------------


def outcome(graph: ir.Model, level: ort.GraphOptimizationLevel) -> npt.NDArray[Any] | None:
    """The first output, None where the session cannot be made."""
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 4
    data = ir.to_proto(graph).SerializeToString()
    try:
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception:  # ONNX Runtime raises classes of its own
        return None
    return np.asarray(session.run(None, random_feeds(graph))[0])


SESSION = ("kept-relu", "loaded-groups")
ALL, BASIC = (
    ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
)


@pytest.mark.parametrize("build", [build for rule, _, build, _ in BROKEN if rule in SESSION])
def test_the_default_session_is_as_bad_as_the_rules_say(build: Build) -> None:
    graph = build()
    right, found = outcome(graph, BASIC), outcome(graph, ALL)
    assert right is not None
    assert found is None or np.abs(found - right).max() > 0.5


@pytest.mark.parametrize(
    "build",
    [build for rule, target, build in OBEYED if rule in SESSION and target == "generic"],
)
def test_the_default_session_is_right_where_the_rules_are_obeyed(build: Build) -> None:
    graph = build()
    right, found = outcome(graph, BASIC), outcome(graph, ALL)
    assert right is not None
    assert found is not None
    np.testing.assert_allclose(found, right, atol=0.51)  # one step of its quantizers


def test_the_rules_of_the_default_session_are_not_those_of_the_basic_level() -> None:
    graph = relu(Grid(dtype="FLOAT8E4M3FN", zero=0.0))
    assert lint(graph, TARGETS["generic"], OptimizationLevel.BASIC) == ()
    assert lint(graph, TARGETS["generic"], OptimizationLevel.DEFAULT)


# --- what we emit --------------------------------------------------------------------------

# Beside the models with layers, which have few channels: one with enough for every target.
BROAD: dict[str, Callable[[], ir.Model]] = {
    "broad_convolutions": lambda: model(
        """g (float[1,32,6,6] x) => (float[1,32] y) {
            [c1] a = Conv <pads = [1,1,1,1]> (x, w1, b1)
            b = Relu (a)
            [dw] c = Conv <group = 32, pads = [1,1,1,1]> (b, w2, b2)
            d = Clip (c, lo, hi)
            [c3] e = Conv (d, w3, b3)
            f = Add (e, b)
            k = Concat <axis = 1> (f, b)
            p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (k)
            m = Mul (p, p)
            [up] u = ConvTranspose (m, w4, b4)
            q = GlobalAveragePool (u)
            h = Flatten (q)
            [head] y = Gemm <transB = 1> (h, w5, b5) }""",
        weights={
            "w1": (32, 32, 3, 3),
            "w2": (32, 1, 3, 3),
            "w3": (32, 32, 1, 1),
            "w4": (64, 32, 2, 2),
            "w5": (32, 32),
            **{f"b{i}": (32,) for i in range(1, 6)},
        },
        constants={"lo": 0.0, "hi": 6.0},
    ),
    "concatenated": lambda: model(
        """g (float[1,32,6,6] x) => (float[1,32,6,6] y) {
            [c1] a = Conv (x, w1)
            [c2] b = Conv (x, w2)
            c = Concat <axis = 1> (a, b)
            d = Relu (c)
            [c3] e = Conv (d, w3)
            f = Concat <axis = 1> (e, a)
            [c4] y = Conv (f, w4) }""",
        weights={
            "w1": (32, 32, 1, 1),
            "w2": (32, 32, 1, 1),
            "w3": (32, 64, 1, 1),
            "w4": (32, 64, 1, 1),
        },
    ),
    "broad_products": lambda: model(
        """g (float[2,8,128] x, int64[2,8] i, bool c) => (float[2,8,128] y, float[2,32] z) {
            [table] t = Gather (emb, i)
            s = Add (x, t)
            [q] q = MatMul (s, w1)
            [k] k = MatMul (s, w2)
            kt = Transpose <perm = [0, 2, 1]> (k)
            [scores] a = MatMul (q, kt)
            p = Softmax (a)
            [mix] m = MatMul (p, s)
            [tied] n = MatMul (m, w1)
            r = Add (n, bias)
            y = If (c) <
                then_branch = th () => (float[2,8,128] u) { [inside] u = MatMul (r, w1) },
                else_branch = el () => (float[2,8,128] v) { v = Neg (r) }>
            one = ReduceMean <keepdims = 0> (y, axis)
            [fc] f = Gemm <transB = 1> (one, w3, b3)
            [fc2] z = Gemm <alpha = 0.5> (f, w4, b4) }""",
        weights={
            "emb": (64, 128),
            "w1": (128, 128),
            "w2": (128, 128),
            "bias": (128,),
            "w3": (64, 128),
            "b3": (64,),
            "w4": (64, 32),
            "b4": (1, 32),
        },
        constants={"axis": [1]},
    ),
}


@functools.cache
def prepared_case(case: str, target: str) -> Calibrated | None:
    """Calibrated; None where the target has no kernel for any layer."""
    try:
        if case in BROAD:
            return calibrated(BROAD[case](), target)
        return calibrated_case(case, target)
    except UnsupportedError:
        return None


def uniform(prepared: Calibrated, wanted: Precision) -> dict[str, Precision]:
    """A precision for all layers that take it, the closest for the others."""
    index = prepared.space.precisions.index(wanted)
    return prepared.space.assign(prepared.space.levels[index])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", [*LAYERED, *BROAD])
def test_what_is_emitted_obeys_the_rules(case: str, target: str) -> None:
    prepared = prepared_case(case, target)
    if prepared is None:
        assert case not in ("broad_convolutions", "concatenated")
        return
    # Sizes are the user's.
    profile = replace(prepared.target, static_shapes=False)
    mixes = [prepared.random_mix(seed) for seed in range(4)]
    for chosen in (*mixes, *(uniform(prepared, each) for each in runnable(profile))):
        graph = prepared.emitted(chosen)
        assert lint(graph, profile, OptimizationLevel.NONE) == ()


@pytest.mark.parametrize("target", [name for name, each in TARGETS.items() if each.kernels])
def test_layers_of_a_broad_model_use_every_precision_of_a_target(target: str) -> None:
    # Otherwise the test above would show little.
    taken = {
        each.name
        for case in BROAD
        if (prepared := prepared_case(case, target)) is not None
        for choices in prepared.space.choices
        for each in choices
    }
    assert taken == {each.name for each in runnable(TARGETS[target])}


def test_the_bias_of_almost_nothing_keeps_a_normal_scale() -> None:
    plain = LAYERED["conv_relu_conv"].build()
    tiny = np.full(4, 1e-40, np.float32)
    plain.graph.initializers["b1"].const_value = ir.tensor(tiny, name="b1")
    prepared = calibrated(plain)
    graph = prepared.emitted(prepared.space.uniform(parse_precision("int4")))
    assert lint(graph, TARGETS["generic"], OptimizationLevel.NONE) == ()


def test_an_emission_that_breaks_a_rule_is_refused() -> None:
    prepared = calibrated_case("conv_relu_conv", "ort-cpu")
    chosen = prepared.space.uniform(parse_precision("int8"))
    wrong = replace(prepared.target, qdq_types=("INT8", "INT32"))
    with pytest.raises(VerificationError, match=r"breaks a rule of ort-cpu: .* UINT8 is not"):
        emit(
            prepared.canonical,
            prepared.space,
            chosen,
            prepared.scales,
            wrong,
            [random_feeds(prepared.canonical)],
        )


# --- validate ------------------------------------------------------------------------------


def test_validate_lists_every_problem(tmp_path: Path) -> None:
    untyped = ir.to_proto(conv(x=U8, y=X, code=-100))
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(untyped))
    found = api.validate(graph, target="ort-cpu-avx2")
    assert [each.rule for each in found.problems] == ["one-activation-type", "weight-range"]
    assert found.to_dict()["problems"][1] == {
        "rule": "weight-range",
        "node": "Conv conv4",
        "message": "codes of its weights reach from -100 to -100; the target takes 7 bits",
    }
    path = tmp_path / "q.onnx"
    save_model(graph, path)
    shown = CliRunner().invoke(main, ["validate", str(path), "--target", "ort-cpu-avx2"])
    assert shown.exit_code == 5
    assert shown.stdout.count("rule     Conv conv4: ") == 2
    assert "valid for" not in shown.stdout
    assert "Error: the graph breaks 2 rules of ort-cpu-avx2: Conv conv4: " in shown.stderr
    as_json = CliRunner().invoke(
        main, ["validate", str(path), "--target", "ort-cpu-avx2", "--json"]
    )
    assert as_json.exit_code == 5
    assert json.loads(as_json.stdout)["problems"] == found.to_dict()["problems"]
