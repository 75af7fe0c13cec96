"""The controllers on a planted problem: how close to the best assignment do they come?

Layers have log-normal costs, and their weights and activations log-normal sensitivities; the
loss of an assignment is a level plus the sum of sensitivity * 4^-bits over both operands, its
excess observed with log-normal noise. A layer has one format for both (``tied``) or one for
each (``separate``), and a budget of uniform 5 bits. The critic is told distortions that are
wrong by a log-normal factor, as calibration's are: one per operand, or, as ``critic, one
sensitivity``, their sum. After as many updates as a search makes, each policy is projected
onto the budget. ``gap`` is the excess loss over the best assignment, found by integer
programming, in units of the uniform assignment's excess: 0 is perfect, 1 no better than
uniform precision::

    python benchmarks/controllers.py --seeds 16
    python benchmarks/controllers.py --seeds 16 --settings --updates 165 --noise 0.3

``--settings`` compares the settings of both controllers instead, one changed at a time.
"""

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from common import provenance
from scipy.optimize import Bounds, LinearConstraint, milp

from onnx_fliqs.controller import (
    Controller,
    ControllerConfig,
    RewardForm,
    Schedule,
    sample,
    uniform,
)
from onnx_fliqs.critic import Critic
from onnx_fliqs.projection import project
from onnx_fliqs.reinforce import Reinforce

_BITS = (4, 5, 6, 7, 8)
_LAYERS = 20
_BUDGET = 5
_DRAWS = 4
_SPREAD = 0.7
"""Of the logarithms of the sensitivities of weights and activations within a layer."""
_DELAY = 1 / 3
"""Of the updates: draws from the uniform policy before them."""
_SPACES = {
    "tied": [(bits, bits) for bits in _BITS],
    "separate": sorted(itertools.product(_BITS, repeat=2), key=lambda p: (p[0] * p[1], p[0])),
}


@dataclass(frozen=True)
class _Contender:
    """A controller with its settings."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    delay: float = _DELAY


_METHODS = {
    name: _Contender(name) for name in ("critic", "critic, one sensitivity", "reinforce")
}


def _changed(method: str, name: str, *values: Any) -> dict[str, _Contender]:
    """One setting at other values."""
    return {
        f"{method}, {name} {getattr(value, 'value', value)}": _Contender(method, {name: value})
        for value in values
    }


_SETTINGS = {
    "critic": _Contender("critic"),
    "critic, no delay": _Contender("critic", delay=0),
    **_changed("critic", "temperature", 0.05, 0.5, 1.0),
    **_changed("critic", "cooling", Schedule.COSINE, Schedule.CONSTANT),
    **_changed("critic", "memory", 0.98, 0.99, 1.0),
    **_changed("critic", "shrinkage", 0.01, 1.0),
    "reinforce": _Contender("reinforce"),
    "reinforce, no delay": _Contender("reinforce", delay=0),
    **_changed("reinforce", "beta", -0.1, -0.3, -3.0),
    **_changed("reinforce", "learning_rate", 0.005, 0.02, 0.2, 0.5),
    **_changed("reinforce", "entropy_end", 0.0, 0.1, 2.0),
    **_changed("reinforce", "entropy_schedule", Schedule.LINEAR, Schedule.CONSTANT),
    **_changed("reinforce", "reward", RewardForm.ONE_SIDED),
}


@dataclass(frozen=True)
class _Problem:
    """Choices are the same in every layer."""

    costs: tuple[np.ndarray, ...]
    excess: tuple[np.ndarray, ...]
    """What each choice of each layer adds to the loss."""
    told: tuple[np.ndarray, ...]
    """Distortions as the critic hears of them: [choices, operands]."""
    uniform: int
    """The choice of uniform precision that spends the budget."""


def _problem(pairs: Sequence[tuple[int, int]], rng: np.random.Generator) -> _Problem:
    macs = rng.lognormal(0, 0.8, _LAYERS)
    layers = rng.lognormal(0, 1.2, _LAYERS)
    sensitivities = layers[:, None] * rng.lognormal(0, _SPREAD, (_LAYERS, 2))
    wrong = rng.lognormal(0, 0.3, (_LAYERS, len(_BITS), 2))
    bits = np.array(pairs)
    distortions = 4.0 ** (4.0 - bits)
    index = bits - _BITS[0]
    return _Problem(
        tuple(m * bits.prod(axis=1) / (_BUDGET**2 * macs.sum()) for m in macs),
        tuple(distortions @ s for s in sensitivities),
        tuple(distortions * factor[index, [0, 1]] for factor in wrong),
        pairs.index((_BUDGET, _BUDGET)),
    )


def _best(problem: _Problem) -> float:
    owner = np.repeat(np.arange(_LAYERS), [len(row) for row in problem.costs])
    one_each = np.equal.outer(np.arange(_LAYERS), owner).astype(float)
    found = milp(
        np.concatenate(problem.excess),
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(np.concatenate(problem.costs)[None, :], 0, 1),
        ],
    )
    return float(found.fun)


def _controller(contender: _Contender, problem: _Problem) -> Controller[Any]:
    config = ControllerConfig(**contender.settings)
    if contender.method == "reinforce":
        return Reinforce(problem.costs, config)
    if contender.method == "critic":
        return Critic(problem.costs, problem.told, config)
    summed = [rows.sum(axis=1, keepdims=True) for rows in problem.told]
    return Critic(problem.costs, summed, config)


def _gap(space: str, contender: _Contender, seed: int, updates: int, noise: float) -> float:
    rng = np.random.default_rng(seed)
    problem = _problem(_SPACES[space], rng)
    level = sum(float(row.mean()) for row in problem.excess)
    controller = _controller(contender, problem)
    delay = int(contender.delay * updates)
    state = controller.initial()
    for step in range(-delay, updates):
        waiting = step < 0
        policy = (
            uniform([len(row) for row in problem.costs])
            if waiting
            else controller.policy(state, step / updates)
        )
        draws = [sample(policy, rng) for _ in range(_DRAWS)]
        losses = []
        for draw in draws:
            total = sum(float(row[c]) for row, c in zip(problem.excess, draw, strict=True))
            losses.append(1 + 0.3 * total / level * rng.lognormal(0, noise))
        state = (
            controller.observe(state, draws, losses)
            if waiting
            else controller.update(state, draws, losses, step / updates)
        )
    final = project(controller.preferences(state), problem.costs, controller.slack)
    served = sum(float(row[c]) for row, c in zip(problem.excess, final, strict=True))
    best = _best(problem)
    return (served - best) / (
        sum(float(row[problem.uniform]) for row in problem.excess) - best
    )


def main() -> None:
    """Run all contenders on the same problems."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--updates", nargs="+", type=int, default=[165, 400])
    parser.add_argument("--noise", nargs="+", type=float, default=[0.1, 0.3])
    parser.add_argument("--settings", action="store_true")
    options = parser.parse_args()
    contenders = _SETTINGS if options.settings else _METHODS
    for space, updates, noise, name in itertools.product(
        _SPACES, options.updates, options.noise, contenders
    ):
        gaps = [
            _gap(space, contenders[name], seed, updates, noise)
            for seed in range(options.seeds)
        ]
        row = {
            "benchmark": "controllers",
            "space": space,
            "method": name,
            "updates": updates,
            "noise": noise,
            "gap_mean": round(float(np.mean(gaps)), 3),
            "gap_deviation": round(float(np.std(gaps)), 3),
            "seeds": options.seeds,
        }
        print(json.dumps({**row, **provenance()}), flush=True)


if __name__ == "__main__":
    main()
