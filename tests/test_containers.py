"""Every number of every format survives its container."""

import functools
from collections.abc import Callable

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from onnx_fliqs.containers import Container, activation_container_of, container_of
from onnx_fliqs.formats import FORMATS, FloatFormat, Format, IntFormat, quantize
from support import session

Array = npt.NDArray[np.float32]

EVERY = pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))
BITS = {ir.DataType.INT4: 4, ir.DataType.UINT4: 4}


def _halves(dtype: npt.DTypeLike) -> Array:
    values = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
    return values[np.isfinite(values)]


# Every finite float16 and bfloat16, and all integers of 16 bits.
GRID = np.concatenate(
    [_halves(np.float16), _halves(ml_dtypes.bfloat16), np.arange(-(1 << 15), 1 << 16)]
).astype(np.float32)


@functools.cache
def numbers(name: str) -> Array:
    """Every number of a format (of float32, those of the grid)."""
    return np.unique(quantize(GRID, FORMATS[name]))


def decode(container: Container, codes: npt.NDArray[np.generic]) -> Array:
    return codes.astype(np.float32) / np.float32(container.multiplier)


def test_the_grid_holds_every_number() -> None:
    for fmt in FORMATS.values():
        found = len(numbers(fmt.name))
        if isinstance(fmt, IntFormat):
            assert found == 1 << fmt.bits
        elif fmt.bits <= 8:
            # All codes but one zero, and but NaN and the infinities.
            missing = {"e4m3": 2, "e5m2": 8}.get(fmt.name, 0)
            assert found == (1 << fmt.bits) - 1 - missing


@EVERY
@pytest.mark.parametrize("choose", [container_of, activation_container_of])
def test_every_number_survives(choose: Callable[[Format], Container], fmt: Format) -> None:
    container = choose(fmt)
    tensor = container.encode(numbers(fmt.name), "codes")
    assert tensor.dtype is container.dtype
    np.testing.assert_array_equal(decode(container, tensor.numpy()), numbers(fmt.name))


@EVERY
def test_every_number_survives_a_file(fmt: Format) -> None:
    container = container_of(fmt)
    proto = ir.to_proto(container.encode(numbers(fmt.name), "codes"))
    read = ir.from_proto(onnx.TensorProto.FromString(proto.SerializeToString()))
    np.testing.assert_array_equal(decode(container, read.numpy()), numbers(fmt.name))


@EVERY
def test_onnx_runtime_reads_every_number(fmt: Format) -> None:
    container = container_of(fmt)
    codes = ir.Value(name="codes", const_value=container.encode(numbers(fmt.name), "codes"))
    scale = np.array(1 / container.multiplier, np.float32)
    step = ir.Value(name="scale", const_value=ir.tensor(scale, name="scale"))
    if container.dequantizes:
        node = ir.node("DequantizeLinear", [codes, step])
    else:
        node = ir.node("Cast", [codes], {"to": int(ir.DataType.FLOAT)})
        assert container.multiplier == 1
    output = node.outputs[0]
    output.name, output.type = "y", ir.TensorType(ir.DataType.FLOAT)
    output.shape = ir.Shape([len(numbers(fmt.name))])
    initializers = [codes, step] if container.dequantizes else [codes]
    graph = ir.Graph(
        [], [output], nodes=[node], initializers=initializers, opset_imports={"": 21}, name="g"
    )
    data = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    np.testing.assert_array_equal(session(data).run(None, {})[0], numbers(fmt.name))


@EVERY
def test_a_container_is_no_larger_than_it_must_be(fmt: Format) -> None:
    size = BITS.get(container_of(fmt).dtype, container_of(fmt).dtype.itemsize * 8)
    assert size >= fmt.bits
    smaller = {4: 2, 8: 4, 16: 8, 32: 16}[int(size)]
    if isinstance(fmt, IntFormat):
        assert smaller < fmt.bits or size == 4  # ONNX has no 2-bit integers at opset 21
    elif fmt.bits <= 8:
        # A minifloat outgrows 8 bits only where neither float8 has its range and mantissa.
        assert size == 8 or fmt.name in ("e2m5", "e3m4")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("int2", "INT4"),
        ("uint3", "UINT4"),
        ("int4", "INT4"),
        ("uint4", "UINT4"),
        ("int5", "INT8"),
        ("uint7", "UINT8"),
        ("int8", "INT8"),
        ("int16", "INT16"),
        ("uint16", "UINT16"),
        ("e2m1", "INT8"),
        ("e4m3", "FLOAT8E4M3FN"),
        ("e5m2", "FLOAT8E5M2"),
        ("bf16", "BFLOAT16"),
        ("fp16", "FLOAT16"),
        ("float32", "FLOAT"),
    ],
)
def test_the_container_of_some_formats(name: str, dtype: str) -> None:
    assert container_of(FORMATS[name]).dtype.name == dtype


@EVERY
def test_a_native_container_rounds_and_saturates_as_the_format(fmt: Format) -> None:
    container = container_of(fmt)
    assert container.native == (
        fmt.name in {"e4m3", "e5m2", "float32"}
        or (isinstance(fmt, IntFormat) and fmt.bits in (4, 8, 16))
    )
    assert not container.native or container.multiplier == 1


@EVERY
def test_no_activation_travels_in_four_bits(fmt: Format) -> None:
    assert activation_container_of(fmt).dtype not in BITS
    if isinstance(fmt, FloatFormat) or fmt.bits >= 8:
        assert activation_container_of(fmt) == container_of(fmt)


def test_the_end_of_int32_does_not_turn_negative() -> None:
    # 2^31 - 1 is 2^31 in float32, which a cast to int32 would wrap round.
    bias = IntFormat(bits=32)
    codes = container_of(bias).encode(quantize([-1e20, 1e20], bias), "codes").numpy()
    np.testing.assert_array_equal(codes, [-(1 << 31), (1 << 31) - 128])
