"""Which samples train, which judge, and in what order: functions of a seed."""

import functools
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_fliqs.data import Dataset
from onnx_fliqs.objective import are_numbers

__all__ = ["batch_indices", "split"]

Indices: TypeAlias = npt.NDArray[np.int64]


def split(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Divide into a training and a validation set, without a common sample.

    Where each sample has one class, both have each class in the same proportion. Both are
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
    stored = dataset.stored_labels
    if stored is not None and stored.ndim == 1 and not are_numbers(stored):
        labels = np.asarray(dataset.labels)
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
