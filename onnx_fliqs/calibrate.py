"""Switchable clipping thresholds: a scale for every (site, format), by least squared error.

FLIQS switches the clipping threshold together with the format. Here each is the one with the
least squared error on the site's values: the weights themselves, per output channel, and a
random sample of the activations.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.formats import Format, grid_code
from onnx_fliqs.runtime import make_session, run_session
from onnx_fliqs.sites import ScaleTable, SearchSpace, Site, computed_in_integers

__all__ = [
    "Observer",
    "activation_scales",
    "blended",
    "distortions",
    "least_squares_scales",
    "leave_room_for_biases",
    "sample_values",
    "sampled",
    "weight_scales",
]

Array: TypeAlias = npt.NDArray[np.float32]

# Thresholds that are tried, as shares of the largest magnitude: 2^-6 ... 2^0.75, four a binade
# (beyond 1, the numbers of a minifloat may lie better for the smaller values), then finer and
# finer looks around the best.
_COARSE: Final = 2.0 ** (np.arange(3, -25, -1, dtype=np.float64) / 4)
_FINER: Final = tuple(
    2.0 ** (np.array([-3, -2, -1, 1, 2, 3], dtype=np.float64) / parts) for parts in (16, 64)
)
_TENSOR_SAMPLE: Final = 16384
"""Values on which one scale for a whole tensor rests."""
_CHANNEL_SAMPLE: Final = 512
"""Values on which the scale of one channel rests."""
_DISTORTION_SAMPLE: Final = 1 << 20
_LARGE_WEIGHT: Final = 1 << 24
"""A larger one is represented by every so-many-th number of each channel."""
_SMALLEST_SCALE: Final = 1e-12
"""Keeps t = x / scale finite for tensors of zeros."""
_SMALLEST_CHANNEL: Final = 2.0**-14
"""Least scale of a channel as a share of its tensor's largest: a dead channel must not make
the int32 code of its bias overflow."""
_LARGEST_BIAS_CODE: Final = 2.0**30
"""Half of what int32 holds: training and bias correction move biases after calibration."""


def least_squares_scales(values: Array, fmt: Format) -> Array:
    """The scale of each row that quantizes it with the least squared error.

    Args:
        values: [rows, samples]; the largest magnitudes must be among the samples.
        fmt: A format with a scale.

    Returns:
        [rows], positive.
    """
    largest = np.abs(values).max(axis=1, initial=0.0).astype(np.float64)
    share, error = _search(values, fmt, largest, _COARSE[:, None])
    for factors in _FINER:
        nearby, its_error = _search(values, fmt, largest, factors[:, None] * share)
        share = np.where(its_error < error, nearby, share)
        error = np.minimum(its_error, error)
    scale: Array = np.maximum(share * largest / fmt.max, _SMALLEST_SCALE).astype(np.float32)
    return scale


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
        scale = np.maximum(share * largest / fmt.max, _SMALLEST_SCALE).astype(np.float32)
        difference = _fast_fake_quantize(values, scale[:, None], fmt) - values
        error = np.einsum("rs,rs->r", difference, difference, dtype=np.float64)
        better = error < least
        best, least = np.where(better, share, best), np.where(better, error, least)
    return best, least


def _fast_fake_quantize(x: Array, scale: Array, fmt: Format) -> Array:
    """The site's own float32 arithmetic (see GridCode), which costs a few passes."""
    code = grid_code(fmt)
    t = np.clip(x / scale, np.float32(code.lo), np.float32(code.hi))
    magic = np.float32(code.magic)
    fixed = (t + magic) - magic
    if code.splitter != 1.0:
        p = t * np.float32(code.splitter)
        fixed = np.where(np.abs(t) < np.float32(code.threshold), fixed, p - (p - t))
    result: Array = fixed * scale
    return result


