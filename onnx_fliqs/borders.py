"""Costs of pairs of decisions: what it takes to convert a tensor between two neighbours.

A table of costs is a sum over decisions. In runtimes with integer kernels, an integer layer
beside a float layer costs more than the two do among their like; a budget that holds in the
runtime has to count that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.cost import CostTable
from onnx_fliqs.signs import REARRANGING
from onnx_fliqs.sites import SearchSpace

__all__ = ["Border", "neighbours", "shares", "spent"]

_ONE_INPUT = REARRANGING | {"Relu", "Clip"}
"""Operators that kernels fuse with the layer in front, or that take whatever it writes."""


@dataclass(frozen=True, slots=True)
class Border:
    """A cost that arises where two decisions choose different kinds of numbers."""

    first: int
    second: int
    """The two decisions."""
    kinds: tuple[tuple[str, ...], tuple[str, ...]]
    """Of each choice of the first, and of the second."""
    cost: float
    """Never negative."""
    budget: int = 0
    """The one of several budgets in which it counts."""

    def crossed(self, choices: Sequence[int]) -> bool:
        """Whether the two differ."""
        mine, theirs = self.kinds
        return mine[choices[self.first]] != theirs[choices[self.second]]


def shares(
    costs: CostTable, borders: Sequence[Border], choices: Sequence[int]
) -> npt.NDArray[np.float64]:
    """What an assignment costs of each budget, borders included: [budgets]."""
    own = sum(row[c] for row, c in zip(costs, choices, strict=True))
    found = np.array(own, np.float64, ndmin=1)
    crossed = np.zeros_like(found)
    for border in borders:
        if border.crossed(choices):
            crossed[border.budget] += border.cost
    return found + crossed


def spent(costs: CostTable, borders: Sequence[Border], choices: Sequence[int]) -> float:
    """What an assignment costs, borders included: of several budgets, the largest share."""
    return float(np.max(shares(costs, borders, choices)))


def neighbours(model: ir.Model, space: SearchSpace) -> tuple[tuple[int, int], ...]:
    """Pairs of decisions between which a tensor may have to be converted.

    All that read a quantized tensor, its maker, and where it is computed from other quantized
    tensors without a layer, the readers and makers of those.

    Args:
        model: The canonical model.
        space: Its layers and sites.
    """
    decision = {name: i for i, names in enumerate(space.decisions) for name in names}
    makers = _makers(model, space)
    around: dict[str, set[int]] = {}
    pairs: set[tuple[int, int]] = set()
    for site in space.sites:
        if site.is_weight:
            continue
        own = {decision[name] for name in (*site.layers, *makers.get(site.tensor, ()))}
        behind = set().union(*(around[name] for name in site.operands))
        # What lies behind a tensor that a layer reads is no neighbour of what follows it.
        around[site.name] = own or behind
        near = sorted(own | behind)
        pairs |= {(a, b) for i, a in enumerate(near) for b in near[i + 1 :]}
    return tuple(sorted(pairs))


def _makers(model: ir.Model, space: SearchSpace) -> Mapping[str, tuple[str, ...]]:
    """Value name → the layer that wrote it, looking through what only rearranges it."""
    makers: dict[str, tuple[str, ...]] = {}
    for node in model.graph:
        found: tuple[str, ...] = ()
        if node.name in space.layer:
            found = (str(node.name),)
        elif node.op_type in _ONE_INPUT and node.inputs and node.inputs[0] is not None:
            found = makers.get(str(node.inputs[0].name), ())
        makers.update((str(value.name), found) for value in node.outputs)
    return makers
