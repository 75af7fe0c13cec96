"""Checkpoints of a search: one file, replaced atomically, that holds the whole state."""

import io
import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_fliqs.errors import FliqsError
from onnx_fliqs.model import atomic_write

__all__ = ["Checkpoint"]

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]

_FILE: Final = "state.npz"
_IDENTITY: Final = "identity"


class Checkpoint:
    """A folder in which a search keeps its state."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Name the folder; nothing is written yet.

        Args:
            folder: Made on the first write.
            identity: JSON values that must be equal for a search to continue: the model, the
                data and the settings.
        """
        self.folder = folder
        # One round through JSON, so that tuples and lists compare equal.
        self._identity = json.loads(json.dumps(identity))

    def write(self, arrays: Arrays) -> None:
        """Replace the checkpoint.

        Raises:
            FliqsError: The folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FliqsError(
                f"cannot make the checkpoint folder {self.folder}: {error.strerror}"
            ) from error
        buffer = io.BytesIO()
        identity = np.frombuffer(json.dumps(self._identity).encode(), np.uint8)
        np.savez(buffer, **{_IDENTITY: identity, **arrays})
        atomic_write(self.folder / _FILE, buffer.getvalue())

    def read(self) -> dict[str, npt.NDArray[Any]] | None:
        """The last state, or None if there is none.

        Raises:
            FliqsError: It cannot be read, or belongs to another search.
        """
        path = self.folder / _FILE
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            identity = json.loads(arrays.pop(_IDENTITY).tobytes())
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise FliqsError(
                f"the checkpoint {path} cannot be read; delete {self.folder} to start afresh"
            ) from error
        different = [
            key
            for key in {**identity, **self._identity}
            if identity.get(key) != self._identity.get(key)
        ]
        if different:
            raise FliqsError(
                f"the checkpoint in {self.folder} is of a search with another"
                f" {', '.join(sorted(different))}; delete it to start afresh"
            )
        return arrays

    def remove(self) -> None:
        """Delete the folder, if it is there."""
        shutil.rmtree(self.folder, ignore_errors=True)
