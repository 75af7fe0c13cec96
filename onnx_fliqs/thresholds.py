"""From values to clipping thresholds: the scale with which a format holds them best.

FLIQS switches the clipping threshold together with the format; the alternatives are there to
be compared with it.
"""

import enum
from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_fliqs.formats import Format, IntFormat, grid_code

__all__ = [
    "SMALLEST_SCALE",
    "Statistics",
    "Thresholds",
    "fit_scales",
    "least_squares_scales",
    "power_of_two_scales",
    "rounded",
]

Array: TypeAlias = npt.NDArray[np.float32]

# Thresholds that are tried, as shares of the largest magnitude: 2^-6 ... 2^0.75, four a binade
# (beyond 1, the numbers of a minifloat may lie better for the smaller values), then finer and
# finer looks around the best.
_COARSE: Final = 2.0 ** (np.arange(3, -25, -1, dtype=np.float64) / 4)
_FINER: Final = tuple(
    2.0 ** (np.array([-3, -2, -1, 1, 2, 3], dtype=np.float64) / parts) for parts in (16, 64)
)
SMALLEST_SCALE: Final = 1e-12
"""Keeps t = x / scale finite for tensors of zeros."""
_PERCENTILE: Final = 99.9


class Thresholds(enum.Enum):
    """Where the values of a site are clipped."""

    SWITCHED = "switched"
    """For each format where its squared error is least."""
    SHARED = "shared"
    """At one threshold for all formats of a site: the geometric mean of the switched ones."""
    PERCENTILE = "percentile"
    """In every format where 99.9 % of the magnitudes are kept."""
    MAXIMUM = "maximum"
    """Nowhere: every format reaches to the largest magnitude."""


class Statistics(enum.Enum):
    """Which activations the thresholds of a search rest on, when they are refreshed.

    A graph that is shipped has fixed scales, so that thresholds of each batch are no choice;
    the latest ones, refreshed at every step, come close in training.
    """

    RUNNING = "running"
    """Those of the whole search: the geometric mean of the old and the new threshold."""
    LATEST = "latest"
    """Those of the batch that was seen last."""
    CALIBRATED = "calibrated"
    """Those of the float model; only the thresholds of weights are refreshed."""


def fit_scales(
    values: Array, formats: Sequence[Format], thresholds: Thresholds = Thresholds.SWITCHED
) -> dict[str, Array]:
    """The scale of each row in each of some formats.

    Args:
        values: [rows, samples]; the largest magnitudes must be among the samples.
        formats: Formats with a scale.
        thresholds: Where to clip.

    Returns:
        Format name → [rows], positive.
    """
    if thresholds in (Thresholds.SWITCHED, Thresholds.SHARED):
        fitted = {fmt.name: least_squares_scales(values, fmt) for fmt in formats}
        return _shared(values, formats, fitted) if thresholds is Thresholds.SHARED else fitted
    share = _PERCENTILE if thresholds is Thresholds.PERCENTILE else 100.0
    return {fmt.name: _covering_scales(values, fmt, share) for fmt in formats}


def _shared(
    values: Array, formats: Sequence[Format], fitted: dict[str, Array]
) -> dict[str, Array]:
    """Scales that clip in all formats at the same share of what clips nothing."""
    whole = {fmt.name: _whole_range_scales(values, fmt) for fmt in formats}
    shares = [np.log(fitted[name] / whole[name]) for name in fitted]
    share = np.exp(np.mean(shares, axis=0))
    return {name: (share * scale).astype(np.float32) for name, scale in whole.items()}


def _whole_range_scales(values: Array, fmt: Format) -> npt.NDArray[np.float64]:
    return np.maximum(_largest(values, fmt) / fmt.max, SMALLEST_SCALE)


def _covering_scales(values: Array, fmt: Format, percentile: float) -> Array:
    """The scales with which a percentage of the values of each row is not clipped."""
    least = fmt.min if isinstance(fmt, IntFormat) and fmt.zero_point else -fmt.max
    asked = np.where(values >= 0, values / fmt.max, values / least)
    scale: Array = np.maximum(np.percentile(asked, percentile, axis=1), SMALLEST_SCALE)
    return scale.astype(np.float32)


def least_squares_scales(values: Array, fmt: Format) -> Array:
    """The scale of each row that quantizes it with the least squared error.

    Args:
        values: [rows, samples]; the largest magnitudes must be among the samples.
        fmt: A format with a scale.

    Returns:
        [rows], positive.
    """
    largest = _largest(values, fmt)
    share, error = _search(values, fmt, largest, _COARSE[:, None])
    for factors in _FINER:
        nearby, its_error = _search(values, fmt, largest, factors[:, None] * share)
        share = np.where(its_error < error, nearby, share)
        error = np.minimum(its_error, error)
    scale: Array = np.maximum(share * largest / fmt.max, SMALLEST_SCALE).astype(np.float32)
    return scale


def power_of_two_scales(values: Array, scales: Array, fmt: Format) -> Array:
    """Round scales to a power of two, each up or down, whichever has the less squared error.

    Args:
        values: [rows, samples].
        scales: [rows], positive.
        fmt: Their format.
    """
    below = np.exp2(np.floor(np.log2(scales))).astype(np.float32)
    errors = [
        np.square(rounded(values, tried[:, None], fmt) - values).sum(axis=1)
        for tried in (below, 2 * below)
    ]
    result: Array = np.where(errors[0] <= errors[1], below, 2 * below)
    return result


def _largest(values: Array, fmt: Format) -> npt.NDArray[np.float64]:
    """Per row, the threshold (the value of the format's maximum) that clips nothing."""
    if fmt.min == -fmt.max or not isinstance(fmt, IntFormat) or not fmt.zero_point:
        largest: npt.NDArray[np.float64] = np.abs(values).max(axis=1, initial=0.0)
        return largest.astype(np.float64)
    above = values.max(axis=1, initial=0.0) / max(fmt.max, 1.0)
    below = values.min(axis=1, initial=0.0) / fmt.min
    asked: npt.NDArray[np.float64] = np.maximum(above, below).astype(np.float64)
    return asked * fmt.max


def _search(
    values: Array,
    fmt: Format,
    largest: npt.NDArray[np.float64],
    shares: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The best of some shares, per row, and its squared error."""
    best = np.ones_like(largest)
    least = np.full_like(largest, np.inf)
    for share in np.broadcast_to(shares, (len(shares), len(largest))):
        scale = np.maximum(share * largest / fmt.max, SMALLEST_SCALE).astype(np.float32)
        difference = rounded(values, scale[:, None], fmt) - values
        error = np.einsum("rs,rs->r", difference, difference, dtype=np.float64)
        better = error < least
        best, least = np.where(better, share, best), np.where(better, error, least)
    return best, least


def rounded(x: Array, scale: Array, fmt: Format) -> Array:
    """Quantize and dequantize by the site's own arithmetic, which costs a few passes.

    It is that of :class:`~onnx_fliqs.formats.GridCode`, in float32.
    """
    code = grid_code(fmt)
    t = np.clip(x / scale, np.float32(code.lo), np.float32(code.hi))
    size, anchor = np.abs(t), np.float32(code.least)
    if code.factor:
        anchor = np.maximum(size * np.float32(code.factor), anchor)
    result: Array = np.copysign(anchor - (anchor - size), t) * scale
    return result
