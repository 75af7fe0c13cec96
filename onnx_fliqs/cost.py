"""What an assignment costs, and the budgets that bound it.

The costs are sums over layers, so they are tables [decision][choice]:

* BOPs = sum of MACs * bits(weights) * bits(activations) (FLIQS and HAWQ-V3; first and last
  layers count like the others), of the layers whose activations are quantized as well;
* bytes = sum of weight elements * bits / 8, of all layers, and four for the scale of each
  group.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_fliqs.errors import ConfigError, InfeasibleError
from onnx_fliqs.formats import Format
from onnx_fliqs.precision import Precision, PrecisionMap, in_words
from onnx_fliqs.sites import Layer, SearchSpace

__all__ = [
    "Budget",
    "BudgetKind",
    "Cost",
    "CostTable",
    "by_budget",
    "check_feasible",
    "cost_of",
    "cost_table",
    "counted_macs",
    "default_budget",
    "layer_bops",
    "layer_bytes",
    "rounded_up",
]

CostTable: TypeAlias = tuple[npt.NDArray[np.float64], ...]
"""For each decision, the cost of each of its choices: [choices], or, where there are several
budgets, as shares of each of them: [choices, budgets]."""

_INT8_BITS: Final = 8
_SCALE_BITS: Final = 32
_MOST_NAMES: Final = 16
"""Precisions that a message lists; more are all pairs of some formats."""
_ROUNDING: Final = 1e-10
"""Relative error of float arithmetic on budgets, with room to spare."""


class BudgetKind(enum.Enum):
    """In what a budget is stated."""

    BITS = "bits"
    """Effective bits, sqrt(BOPs / MACs)."""
    BOPS = "bops"
    """BOPs as a fraction of those of uniform int8."""
    SIZE = "size"
    """Weight bytes as a fraction of those of uniform int8."""
    LATENCY = "latency"
    """Time of a run as a fraction of the float model's, both as a latency table has them."""


@dataclass(frozen=True, slots=True)
class Budget:
    """An upper bound on the cost."""

    kind: BudgetKind
    value: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value > 0):
            raise ConfigError(f"--{self.kind.value} must be positive, got {self.value:g}")

    def __str__(self) -> str:
        return f"--{self.kind.value} {self.value:g}"

    def limit(self, space: SearchSpace) -> float:
        """The bound in the unit of :func:`cost_table`."""
        power = 2 if self.kind is BudgetKind.BITS else 1
        return math.prod([self.value] * power) * _unit(space, self.kind)

    def used(self, share: float) -> float:
        """A share of the bound, in the unit of the budget."""
        return self.value * (math.sqrt(share) if self.kind is BudgetKind.BITS else share)

    def stated(self, space: SearchSpace, cost: float) -> float:
        """A cost of :func:`cost_table`, restated in the unit of the budget."""
        share = cost / _unit(space, self.kind)
        return math.sqrt(share) if self.kind is BudgetKind.BITS else share


@dataclass(frozen=True, slots=True)
class Cost:
    """What an assignment costs."""

    bops: float
    """Bit operations for one sample."""
    effective_bits: float
    """sqrt(BOPs / MACs): the uniform precision of the same cost."""
    weight_bytes: float
    """Bytes of all quantized weights, densely packed, with the scales of their groups."""
    relative_to_int8: float
    """BOPs as a fraction of uniform int8's."""


def counted_macs(layer: Layer) -> int:
    """The multiply-accumulates that a format makes cheaper."""
    return layer.macs if layer.weight_only is None else 0


def _unit(space: SearchSpace, kind: BudgetKind) -> int:
    """What a budget of 1 is in the unit of :func:`cost_table`."""
    if kind is BudgetKind.LATENCY:
        raise ValueError("the cost of latency is in latency_budget")
    if kind is BudgetKind.SIZE:
        return sum(layer.params for layer in space.layers) * _INT8_BITS // 8
    macs = sum(map(counted_macs, space.layers))
    return macs if kind is BudgetKind.BITS else macs * _INT8_BITS**2


