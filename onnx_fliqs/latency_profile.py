"""Measures what the layers of a model cost in a runtime: ``onnx-fliqs profile``."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir

from onnx_fliqs.borders import neighbours
from onnx_fliqs.controller import Choices
from onnx_fliqs.data import Dataset, input_specs, load_npz
from onnx_fliqs.emission import emit_graph
from onnx_fliqs.errors import ConfigError
from onnx_fliqs.latency import (
    Conditions,
    Estimate,
    LatencyBorder,
    LatencyTable,
    choice_names,
    kind_of,
)
from onnx_fliqs.latency_fit import Observation, fit, left_out_errors, spread
from onnx_fliqs.model import fingerprint, load_model
from onnx_fliqs.prepare import calibrate, prepare, synthetic_data
from onnx_fliqs.runners import (
    Clock,
    Feeds,
    Runner,
    Runtime,
    machine_name,
    runtime_of,
    time_pairs,
)
from onnx_fliqs.runtime import OptimizationLevel
from onnx_fliqs.targets import parse_target

__all__ = ["ProfileConfig", "ProfileProgress", "conditions_of", "profile"]

_PER_UNKNOWN: Final = 3
"""Graphs to measure for each number that is to be found."""
_COARSE: Final = 1.5
"""With fewer for each the fit rests on its prior; the user is told."""
_FEWEST: Final = 10
"""Graphs that are measured whatever the time limit."""
_ERROR: Final = 0.003
"""Standard error of a ratio of latencies that is good enough: the table's own is larger."""
_LONGEST: Final = 1.0
"""Seconds for one graph."""
_STAY: Final = 0.8
"""Chance that a decision follows the one before it, in assignments of whole regions."""
_SAMPLES: Final = 8
"""Thresholds, which samples decide, have no influence on latency."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileConfig:
    """Settings of a profile."""

    target: str = "ort-cpu"
    space: str | None = None
    """A named space or a comma list of formats; None: the target's own."""
    batch_size: int | None = None
    """None: what the model fixes, or else 1."""
    threads: int | None = None
    """Threads within one operator; None: the runtime's choice."""
    seconds: float = 60.0
    """About how long to measure."""
    seed: int = 0
    remove_quantization: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not self.seconds > 0:
            raise ConfigError(f"seconds must be positive, got {self.seconds:g}")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")


@dataclass(frozen=True, slots=True)
class ProfileProgress:
    """What a measured graph reports."""

    done: int
    total: int
    float_ms: float
    """Of the float model, so far."""


