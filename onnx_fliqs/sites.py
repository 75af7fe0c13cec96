"""What is searched: layers, the sites that quantize their operands, and the formats.

A :class:`Layer` chooses a precision; a :class:`Site` is a tensor that is quantized in the
format that its deciding layers chose for it. What a choice feeds into the graph are the two
flat arrays of :class:`SiteValues`.
"""

import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_fliqs.formats import (
    FORMATS,
    Format,
    GridCode,
    IntFormat,
    grid_code,
    is_passthrough,
    unsigned_variant,
)
from onnx_fliqs.partition import united
from onnx_fliqs.precision import Precision, PrecisionMap

__all__ = [
    "FormatMap",
    "Layer",
    "ScaleTable",
    "SearchSpace",
    "Site",
    "SiteValues",
    "Skipped",
]

FormatMap: TypeAlias = Mapping[str, Format]
"""Site name → its format."""

ScaleTable: TypeAlias = Mapping[tuple[str, str], npt.NDArray[np.float32]]
"""(site name, format name) → scales, of shape [site.scale_count(format)]: the switchable
thresholds."""

_BIAS: Final = IntFormat(bits=32)
_CUT_OFF: Final = 1.01
"""How far apart the scales may be that fit the two limits of a Clip."""
_WIDE_BIAS: Final = IntFormat(bits=32, step=512)
"""Beside activations of more than 8 bits, whose products make codes that exceed 2^22: beyond,
float32 does not round to whole numbers any more. Coarser it is no less precise than beside
activations of 8 bits, and exact to the end of int32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """An operator whose operands are quantized: a product, a recurrent cell, an embedding."""

    name: str
    """Name of its node."""
    op_type: str
    weights: tuple[str, ...]
    """Names of its constant operands; none for the product of two activations."""
    params: int
    """Elements of its weights, less those that an earlier layer has too."""
    macs: int = 0
    """Multiply-accumulates for one sample; 0 where they are not known."""
    frozen: str | None = None
    """Why the weights are not trained; None where they are."""
    weight_only: str | None = None
    """Why the activations stay float; None where they are quantized. Such a layer multiplies
    in float, whatever its format: it counts in bytes, not in bit operations."""
    excluded: frozenset[str] = frozenset()
    """Names of the precisions that it cannot take."""
    rule: str | None = None
    """The rule that says what it may take, besides the target; None without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A tensor that is quantized."""

    name: str
    tensor: str
    """The value that is quantized."""
    layers: tuple[str, ...]
    """Layers that decide the format: the one with the fewest bits that any of them chose."""
    consumers: tuple[tuple[str, int], ...]
    """(node name, input index) of every use that reads the quantized tensor."""
    is_weight: bool
    is_output: bool = False
    """Whether the graph hands out the quantized tensor, under the tensor's name."""
    after: str | None = None
    """Name of an earlier site of this tensor whose output is quantized once more, for readers
    in another format: a conversion. With the same format on the same scale it is none."""
    operands: tuple[str, ...] = ()
    """Names of earlier sites: all operands of the operator that computes this tensor, where it
    can run in their format. The widest of theirs is one more choice that counts."""
    axis: int | None = None
    """Axis of the scales; None for one scale."""
    channels: int = 1
    """Number of scales, where they are not in groups."""
    rank: int = 0
    """Rank of the tensor; of interest only with an axis."""
    group_axis: int | None = None
    """Axis along which some precision has groups; of a weight that is a matrix."""
    groups: int = 1
    """Number of the smallest groups that some precision has."""
    group: int | None = None
    """Size of the smallest groups that some precision has."""
    negative: float | None = None
    """Share of the range that lies below zero: 0 where no value is negative; None where the
    range is symmetric."""
    same_scale_as: str | None = None
    """Name of an earlier site with which this one shares its scale."""
    limits: tuple[float, float] | None = None
    """The least and the most that a Clip in front lets through. An integer kernel computes the
    Clip in the same pass if no code lies beyond them."""
    fixed_range: tuple[float, float] | None = None
    """The least and the largest number, where the scale does not depend on data."""
    most_bits: int | None = None
    """Of integers; wider ones are asked of other operands only."""
    bias_of: tuple[str, str] | None = None
    """For a bias that is added to integer products: the names of the sites of the activation
    and of the weight, whose scales multiply to its own."""
    every_width: bool = False
    """For a bias: whether it is one of integers of any width, not only of 8 bits."""

    @property
    def follows_weights(self) -> bool:
        """Whether it is in the format that layers choose for weights, not for activations.

        The constants of operators between layers are in the format of the activations there.
        """
        return self.is_weight and not self.operands

    def asked(self, precision: Precision) -> Format:
        """What a layer of some precision asks of this tensor."""
        if self.bias_of is None:
            fmt = precision.weights if self.follows_weights else precision.activations
            grouped = fmt.group is not None and self.group_axis is None
            return replace(fmt, group=None) if grouped else fmt
        formats = (precision.weights, precision.activations)
        integers = all(isinstance(fmt, IntFormat) for fmt in formats)
        rounded = integers if self.every_width else precision.in_integers
        return _bias(precision.activations) if rounded else FORMATS["float32"]

    def effective(self, fmt: Format) -> Format:
        """The format as this tensor takes it: shifted where its range is not symmetric."""
        if not isinstance(fmt, IntFormat):
            return fmt
        if self.bias_of is not None:
            return fmt if fmt.bits == _BIAS.bits else _bias(fmt)
        if self.most_bits is not None:
            fmt = replace(fmt, bits=min(fmt.bits, self.most_bits))
        if self.negative is None:
            return fmt
        if self.fixed_range is None:
            return unsigned_variant(fmt, self.negative)
        low, high = self.fixed_range
        zero_point = round(-low / (high - low) * (1 << fmt.bits))
        return IntFormat(bits=fmt.bits, signed=False, zero_point=zero_point)

    def fixed_scale(self, fmt: Format) -> float:
        """The scale in a format, where it follows from ``fixed_range``."""
        assert self.fixed_range is not None
        low, high = self.fixed_range
        if isinstance(fmt, IntFormat) and not fmt.signed:
            return (high - low) / (1 << fmt.bits)
        largest = max(-low, high)
        return largest / (-fmt.min if isinstance(fmt, IntFormat) else fmt.max)

    def scale_count(self, fmt: Format) -> int:
        """Number of scales in a format."""
        return math.prod(self.scale_shape(fmt))

    def scale_shape(self, fmt: Format) -> tuple[int, ...]:
        """Shape of the scales in a format, as many axes as the tensor; () for one scale."""
        if self.axis is None and fmt.group is None:
            return ()
        shape = [self.channels if i == self.axis else 1 for i in range(self.rank)]
        if fmt.group is not None:
            assert self.group_axis is not None and self.group is not None  # noqa: PT018
            shape[self.group_axis] = self.groups * self.group // fmt.group
        return tuple(shape)

    def within_limits(
        self, fmt: Format, scales: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """The scales, made so small that no code lies beyond the limits.

        They stay as they are where that would cut off more than a hundredth on one side.
        """
        if self.limits is None or not isinstance(fmt, IntFormat):
            return scales
        ends = zip(self.limits, (fmt.min, fmt.max), strict=True)
        fitting = [limit / code for limit, code in ends if code != 0]
        if max(fitting) > _CUT_OFF * min(fitting):
            return scales
        # The product of scale and code is rounded, and has to stay within as well.
        return np.minimum(scales, np.float32(min(fitting) * (1 - 2**-20)))

    @property
    def broadcast_shape(self) -> tuple[int, ...]:
        """Shape in which the graph's scales broadcast against the tensor; () for one scale.

        With groups, the tensor has its axis cut in two: groups, and numbers of a group.
        """
        if self.group_axis is None:
            shape = [self.channels if i == self.axis else 1 for i in range(self.rank)]
            return () if self.axis is None else tuple(shape)
        shape = [self.channels if i == self.axis else 1 for i in range(self.rank)]
        shape[self.group_axis] = self.groups
        return (*shape[: self.group_axis + 1], 1, *shape[self.group_axis + 1 :])

    def against(self, scales: npt.NDArray[np.float32], fmt: Format) -> npt.NDArray[np.float32]:
        """The scales of a format, in a shape that broadcasts against the tensor.

        Args:
            scales: [scale_count(fmt)].
            fmt: The format.
        """
        shaped = scales.reshape(self.scale_shape(fmt))
        if fmt.group is None:
            return shaped
        assert self.group_axis is not None
        return np.repeat(shaped, fmt.group, axis=self.group_axis)

    def spread(self, scales: npt.NDArray[np.float32], fmt: Format) -> npt.NDArray[np.float32]:
        """The scales of a format, repeated for the smallest groups: what the graph reads.

        Args:
            scales: [scale_count(fmt)].
            fmt: The format.
        """
        if self.group_axis is None:
            return scales
        shaped = scales.reshape(self.scale_shape(fmt) or (1,) * self.rank)
        repeats = self.groups // shaped.shape[self.group_axis]
        shaped = np.repeat(shaped, repeats, axis=self.group_axis)
        return np.ascontiguousarray(shaped).reshape(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A node that looks quantizable and is left as it is."""

    name: str
    op_type: str
    reason: str


@dataclass(frozen=True, slots=True)
class SiteValues:
    """What an assignment feeds into a searchable graph."""

    codes: npt.NDArray[np.float32]
    """Shape [sites, 4]: the grid code of each site's format."""
    scales: npt.NDArray[np.float32]
    """Shape [sum of channels]: the scales of all sites, one after another."""


@dataclass(frozen=True)
class SearchSpace:
    """Layers, sites and the formats that each layer may take."""

    layers: tuple[Layer, ...]
    sites: tuple[Site, ...]
    precisions: tuple[Precision, ...]
    """Cheapest first; each layer may take all but those that it excludes."""
    skipped: tuple[Skipped, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    """Names of layers that have to take the same precision; groups may overlap."""
    power_of_two_scales: bool = False
    """Whether every scale is a power of two."""

    @cached_property
    def layer(self) -> Mapping[str, Layer]:
        """Layers by name."""
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def site(self) -> Mapping[str, Site]:
        """Sites by name."""
        return {site.name: site for site in self.sites}

    @cached_property
    def decisions(self) -> tuple[tuple[str, ...], ...]:
        """The layers of each decision, by name: one, or all that groups tie together."""
        return united(self.layer, self.groups)

    @cached_property
    def choices(self) -> tuple[tuple[Precision, ...], ...]:
        """For each decision, what all of its layers can take, cheapest first."""
        found = []
        for names in self.decisions:
            excluded = frozenset().union(*(self.layer[name].excluded for name in names))
            taken = [p for p in self.precisions if p.name not in excluded]
            found.append(tuple(sorted(taken, key=lambda p: self._counted(names, p).order)))
        return tuple(found)

    def _counted(self, names: Sequence[str], precision: Precision) -> Precision:
        """What a precision is to some layers: that of the operands which are quantized there.

        Where there are no weights, the activations alone count, and the weights where
        activations stay float.
        """
        layers = [self.layer[name] for name in names]
        if not any(layer.weights for layer in layers):
            return Precision(precision.activations, precision.activations)
        if all(layer.weight_only for layer in layers):
            return Precision(precision.weights, precision.weights)
        return precision

    @cached_property
    def choices_of(self) -> Mapping[str, tuple[Precision, ...]]:
        """For each layer, the choices of its decision."""
        return {
            name: choices
            for names, choices in zip(self.decisions, self.choices, strict=True)
            for name in names
        }

    @cached_property
    def as_precise(self) -> tuple[npt.NDArray[np.bool_], ...]:
        """For each decision, [choices, choices]: is the second at least as precise?"""
        counted = [
            [self._counted(names, precision) for precision in choices]
            for names, choices in zip(self.decisions, self.choices, strict=True)
        ]
        every = dict.fromkeys(itertools.chain.from_iterable(counted))
        index = {precision: i for i, precision in enumerate(every)}
        table = np.array([[b.as_precise_as(a) for b in index] for a in index], np.bool_)
        return tuple(
            table[np.ix_(rows, rows)] for rows in ([index[p] for p in row] for row in counted)
        )

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """For each precision, the choice of every decision that comes closest to it.

        That is the precision itself where it is a choice, else the next one with no fewer
        bits in either operand, else the most precise of all.
        """

        def sizes(
            names: Sequence[str], precision: Precision
        ) -> tuple[tuple[int, int, float, str], int, int]:
            counted = self._counted(names, precision)
            return counted.order, counted.weights.bits, counted.activations.bits

        rows = []
        for names, choices in zip(self.decisions, self.choices, strict=True):
            offered = [sizes(names, precision) for precision in choices]
            wanted = [sizes(names, precision) for precision in self.precisions]
            rows.append([_first_as_large(offered, each) for each in wanted])
        return tuple(zip(*rows, strict=True))

    @cached_property
    def uniform_choices(self) -> tuple[tuple[int, ...], ...]:
        """The levels, the least precise first.

        The operand with fewer bits decides, then the cost: rounding one operand finely does
        not undo that the other is rounded coarsely.
        """

        def rank(level: tuple[Precision, tuple[int, ...]]) -> tuple[object, ...]:
            precision, _ = level
            return min(precision.weights.bits, precision.activations.bits), precision.order

        levels = sorted(zip(self.precisions, self.levels, strict=True), key=rank)
        return tuple(choices for _, choices in levels)

    def assign(self, choices: Sequence[int]) -> dict[str, Precision]:
        """The precision of every layer.

        Args:
            choices: For each decision, an index into its ``choices``.
        """
        chosen = {
            name: precisions[choice]
            for names, precisions, choice in zip(
                self.decisions, self.choices, choices, strict=True
            )
            for name in names
        }
        return {layer.name: chosen[layer.name] for layer in self.layers}

    def fixed(self, chosen: PrecisionMap) -> "SearchSpace":
        """The space that leaves every layer one choice: its precision here."""
        names = {precision.name for precision in self.precisions}
        layers = (
            replace(layer, excluded=frozenset(names - {chosen[layer.name].name}))
            for layer in self.layers
        )
        return replace(self, layers=tuple(layers))

    @property
    def needs_mantissa(self) -> bool:
        """Whether a site has to round to a mantissa: any float format but float32."""
        return any(precision.needs_mantissa for precision in self.precisions)

    @property
    def byte_sites(self) -> frozenset[str]:
        """Names of the activations that are integers of at most 8 bits, on one scale."""
        return frozenset(
            site.name
            for site in self.sites
            if not site.is_weight
            and site.broadcast_shape == ()
            and all(map(_fits_a_byte, self._formats_asked(site)))
        )

    def uniform(self, precision: Precision) -> dict[str, Precision]:
        """The same precision for every layer."""
        return {layer.name: precision for layer in self.layers}

    def formats_taken(self, chosen: PrecisionMap) -> dict[str, Format]:
        """Site name → the format that it takes under an assignment (see :class:`Site`)."""
        decided: dict[str, Format] = {}
        for site in self.sites:
            votes = [site.asked(chosen[name]) for name in site.layers]
            if site.operands:
                votes.append(max((decided[name] for name in site.operands), key=_bits))
            decided[site.name] = min(votes, key=_bits)
        return {site.name: site.effective(decided[site.name]) for site in self.sites}

    def scales_taken(
        self, taken: FormatMap, scales: ScaleTable
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Site name → its scales, of shape [site.scale_count(format)].

        Args:
            taken: The format of every site.
            scales: Scales for every site in (at least) that format.
        """
        found: dict[str, npt.NDArray[np.float32]] = {}
        for site in self.sites:
            fmt = taken[site.name]
            if is_passthrough(fmt):
                found[site.name] = np.ones(site.channels, np.float32)
            elif site.bias_of is None:
                found[site.name] = site.within_limits(fmt, scales[site.name, fmt.name])
            else:
                activation, weight = (found[name] for name in site.bias_of)
                product = np.broadcast_to(activation * weight, site.channels)
                found[site.name] = product.astype(np.float32)
        return found

    def values(self, chosen: PrecisionMap, scales: ScaleTable) -> SiteValues:
        """What an assignment feeds into the searchable graph.

        Args:
            chosen: A precision for every layer.
            scales: Scales for every site in (at least) the format that it takes.
        """
        taken = self.formats_taken(chosen)
        steps = self.scales_taken(taken, scales)
        return SiteValues(
            np.array([grid_code(fmt) for fmt in taken.values()], np.float32).reshape(
                -1, len(GridCode._fields)
            ),
            np.concatenate(
                [site.spread(steps[site.name], taken[site.name]) for site in self.sites]
            ),
        )

    def site_formats(self, site: Site) -> tuple[Format, ...]:
        """Every format that needs scales of its own at this site."""
        if site.bias_of is not None:
            return ()
        return tuple(fmt for fmt in self._formats_asked(site) if not is_passthrough(fmt))

    def _formats_asked(self, site: Site) -> tuple[Format, ...]:
        """Every format that this site may take."""
        taken = {precision for name in site.layers for precision in self.choices_of[name]}
        asked = dict.fromkeys(
            site.asked(precision)
            for precision in self.precisions
            # What an operator between layers makes may follow from any of them.
            if site.operands or precision in taken
        )
        return tuple(map(site.effective, asked))


def _bias(activations: Format) -> Format:
    """What becomes of a bias beside integers of some format."""
    return _BIAS if activations.bits <= 8 else _WIDE_BIAS


def _first_as_large(rows: Sequence[tuple[Any, ...]], wanted: tuple[Any, ...]) -> int:
    """The first that is not below the wanted one in any place, else the last."""
    enough = (i for i, row in enumerate(rows) if all(map(operator.ge, row, wanted)))
    return next(enough, len(rows) - 1)


def _bits(fmt: Format) -> int:
    return fmt.bits


def _fits_a_byte(fmt: Format) -> bool:
    return isinstance(fmt, IntFormat) and fmt.bits <= 8
