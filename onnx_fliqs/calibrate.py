"""Switchable clipping thresholds: a scale for every (site, format).

They rest on the site's values: the weights themselves, per output channel, and a random
sample of the activations. How they follow from these is told in ``thresholds``.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.formats import (
    FORMATS,
    Format,
    IntFormat,
    is_passthrough,
    unsigned_variant,
)
from onnx_fliqs.runtime import make_session, run_session
from onnx_fliqs.sites import ScaleTable, SearchSpace, Site
from onnx_fliqs.thresholds import (
    SMALLEST_SCALE,
    Thresholds,
    fit_scales,
    least_squares_scales,
    power_of_two_scales,
    rounded,
)

__all__ = [
    "Observer",
    "activation_scales",
    "blended",
    "distortions",
    "fit_to_activations",
    "negative_shares",
    "sample_values",
    "sampled",
    "weight_scales",
]

Array: TypeAlias = npt.NDArray[np.float32]
_Values: TypeAlias = tuple[tuple[str, ...], tuple[float, float] | None]
"""The tensors that a scale has to suit, and the range that is known beforehand."""

_TENSOR_SAMPLE: Final = 16384
"""Values on which one scale for a whole tensor rests."""
_CHANNEL_SAMPLE: Final = 512
"""Values on which the scale of one channel rests."""
_DISTORTION_SAMPLE: Final = 1 << 20
_LARGE_WEIGHT: Final = 1 << 24
"""A larger one is represented by every so-many-th number of each channel."""
_UNGROUPED: Final = FORMATS["float32"]
_SMALLEST_CHANNEL: Final = 2.0**-14
"""Least scale of a channel as a share of its tensor's largest: a dead channel must not make
the int32 code of its bias overflow."""
_LARGEST_BIAS_CODE: Final = 2.0**28
"""An eighth of what int32 holds: training and bias correction move biases after calibration,
and thresholds that are learned may halve both scales of which the unit is the product."""


def sampled(values: npt.ArrayLike, count: int, rng: np.random.Generator) -> Array:
    """At most ``count`` of the values, flat, the smallest and the largest among them."""
    flat = np.asarray(values, np.float32).reshape(-1)
    if flat.size <= count:
        return flat
    chosen = flat[rng.integers(0, flat.size, count)]
    chosen[:2] = flat.min(), flat.max()
    return chosen


def weight_scales(
    space: SearchSpace,
    weights: Mapping[str, npt.NDArray[Any]],
    seed: int,
    thresholds: Thresholds = Thresholds.SWITCHED,
) -> dict[tuple[str, str], Array]:
    """Scales of every weight site in every format.

    Args:
        space: What is searched.
        weights: Value name → weight.
        seed: For the sample of large channels.
        thresholds: Where to clip; formats of other groups share no threshold.
    """
    table: dict[tuple[str, str], Array] = {}
    for index, site in enumerate(space.sites):
        if not site.is_weight:
            continue
        weight = np.asarray(weights[site.tensor], np.float32)
        rng = np.random.default_rng([seed, index])
        channels = _sampled_columns(_rows(weight, site.scale_shape(_UNGROUPED)), rng)
        alike: dict[int | None, list[Format]] = {}
        for fmt in space.site_formats(site):
            alike.setdefault(fmt.group, []).append(fmt)
        for group, formats in alike.items():
            rows = channels if group is None else _rows(weight, site.scale_shape(formats[0]))
            fitted = fit_scales(rows, formats, thresholds)
            for fmt in formats:
                scales = fitted[fmt.name]
                scales = np.maximum(scales, np.float32(scales.max() * _SMALLEST_CHANNEL))
                if space.power_of_two_scales:
                    scales = power_of_two_scales(rows, scales, fmt)
                table[site.name, fmt.name] = scales
    return table


def fit_to_activations(
    space: SearchSpace, scales: ScaleTable, weights: Mapping[str, npt.NDArray[Any]]
) -> dict[tuple[str, str], Array]:
    """Change those scales of constants that follow from the scales of activations.

    A table shares the scale of the rows that are read of it. A bias beside integer products is
    stored in units of the product of two scales. Where an activation was always 0, or a
    channel has hardly any weights, that unit is so small that a common bias is beyond int32:
    there the scale of the weight is enlarged. The weights that it rounds away count for
    nothing beside such a bias.

    Args:
        space: What is searched.
        scales: Scales of activations and weights.
        weights: Value name → weight or bias.

    Returns:
        All scales.
    """
    table = dict(scales)
    for site in space.sites:
        if site.is_weight and site.same_scale_as is not None:
            # All formats that it can take: those of the layers that read it.
            for fmt in space.site_formats(space.site[site.same_scale_as]):
                table[site.name, fmt.name] = scales[site.same_scale_as, fmt.name]
        if site.bias_of is None:
            continue
        activation, weight = (space.site[name] for name in site.bias_of)
        # The bias of a normalization follows the operators in front of it.
        choices = space.choices_of[site.layers[0]] if site.layers else space.precisions
        precisions = [p for p in choices if isinstance(site.asked(p), IntFormat)]
        if not precisions:
            continue
        taken = {activation.effective(p.activations).name for p in precisions}
        step = min(float(scales[activation.name, name][0]) for name in taken)
        bias = np.abs(np.asarray(weights[site.tensor], np.float64))
        largest = bias if weight.channels == bias.size else bias.max(keepdims=True, initial=0)
        floor = (largest / (step * _LARGEST_BIAS_CODE)).astype(np.float32)
        if space.power_of_two_scales:
            floor = np.exp2(np.ceil(np.log2(np.maximum(floor, SMALLEST_SCALE))))
        for precision in precisions:
            key = weight.name, weight.asked(precision).name
            if key in table:
                table[key] = np.maximum(table[key], floor).astype(np.float32)
    return table


def _sampled_columns(rows: Array, rng: np.random.Generator) -> Array:
    """Some of the columns, and the extremes of each row, if there are many."""
    most = _TENSOR_SAMPLE if len(rows) == 1 else _CHANNEL_SAMPLE
    if rows.shape[1] <= most:
        return rows
    columns = rng.choice(rows.shape[1], most - 2, replace=False)
    ends = np.stack([rows.min(axis=1), rows.max(axis=1)], axis=1)
    return np.concatenate([rows[:, columns], ends], axis=1)


def _rows(weight: Array, scale_shape: Sequence[int]) -> Array:
    """One row for the numbers of each scale, in the order of the scales.

    Args:
        weight: Of any shape.
        scale_shape: As many axes, each length a divisor of the weight's; () for one scale.
    """
    if not scale_shape:
        return weight.reshape(1, -1)
    cut = [
        length
        for size, count in zip(weight.shape, scale_shape, strict=True)
        for length in (count, size // count)
    ]
    order = (*range(0, len(cut), 2), *range(1, len(cut), 2))
    return weight.reshape(cut).transpose(order).reshape(math.prod(scale_shape), -1)


def activation_scales(
    space: SearchSpace,
    samples: Mapping[str, Array],
    thresholds: Thresholds = Thresholds.SWITCHED,
) -> dict[tuple[str, str], Array]:
    """Scales of every activation site in every format.

    The scale that several sites share suits the samples of all of them together.

    Args:
        space: What is searched.
        samples: Value name → flat sample of its values.
        thresholds: Where to clip.
    """
    sharing: dict[str, dict[str, None]] = {}
    for site in space.sites:
        if not site.is_weight:
            sharing.setdefault(site.same_scale_as or site.name, {})[site.tensor] = None
    # Sites of the same values have the same scales, whichever of the formats they take.
    alike: dict[_Values, dict[Format, None]] = {}
    root_of: dict[_Values, Site] = {}
    key_of: dict[str, _Values] = {}
    for site in space.sites:
        if site.is_weight:
            continue
        root = space.site[site.same_scale_as or site.name]
        key = key_of[site.name] = tuple(sharing[root.name]), root.fixed_range
        root_of.setdefault(key, root)
        alike.setdefault(key, {}).update(dict.fromkeys(space.site_formats(site)))
    fitted: dict[_Values, dict[str, Array]] = {}
    for key, formats in alike.items():
        root = root_of[key]
        values = np.concatenate([samples[tensor] for tensor in sharing[root.name]])
        fitted[key] = _tensor_scales(root, values, list(formats), thresholds, space)
    return {
        (name, fmt.name): fitted[key][fmt.name]
        for name, key in key_of.items()
        for fmt in space.site_formats(space.site[name])
    }


def _tensor_scales(
    site: Site,
    values: Array,
    formats: Sequence[Format],
    thresholds: Thresholds,
    space: SearchSpace,
) -> dict[str, Array]:
    """The scales of an activation in some formats."""
    if site.fixed_range is not None:
        return {fmt.name: np.array([site.fixed_scale(fmt)], np.float32) for fmt in formats}
    rows = values[None, :]
    scales = fit_scales(rows, formats, thresholds)
    if space.power_of_two_scales:
        scales = {
            fmt.name: power_of_two_scales(rows, scales[fmt.name], fmt) for fmt in formats
        }
    return scales


def negative_shares(space: SearchSpace, samples: Mapping[str, Array]) -> dict[str, float]:
    """For each activation site, the share of its range that best lies below zero.

    Tried are the range of the sample, that of its bulk, and the symmetric one; the least
    squared error in the coarsest integer format of the space decides. What shares a scale
    shares its range.

    Args:
        space: What is searched.
        samples: Value name → flat sample of its values.

    Returns:
        Site name → 0 (no value is negative) to 1, of the sites that take integers.
    """
    integers = [
        p.activations for p in space.precisions if isinstance(p.activations, IntFormat)
    ]
    if not integers:
        return {}
    coarsest = min(integers, key=lambda fmt: fmt.bits)
    activations = [site for site in space.sites if not site.is_weight]
    tensors: dict[str, dict[str, None]] = {}
    for site in activations:
        tensors.setdefault(site.same_scale_as or site.name, {})[site.tensor] = None
    shares = {
        root: _negative_share(np.concatenate([samples[name] for name in names]), coarsest)
        for root, names in tensors.items()
    }
    return {site.name: shares[site.same_scale_as or site.name] for site in activations}


def _negative_share(values: Array, fmt: Format) -> float:
    if values.min(initial=0.0) >= 0:
        return 0.0
    tried = dict.fromkeys((0.5, *(_share_below(*ends) for ends in _ranges(values))))

    def error(share: float) -> float:
        grid = unsigned_variant(fmt, share)
        scale = least_squares_scales(values[None, :], grid)
        difference = rounded(values[None, :], scale[:, None], grid) - values
        return float(np.square(difference).sum())

    return min(tried, key=error)


def _ranges(values: Array) -> list[tuple[float, float]]:
    """From the least to the largest value, of all and of most."""
    return [
        tuple(np.quantile(values, [tail, 1 - tail]).tolist()) for tail in (0.0, 1e-3, 1e-2)
    ]


def _share_below(low: float, high: float) -> float:
    """Where zero lies between two ends."""
    low, high = min(low, 0.0), max(high, 0.0)
    return low / (low - high) if high > low else 0.0


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
            arrays = run_session(self._session, self._inside, feeds, borrow=True)
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
    numbers = itertools.count()
    # Not enumerated, which would keep these values while the next ones are computed.
    for values in batches:
        for name, array in _sampled_batch(values, share, [seed, next(numbers)]).items():
            parts.setdefault(name, []).append(array)
        del values
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _sampled_batch(
    values: Mapping[str, npt.NDArray[Any]], count: int, seed: Sequence[int]
) -> dict[str, Array]:
    """A sample of each value: a copy, however small the value is."""
    return {
        name: np.array(sampled(array, count, np.random.default_rng([*seed, position])))
        for position, (name, array) in enumerate(values.items())
    }


def distortions(
    space: SearchSpace,
    samples: Mapping[str, Array],
    weights: Mapping[str, npt.NDArray[Any]],
    scales: ScaleTable,
) -> tuple[npt.NDArray[np.float64], ...]:
    """How much each precision distorts the operands of the layers of each decision.

    Returns:
        For each decision, of shape [choices, 2]: the sum, over its layers and the sites that
        follow the format of weights and of activations, of the squared error divided by the
        sum of squares.
    """
    table: dict[tuple[str, str], npt.NDArray[np.float64]] = {}
    for site in space.sites:
        if site.bias_of is not None:
            continue
        source = weights if site.is_weight else samples
        values = np.asarray(source[site.tensor], np.float32)
        operand = np.array([site.follows_weights, not site.follows_weights], np.float64)
        known: dict[Format, float] = {}
        for name in site.layers:
            for precision in space.choices_of[name]:
                fmt = site.effective(site.asked(precision))
                if fmt not in known:
                    known[fmt] = _distortion(site, values, fmt, scales)
                key = (name, precision.name)
                table[key] = table.get(key, np.zeros(2)) + known[fmt] * operand
    return tuple(
        np.sum([[table.get((n, p.name), np.zeros(2)) for p in choices] for n in names], axis=0)
        for names, choices in zip(space.decisions, space.choices, strict=True)
    )


def _distortion(site: Site, values: Array, fmt: Format, scales: ScaleTable) -> float:
    """The squared error of a tensor in a format, divided by its sum of squares."""
    scale = np.ones(1, np.float32) if is_passthrough(fmt) else scales[site.name, fmt.name]
    if scale.size == 1:
        rows = values.reshape(1, -1)[:, :_DISTORTION_SAMPLE]
    else:
        rows = _rows(values, site.scale_shape(fmt))
        rows = rows[:, :: max(1, -(-values.size // _LARGE_WEIGHT))]
    error = rounded(rows, scale[:, None], fmt) - rows
    power = float(np.sum(np.square(rows, dtype=np.float64))) or 1.0
    return float(np.sum(np.square(error, dtype=np.float64))) / power


def blended(old: ScaleTable, new: ScaleTable, keep: float) -> dict[tuple[str, str], Array]:
    """Running scales: the geometric mean, weighted, of the old and the new."""
    return {
        key: (old[key] ** keep * new[key] ** (1 - keep)).astype(np.float32)
        if key in old
        else new[key]
        for key in new
    }
