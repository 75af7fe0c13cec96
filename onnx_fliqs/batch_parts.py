"""How a training batch is cut into parts that run one after another, or side by side.

Small parts need less memory at once, and more of it stays in the caches; each part costs some
calls of its own, and sums that are joined in the end.
"""

import math
from typing import Final

import numpy as np
import onnx_ir as ir

__all__ = ["part_sizes", "values_per_sample"]

_MOST_SAMPLES: Final = 32
_MOST_VALUES: Final = 2**25
"""Values that the nodes of a part compute, at most: 128 MiB in float32."""


def part_sizes(batch: int, workers: int, values: int) -> list[int]:
    """Cut a batch: as many parts for each worker, of at most 32 samples.

    Fewer where a sample's values take much memory, but never less than one.

    Args:
        batch: Samples.
        workers: Parts that run side by side.
        values: Of a sample, see :func:`values_per_sample`.
    """
    largest = max(1, min(_MOST_SAMPLES, _MOST_VALUES // max(1, values)))
    rounds = -(-batch // (largest * workers))
    count = min(workers * rounds, batch)
    return [len(part) for part in np.array_split(np.arange(batch), count)]


def values_per_sample(model: ir.Model) -> int:
    """How many numbers the nodes compute for one sample.

    Values whose shapes are not known behind their first axis do not count.
    """
    total = 0
    for node in model.graph:
        for value in node.outputs:
            sizes = [] if value.shape is None else value.shape.dims[1:]
            known = [size for size in sizes if isinstance(size, int)]
            if value.shape is not None and len(known) == len(sizes):
                total += math.prod(known)
    return total