def cost_table(space: SearchSpace, kind: BudgetKind) -> CostTable:
    """The cost of each choice of each decision, in BOPs or in bytes."""
    cost = layer_bytes if kind is BudgetKind.SIZE else layer_bops
    return tuple(
        np.array(
            [sum(cost(space.layer[name], p) for name in names) for p in choices], np.float64
        )
        for names, choices in zip(space.decisions, space.choices, strict=True)
    )


def by_budget(costs: CostTable) -> npt.NDArray[np.float64]:
    """The costs of all choices, one decision after another: [budgets, choices]."""
    return np.concatenate([row.reshape(len(row), -1) for row in costs]).T


def layer_bops(layer: Layer, precision: Precision) -> float:
    """Bit operations of a layer for one sample: MACs times the bits of both operands."""
    weights = precision.weights if layer.weights else precision.activations
    return float(counted_macs(layer) * weights.bits * precision.activations.bits)


def layer_bytes(layer: Layer, precision: Precision) -> float:
    """Bytes of the weights of a layer, with the scales of their groups."""
    return layer.params * stored_bits(precision.weights) / 8


def stored_bits(fmt: Format) -> float:
    """Bits of a stored number, with its share of the scale of its group."""
    return fmt.bits + (_SCALE_BITS / fmt.group if fmt.group else 0.0)


def cost_of(space: SearchSpace, chosen: PrecisionMap) -> Cost:
    """What an assignment costs."""
    macs = sum(map(counted_macs, space.layers))
    bops = sum(layer_bops(layer, chosen[layer.name]) for layer in space.layers)
    return Cost(
        bops=bops,
        effective_bits=math.sqrt(bops / macs) if macs else 0.0,
        weight_bytes=sum(layer_bytes(layer, chosen[layer.name]) for layer in space.layers),
        relative_to_int8=bops / (macs * _INT8_BITS**2) if macs else 0.0,
    )


def check_feasible(space: SearchSpace, budget: Budget) -> None:
    """Refuse a budget that no assignment meets.

    Raises:
        ConfigError: The model has nothing that such a budget counts.
        InfeasibleError: The message names the range that can be reached.
    """
    if not _unit(space, budget.kind):
        reason = "no layer has weights"
        if budget.kind is not BudgetKind.SIZE:
            reason = "of this model only weights are quantized; bound their bytes with --size"
        raise ConfigError(f"budget {budget} bounds nothing: {reason}")
    table = cost_table(space, budget.kind)
    low, high = (budget.stated(space, sum(pick(row) for row in table)) for pick in (min, max))
    if budget.value < low * (1 - _ROUNDING):
        least = rounded_up(low)
        most = max(least, f"{high:.4g}", key=float)
        raise InfeasibleError(
            f"budget {budget} cannot be met: with {_names(space.precisions)} this model"
            f" reaches --{budget.kind.value} {least} to {most}"
        )


def default_budget(space: SearchSpace, bits: float) -> Budget:
    """The budget of a uniform precision, as far as the space reaches.

    Effective bits, or bytes where no layer multiplies in its format.
    """
    kind = BudgetKind.BITS if _unit(space, BudgetKind.BITS) else BudgetKind.SIZE
    value = bits if kind is BudgetKind.BITS else bits / _INT8_BITS
    if not _unit(space, kind):
        return Budget(kind, value)
    table = cost_table(space, kind)
    low, high = (
        Budget(kind, 1).stated(space, sum(p(row) for row in table)) for p in (min, max)
    )
    return Budget(kind, min(max(value, low), high))


def rounded_up(value: float) -> str:
    """Four digits, never less than the value: a budget typed with them must be met."""
    text = f"{value:.4g}"
    if float(text) < value * (1 - _ROUNDING):
        text = f"{value + 10.0 ** (math.floor(math.log10(value)) - 3) / 2:.4g}"
    return text


def _names(precisions: Sequence[Precision]) -> str:
    words = in_words(precisions)
    if words.count(",") >= _MOST_NAMES:
        first, last = precisions[0].name, precisions[-1].name
        return f"{first} to {last} ({len(precisions)} precisions)"
    return words
