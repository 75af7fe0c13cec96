"""Data sets from files, checked against the inputs of a model."""

import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_fliqs.data import Dataset, TensorSpec
from onnx_fliqs.data_arrays import checked_dataset, match_names
from onnx_fliqs.errors import DataError

__all__ = ["load_data", "load_folder", "load_npz"]

Array: TypeAlias = npt.NDArray[Any]


def load_data(path: Path, specs: Sequence[TensorSpec]) -> Dataset:
    """Read an ``.npz`` file, or a folder of ``.npy`` files.

    Raises:
        DataError: As for :func:`load_npz` and :func:`load_folder`.
    """
    return load_folder(path, specs) if path.is_dir() else load_npz(path, specs)


def load_folder(folder: Path, specs: Sequence[TensorSpec]) -> Dataset:
    """Map one ``.npy`` file per model input, by name, and ``labels.npy`` where there is one.

    What is mapped is read when it is needed, so the samples may be more than the memory
    holds. Names are as in :func:`load_npz`; ``ids/tokens.npy`` feeds the input
    ``ids/tokens``. Other files of the folder do not matter.

    Args:
        folder: Where the files are.
        specs: What the model wants (:func:`input_specs`).

    Raises:
        DataError: A file is missing, or is not what the model needs.
    """
    specs = tuple(specs)
    found = {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for file in sorted(folder.rglob("*.npy"))
    }
    keys = match_names(str(folder), tuple(found), specs)
    return checked_dataset({name: _map_array(found[key]) for name, key in keys.items()}, specs)


def _map_array(file: Path) -> Array:
    try:
        array: Array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # A damaged header can fail anywhere in NumPy.
        if "Python objects" in str(error) or "Object arrays" in str(error):
            reason = "it holds Python objects; save plain numbers"
        else:
            reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{file} is not a readable .npy file: {reason}") from error
    return array


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
    return checked_dataset(_read_arrays(path, specs), specs)


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
            keys = match_names(str(path), archive.files, specs)
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
