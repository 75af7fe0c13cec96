"""Whether an emitted graph computes what was searched, in the runtime that will run it."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnx_fliqs.errors import FliqsError, UnknownOperatorError, VerificationError
from onnx_fliqs.judged import compared_names, exposed
from onnx_fliqs.payload import is_plain, skeleton
from onnx_fliqs.runtime import OptimizationLevel, make_session, run_session

__all__ = ["Comparison", "LevelCheck", "Verification", "compare", "verify_levels"]

Array: TypeAlias = npt.NDArray[Any]
Outputs: TypeAlias = Mapping[str, Array]

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
class LevelCheck:
    """One optimisation level."""

    level: OptimizationLevel
    error: str | None
    """Why ONNX Runtime refuses the graph, if it does."""
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


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of all checks."""

    searched: Comparison | None
    """Unoptimised graph against the searched network, where that is known."""
    levels: tuple[LevelCheck, ...]

    @property
    def level(self) -> OptimizationLevel:
        """The highest optimisation level that computes the graph right.

        Raises:
            VerificationError: There is none.
        """
        for check in reversed(self.levels):
            if check.agrees:
                return check.level
        raise VerificationError(
            f"no optimisation level computes the graph right: {self.why()}"
        )

    def why(self) -> str:
        """What is wrong at the levels that fail, in one line."""
        return "; ".join(
            f"{check.level.value}: {check.problem}"
            for check in self.levels
            if not check.agrees
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "searched_rms": None if self.searched is None else self.searched.rms,
            "levels": {
                check.level.value: {
                    "agrees": check.agrees,
                    "rms": None if check.difference is None else check.difference.rms,
                    "error": check.error,
                }
                for check in self.levels
            },
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
    return _worst(found) if found else _INFINITE


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


def verify_levels(
    model: ir.Model,
    batches: Sequence[Mapping[str, Array]],
    searched: Sequence[Outputs] | None = None,
) -> Verification:
    """Check an emitted graph and run it at every optimisation level.

    Args:
        model: The graph.
        batches: Feeds.
        searched: The searched network's judged values for each of them, if known.

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
    names = compared_names(model) if searched is None else list(searched[0])
    if not names:
        raise VerificationError("no output of the graph is a tensor of numbers")
    try:
        plain = _run(model, names, OptimizationLevel.NONE, batches)
    except UnknownOperatorError:
        raise
    except FliqsError as error:
        raise VerificationError(f"the emitted graph does not run: {error}") from error
    difference = None
    if searched is not None:
        difference = _worst(
            compare(mine, theirs) for mine, theirs in zip(plain, searched, strict=True)
        )
        if difference.rms > EXACT:
            raise VerificationError(
                f"the emitted graph differs from the searched network by {difference.rms:.3g}"
                " of the output (root mean square)"
            )
    levels = tuple(
        _check_level(model, level, batches, plain)
        for level in (OptimizationLevel.BASIC, OptimizationLevel.DEFAULT)
    )
    return Verification(difference, levels)


def _run(
    model: ir.Model,
    names: Sequence[str],
    level: OptimizationLevel,
    batches: Sequence[Mapping[str, Array]],
) -> list[dict[str, Array]]:
    """Some values of a graph, inner ones among them; the graph as it is has to run as well."""
    watched = exposed(model, names)
    if watched is not model:
        run_session(make_session(model, level=level), [], batches[0])
    session = make_session(watched, level=level)
    return [dict(zip(names, run_session(session, names, f), strict=True)) for f in batches]


def _check_level(
    model: ir.Model,
    level: OptimizationLevel,
    batches: Sequence[Mapping[str, Array]],
    plain: Sequence[Outputs],
) -> LevelCheck:
    try:
        rows = _run(model, list(plain[0]), level, batches)
    except FliqsError as error:
        return LevelCheck(level, str(error), None)
    return LevelCheck(
        level, None, _worst(compare(a, b) for a, b in zip(rows, plain, strict=True))
    )


def _worst(comparisons: Iterable[Comparison]) -> Comparison:
    items = list(comparisons)
    return Comparison(max(c.rms for c in items), max(c.largest for c in items))
