"""The numbers that integer and float8 codes stand for."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Grid", "dequantized", "unpacked"]

Array: TypeAlias = npt.NDArray[Any]


class Grid:
    """How codes are spaced: number = (code - zero point) * scale."""

    def __init__(
        self, scale: Array, zero_point: Array | None, axis: int = 0, block_size: int = 0
    ) -> None:
        """Describe the spacing.

        Args:
            scale: A scalar, one per index of ``axis``, or as codes with ``axis`` in blocks.
            zero_point: As the scale; None: 0.
            axis: Of the scale.
            block_size: Indices of ``axis`` that share a scale; 0: no blocks.
        """
        self.scale = scale
        self.zero_point = zero_point
        self.axis = axis
        self.block_size = block_size

    @property
    def is_per_tensor(self) -> bool:
        """Whether one scale holds for all codes, whose shape then does not matter."""
        return self.scale.size == 1 and not self.block_size

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for grids of the same numbers."""
        zero = np.zeros(1) if self.zero_point is None else self.zero_point.astype(np.float64)
        zeros = np.broadcast_to(zero.reshape(-1), self.scale.size)
        axis = None if self.is_per_tensor else (self.axis, self.block_size)
        return (self.scale.astype(np.float64).tobytes(), zeros.tobytes(), axis)

    def spread(self, rank: int | None) -> tuple[Array, Array] | None:
        """Scale and zero point in float32, in a shape that broadcasts against the codes.

        None where there are blocks, or where the rank is needed and unknown.
        """
        zero = np.zeros(()) if self.zero_point is None else self.zero_point
        arrays = [array.astype(np.float32) for array in (self.scale, zero)]
        if self.is_per_tensor:
            return arrays[0].reshape(()), arrays[1].reshape(())
        if rank is None or self.block_size:
            return None
        shape = (-1, *(1,) * (rank - self.axis % rank - 1))
        return arrays[0].reshape(shape), arrays[1].reshape(shape)


def dequantized(codes: Array, grid: Grid) -> npt.NDArray[np.float32]:
    """The numbers of a tensor of codes."""
    spread = grid.spread(codes.ndim)
    if spread is None:
        zero = np.zeros(()) if grid.zero_point is None else grid.zero_point
        spread = _in_full(grid.scale, codes, grid), _in_full(zero, codes, grid)
    steps, zeros = spread
    # int32 biases have more digits than float32.
    precise = np.float64 if codes.dtype.itemsize > 2 else np.float32
    numbers: Array = (codes.astype(precise) - zeros) * steps
    return numbers.astype(np.float32, copy=False)


def _in_full(array: Array, codes: Array, grid: Grid) -> Array:
    """A number for each code of the blocks."""
    array = array.astype(np.float32)
    if array.ndim == 0:
        return array
    repeated = np.repeat(array, grid.block_size, grid.axis)
    return np.take(repeated, np.arange(codes.shape[grid.axis]), grid.axis)


def unpacked(data: Array, bits: int, count: int) -> Array:
    """Codes of fewer than 8 bits out of bytes, along the last axis, lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (data[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    flat: Array = codes.reshape(*data.shape[:-1], -1)[..., :count]
    return flat
