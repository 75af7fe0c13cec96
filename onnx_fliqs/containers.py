"""Which ONNX type holds the codes of a format.

A format with an ONNX type of its own is stored in that. The others go into the smallest type
that represents every one of their numbers exactly, after multiplication with a power of two;
they are *simulated*: small in the file, rounded by explicit arithmetic at run time.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.formats import FloatFormat, Format, IntFormat, Special, is_passthrough

__all__ = ["Container", "activation_container_of", "container_of"]


@dataclass(frozen=True, slots=True)
class Container:
    """Where a format's codes are stored."""

    dtype: ir.DataType
    native: bool
    """Whether casting to the type rounds and saturates exactly as the format does."""
    multiplier: float = 1.0
    """Code = number of the format * multiplier, a power of two."""

    def encode(self, numbers: npt.NDArray[np.float32], name: str) -> ir.TensorProtocol:
        """Turn numbers of the format into a stored tensor; exact.

        Only 2^31, which is the end of int32 in float32, becomes the float32 below it.
        """
        scaled = numbers * np.float32(self.multiplier)
        if self.dtype is ir.DataType.INT32:
            scaled = np.minimum(scaled, np.nextafter(np.float32(2**31), np.float32(0)))
        return ir.Tensor(scaled.astype(self.dtype.numpy()), dtype=self.dtype, name=name)

    @property
    def dequantizes(self) -> bool:
        """Whether DequantizeLinear reads the type (else Cast does)."""
        return self.dtype not in (
            ir.DataType.BFLOAT16,
            ir.DataType.FLOAT16,
            ir.DataType.FLOAT,
        )


_NATIVE_INT: Final = {
    (4, True): ir.DataType.INT4,
    (4, False): ir.DataType.UINT4,
    (8, True): ir.DataType.INT8,
    (8, False): ir.DataType.UINT8,
    (16, True): ir.DataType.INT16,
    (16, False): ir.DataType.UINT16,
    (32, True): ir.DataType.INT32,
}
_NATIVE_FLOAT: Final = {
    "e4m3": ir.DataType.FLOAT8E4M3FN,
    "e5m2": ir.DataType.FLOAT8E5M2,
    "bf16": ir.DataType.BFLOAT16,
    "fp16": ir.DataType.FLOAT16,
    "float32": ir.DataType.FLOAT,
}
_E4M3: Final = FloatFormat(exponent=4, mantissa=3, special=Special.NAN)
_E5M2: Final = FloatFormat(exponent=5, mantissa=2, special=Special.IEEE)


def container_of(fmt: Format) -> Container:
    """The smallest ONNX type (opset 21) that holds every number of the format exactly."""
    if isinstance(fmt, IntFormat):
        width = next(bits for bits in (4, 8, 16, 32) if bits >= fmt.bits)
        return Container(_NATIVE_INT[width, fmt.signed], native=width == fmt.bits)
    if fmt.name in _NATIVE_FLOAT:
        # A cast to fp16 or bf16 turns what is too large into infinity; a site saturates.
        native = not is_passthrough(fmt) or fmt.mantissa == 23
        return Container(_NATIVE_FLOAT[fmt.name], native=native)
    return (
        _as_integer(fmt)
        or _as_float8(fmt, _E4M3, ir.DataType.FLOAT8E4M3FN)
        or _as_float8(fmt, _E5M2, ir.DataType.FLOAT8E5M2)
        or Container(ir.DataType.BFLOAT16, native=False)
    )


def activation_container_of(fmt: Format) -> Container:
    """Like :func:`container_of`, for tensors that are computed at run time.

    Integers of fewer than 8 bits travel as 8-bit ones. No runtime computes on 4-bit
    activations, and ONNX Runtime handles tensors of that type wrongly: 1.19.2 gives the
    half-sized buffer of a 4-bit tensor to an 8-bit tensor of the same shape, which corrupts
    the heap, and 1.31.1 rounds the biases next to them to the coarse 4-bit scales.
    """
    if isinstance(fmt, IntFormat) and fmt.bits < 8:
        return Container(_NATIVE_INT[8, fmt.signed], native=False)
    return container_of(fmt)


def _as_integer(fmt: FloatFormat) -> Container | None:
    """Every number is a multiple of the smallest one; few exponents make them int8 codes."""
    if fmt.max / fmt.smallest > 127:
        return None
    return Container(ir.DataType.INT8, native=False, multiplier=1 / fmt.smallest)


def _as_float8(fmt: FloatFormat, host: FloatFormat, dtype: ir.DataType) -> Container | None:
    """Align the largest binades; the smallest step must still be a multiple of the host's."""
    if fmt.mantissa > host.mantissa:
        return None
    multiplier = 2.0 ** (np.frexp(host.max)[1] - np.frexp(fmt.max)[1])
    if fmt.max * multiplier > host.max:
        multiplier /= 2
    if fmt.smallest * multiplier < host.smallest:
        return None
    return Container(dtype, native=False, multiplier=float(multiplier))
