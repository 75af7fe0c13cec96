"""Measures what the layers of a model cost in a runtime: ``onnx-fliqs profile``."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from onnx_fliqs.borders import neighbours
from onnx_fliqs.controller import Choices
from onnx_fliqs.data import Dataset
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
from onnx_fliqs.legality import check_pairs
from onnx_fliqs.model import fingerprint
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
from onnx_fliqs.sites import SearchSpace
from onnx_fliqs.sources import DataSource, ModelSource, dataset_of, model_of
from onnx_fliqs.target_files import parse_target

__all__ = ["ProfileConfig", "ProfileProgress", "conditions_of", "profile"]

_PER_UNKNOWN: Final = 3
"""Graphs to measure for each number that is to be found."""
_COARSE: Final = 1.5
"""With fewer for each the fit rests on its prior; the user is told."""
_UNRELIABLE: Final = 0.1
"""Median error of predictions from which on the user is told."""
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
    separate: bool | None = None
    """Measure every legal pair of formats of weights and of activations; None: as a search
    without ``separate`` chooses among them."""
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
    model: ModelSource,
    data: DataSource | None = None,
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
        runtime: Where to run; None: the target's, or ONNX Runtime if it has none here.
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
    precisions = target.space(config.space, separate=config.separate)
    warnings = []
    if runtime is None and not target.runtimes:
        warnings.append(
            f"no runtime for {target.name} is known here: these are latencies in ONNX Runtime,"
            " not on its hardware"
        )
    runtime = runtime or runtime_of(target)
    source = model_of(model)
    dataset = None if data is None else dataset_of(data, source)
    prepared = prepare(
        source, dataset, target, precisions, remove_quantization=config.remove_quantization
    )
    if config.separate:
        check_pairs(prepared.space, target)
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

    names = choice_names(space)
    wanted = _Wanted(
        names, tuple(tuple(map(kind_of, row)) for row in names), neighbours(canonical, space)
    )
    reference = runtime.load(canonical, feeds, config.threads, OptimizationLevel.DEFAULT)
    observations, times = _observe(wanted, reference, load, config, progress, clock)
    if len(observations) < _COARSE * wanted.unknowns:
        warnings.append(
            f"the table is coarse: there was time for {len(observations)} of {wanted.graphs}"
            " graphs; give it more --seconds"
        )
    layers, borders, base, float_model = _explained(
        space, wanted, observations, times, config.seed
    )
    errors = left_out_errors(observations, wanted.kinds, wanted.near)
    if np.median(errors) > _UNRELIABLE:
        warnings.append(
            f"the table is off by {np.median(errors):.0%} for every other graph that was left"
            " out: was the machine busy with something else?"
        )
    table = LatencyTable(
        model=fingerprint(source),
        target=target.name,
        conditions=conditions,
        seed=config.seed,
        assignments=len(observations),
        repetitions=len(times),
        median_error=float(np.median(errors)),
        p90_error=float(np.percentile(errors, 90)),
        float_model=float_model,
        base_ms=base,
        layers=layers,
        borders=borders,
    )
    return table, tuple(warnings)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is to be found."""

    names: tuple[tuple[str, ...], ...]
    """For each decision, the names of its choices."""
    kinds: tuple[tuple[str, ...], ...]
    """The kinds of numbers of those."""
    near: tuple[tuple[int, int], ...]
    """Pairs of decisions that may have a border between them."""

    @property
    def unknowns(self) -> int:
        """How many numbers the fit has to find."""
        return 1 + sum(len(row) - 1 for row in self.names) + len(self.near)

    @property
    def graphs(self) -> int:
        """How many graphs tell them."""
        return max(_FEWEST, _PER_UNKNOWN * self.unknowns)


def _observe(
    wanted: _Wanted,
    reference: Runner,
    load: Callable[[Choices], Runner],
    config: ProfileConfig,
    progress: Callable[[ProfileProgress], None] | None,
    clock: Clock,
) -> tuple[list[Observation], list[float]]:
    """Time assignments, each in turn with the float model; also the times of that.

    One graph at a time is in memory. What is left of the time is shared out anew before each.
    """
    observations: list[Observation] = []
    times: list[float] = []
    started = clock()
    rng = np.random.default_rng(config.seed)
    for choices in itertools.islice(_assignments(wanted.names, rng), wanted.graphs):
        begun = clock()
        left = config.seconds - (begun - started)
        if left <= 0 and len(observations) >= _FEWEST:
            break
        share = min(left / (wanted.graphs - len(observations)), _LONGEST)
        runner = load(choices)
        share -= clock() - begun
        pairs = time_pairs(reference, runner, seconds=share, error=_ERROR, clock=clock)
        observations.append(Observation(choices, pairs.ratio, pairs.error))
        times += pairs.reference
        if progress is not None:
            float_ms = 1e3 * float(np.median(times))
            progress(ProfileProgress(len(observations), wanted.graphs, float_ms))
    return observations, times


def _explained(
    space: SearchSpace,
    wanted: _Wanted,
    observations: Sequence[Observation],
    times: Sequence[float],
    seed: int,
) -> tuple[dict[str, Mapping[str, Estimate]], tuple[LatencyBorder, ...], float, Estimate]:
    """Layers, borders, base and float model of the table, in milliseconds."""
    found = fit(observations, wanted.kinds, wanted.near)
    rng = np.random.default_rng([seed, 1])
    around = spread(observations, wanted.kinds, wanted.near, rng)
    low, unit, high = (1e3 * float(q) for q in np.percentile(times, (25, 50, 75)))
    layers: dict[str, Mapping[str, Estimate]] = {}
    for decided, row, values, quartiles in zip(
        space.decisions, wanted.names, found.rows, around.rows, strict=True
    ):
        # Layers that share a decision are told apart by no measurement.
        scale = unit / len(decided)
        entries = {
            name: Estimate(*(scale * float(x) for x in numbers))
            for name, *numbers in zip(row, values, *quartiles, strict=True)
        }
        layers.update(dict.fromkeys(decided, entries))
    borders = tuple(
        LatencyBorder(
            (space.decisions[border.first][0], space.decisions[border.second][0]),
            Estimate(unit * border.cost, unit * quartiles[0], unit * quartiles[1]),
        )
        for border, quartiles in zip(found.borders, around.borders, strict=True)
    )
    ordered = {layer.name: layers[layer.name] for layer in space.layers}
    return ordered, borders, unit * found.base, Estimate(unit, low, high)


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
