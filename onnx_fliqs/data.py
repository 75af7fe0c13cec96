"""Data sets: arrays for the inputs of a model.

Values are cast to the type of the input they feed, never rescaled: a model that wants pixels
in 0..255 gets what the file holds.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.errors import DataError, UnsupportedError

__all__ = [
    "LABELS",
    "Dataset",
    "TensorSpec",
    "batched_inputs",
    "check_labels",
    "extremes",
    "input_specs",
    "pieces",
    "shape_text",
]

Array: TypeAlias = npt.NDArray[Any]
Indices: TypeAlias = npt.NDArray[np.int64]

LABELS: Final = "labels"
"""Under which name a file has them."""

_PIECE: Final = 1 << 22
"""Numbers of an array that are looked at together."""
_FEWEST_OBSERVED: Final = 8
_MOST_OBSERVED: Final = 400_000
"""Numbers of a batch's inputs, where what lies behind them is kept as well."""


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
        return shape_text(("N", *("?" if size is None else size for size in self.shape[1:])))

    @property
    def is_integer(self) -> bool:
        """Whether it takes whole numbers only; NumPy calls those of ml_dtypes void."""
        return self.dtype.kind in "biu" or self.dtype.name.startswith(("int", "uint"))

    @property
    def value_range(self) -> tuple[float, float]:
        """The smallest and the largest number that its type holds."""
        if self.dtype.kind == "b":
            return 0, 1
        if self.is_integer:
            whole = ml_dtypes.iinfo(self.dtype)  # type: ignore[no-untyped-call]
            return int(whole.min), int(whole.max)
        real = ml_dtypes.finfo(self.dtype)  # type: ignore[no-untyped-call]
        return float(real.min), float(real.max)


def input_specs(model: ir.Model) -> tuple[TensorSpec, ...]:
    """List what a model must be fed: its inputs, without those that have a default value.

    Raises:
        UnsupportedError: An input is not a tensor of a known type.
        DataError: An input has its samples along another axis than the first.
    """
    specs = []
    fed = [value for value in model.graph.inputs if not value.is_initializer()]
    _refuse_other_batch_axes(fed)
    for value in fed:
        if not isinstance(value.type, ir.TensorType):
            raise UnsupportedError(f"input {value.name!r} is not a tensor of a known type")
        shape = None if value.shape is None else tuple(map(_fixed_size, value.shape))
        specs.append(TensorSpec(value.name or "", value.type.dtype.numpy(), shape))
    return tuple(specs)


def _refuse_other_batch_axes(inputs: Sequence[ir.Value]) -> None:
    """Refuse an input with the name of the batch, which is free, on a later axis."""
    shapes = {value: tuple(value.shape) for value in inputs if value.shape is not None}
    batch = next((shape[0] for shape in shapes.values() if shape), None)
    if not isinstance(batch, ir.SymbolicDim) or batch.value is None:
        return
    for value, shape in shapes.items():
        if shape and shape[0] != batch and batch in shape[1:]:
            raise DataError(
                f"input {value.name!r} has its samples along axis {shape.index(batch)}, not"
                f" along the first: fix the batch size {batch.value!r} of the model to 1"
            )


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


def batched_inputs(specs: Sequence[TensorSpec]) -> tuple[str, ...]:
    """The inputs that have a batch axis; the rule is in the docstring of Dataset."""
    batch = _batch_size(specs)
    return tuple(
        spec.name
        for spec in specs
        if spec.shape is None
        or (spec.shape and (spec.shape[0] is None or spec.shape[0] == batch))
    )


