"""Data sets from arrays, checked against the inputs of a model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_fliqs.data import (
    LABELS,
    Dataset,
    TensorSpec,
    batched_inputs,
    extremes,
    pieces,
    shape_text,
)
from onnx_fliqs.errors import DataError

__all__ = ["checked_dataset", "dataset_from_arrays", "match_names"]

Array: TypeAlias = npt.NDArray[Any]
Indices: TypeAlias = npt.NDArray[np.int64]

_ANY_NAME: Final = "x"


def dataset_from_arrays(
    arrays: Mapping[str, npt.ArrayLike], specs: Sequence[TensorSpec]
) -> Dataset:
    """Take one array per model input, by name, and ``labels`` where there are any.

    A model with a single input also accepts its array under the name ``x``. Arrays are not
    copied, and never changed.

    Args:
        arrays: Of plain numbers.
        specs: What the model wants (:func:`input_specs`).

    Raises:
        DataError: An array is not what the model needs.
    """
    specs = tuple(specs)
    keys = match_names("the data", tuple(arrays), specs)
    return checked_dataset(
        {name: _plain(key, arrays[key]) for name, key in keys.items()}, specs
    )


def _plain(name: str, values: npt.ArrayLike) -> Array:
    """An array of what may be lists, or tensors of another library."""
    try:
        return np.asarray(values)
    except Exception as error:  # Lists of different lengths, tensors on other devices, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name!r} is no array: {reason}") from error


def checked_dataset(arrays: Mapping[str, Array], specs: tuple[TensorSpec, ...]) -> Dataset:
    """Make a data set of arrays that have the names of the inputs, once they are checked.

    Args:
        arrays: By input name; ``labels`` beside them, unless an input has that name.
        specs: What the model wants.

    Raises:
        DataError: Shapes, values, labels or numbers of samples do not fit.
    """
    inputs = {spec.name: arrays[spec.name] for spec in specs}
    found = None if LABELS in inputs else arrays.get(LABELS)
    batched = batched_inputs(specs)
    for spec in specs:
        array = inputs[spec.name]
        _check_shape(array, spec, constant=spec.name not in batched)
        _check_values(array, spec)
    if found is not None:
        _check_label_array(found)
    _check_lengths(inputs, found, batched)
    return Dataset(inputs, found, specs)


def _listing(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def match_names(
    source: str, found: Sequence[str], specs: tuple[TensorSpec, ...]
) -> dict[str, str]:
    """Map each input, and ``labels``, to the name under which a source has it.

    Args:
        source: What to call it in messages.
        found: The names of its arrays.
        specs: What the model wants.

    Raises:
        DataError: An array is missing, or there is one that nothing uses.
    """
    needed = tuple(spec.name for spec in specs)
    keys = {name: name for name in needed if name in found}
    if len(needed) == 1 and not keys and _ANY_NAME in found:
        keys[needed[0]] = _ANY_NAME
    if missing := [name for name in needed if name not in keys]:
        raise DataError(
            f"{source} has no array {_listing(missing)}: the model needs {_listing(needed)},"
            f" and there is {_listing(found)}"
        )
    if LABELS in found:
        keys.setdefault(LABELS, LABELS)
    if extra := [name for name in found if name not in keys.values()]:
        raise DataError(
            f"{source} has arrays that nothing uses: {_listing(extra)}; the model takes"
            f" {_listing(needed)} and {LABELS!r}"
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
    found = shape_text(array.shape)
    if constant:
        wanted = shape_text("?" if size is None else size for size in spec.shape)
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
            raise DataError(f"input {name!r} wants strings, not {array.dtype}")
        return
    if array.dtype.kind not in "biufc" or (array.dtype.kind == "c" and target.kind != "c"):
        raise DataError(f"input {name!r} wants {target}, not {array.dtype}")
    if array.size == 0:
        return
    if array.dtype.kind in "fc":
        _check_finite(array, f"input {name!r} holds", array.dtype)
    if target.kind == "c":
        return
    low, high = spec.value_range
    least, most = extremes(array)
    if least < low or most > high:
        worst = most if most > high else least
        raise DataError(f"input {name!r} is {target}, which cannot hold {worst:g}")
    whole = array.dtype.kind != "f" or not spec.is_integer
    if not (whole or all((piece == np.trunc(piece)).all() for piece in pieces(array))):
        raise DataError(f"input {name!r} is {target}, but the data has fractions")


def _check_finite(array: Array, what: str, dtype: npt.DTypeLike) -> None:
    """Refuse what is not finite once it has a type."""
    start = 0
    for piece in pieces(array):
        with np.errstate(over="ignore"):
            finite = np.isfinite(piece.astype(dtype, copy=False))
        if not finite.all():
            first = np.argwhere(~finite)[0]
            first[:1] += start
            where = ", ".join(map(str, first))
            raise DataError(f"{what} NaN or infinity, first at index [{where}]")
        start += len(piece) if piece.ndim else 0


def _check_label_array(labels: Array) -> None:
    """Check that labels are class numbers, or finite numbers of another kind."""
    if labels.dtype.kind not in "biuf":
        raise DataError(f"labels are {labels.dtype}; they must be integers or floats")
    if labels.ndim == 0:
        raise DataError("labels need a first axis that counts the samples")
    if labels.dtype.kind == "f":
        _check_finite(labels, "labels hold", np.float32)
        return
    if not labels.size:
        return
    least, most = extremes(labels)
    if least < 0:
        raise DataError(f"labels run from {least}; they must not be negative")
    if most > np.iinfo(np.int64).max:
        raise DataError(f"labels run to {most}, which is no class number")


def _check_lengths(
    arrays: Mapping[str, Array], labels: Array | None, batched: Sequence[str]
) -> None:
    """Check that all arrays have the same number of samples, and more than none."""
    lengths = {name: len(arrays[name]) for name in batched}
    if labels is not None:
        # An input of that name has no labels beside it, so this overwrites nothing.
        lengths[LABELS] = len(labels)
    if len(set(lengths.values())) > 1:
        each = ", ".join(f"{name!r} has {length}" for name, length in lengths.items())
        raise DataError(f"the arrays differ in their number of samples: {each}")
    if 0 in lengths.values():
        raise DataError("the data has no samples")
