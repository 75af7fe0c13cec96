"""Data sets: arrays for the inputs of a model, read from ``.npz`` files or made up.

Values are cast to the type of the input they feed, never rescaled: a model that wants pixels
in 0..255 gets what the file holds.
"""

import functools
import hashlib
import math
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.errors import ConfigError, DataError, UnsupportedError

__all__ = [
    "Dataset",
    "TensorSpec",
    "batch_indices",
    "check_labels",
    "input_specs",
    "load_npz",
    "split",
    "synthetic",
]

Array: TypeAlias = npt.NDArray[Any]
Indices: TypeAlias = npt.NDArray[np.int64]

_FEWEST_OBSERVED: Final = 8
_MOST_OBSERVED: Final = 400_000
"""Numbers of a batch's inputs, where what lies behind them is kept as well."""
_LABELS: Final = "labels"
_ANY_NAME: Final = "x"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, type and shape of a model input."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...] | None
    """None for a dimension that is free, or for the whole where even the rank is unknown."""

    @property
    def label(self) -> str:
        """The shape for messages: ``[N,3,32,32]``, with ``?`` for a free dimension."""
        if self.shape is None:
            return "[N,...]"
        if not self.shape:
            return "[]"
        return _shape_text(("N", *("?" if size is None else size for size in self.shape[1:])))


def input_specs(model: ir.Model) -> tuple[TensorSpec, ...]:
    """List what a model must be fed: its inputs, without those that have a default value.

    Raises:
        UnsupportedError: An input is not a tensor of a known type.
    """
    specs = []
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        if not isinstance(value.type, ir.TensorType):
            raise UnsupportedError(f"input {value.name!r} is not a tensor of a known type")
        shape = None if value.shape is None else tuple(map(_fixed_size, value.shape))
        specs.append(TensorSpec(value.name or "", value.type.dtype.numpy(), shape))
    return tuple(specs)


def _fixed_size(dimension: int | ir.SymbolicDim) -> int | None:
    """A dimension's size; exporters also write 0 and -1 for a free one."""
    return dimension if isinstance(dimension, int) and dimension > 0 else None


def _batch_size(specs: Sequence[TensorSpec]) -> int | None:
    """The batch size that a model fixes: the first dimension of its first non-scalar input."""
    for spec in specs:
        if spec.shape is None:
            return None
        if spec.shape:
            return spec.shape[0]
    return None


def _is_constant(spec: TensorSpec, batch: int | None) -> bool:
    """Whether the input has no batch axis; the rule is in the docstring of Dataset."""
    if spec.shape is None:
        return False
    return not spec.shape or (spec.shape[0] is not None and spec.shape[0] != batch)


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Samples for every input of a model, and their labels if there are any.

    The first axis of an array counts the samples, and a batch gathers some of them. A model
    whose first input has a fixed first dimension accepts only batches of that size
    (``fixed_batch``); whoever runs it asks for as many indices.

    An input has no batch axis if it is a scalar, or if its first dimension is fixed and is not
    the batch size: beside ``frames [N,257]`` or ``frames [1,257]``, a ``state [2,128]`` is one
    constant. Its array has exactly that shape and goes whole into each batch.
    """

    inputs: Mapping[str, Array]
    """By input name, as stored: not yet of the input's type."""
    labels: Indices | None
    """``[N]`` or ``[N, ...]``, never negative."""
    specs: tuple[TensorSpec, ...]
    synthetic: bool = False
    """Whether the samples are made up."""

    def __len__(self) -> int:
        """The number of samples."""
        return max((len(self.inputs[name]) for name in self._batched), default=1)

    @property
    def _batched(self) -> tuple[str, ...]:
        batch = self.fixed_batch
        return tuple(spec.name for spec in self.specs if not _is_constant(spec, batch))

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the model accepts; None if any will do."""
        return _batch_size(self.specs)

    def batch_within(self, most: int) -> int:
        """A batch size for runs that keep every tensor inside the model.

        Args:
            most: For inputs of some thousand numbers; big images are run 8 at a time.
        """
        if self.fixed_batch is not None:
            return self.fixed_batch
        numbers = sum(math.prod(self.inputs[name].shape[1:]) for name in self._batched)
        fitting = max(_FEWEST_OBSERVED, _MOST_OBSERVED // max(1, numbers))
        return min(most, fitting, len(self))

    def batch(self, indices: npt.NDArray[np.integer[Any]]) -> dict[str, Array]:
        """Gather samples, of the inputs' types and contiguous, ready to be fed."""
        batched = self._batched
        return {
            spec.name: np.asarray(
                self.inputs[spec.name][indices]
                if spec.name in batched
                else self.inputs[spec.name],
                dtype=spec.dtype,
                order="C",
            )
            for spec in self.specs
        }

    def take(self, indices: npt.NDArray[np.integer[Any]]) -> "Dataset":
        """Make a data set of some of the samples, in the order of the indices."""
        batched = self._batched
        return replace(
            self,
            inputs={
                name: array[indices] if name in batched else array
                for name, array in self.inputs.items()
            },
            labels=None if self.labels is None else self.labels[indices],
        )

    def fingerprint(self) -> str:
        """SHA-256 over names, types, shapes and contents: equal only for equal data."""
        digest = hashlib.sha256()
        arrays = [(f"input {name}", self.inputs[name]) for name in sorted(self.inputs)]
        if self.labels is not None:
            arrays.append((_LABELS, self.labels))
        for name, array in arrays:
            digest.update(f"{name!r} {array.dtype} {array.shape}\n".encode())
            digest.update(
                # Strings have no bytes of their own when they are objects.
                repr(array.tolist()).encode()
                if array.dtype.hasobject
                else np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            )
        return digest.hexdigest()


