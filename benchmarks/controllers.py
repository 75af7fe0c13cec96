"""The controllers on a planted problem: how close to the best assignment do they come?

Layers have log-normal costs and sensitivities; the loss of an assignment is a level plus the
sum of sensitivity * 4^-bits, its excess observed with log-normal noise. The critic is told a
distortion that is wrong by a log-normal factor, as calibration's is. After as many updates as
a search makes, each policy is projected onto the budget. ``gap`` is the excess loss over the
best assignment, found by integer programming, in units of the uniform assignment's excess: 0
is perfect, 1 no better than uniform precision::

    python benchmarks/controllers.py --seeds 8
"""

import argparse
import json
from typing import Any

import numpy as np
from common import provenance
from scipy.optimize import Bounds, LinearConstraint, milp

from onnx_fliqs.controller import Controller, ControllerConfig, sample, uniform
from onnx_fliqs.critic import Critic
from onnx_fliqs.projection import project
from onnx_fliqs.reinforce import Reinforce

_BITS = np.array([4.0, 5.0, 6.0, 7.0, 8.0])
_LAYERS = 20
_BUDGET = 5.0
_DRAWS = 4


def _best(costs: list[np.ndarray], excess: list[np.ndarray]) -> float:
    owner = np.repeat(np.arange(_LAYERS), len(_BITS))
    one_each = np.equal.outer(np.arange(_LAYERS), owner).astype(float)
    found = milp(
        np.concatenate(excess),
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(np.concatenate(costs)[None, :], 0, 1),
        ],
    )
    return float(found.fun)


def _gap(method: str, seed: int, updates: int, delay: int, noise: float) -> float:
    rng = np.random.default_rng(seed)
    macs, sensitivity = rng.lognormal(0, 0.8, _LAYERS), rng.lognormal(0, 1.2, _LAYERS)
    costs = [m * _BITS**2 / (_BUDGET**2 * macs.sum()) for m in macs]
    shape = 4.0 ** -(_BITS - 4)
    excess = [s * shape for s in sensitivity]
    level = sum(float(row.mean()) for row in excess)
    told = [shape * rng.lognormal(0, 0.3, len(_BITS)) for _ in excess]
    config = ControllerConfig()
    controller: Controller[Any] = (
        Critic(tuple(costs), told, config)
        if method == "critic"
        else Reinforce(tuple(costs), config)
    )
    state = controller.initial()
    for step in range(-delay, updates):
        waiting = step < 0
        policy = (
            uniform([len(_BITS)] * _LAYERS)
            if waiting
            else controller.policy(state, step / updates)
        )
        draws = [sample(policy, rng) for _ in range(_DRAWS)]
        losses = []
        for draw in draws:
            total = sum(float(row[c]) for row, c in zip(excess, draw, strict=True))
            losses.append(1 + 0.3 * total / level * rng.lognormal(0, noise))
        state = (
            controller.observe(state, draws, losses)
            if waiting
            else controller.update(state, draws, losses, step / updates)
        )
    final = project(controller.preferences(state), tuple(costs), controller.slack)
    served = sum(float(row[c]) for row, c in zip(excess, final, strict=True))
    best = _best(costs, excess)
    return (served - best) / (sum(float(row[1]) for row in excess) - best)


def main() -> None:
    """Run both controllers on the same problems."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--updates", nargs="+", type=int, default=[165, 400])
    parser.add_argument("--noise", nargs="+", type=float, default=[0.1, 0.3])
    options = parser.parse_args()
    for updates in options.updates:
        for noise in options.noise:
            for method in ("critic", "reinforce"):
                gaps = [
                    _gap(method, seed, updates, updates // 3, noise)
                    for seed in range(options.seeds)
                ]
                row = {
                    "benchmark": "controllers",
                    "method": method,
                    "updates": updates,
                    "noise": noise,
                    "gap_mean": round(float(np.mean(gaps)), 3),
                    "gap_deviation": round(float(np.std(gaps)), 3),
                    "seeds": options.seeds,
                }
                print(json.dumps({**row, **provenance()}), flush=True)


if __name__ == "__main__":
    main()
