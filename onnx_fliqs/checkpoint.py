"""Checkpoints of a search: one file, replaced atomically, that holds the whole state."""

import contextlib
import json
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
_LEFT_OVERS: Final = f".{_FILE}.*.tmp"
"""What a write that was killed leaves behind."""
_HEADER: Final = "header"
_SCHEMA: Final = 3


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
        # Arrays go by number: a name may hold what a zip archive does not keep apart.
        header = {"schema": _SCHEMA, "identity": self._identity, "names": list(arrays)}
        members: dict[str, Any] = {f"{i}": array for i, array in enumerate(arrays.values())}
        members[_HEADER] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FliqsError(
                f"cannot make the checkpoint folder {self.folder}: {error.strerror}"
            ) from error
        atomic_write(self.folder / _FILE, lambda file: np.savez(file, **members))

    def read(self) -> dict[str, npt.NDArray[Any]] | None:
        """The last state, or None if there is none.

        Raises:
            FliqsError: It cannot be read, or belongs to another search.
        """
        path = self.folder / _FILE
        try:
            identity, arrays = _parse(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # a damaged file can fail anywhere in zipfile or NumPy
            raise FliqsError(
                f"the checkpoint {path} cannot be read; delete it to start afresh"
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

    def check(self) -> None:
        """Refuse a place where no checkpoint can be written, before any work.

        Raises:
            FliqsError: There is something else of that name.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise FliqsError(
                f"cannot make the checkpoint folder {self.folder}: there is a file"
            )

    def begin(self, resume: bool) -> tuple[str, ...]:
        """Make room for a search, before its first step.

        A checkpoint that is not continued may be hours of work: it is set aside, in place of
        one that was set aside before.

        Args:
            resume: Whether the search continues from the checkpoint.

        Returns:
            What the user should know.

        Raises:
            FliqsError: As for :meth:`check`, or the checkpoint cannot be renamed.
        """
        self.check()
        if (self.folder / _FILE).exists() == resume:
            return ()
        if resume:
            return (f"there was no checkpoint in {self.folder}: the search started afresh",)
        aside = self.folder.with_name(f"{self.folder.name}.old")
        Checkpoint(aside, {}).remove()
        try:
            self.folder.rename(aside)
        except OSError as error:
            raise FliqsError(
                f"cannot set the checkpoint {self.folder} aside: {error.strerror}"
            ) from error
        return (f"the checkpoint of an earlier search is kept in {aside}",)

    def remove(self) -> None:
        """Delete the checkpoint, and the folder unless it holds anything else."""
        with contextlib.suppress(OSError):
            for path in (self.folder / _FILE, *self.folder.glob(_LEFT_OVERS)):
                path.unlink(missing_ok=True)
            self.folder.rmdir()


def _parse(path: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """The identity and the arrays of a file; whatever it raises means a damaged one."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        header = json.loads(archive[_HEADER].tobytes())
        if header["schema"] != _SCHEMA:
            raise ValueError(f"schema {header['schema']}")
        return dict(header["identity"]), {
            name: archive[f"{i}"] for i, name in enumerate(header["names"])
        }