def load_npz(path: Path, specs: Sequence[TensorSpec]) -> Dataset:
    """Read one array per model input, by name, and ``labels`` where the file has them.

    A model with a single input also accepts its array under the name ``x``.

    Args:
        path: An ``.npz`` file of plain numbers.
        specs: What the model wants (:func:`input_specs`).

    Raises:
        DataError: The file or an array in it is not what the model needs.
    """
    specs = tuple(specs)
    arrays = _read_arrays(path, specs)
    found = arrays.pop(_LABELS, None) if _LABELS not in _names(specs) else None
    batch = _batch_size(specs)
    for spec in specs:
        array = arrays[spec.name]
        _check_shape(array, spec, constant=_is_constant(spec, batch))
        _check_values(array, spec)
    labels = None if found is None else _check_label_array(found)
    _check_lengths(arrays, labels, [s.name for s in specs if not _is_constant(s, batch)])
    return Dataset(arrays, labels, specs)


def _names(specs: Iterable[TensorSpec]) -> tuple[str, ...]:
    return tuple(spec.name for spec in specs)


def _listing(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _shape_text(sizes: Iterable[object]) -> str:
    return f"[{','.join(map(str, sizes))}]"


def _read_arrays(path: Path, specs: tuple[TensorSpec, ...]) -> dict[str, Array]:
    """Read the arrays of a file, by input name, after checking that all are there."""
    if not path.exists():
        raise DataError(f"data file {path} does not exist")
    try:
        # Reading a damaged header can also warn before it fails.
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")
            # For anything but a zip file NumPy would talk of pickles.
            if file.read(2) != b"PK" or not zipfile.is_zipfile(file):
                _refuse(f"{path} is not an .npz file, or is cut off")
            file.seek(0)
            archive = np.load(file, allow_pickle=False)
            keys = _match_names(path, archive.files, specs)
            return {name: _read_array(path, archive, key) for name, key in keys.items()}
    except DataError:
        raise
    except Exception as error:  # A damaged file can fail anywhere in zipfile, zlib or NumPy.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} is not a readable .npz file: {reason}") from error


def _refuse(message: str) -> NoReturn:
    raise DataError(message)


def _read_array(path: Path, archive: Mapping[str, Array], key: str) -> Array:
    """Read one array of a file."""
    try:
        array = archive[key]
    except ValueError as error:
        if "Object arrays" not in str(error):
            raise
        raise DataError(f"{path}: {key!r} holds Python objects; save plain numbers") from error
    if not isinstance(array, np.ndarray):  # NumPy hands members of other kinds on as bytes.
        raise DataError(f"{path}: {key!r} is not an array")
    return array


def _match_names(
    path: Path, found: Sequence[str], specs: tuple[TensorSpec, ...]
) -> dict[str, str]:
    """Map each input, and ``labels``, to the name under which the file has it."""
    needed = _names(specs)
    keys = {name: name for name in needed if name in found}
    if len(needed) == 1 and not keys and _ANY_NAME in found:
        keys[needed[0]] = _ANY_NAME
    if missing := [name for name in needed if name not in keys]:
        raise DataError(
            f"{path} has no array {_listing(missing)}: the model needs {_listing(needed)},"
            f" the file has {_listing(found)}"
        )
    if _LABELS in found:
        keys.setdefault(_LABELS, _LABELS)
    if extra := [name for name in found if name not in keys.values()]:
        raise DataError(
            f"{path} has arrays that nothing uses: {_listing(extra)}; the model takes"
            f" {_listing(needed)} and {_LABELS!r}"
        )
    return keys


def _check_shape(array: Array, spec: TensorSpec, *, constant: bool) -> None:
    """Check an array against the shape of its input."""
    if spec.shape is None:
        if array.ndim == 0:
            raise DataError(f"input {spec.name!r} needs a first axis that counts the samples")
        return
    if _fits(array.shape, spec.shape, constant=constant):
        return
    found = _shape_text(array.shape)
    if constant:
        wanted = _shape_text("?" if size is None else size for size in spec.shape)
        raise DataError(
            f"input {spec.name!r} has shape {found}; the model wants {wanted},"
            " the same for every sample"
        )
    raise DataError(
        f"input {spec.name!r} has shape {found}{_layout_hint(array.shape, spec.shape)};"
        f" the model wants {spec.label}{_mend(array.shape, spec.shape)}"
    )


def _fits(found: tuple[int, ...], shape: tuple[int | None, ...], *, constant: bool) -> bool:
    wanted = shape if constant else (None, *shape[1:])
    return len(found) == len(wanted) and all(
        size in (None, actual) for actual, size in zip(found, wanted, strict=True)
    )


def _channels_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[-1], *shape[1:-1])


