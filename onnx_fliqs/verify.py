"""Whether an emitted graph computes what was searched, in the runtimes that will run it."""

import functools
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnx_fliqs.errors import FliqsError, UnknownOperatorError, VerificationError
from onnx_fliqs.judged import compared_names, exposed
from onnx_fliqs.openvino_runtime import compile_model, run_compiled
from onnx_fliqs.payload import is_plain, skeleton
from onnx_fliqs.runtime import OptimizationLevel, make_session, run_session

__all__ = [
    "FUSED",
    "ONNX_RUNTIME",
    "OPENVINO",
    "RUNTIMES",
    "Batches",
    "Check",
    "Comparison",
    "Verification",
    "Way",
    "compare",
    "verify_graph",
    "watch",
    "watched_names",
    "way_of",
    "worst",
]

Array: TypeAlias = npt.NDArray[Any]
Outputs: TypeAlias = Mapping[str, Array]
Batches: TypeAlias = Sequence[Mapping[str, Array]]
"""Feeds, one after the other."""
Way: TypeAlias = Callable[[ir.Model, Sequence[str], Batches], list[list[Array]]]
"""Runs a graph and gives the outputs of these names for each batch."""

ONNX_RUNTIME: Final = "onnxruntime"
OPENVINO: Final = "openvino"
RUNTIMES: Final = (ONNX_RUNTIME, OPENVINO)
"""Names of the runtimes that can check a graph."""

EXACT: Final = 1e-3
"""Largest relative difference between the searched network and the unoptimised graph: rounding
of float sums flips a code now and then, and a flip moves a value by a whole step."""
FUSED: Final = 0.05
"""Largest relative difference that integer kernels may add; a lost Relu makes it about 1."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far two runs lie apart."""

    rms: float
    """Root mean square difference / root mean square of the reference."""
    largest: float
    """Largest difference / root mean square of the reference."""


_INFINITE: Final = Comparison(float("inf"), float("inf"))