def profile(
    model: Path | ir.Model,
    data: Path | Dataset | None = None,
    config: ProfileConfig | None = None,
    *,
    progress: Callable[[ProfileProgress], None] | None = None,
    runtime: Runtime | None = None,
    clock: Clock = time.perf_counter,
) -> tuple[LatencyTable, tuple[str, ...]]:
    """Measure assignments against the float model, and explain their latencies by a table.

    Args:
        model: A float ONNX model; it is not changed.
        data: Samples to run, of which only the shapes matter; None: they are made up.
        config: Settings.
        progress: Called after every graph.
        runtime: Where to run; None: the target's.
        clock: Tells seconds.

    Returns:
        The table, and warnings.

    Raises:
        ModelError: The model cannot be read or quantized.
        ConfigError: The model fixes another batch size.
        EnvironmentMissingError: The target's runtime is not installed.
        RunError: The runtime gives up.
    """
    config = config or ProfileConfig()
    target = parse_target(config.target)
    precisions = target.space(config.space)
    runtime = runtime or runtime_of(target.name)
    source = load_model(model) if isinstance(model, Path) else model
    dataset = load_npz(data, input_specs(source)) if isinstance(data, Path) else data
    prepared = prepare(
        source, dataset, target, precisions, remove_quantization=config.remove_quantization
    )
    if dataset is None:
        dataset = synthetic_data(prepared.canonical, _SAMPLES, config.seed)
    feeds = _feeds(dataset, config.batch_size)
    conditions = conditions_of(runtime, feeds, config.threads)
    few = dataset.take(np.arange(dataset.fixed_batch or _SAMPLES) % len(dataset))
    prepared, scales, _ = calibrate(prepared, target, few, config.seed)
    canonical, space = prepared.canonical, prepared.space

    def load(choices: Choices) -> Runner:
        graph = emit_graph(canonical, space, space.assign(choices), scales, target)
        return runtime.load(graph, feeds, config.threads, OptimizationLevel.DEFAULT)

    near = neighbours(canonical, space)
    names = choice_names(space)
    kinds = [tuple(map(kind_of, row)) for row in names]
    unknowns = 1 + sum(len(row) - 1 for row in names) + len(near)
    wanted = max(_FEWEST, _PER_UNKNOWN * unknowns)
    observations: list[Observation] = []
    reference_times: list[float] = []
    reference = runtime.load(canonical, feeds, config.threads, OptimizationLevel.DEFAULT)
    started = clock()
    rng = np.random.default_rng(config.seed)
    for choices in itertools.islice(_assignments(names, rng), wanted):
        begun = clock()
        left = config.seconds - (begun - started)
        if left <= 0 and len(observations) >= _FEWEST:
            break
        share = left / (wanted - len(observations))
        runner = load(choices)
        share -= clock() - begun
        pairs = time_pairs(
            reference, runner, seconds=min(share, _LONGEST), error=_ERROR, clock=clock
        )
        observations.append(Observation(choices, pairs.ratio, pairs.error))
        reference_times += pairs.reference
        if progress is not None:
            float_ms = 1e3 * float(np.median(reference_times))
            progress(ProfileProgress(len(observations), wanted, float_ms))
    warnings: tuple[str, ...] = ()
    if len(observations) < _COARSE * unknowns:
        coarse = (
            f"the table is coarse: there was time for {len(observations)} of {wanted} graphs;"
            " give it more --seconds"
        )
        warnings = (coarse,)

    found = fit(observations, kinds, near)
    errors = left_out_errors(observations, kinds, near)
    around = spread(observations, kinds, near, np.random.default_rng([config.seed, 1]))
    low, unit, high = (1e3 * float(q) for q in np.percentile(reference_times, (25, 50, 75)))
    layers = {}
    for decided, row, values, quartiles in zip(
        space.decisions, names, found.rows, around.rows, strict=True
    ):
        # Layers that share a decision are told apart by no measurement.
        scale = unit / len(decided)
        entries = {
            name: Estimate(*(scale * float(x) for x in numbers))
            for name, *numbers in zip(row, values, *quartiles, strict=True)
        }
        layers.update(dict.fromkeys(decided, entries))
    table = LatencyTable(
        model=fingerprint(source),
        target=target.name,
        conditions=conditions,
        seed=config.seed,
        assignments=len(observations),
        repetitions=len(reference_times),
        median_error=float(np.median(errors)),
        largest_error=float(np.percentile(errors, 90)),
        float_model=Estimate(unit, low, high),
        base_ms=unit * found.base,
        layers={layer.name: layers[layer.name] for layer in space.layers},
        borders=tuple(
            LatencyBorder(
                (space.decisions[border.first][0], space.decisions[border.second][0]),
                Estimate(unit * border.cost, unit * quartiles[0], unit * quartiles[1]),
            )
            for border, quartiles in zip(found.borders, around.borders, strict=True)
        ),
    )
    return table, warnings


def conditions_of(runtime: Runtime, feeds: Feeds, threads: int | None) -> Conditions:
    """The conditions of a measurement here and now.

    Raises:
        EnvironmentMissingError: The runtime is not installed.
    """
    return Conditions(
        runtime=runtime.name,
        version=runtime.version(),
        machine=machine_name(),
        threads=threads,
        shapes={name: array.shape for name, array in feeds.items()},
    )


def _feeds(dataset: Dataset, batch_size: int | None) -> Feeds:
    """One batch.

    Raises:
        ConfigError: The model fixes another batch size.
    """
    fixed = dataset.fixed_batch
    if fixed is not None and batch_size not in (None, fixed):
        raise ConfigError(f"the model fixes the batch size {fixed}, got {batch_size}")
    return dataset.batch(np.arange(fixed or batch_size or 1) % len(dataset))


def _assignments(
    names: Sequence[tuple[str, ...]], rng: np.random.Generator
) -> Iterator[Choices]:
    """Each precision for all that can have it, then without end random assignments.

    Of those, every other one is drawn layer by layer, in random proportions, the rest in
    regions.
    """
    known = list(dict.fromkeys(name for row in names for name in row))
    for name in known:
        yield tuple(row.index(name) if name in row else len(row) - 1 for row in names)
    for number in itertools.count():
        chances = dict(zip(known, rng.dirichlet(np.ones(len(known))), strict=True))
        stay = _STAY if number % 2 else 0.0
        choices: list[int] = []
        before = ""
        for row in names:
            if before not in row or rng.uniform() >= stay:
                weights = np.array([chances[name] for name in row])
                before = row[int(rng.choice(len(row), p=weights / weights.sum()))]
            choices.append(row.index(before))
        yield tuple(choices)