def sampled(values: npt.ArrayLike, count: int, rng: np.random.Generator) -> Array:
    """At most ``count`` of the values, flat, the smallest and the largest among them."""
    flat = np.asarray(values, np.float32).reshape(-1)
    if flat.size <= count:
        return flat
    chosen = flat[rng.integers(0, flat.size, count)]
    chosen[:2] = flat.min(), flat.max()
    return chosen


def weight_scales(
    space: SearchSpace, weights: Mapping[str, npt.NDArray[Any]], seed: int
) -> dict[tuple[str, str], Array]:
    """Scales of every weight site in every format.

    Args:
        space: What is searched.
        weights: Value name → weight.
        seed: For the sample of large channels.
    """
    table: dict[tuple[str, str], Array] = {}
    for index, site in enumerate(space.sites):
        if not site.is_weight:
            continue
        rows = _rows(np.asarray(weights[site.tensor], np.float32), site)
        most = _TENSOR_SAMPLE if site.axis is None else _CHANNEL_SAMPLE
        if rows.shape[1] > most:
            rng = np.random.default_rng([seed, index])
            columns = rng.choice(rows.shape[1], most - 2, replace=False)
            ends = np.stack([rows.min(axis=1), rows.max(axis=1)], axis=1)
            rows = np.concatenate([rows[:, columns], ends], axis=1)
        for fmt in space.site_formats(site):
            scales = least_squares_scales(rows, fmt)
            floor = np.float32(scales.max() * _SMALLEST_CHANNEL)
            table[site.name, fmt.name] = np.maximum(scales, floor)
    return table


def leave_room_for_biases(
    space: SearchSpace, scales: ScaleTable, weights: Mapping[str, npt.NDArray[Any]]
) -> dict[tuple[str, str], Array]:
    """Enlarge the scales of weights beside which the code of a bias would not fit in int32.

    A bias beside integer products is stored in units of the product of two scales. Where an
    activation was always 0, or a channel has hardly any weights, that unit is so small that a
    common bias is beyond int32. The weights that a larger scale rounds away count for nothing
    beside such a bias.

    Args:
        space: What is searched.
        scales: Scales of activations and weights.
        weights: Value name → weight or bias.

    Returns:
        All scales.
    """
    table = dict(scales)
    for site in space.sites:
        if site.bias_of is None:
            continue
        activation, weight = (space.site[name] for name in site.bias_of)
        formats = [fmt for fmt in space.formats if computed_in_integers(fmt)]
        taken = {activation.effective(fmt).name for fmt in formats}
        step = min(float(scales[activation.name, name][0]) for name in taken)
        bias = np.abs(np.asarray(weights[site.tensor], np.float64))
        largest = bias if weight.channels == bias.size else bias.max(keepdims=True, initial=0)
        floor = (largest / (step * _LARGEST_BIAS_CODE)).astype(np.float32)
        for fmt in formats:
            key = weight.name, weight.effective(fmt).name
            table[key] = np.maximum(table[key], floor)
    return table


def _rows(weight: Array, site: Site) -> Array:
    """One row per channel."""
    if site.axis is None:
        return weight.reshape(1, -1)
    return np.moveaxis(weight, site.axis, 0).reshape(site.channels, -1)


def activation_scales(
    space: SearchSpace, samples: Mapping[str, Array]
) -> dict[tuple[str, str], Array]:
    """Scales of every activation site in every format.

    The scale that several sites share suits the samples of all of them together.

    Args:
        space: What is searched.
        samples: Value name → flat sample of its values.
    """
    sharing: dict[str, dict[str, None]] = {}
    for site in space.sites:
        if not site.is_weight:
            sharing.setdefault(site.same_scale_as or site.name, {})[site.tensor] = None
    table: dict[tuple[str, str], Array] = {}
    known: dict[tuple[tuple[str, ...], str], Array] = {}
    for site in space.sites:
        if site.is_weight:
            continue
        tensors = tuple(sharing[site.same_scale_as or site.name])
        for fmt in space.site_formats(site):
            key = (tensors, fmt.name)
            if key not in known:
                values = np.concatenate([samples[tensor] for tensor in tensors])
                known[key] = least_squares_scales(values[None, :], fmt)
            table[site.name, fmt.name] = known[key]
    return table