def _channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], *shape[2:], shape[1])


def _layout_hint(found: tuple[int, ...], shape: tuple[int | None, ...]) -> str:
    """Recognise images whose channels are at the other end."""
    if len(found) == len(shape) == 4:
        if _fits(_channels_first(found), shape, constant=False):
            return ", which looks like NHWC"
        if _fits(_channels_last(found), shape, constant=False):
            return ", which looks like NCHW"
    return ""


def _mend(found: tuple[int, ...], shape: tuple[int | None, ...]) -> str:
    """What to do about the commonest wrong shapes."""
    if _layout_hint(found, shape):
        return ": transpose it first"
    for axis in range(1, len(shape)):
        longer = (*found[:axis], 1, *found[axis:])
        if shape[axis] == 1 and _fits(longer, shape, constant=False):
            return ": insert an axis of length 1 first"
    return ""


def _check_values(array: Array, spec: TensorSpec) -> None:
    """Check that casting the array to the input's type keeps its values."""
    name, target = spec.name, spec.dtype
    if target.kind == "O":
        if array.dtype.kind != "U":
            raise DataError(f"input {name!r} wants strings, the file has {array.dtype}")
        return
    if array.dtype.kind not in "biufc" or (array.dtype.kind == "c" and target.kind != "c"):
        raise DataError(f"input {name!r} wants {target}, the file has {array.dtype}")
    if array.size == 0:
        return
    if array.dtype.kind in "fc" and not (finite := np.isfinite(array)).all():
        where = ", ".join(map(str, np.argwhere(~finite)[0]))
        raise DataError(f"input {name!r} holds NaN or infinity, first at index [{where}]")
    if target.kind == "c":
        return
    low, high = _value_range(target)
    least, most = array.min().item(), array.max().item()
    if least < low or most > high:
        worst = most if most > high else least
        raise DataError(f"input {name!r} is {target}, which cannot hold {worst:g}")
    if array.dtype.kind == "f" and _is_integer(target) and (array != np.trunc(array)).any():
        raise DataError(f"input {name!r} is {target}, but the file has fractions")


def _is_integer(dtype: np.dtype[Any]) -> bool:
    """Whether a type holds whole numbers only; NumPy calls those of ml_dtypes void."""
    return dtype.kind in "biu" or dtype.name.startswith(("int", "uint"))


def _value_range(dtype: np.dtype[Any]) -> tuple[float, float]:
    """The smallest and the largest number of a type."""
    if dtype.kind == "b":
        return 0, 1
    if _is_integer(dtype):
        whole = ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call]
        return int(whole.min), int(whole.max)
    real = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return float(real.min), float(real.max)


def _check_label_array(labels: Array) -> Indices:
    """Check that labels are class numbers."""
    if labels.dtype.kind not in "biu":
        raise DataError(f"labels are {labels.dtype}; they must be integers")
    if labels.ndim == 0:
        raise DataError("labels need a first axis that counts the samples")
    if labels.size and labels.min() < 0:
        raise DataError(f"labels run from {labels.min()}; they must not be negative")
    if labels.size and int(labels.max()) > np.iinfo(np.int64).max:
        raise DataError(f"labels run to {labels.max()}, which is no class number")
    return labels.astype(np.int64)


def _check_lengths(
    arrays: Mapping[str, Array], labels: Indices | None, batched: Sequence[str]
) -> None:
    """Check that all arrays have the same number of samples, and more than none."""
    lengths = {name: len(arrays[name]) for name in batched}
    if labels is not None:
        # An input of that name has no labels beside it, so this overwrites nothing.
        lengths[_LABELS] = len(labels)
    if len(set(lengths.values())) > 1:
        each = ", ".join(f"{name!r} has {length}" for name, length in lengths.items())
        raise DataError(f"the arrays differ in their number of samples: {each}")
    if 0 in lengths.values():
        raise DataError("the data has no samples")