@dataclass(frozen=True, slots=True)
class Check:
    """One way of running the graph, against the unoptimised run."""

    name: str
    """Of the optimisation level of ONNX Runtime, or of another runtime."""
    error: str | None
    """Why it refuses the graph, if it does."""
    difference: Comparison | None
    """From the unoptimised run."""

    @property
    def agrees(self) -> bool:
        """Whether it runs and computes the same to within integer rounding."""
        return self.difference is not None and self.difference.rms <= FUSED

    @property
    def problem(self) -> str:
        """What is wrong, in a few words; of interest where it does not agree."""
        if self.difference is not None:
            return f"differs by {self.difference.rms:.3g} of the output"
        return textwrap.shorten(self.error or "does not run", 160, placeholder=" ...")

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "agrees": self.agrees,
            "rms": None if self.difference is None else self.difference.rms,
            "error": self.error,
        }


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of all checks."""

    searched: Comparison | None
    """Unoptimised graph against the searched network, where that is known."""
    levels: tuple[Check, ...]
    """Optimisation levels of ONNX Runtime, the lowest first."""
    others: tuple[Check, ...] = ()
    """Other runtimes."""

    @property
    def level(self) -> OptimizationLevel:
        """The highest optimisation level that computes the graph right.

        Raises:
            VerificationError: There is none.
        """
        for check in reversed(self.levels):
            if check.agrees:
                return OptimizationLevel(check.name)
        raise VerificationError(
            f"no optimisation level computes the graph right: {self.why()}"
        )

    def why(self) -> str:
        """What is wrong at the levels that fail, in one line."""
        return "; ".join(
            f"{check.name}: {check.problem}" for check in self.levels if not check.agrees
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "searched_rms": None if self.searched is None else self.searched.rms,
            "levels": {check.name: check.to_dict() for check in self.levels},
            "runtimes": {check.name: check.to_dict() for check in self.others},
        }


def compare(outputs: Outputs, reference: Outputs) -> Comparison:
    """Compare outputs; the worst counts.

    Where there are floats, they decide. Otherwise the share of whole numbers that differ takes
    the place of their difference. What is empty in both runs, or no tensor of numbers, is left
    out; without anything to compare, the two differ infinitely.
    """
    pairs = [(outputs[name], expected) for name, expected in reference.items()]
    kinds = [_kind(expected) for _, expected in pairs]
    compared = [pair for pair, kind in zip(pairs, kinds, strict=True) if kind == "float"]
    if compared:
        found = [_float_difference(*pair) for pair in compared]
    else:
        compared = [pair for pair, kind in zip(pairs, kinds, strict=True) if kind == "whole"]
        found = [_share_of_different(*pair) for pair in compared]
    return worst(found) if found else _INFINITE


def _kind(values: Any) -> str:
    """Whether an output holds floats, whole numbers, or nothing that can be compared."""
    if not isinstance(values, np.ndarray) or values.size == 0:
        return "nothing"
    if values.dtype.kind in "biu":
        return "whole"
    # NumPy does not call the types of ml_dtypes floats.
    return "nothing" if values.dtype.kind in "OSU" else "float"


def _float_difference(values: Array, expected: Array) -> Comparison:
    if values.shape != expected.shape:
        return _INFINITE
    values, expected = values.astype(np.float64), expected.astype(np.float64)
    # The infinities of a mask are the same in both, and no numbers.
    same = values == expected
    difference = np.subtract(values, expected, out=np.zeros(values.shape), where=~same)
    if not np.isfinite(difference).all():
        return _INFINITE
    finite = expected[np.isfinite(expected)]
    size = (float(np.sqrt(np.mean(np.square(finite)))) if finite.size else 0.0) or 1.0
    rms = float(np.sqrt(np.mean(difference**2))) / size
    return Comparison(rms, float(np.abs(difference).max()) / size)


def _share_of_different(values: Array, expected: Array) -> Comparison:
    if values.shape != expected.shape:
        return _INFINITE
    different = values != expected
    return Comparison(float(different.mean()), float(different.any()))


def verify_graph(
    model: ir.Model,
    batches: Batches,
    searched: Sequence[Outputs] | None = None,
    *,
    runtimes: Sequence[str] = (ONNX_RUNTIME,),
) -> Verification:
    """Check a graph, and compare other ways of running it with the unoptimised run.

    Args:
        model: The graph.
        batches: Feeds.
        searched: The searched network's judged values for each of them, if known.
        runtimes: Those of ``RUNTIMES`` whose results count; they must be installed.

    Raises:
        UnknownOperatorError: The graph needs a library of custom operators.
        VerificationError: The graph is not valid ONNX, does not run unoptimised, or is not
            what was searched.
    """
    try:
        onnx.checker.check_model(
            ir.to_proto(model) if is_plain(model) else skeleton(model), full_check=True
        )
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        raise VerificationError(f"the emitted graph is not valid ONNX: {reason}") from error
    names = watched_names(model) if searched is None else list(searched[0])
    try:
        plain = watch(model, names, batches, way_of("none"))
    except UnknownOperatorError:
        raise
    except FliqsError as error:
        raise VerificationError(f"the emitted graph does not run: {error}") from error
    difference = None
    if searched is not None:
        difference = worst(
            compare(mine, theirs) for mine, theirs in zip(plain, searched, strict=True)
        )
        if difference.rms > EXACT:
            raise VerificationError(
                f"the emitted graph differs from the searched network by {difference.rms:.3g}"
                " of the output (root mean square)"
            )
    levels = (OptimizationLevel.BASIC.value, OptimizationLevel.DEFAULT.value)
    checks = {
        runtime: tuple(
            _check(model, name, batches, plain)
            for name in (levels if runtime == ONNX_RUNTIME else (runtime,))
        )
        for runtime in runtimes
    }
    return Verification(difference, checks.get(ONNX_RUNTIME, ()), checks.get(OPENVINO, ()))


def watched_names(model: ir.Model) -> list[str]:
    """The values by which two runs of a graph are compared.

    Raises:
        VerificationError: There are none.
    """
    names = compared_names(model)
    if not names:
        raise VerificationError("no output of the graph is a tensor of numbers")
    return names


def way_of(name: str) -> Way:
    """The way of running a graph that a check is named after."""
    if name == OPENVINO:
        return _in_openvino
    return functools.partial(_in_onnxruntime, OptimizationLevel(name))


def _in_onnxruntime(
    level: OptimizationLevel, model: ir.Model, names: Sequence[str], batches: Batches
) -> list[list[Array]]:
    session = make_session(model, level=level)
    # Without names, ONNX Runtime gives everything.
    return [run_session(session, names, feeds)[: len(names)] for feeds in batches]


def _in_openvino(model: ir.Model, names: Sequence[str], batches: Batches) -> list[list[Array]]:
    compiled = compile_model(model)
    return [run_compiled(compiled, names, feeds) for feeds in batches]


def watch(
    model: ir.Model, names: Sequence[str], batches: Batches, way: Way
) -> list[dict[str, Array]]:
    """Some values of a graph, inner ones among them, for each batch.

    Outputs are taken from the graph as it is: with others exposed it may run otherwise.
    """
    known = {value.name for value in model.graph.outputs}
    inner = [name for name in names if name not in known]
    outputs = [name for name in names if name in known]
    rows = [dict(zip(outputs, row, strict=True)) for row in way(model, outputs, batches)]
    if inner:
        for row, values in zip(rows, way(exposed(model, inner), inner, batches), strict=True):
            row.update(zip(inner, values, strict=True))
    return rows


def _check(model: ir.Model, name: str, batches: Batches, plain: Sequence[Outputs]) -> Check:
    try:
        rows = watch(model, list(plain[0]), batches, way_of(name))
    except FliqsError as error:
        return Check(name, str(error), None)
    return Check(name, None, worst(compare(a, b) for a, b in zip(rows, plain, strict=True)))


def worst(comparisons: Iterable[Comparison]) -> Comparison:
    """The largest of each measure."""
    items = list(comparisons)
    return Comparison(max(c.rms for c in items), max(c.largest for c in items))
