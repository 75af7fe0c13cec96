"""Made-up inputs, for a look at a model without data."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_fliqs.data import Dataset, TensorSpec, batched_inputs
from onnx_fliqs.errors import ConfigError, DataError

__all__ = ["synthetic"]

Array: TypeAlias = npt.NDArray[Any]


def synthetic(
    specs: Sequence[TensorSpec],
    samples: int,
    seed: int,
    *,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    dynamic: int = 32,
) -> Dataset:
    """Make up inputs, the same ones for the same arguments.

    Floats are standard normal within +-3, booleans are fair, 8-bit integers are pixels of any
    value; wider integers are indices into something unknown, so they need a range.

    Args:
        specs: What the model wants.
        samples: How many samples.
        seed: Not negative.
        ranges: Bounds, both included, of uniform values for some inputs, by name.
        dynamic: Size of free dimensions other than the batch.

    Raises:
        ConfigError: A range names no input, is empty, or goes beyond the input's type.
        DataError: An input needs real data.
    """
    if samples < 1 or dynamic < 1:
        raise ValueError(f"samples and dynamic must be positive, got {samples} and {dynamic}")
    specs, ranges = tuple(specs), ranges or {}
    names = [spec.name for spec in specs]
    if unknown := [name for name in ranges if name not in names]:
        raise ConfigError(
            f"a range names {', '.join(map(repr, unknown))}; the model's inputs are"
            f" {', '.join(map(repr, names)) or 'none'}"
        )
    batched = batched_inputs(specs)
    inputs = {}
    for position, spec in enumerate(specs):
        if spec.shape is None:
            raise DataError(
                f"input {spec.name!r} has an unknown rank: synthetic inputs cannot be made for"
                " it; pass --data"
            )
        shape = tuple(size or dynamic for size in spec.shape)
        if spec.name in batched:
            shape = (samples, *shape[1:])
        # A stream for each input: one does not change with the size of another.
        rng = np.random.default_rng([seed, position])
        inputs[spec.name] = _random_values(spec, shape, ranges.get(spec.name), rng)
    return Dataset(inputs, None, specs, synthetic=True)


def _random_values(
    spec: TensorSpec,
    shape: tuple[int, ...],
    bounds: tuple[float, float] | None,
    rng: np.random.Generator,
) -> Array:
    """Draw values for one input; the rule is in the docstring of synthetic."""
    dtype = spec.dtype
    if dtype.kind not in "Oc":
        if bounds is None and spec.is_integer and dtype.itemsize == 1:
            bounds = spec.value_range
        if bounds is not None:
            return _uniform_values(spec, shape, bounds, rng)
        if not spec.is_integer:
            normal = rng.standard_normal(shape, dtype=np.float32)
            return np.asarray(np.clip(normal, -3.0, 3.0)).astype(dtype)
    raise DataError(
        f"input {spec.name!r} is {'string' if dtype.kind == 'O' else dtype}: synthetic inputs"
        " cannot be made for it; pass --data"
    )


def _uniform_values(
    spec: TensorSpec,
    shape: tuple[int, ...],
    bounds: tuple[float, float],
    rng: np.random.Generator,
) -> Array:
    """Draw uniform values, both bounds included."""
    (low, high), dtype = bounds, spec.dtype
    if spec.is_integer and math.isfinite(low) and math.isfinite(high):
        low, high = math.ceil(low), math.floor(high)
    least, most = spec.value_range
    if not least <= low <= high <= most:
        raise ConfigError(
            f"the range {bounds[0]:g}..{bounds[1]:g} of input {spec.name!r} is empty or goes"
            f" beyond {dtype}"
        )
    if spec.is_integer:
        # Not of the type itself: NumPy cannot draw those of ml_dtypes.
        drawn = np.uint64 if dtype == np.uint64 else np.int64
        whole = rng.integers(int(low), int(high), shape, dtype=drawn, endpoint=True)
        return np.asarray(whole).astype(dtype)
    return np.asarray(rng.uniform(low, high, shape)).astype(dtype)
