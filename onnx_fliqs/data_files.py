"""Data sets from ``.npz`` files, checked against the inputs of a model."""

import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_fliqs.data import LABELS, Dataset, TensorSpec, batched_inputs, shape_text
from onnx_fliqs.errors import DataError

__all__ = ["load_npz"]

Array: TypeAlias = npt.NDArray[Any]
Indices: TypeAlias = npt.NDArray[np.int64]

_ANY_NAME: Final = "x"


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
    found = None if any(spec.name == LABELS for spec in specs) else arrays.pop(LABELS, None)
    batched = batched_inputs(specs)
    for spec in specs:
        array = arrays[spec.name]
        _check_shape(array, spec, constant=spec.name not in batched)
        _check_values(array, spec)
    labels = None if found is None else _check_label_array(found)
    _check_lengths(arrays, labels, batched)
    return Dataset(arrays, labels, specs)


def _listing(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


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
    needed = tuple(spec.name for spec in specs)
    keys = {name: name for name in needed if name in found}
    if len(needed) == 1 and not keys and _ANY_NAME in found:
        keys[needed[0]] = _ANY_NAME
    if missing := [name for name in needed if name not in keys]:
        raise DataError(
            f"{path} has no array {_listing(missing)}: the model needs {_listing(needed)},"
            f" the file has {_listing(found)}"
        )
    if LABELS in found:
        keys.setdefault(LABELS, LABELS)
    if extra := [name for name in found if name not in keys.values()]:
        raise DataError(
            f"{path} has arrays that nothing uses: {_listing(extra)}; the model takes"
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
    low, high = spec.value_range
    least, most = array.min().item(), array.max().item()
    if least < low or most > high:
        worst = most if most > high else least
        raise DataError(f"input {name!r} is {target}, which cannot hold {worst:g}")
    if array.dtype.kind == "f" and spec.is_integer and (array != np.trunc(array)).any():
        raise DataError(f"input {name!r} is {target}, but the file has fractions")


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
        lengths[LABELS] = len(labels)
    if len(set(lengths.values())) > 1:
        each = ", ".join(f"{name!r} has {length}" for name, length in lengths.items())
        raise DataError(f"the arrays differ in their number of samples: {each}")
    if 0 in lengths.values():
        raise DataError("the data has no samples")
