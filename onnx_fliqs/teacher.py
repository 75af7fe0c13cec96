"""The float model, asked once for each sample."""

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_fliqs.data import Dataset
from onnx_fliqs.runtime import run_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

__all__ = ["Teacher"]

Array: TypeAlias = npt.NDArray[Any]

_MOST_BYTES: Final = 1 << 28
"""What is remembered of a data set."""


class Teacher:
    """Gives the float model's outputs, and remembers them where they are small.

    A search sees the same samples again in each epoch, and the held-out ones more often; the
    float model does not change meanwhile.
    """

    def __init__(self, session: "InferenceSession", names: Sequence[str]) -> None:
        """Say what to ask for.

        Args:
            session: The float model.
            names: Outputs that are compared with; may be empty.
        """
        self._session = session
        self._names = tuple(names)
        declared = {value.name: value.shape for value in session.get_outputs()}
        self._firsts = {declared[name][0] for name in self._names if declared[name]}
        self._memories: dict[Dataset, _Memory] = {}
        self._lock = Lock()

    def outputs(
        self,
        inputs: Mapping[str, Array],
        source: Dataset | None = None,
        rows: npt.NDArray[Any] | None = None,
    ) -> dict[str, Array]:
        """The outputs for a batch.

        Args:
            inputs: What to feed.
            source: The data set that it was gathered from, if any.
            rows: The samples of the data set that it consists of.
        """
        if not self._names:
            return {}
        known = self._memories.get(source) if source is not None else None
        if known is not None and rows is not None and known.has[rows].all():
            return {name: array[rows] for name, array in known.arrays.items()}
        found = dict(
            zip(self._names, run_session(self._session, self._names, inputs), strict=True)
        )
        if source is not None and rows is not None:
            self._remember(found, source, rows)
        return found

    def _remember(
        self, found: Mapping[str, Array], source: Dataset, rows: npt.NDArray[Any]
    ) -> None:
        if any(array.ndim == 0 or len(array) != len(rows) for array in found.values()):
            return
        # A first dimension that is always the same may be as long as this batch by chance.
        if any(isinstance(n, int) and n != source.fixed_batch for n in self._firsts):
            return
        each = sum(array.nbytes for array in found.values()) / len(rows)
        if each * len(source) > _MOST_BYTES:
            return
        with self._lock:
            if source not in self._memories:
                self._memories[source] = _Memory(len(source), found)
            memory = self._memories[source]
        if any(memory.arrays[name].shape[1:] != a.shape[1:] for name, a in found.items()):
            return
        for name, array in found.items():
            memory.arrays[name][rows] = array
        memory.has[rows] = True


class _Memory:
    """What is known of a data set."""

    def __init__(self, samples: int, like: Mapping[str, Array]) -> None:
        self.arrays = {
            name: np.empty((samples, *array.shape[1:]), array.dtype)
            for name, array in like.items()
        }
        self.has = np.zeros(samples, np.bool_)