def shape_text(sizes: Iterable[object]) -> str:
    """A shape for messages."""
    return f"[{','.join(map(str, sizes))}]"


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

    stored_inputs: Mapping[str, Array]
    """By input name: not yet of the input's type, and maybe of more samples (``rows``)."""
    stored_labels: Array | None
    """``[N]`` or ``[N, ...]``, as the inputs: classes as whole numbers of any type, never
    negative, or finite floats."""
    specs: tuple[TensorSpec, ...]
    synthetic: bool = False
    """Whether the samples are made up."""
    rows: Indices | None = None
    """Which samples of the stored arrays, in which order; None: all. So parts of a data set
    share its memory, or its files."""

    def __len__(self) -> int:
        """The number of samples."""
        if self.rows is not None:
            return len(self.rows)
        return max((len(self.stored_inputs[name]) for name in self._batched), default=1)

    @property
    def _batched(self) -> tuple[str, ...]:
        return batched_inputs(self.specs)

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
        numbers = sum(math.prod(self.stored_inputs[name].shape[1:]) for name in self._batched)
        fitting = max(_FEWEST_OBSERVED, _MOST_OBSERVED // max(1, numbers))
        return min(most, fitting, len(self))

    def batch(self, indices: npt.NDArray[np.integer[Any]]) -> dict[str, Array]:
        """Gather samples, of the inputs' types and contiguous, ready to be fed."""
        chosen = self._stored_at(indices)
        batched = self._batched
        return {
            spec.name: np.asarray(
                self.stored_inputs[spec.name][chosen]
                if spec.name in batched
                else self.stored_inputs[spec.name],
                dtype=spec.dtype,
                order="C",
            )
            for spec in self.specs
        }

    def labels_at(self, indices: npt.NDArray[np.integer[Any]]) -> Array | None:
        """Gather labels: int64 classes or float32 numbers; None if there are none."""
        if self.stored_labels is None:
            return None
        return _as_labels(self.stored_labels[self._stored_at(indices)])

    @property
    def labels(self) -> Array | None:
        """All its labels, as :meth:`labels_at`; a copy, if they are stored in another way."""
        if self.stored_labels is None:
            return None
        return _as_labels(self.stored_labels[slice(None) if self.rows is None else self.rows])

    def _stored_at(
        self, indices: npt.NDArray[np.integer[Any]]
    ) -> npt.NDArray[np.integer[Any]]:
        return indices if self.rows is None else self.rows[indices]

    def take(self, indices: npt.NDArray[np.integer[Any]]) -> "Dataset":
        """Make a data set of some of the samples, in the order of the indices.

        Its arrays are those of this one; nothing is copied.
        """
        rows = np.arange(len(self)) if self.rows is None else self.rows
        return replace(self, rows=rows[indices])

    def fingerprint(self) -> str:
        """SHA-256 over names, types, shapes and contents: equal only for equal data."""
        digest = hashlib.sha256()
        batched = self._batched
        for name in sorted(self.stored_inputs):
            rows = self.rows if name in batched else None
            _feed(digest.update, f"input {name}", self.stored_inputs[name], rows)
        if self.stored_labels is not None:
            _feed(digest.update, LABELS, self.stored_labels, self.rows)
        return digest.hexdigest()


def _as_labels(stored: Array) -> Array:
    return np.asarray(stored, np.float32 if stored.dtype.kind == "f" else np.int64)


def _feed(
    update: Callable[[bytes | memoryview], object],
    name: str,
    array: Array,
    rows: Indices | None = None,
) -> None:
    """Feed name, type, shape and contents of an array, or of some of its rows, to a hash."""
    shape = array.shape if rows is None else (len(rows), *array.shape[1:])
    update(f"{name!r} {array.dtype} {shape}\n".encode())
    if array.dtype.hasobject:  # Strings have no bytes of their own when they are objects.
        update(repr((array if rows is None else array[rows]).tolist()).encode())
        return
    for piece in pieces(array, rows):
        update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)


def pieces(array: Array, rows: Indices | None = None) -> Iterator[Array]:
    """An array, or some rows of it, a few million numbers at a time: it may be a file.

    Args:
        array: What to cut along its first axis; a scalar is one piece.
        rows: Which rows, in which order; None: all.
    """
    if not array.ndim:
        yield array
        return
    count = len(array) if rows is None else len(rows)
    step = max(1, _PIECE // max(1, math.prod(array.shape[1:])))
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield array[start:stop] if rows is None else array[rows[start:stop]]


def extremes(array: Array, rows: Indices | None = None) -> tuple[Any, Any]:
    """The smallest and the largest number of an array that is not empty, as plain numbers.

    Args:
        array: Real numbers without NaN.
        rows: Which rows count; None: all.
    """
    found = [(piece.min().item(), piece.max().item()) for piece in pieces(array, rows)]
    return min(least for least, _ in found), max(most for _, most in found)


def check_labels(dataset: Dataset, classes: int) -> None:
    """Check that every label is one of the model's classes.

    Raises:
        DataError: A label is too large.
    """
    if dataset.stored_labels is None:
        return
    least, most = extremes(dataset.stored_labels, dataset.rows)
    if most >= classes:
        hint = "; numbers to regress must be floats" if classes == 1 else ""
        raise DataError(
            f"labels run from {int(least)} to {int(most)}, but the model's output has"
            f" {classes} classes{hint}"
        )