def check_labels(dataset: Dataset, classes: int) -> None:
    """Check that every label is one of the model's classes.

    Raises:
        DataError: A label is too large.
    """
    labels = dataset.labels
    if labels is not None and labels.max() >= classes:
        raise DataError(
            f"labels run from {labels.min()} to {labels.max()}, but the model's output has"
            f" {classes} classes"
        )


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
    if unknown := [name for name in ranges if name not in _names(specs)]:
        raise ConfigError(
            f"a range names {_listing(unknown)}; the model's inputs are"
            f" {_listing(_names(specs))}"
        )
    batch = _batch_size(specs)
    inputs = {}
    for position, spec in enumerate(specs):
        if spec.shape is None:
            raise DataError(
                f"input {spec.name!r} has an unknown rank: synthetic inputs cannot be made for"
                " it; pass --data"
            )
        shape = tuple(size or dynamic for size in spec.shape)
        if not _is_constant(spec, batch):
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
        if bounds is None and _is_integer(dtype) and dtype.itemsize == 1:
            bounds = _value_range(dtype)
        if bounds is not None:
            return _uniform_values(spec, shape, bounds, rng)
        if not _is_integer(dtype):
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
    if _is_integer(dtype) and math.isfinite(low) and math.isfinite(high):
        low, high = math.ceil(low), math.floor(high)
    least, most = _value_range(dtype)
    if not least <= low <= high <= most:
        raise ConfigError(
            f"the range {bounds[0]:g}..{bounds[1]:g} of input {spec.name!r} is empty or goes"
            f" beyond {dtype}"
        )
    if _is_integer(dtype):
        # Not of the type itself: NumPy cannot draw those of ml_dtypes.
        drawn = np.uint64 if dtype == np.uint64 else np.int64
        whole = rng.integers(int(low), int(high), shape, dtype=drawn, endpoint=True)
        return np.asarray(whole).astype(dtype)
    return np.asarray(rng.uniform(low, high, shape)).astype(dtype)


def split(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Divide into a training and a validation set, without a common sample.

    Where each sample has one label, both have each class in the same proportion. Both are
    shuffled: files are often sorted by class, and the first samples of either part are looked
    at alone.

    Args:
        dataset: What to divide. A single sample becomes both sets.
        fraction: The share of the validation set, in (0, 1); it gets at least one sample and
            leaves at least one.
        seed: Not negative; the same seed divides in the same way.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must be in (0, 1), got {fraction}")
    total = len(dataset)
    if total == 1:
        return dataset, dataset
    held_out = min(max(round(fraction * total), 1), total - 1)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(total)
    labels = dataset.labels
    if labels is not None and labels.ndim == 1:
        # A sample's place within its class, 0..1: the lowest places of all classes together
        # are the same share of each class.
        shuffled = shuffled[np.argsort(_places(labels[shuffled]), kind="stable")]
    train, validation = (
        rng.permutation(shuffled[held_out:]),
        rng.permutation(shuffled[:held_out]),
    )
    return dataset.take(train), dataset.take(validation)


def _places(labels: Indices) -> npt.NDArray[np.float64]:
    """For each sample, the middle of its rank among those with its label, in (0, 1)."""
    _, first, inverse, counts = np.unique(
        np.sort(labels), return_index=True, return_inverse=True, return_counts=True
    )
    places = np.empty(len(labels))
    rank = np.arange(len(labels)) - first[inverse]
    places[np.argsort(labels, kind="stable")] = (rank + 0.5) / counts[inverse]
    return places


@functools.lru_cache(maxsize=4)
def _permutation(samples: int, seed: int, epoch: int) -> Indices:
    order = np.random.default_rng([seed, epoch]).permutation(samples).astype(np.int64)
    order.flags.writeable = False  # The cache hands the same array to every caller.
    return order


def batch_indices(samples: int, batch: int, step: int, seed: int) -> Indices:
    """Give the samples of one training batch, a pure function of its arguments.

    Batches follow each other through epochs, each of which visits every sample once in an
    order of its own; a batch may reach into the next epoch. A resumed search asks for the
    same steps and so sees the same batches.

    Args:
        samples: Size of the data set.
        batch: Size of the batch; it may be larger than the data set.
        step: Number of the batch, from 0.
        seed: Not negative.
    """
    if samples < 1 or batch < 1 or step < 0:
        raise ValueError(f"no batch {step} of {batch} from {samples} samples")
    first, last = step * batch, (step + 1) * batch
    parts = []
    for epoch in range(first // samples, -(-last // samples)):
        begin = epoch * samples
        order = _permutation(samples, seed, epoch)
        parts.append(order[max(first - begin, 0) : last - begin])
    return np.concatenate(parts)