class Observer:
    """Runs a model and hands out values inside it."""

    def __init__(self, model: ir.Model, names: Sequence[str]) -> None:
        """Build the session.

        Args:
            model: A canonical model.
            names: Values to observe; graph inputs are allowed.
        """
        tapped = model.clone()
        values = ir.convenience.create_value_mapping(tapped.graph)
        self._inputs = {str(value.name) for value in tapped.graph.inputs}
        self.names = tuple(dict.fromkeys(names))
        self._inside = [name for name in self.names if name not in self._inputs]
        tapped.graph.outputs[:] = [values[name] for name in self._inside]
        self._session = make_session(tapped) if self._inside else None

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """The observed values for one batch, by name."""
        found = {name: feeds[name] for name in self.names if name in self._inputs}
        if self._session is not None:
            arrays = run_session(self._session, self._inside, feeds)
            found |= dict(zip(self._inside, arrays, strict=True))
        return found


def sample_values(
    batches: Iterable[Mapping[str, npt.NDArray[Any]]], count: int, seed: int
) -> dict[str, Array]:
    """Sample values that an :class:`Observer` saw.

    Args:
        batches: The values of each batch, by name.
        count: Number of batches, among which the sample is shared out.
        seed: For the choice.

    Returns:
        Value name → about 16,384 values, the extremes of each batch among them.
    """
    share = max(2, _TENSOR_SAMPLE // max(1, count))
    parts: dict[str, list[Array]] = {}
    for index, values in enumerate(batches):
        for position, (name, array) in enumerate(values.items()):
            rng = np.random.default_rng([seed, index, position])
            parts.setdefault(name, []).append(sampled(array, share, rng))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def distortions(
    space: SearchSpace,
    samples: Mapping[str, Array],
    weights: Mapping[str, npt.NDArray[Any]],
    scales: ScaleTable,
) -> tuple[npt.NDArray[np.float64], ...]:
    """How much each format distorts the operands of the layers of each decision.

    Returns:
        For each decision, for each format: the sum, over its layers and their sites, of the
        squared error divided by the sum of squares.
    """
    table = {layer.name: np.zeros(len(space.formats)) for layer in space.layers}
    for site in space.sites:
        if site.bias_of is not None:
            continue
        source = weights if site.is_weight else samples
        values = np.asarray(source[site.tensor], np.float32)
        shape = site.broadcast_shape
        if values.size > _DISTORTION_SAMPLE and site.axis is None:
            values = values.reshape(-1)[:_DISTORTION_SAMPLE]
        elif values.size > _LARGE_WEIGHT:
            values = _rows(values, site)[:, :: -(-values.size // _LARGE_WEIGHT)]
            shape = (site.channels, 1)
        power = float(np.sum(np.square(values, dtype=np.float64))) or 1.0
        for index, fmt in enumerate(space.formats):
            taken = site.effective(fmt)
            scale = scales.get((site.name, taken.name), np.ones(1, np.float32))
            spread = scale.reshape(shape if scale.size > 1 else ())
            error = _fast_fake_quantize(values, spread, taken) - values
            for name in site.layers:
                table[name][index] += float(np.sum(np.square(error, dtype=np.float64))) / power
    return tuple(np.sum([table[name] for name in names], axis=0) for names in space.decisions)


def blended(old: ScaleTable, new: ScaleTable, keep: float) -> dict[tuple[str, str], Array]:
    """Running scales: the geometric mean, weighted, of the old and the new."""
    return {
        key: (old[key] ** keep * new[key] ** (1 - keep)).astype(np.float32)
        if key in old
        else new[key]
        for key in new
    }
