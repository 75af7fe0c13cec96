"""The runtimes in which latency is measured, and how two graphs are timed in them."""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs import openvino_runtime
from onnx_fliqs.errors import EnvironmentMissingError, RunError
from onnx_fliqs.runtime import OptimizationLevel, load_onnxruntime, make_session, run_session
from onnx_fliqs.targets import Target

__all__ = [
    "Clock",
    "Feeds",
    "Pairs",
    "Runner",
    "Runtime",
    "machine_name",
    "runtime_named",
    "runtime_of",
    "time_pairs",
]

Runner: TypeAlias = Callable[[], object]
"""Runs a graph once."""
Clock: TypeAlias = Callable[[], float]
Feeds: TypeAlias = Mapping[str, npt.NDArray[Any]]

_FEWEST: Final = 7
"""Pairs without which there is no median to speak of."""
_NORMAL_QUARTILES: Final = 1.349
"""Quartiles of a normal distribution lie this many standard deviations apart."""
_MEDIAN_ERROR: Final = 1.2533
"""Standard error of a median over that of a mean."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where graphs are run."""

    name: str
    version: Callable[[], str]
    """Of what is installed; raises EnvironmentMissingError if it is not."""
    load: Callable[[ir.Model, Feeds, int | None, OptimizationLevel], Runner]
    """Makes a runner of a graph, what it is fed, the threads within one operator (None: the
    runtime's choice) and how much ONNX Runtime may rewrite the graph, which others ignore."""


def _onnxruntime_version() -> str:
    return str(load_onnxruntime().__version__)


def _load_in_onnxruntime(
    model: ir.Model, feeds: Feeds, threads: int | None, level: OptimizationLevel
) -> Runner:
    session = make_session(model, threads=threads or 0, level=level)
    names = [value.name for value in session.get_outputs()]
    run_session(session, names, feeds)
    return lambda: session.run(names, feeds)


def _openvino_version() -> str:
    openvino_runtime.load_openvino()
    return openvino_runtime.version()


def _load_in_openvino(
    model: ir.Model, feeds: Feeds, threads: int | None, level: OptimizationLevel
) -> Runner:
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino_runtime.compile_model(model, settings)
    # Says in one line what is wrong, if anything is.
    openvino_runtime.run_compiled(compiled, [], feeds)
    request = compiled.create_infer_request()
    request.infer(dict(feeds))
    return lambda: request.infer()


_RUNTIMES: Final = {
    runtime.name: runtime
    for runtime in (
        Runtime("onnxruntime", _onnxruntime_version, _load_in_onnxruntime),
        Runtime("openvino", _openvino_version, _load_in_openvino),
    )
}


def runtime_of(target: Target) -> Runtime:
    """The first runtime at hand that is meant to run a target's graphs, else ONNX Runtime."""
    return runtime_named(next(iter(target.runtimes), "onnxruntime"))


def runtime_named(name: str) -> Runtime:
    """The runtime that a latency table names.

    Raises:
        EnvironmentMissingError: None is called that.
    """
    if name not in _RUNTIMES:
        raise EnvironmentMissingError(f"there is no runtime {name!r} to measure latency in")
    return _RUNTIMES[name]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Times of two graphs that were run in turn, in seconds."""

    reference: tuple[float, ...]
    other: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median of other / reference: what slows both down for a while cancels out."""
        return statistics.median(self._ratios())

    @property
    def error(self) -> float:
        """Standard error of the ratio, as a share of it."""
        low, middle, high = statistics.quantiles(self._ratios(), n=4)
        deviation = (high - low) / _NORMAL_QUARTILES / middle
        return _MEDIAN_ERROR * deviation / math.sqrt(len(self.other))

    def _ratios(self) -> list[float]:
        return [b / a for a, b in zip(self.reference, self.other, strict=True)]


def time_pairs(
    reference: Runner,
    other: Runner,
    *,
    seconds: float,
    error: float = 0.0,
    clock: Clock = time.perf_counter,
) -> Pairs:
    """Run two graphs in turn until the ratio of their times is known.

    Args:
        reference: One graph.
        other: The other.
        seconds: When to stop at the latest, once a few pairs are there.
        error: Stop as soon as the standard error of the ratio is no larger.
        clock: Tells seconds.

    Raises:
        RunError: The runtime gives up.
    """
    first: list[float] = []
    second: list[float] = []
    started = clock()
    try:
        while True:
            for runner, times in ((reference, first), (other, second)):
                # A graph that follows itself finds its weights in the caches, as in use.
                runner()
                before = clock()
                runner()
                times.append(clock() - before)
            if len(first) < _FEWEST:
                continue
            if clock() - started >= seconds:
                break
            if len(first) % _FEWEST == 0 and Pairs(tuple(first), tuple(second)).error <= error:
                break
    except Exception as failure:  # Runtimes' exceptions share no other base.
        reason = " ".join(str(failure).split())
        raise RunError(f"the runtime gave up while it was timed: {reason}") from failure
    return Pairs(tuple(first), tuple(second))


def machine_name() -> str:
    """What measurements of time depend on, in words."""
    return f"{platform.machine()}, {os.cpu_count()} cores, {_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    models = (
        line.partition(":")[2].strip() for line in lines if line.startswith("model name")
    )
    return next(models, "unknown processor")
