"""Real models with their data: what benchmarks train and test on.

Everything lies beside the project (see ``common.SHARED``). A task's arrays are prepared as its
model expects them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from common import SHARED

__all__ = ["TASKS", "Arrays", "Task"]

Arrays: TypeAlias = dict[str, npt.NDArray[np.generic]]
"""``x`` and ``labels``, as an ``.npz`` file for onnx-fliqs holds them."""

_MEAN = np.array([0.485, 0.456, 0.406])[:, None, None]
_DEVIATION = np.array([0.229, 0.224, 0.225])[:, None, None]


def _cifar_pixels(part: str) -> Arrays:
    data = np.load(SHARED / "data" / "cifar10_jpeg_20k.npz")
    return {"x": data[f"{part}_x"].transpose(0, 3, 1, 2), "labels": data[f"{part}_y"]}


def _cifar(part: str) -> Arrays:
    arrays = _cifar_pixels(part)
    x = (np.asarray(arrays["x"], np.float64) / 255 - _MEAN) / _DEVIATION
    return {**arrays, "x": x.astype(np.float32)}


def _fashion(part: str) -> Arrays:
    data = np.load(SHARED / "data" / "fashion_mnist.npz")
    x = (data[f"{part}_x"][:, None] / 255 - 0.2860) / 0.3530
    return {"x": x.astype(np.float32), "labels": data[f"{part}_y"]}


@dataclass(frozen=True)
class Task:
    """A model and its data."""

    file: str
    arrays: Callable[[str], Arrays]
    """Gives the ``train`` or the ``test`` part."""

    @property
    def model(self) -> Path:
        """The float model."""
        return SHARED / "models" / self.file


TASKS = {
    "resnet20": Task("resnet20_cifar10_jpegft_bnfold.onnx", _cifar),
    "resnet8": Task("mlperftiny_resnet8_cifar10_bnfold.onnx", _cifar_pixels),
    "vit": Task("vit_fmnist.onnx", _fashion),
    "mobilenetv2": Task("mobilenetv2_fmnist.onnx", _fashion),
}
