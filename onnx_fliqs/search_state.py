"""The state of a search: one immutable value, and its form in a checkpoint."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_fliqs.controller import Choices, Controller
from onnx_fliqs.convergence import History
from onnx_fliqs.sites import ScaleTable
from onnx_fliqs.train_step import TrainState, TrainStep

__all__ = ["Best", "Scales", "SearchState", "from_arrays", "measurements", "to_arrays"]

Array: TypeAlias = npt.NDArray[Any]
Scales: TypeAlias = dict[tuple[str, str], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Best:
    """The best weights and thresholds of the fixed assignment so far."""

    loss: float
    """Loss on the held-out samples, by which they are the best."""
    weights: Mapping[str, Array]
    scales: Scales


@dataclass(frozen=True, slots=True)
class SearchState:
    """Everything that a step changes."""

    step: int
    """Steps done."""
    train: TrainState
    controller: Any
    """What the policy has learned; the controller knows its form."""
    scales: Scales
    history: History
    measured: tuple[npt.NDArray[np.float64], ...] = ()
    """For each decision, what each choice costs the float network, if that was measured."""
    earlier: Choices | None = None
    """What would have been fixed at three quarters of the search phase."""
    final: Choices | None = None
    """The fixed assignment, once there is one."""
    entropy: float = math.nan
    """Of the policy when it was fixed."""
    untrained_loss: float = math.nan
    """Loss of the fixed assignment on the held-out samples, with the float model's weights."""
    best: Best | None = None
    skipped: int = 0
    """Steps in a row whose gradient was not finite."""
    lost: int = 0
    """All such steps."""


def to_arrays(state: SearchState, controller: Controller[Any]) -> dict[str, Array]:
    """The state as arrays, by name."""
    arrays: dict[str, Array] = {
        "step": np.asarray(state.step),
        "skipped": np.asarray(state.skipped),
        "lost": np.asarray(state.lost),
        "entropy": np.asarray(state.entropy),
        "untrained_loss": np.asarray(state.untrained_loss),
        **{f"train/{name}": array for name, array in state.train.arrays().items()},
        **{
            f"controller/{name}": array
            for name, array in controller.to_arrays(state.controller).items()
        },
        **_scale_arrays("scales", state.scales),
        "history/sums": state.history.sums,
        "history/counts": state.history.counts,
        **{f"measured/{index}": row for index, row in enumerate(state.measured)},
    }
    assignments = {"earlier": state.earlier, "final": state.final}
    arrays |= {n: np.array(a, np.int64) for n, a in assignments.items() if a is not None}
    if state.best is not None:
        arrays |= {
            "best": np.asarray(state.best.loss),
            **{f"best_weights/{name}": a for name, a in state.best.weights.items()},
            **_scale_arrays("best_scales", state.best.scales),
        }
    return arrays


def measurements(arrays: Mapping[str, Array]) -> tuple[Array, ...]:
    """What was measured, of what :func:`to_arrays` wrote: the controller is made of it."""
    rows = _below("measured", arrays)
    return tuple(rows[str(index)] for index in range(len(rows)))


def from_arrays(
    arrays: Mapping[str, Array], step: TrainStep, controller: Controller[Any]
) -> SearchState:
    """The state that :func:`to_arrays` wrote.

    Args:
        arrays: By name.
        step: Wraps the weights.
        controller: Knows the form of what it has learned.
    """
    best = None
    if "best" in arrays:
        best = Best(
            float(arrays["best"]),
            _below("best_weights", arrays),
            _scales_below("best_scales", arrays),
        )
    return SearchState(
        step=int(arrays["step"]),
        train=step.restore(_below("train", arrays)),
        controller=controller.from_arrays(_below("controller", arrays)),
        scales=_scales_below("scales", arrays),
        history=History(arrays["history/sums"], arrays["history/counts"]),
        measured=measurements(arrays),
        earlier=_choices("earlier", arrays),
        final=_choices("final", arrays),
        entropy=float(arrays["entropy"]),
        untrained_loss=float(arrays["untrained_loss"]),
        best=best,
        skipped=int(arrays["skipped"]),
        lost=int(arrays["lost"]),
    )


def _choices(name: str, arrays: Mapping[str, Array]) -> Choices | None:
    return tuple(map(int, arrays[name])) if name in arrays else None


def _below(prefix: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    start = f"{prefix}/"
    return {k.removeprefix(start): v for k, v in arrays.items() if k.startswith(start)}


def _scale_arrays(prefix: str, scales: ScaleTable) -> dict[str, Array]:
    """Format first: a site's name may hold any character."""
    return {f"{prefix}/{fmt}/{site}": array for (site, fmt), array in scales.items()}


def _scales_below(prefix: str, arrays: Mapping[str, Array]) -> Scales:
    pairs = ((name.split("/", 1), array) for name, array in _below(prefix, arrays).items())
    return {(site, fmt): array for (fmt, site), array in pairs}
