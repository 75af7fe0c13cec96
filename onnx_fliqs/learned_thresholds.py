"""Clipping thresholds that training moves: which there are, and how they follow.

A threshold switches with the format, and has a scale for each. What is learned is the
logarithm of a factor that all formats of a site have in common: a site that clips too much in
one format does so in the next as well.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from onnx_fliqs.formats import is_passthrough
from onnx_fliqs.sites import FormatMap, ScaleTable, SearchSpace, Site

__all__ = ["Growth", "Threshold", "learned_thresholds"]

_FARTHEST: Final = 2.0
"""By what factor a threshold may leave the calibrated one. The codes of biases, in units of
the product of two, have room for as much."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """A threshold that is learned, or one for each channel of a weight."""

    sites: tuple[str, ...]
    """Names of the sites that share it."""
    shape: tuple[int, ...] = ()
    """In which the scales broadcast against a weight, of which it is then the only site; ()
    for one."""
    of_weight: bool = False

    @property
    def count(self) -> int:
        """How many numbers are learned."""
        return math.prod(self.shape)


def learned_thresholds(space: SearchSpace) -> tuple[Threshold, ...]:
    """What is learned: thresholds of activations, and of the channels of weights.

    A fixed range stays, and so do thresholds of groups, and all where every scale has to be a
    power of two.

    Args:
        space: What is searched.
    """
    if space.power_of_two_scales:
        return ()
    weights: list[Threshold] = []
    rooted: dict[str, list[Site]] = {}
    for site in space.sites:
        if not site.is_weight or site.same_scale_as is not None:
            rooted.setdefault(site.same_scale_as or site.name, []).append(site)
        elif site.bias_of is None and site.group_axis is None:
            weights.append(Threshold((site.name,), site.broadcast_shape, of_weight=True))
    return (*_of_activations(rooted.values()), *weights)


def _of_activations(sharing: Iterable[Sequence[Site]]) -> tuple[Threshold, ...]:
    # Sites of the same values have the same scales (see ``calibrate.activation_scales``).
    alike: dict[tuple[str, ...], list[Site]] = {}
    for sites in sharing:
        tensors = dict.fromkeys(site.tensor for site in sites if not site.is_weight)
        alike.setdefault(tuple(tensors), []).extend(sites)
    return tuple(
        Threshold(tuple(site.name for site in sites))
        for sites in alike.values()
        if all(site.fixed_range is None and site.broadcast_shape == () for site in sites)
    )


class Growth:
    """Moves scales as thresholds do, in all formats, but none farther than by a factor of two.

    All scales are moved at once: there are as many tables as sites and formats.
    """

    def __init__(self, thresholds: Sequence[Threshold], calibrated: ScaleTable) -> None:
        """Say what is learned, and from where."""
        self._thresholds = thresholds
        formats: dict[str, list[tuple[str, str]]] = {}
        for key in calibrated:
            formats.setdefault(key[0], []).append(key)
        self._keys: list[tuple[str, str]] = []
        places: list[npt.NDArray[np.intp]] = []
        start = 0
        for threshold in thresholds:
            numbers = np.arange(start, start + threshold.count)
            start += threshold.count
            own = [key for name in threshold.sites for key in formats.get(name, ())]
            self._keys += own
            places += [numbers] * len(own)
        self._places = np.concatenate([*places, np.zeros(0, np.intp)])
        self._ends = np.cumsum([len(numbers) for numbers in places]).tolist()
        self._calibrated = self._flat(calibrated)

    def __call__(
        self, scales: ScaleTable, growth: npt.NDArray[np.float32], taken: FormatMap
    ) -> dict[tuple[str, str], npt.NDArray[np.float32]]:
        """The scales after a step.

        Args:
            scales: Before it.
            growth: By what the logarithms change, one threshold after another.
            taken: The format of every site in the step. One that has no scale says nothing of
                its threshold.
        """
        speaks = [
            not all(is_passthrough(taken[name]) for name in threshold.sites)
            for threshold in self._thresholds
        ]
        counts = [threshold.count for threshold in self._thresholds]
        factors = np.exp(np.where(np.repeat(speaks, counts), growth, np.float32(0)))
        moved = np.clip(
            self._flat(scales) * factors[self._places],
            self._calibrated / _FARTHEST,
            self._calibrated * _FARTHEST,
        )
        starts = [0, *self._ends]
        pieces = zip(self._keys, starts, self._ends, strict=False)
        return {**scales, **{key: moved[start:end] for key, start, end in pieces}}

    def _flat(self, scales: ScaleTable) -> npt.NDArray[np.float32]:
        return np.concatenate([*(scales[key] for key in self._keys), np.zeros(0, np.float32)])
