"""Data for every model beside the project, and runs of the command line on them.

Labelled data, signals or files that resemble what a model was trained on, or made-up numbers.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from common import ROOT
from tasks import TASKS

from onnx_fliqs.data import input_specs
from onnx_fliqs.model import load_model
from onnx_fliqs.synthetic_data import synthetic

__all__ = ["RECIPES", "Arrays", "Ran", "Recipe", "blurred_luma", "command"]

Arrays = dict[str, npt.NDArray[Any]]

_SEED: Final = 0


def _bytes_of_files(samples: int) -> Arrays:
    """Magika reads the first and last 1024 bytes of a file.

    Here pieces of this project's files, up to half of whose bytes are of another: of whole
    files the model is so sure that there is nothing to learn from its outputs.
    """
    kinds = ("py", "md", "toml", "onnx", "npz")
    files = sorted(path for kind in kinds for path in ROOT.rglob(f"*.{kind}"))
    contents = [np.frombuffer(path.read_bytes(), np.uint8) for path in files]
    contents = [content for content in contents if len(content) >= 2048]
    rng = np.random.default_rng(_SEED)

    def piece() -> npt.NDArray[np.uint8]:
        content = contents[rng.integers(len(contents))]
        first, last = np.sort(rng.integers(len(content) - 2047, size=2))
        return np.concatenate([content[first:][:1024], content[last + 1024 :][:1024]])

    rows = [
        np.where(rng.uniform(size=2048) < share, piece(), piece())
        for share in rng.uniform(0, 0.5, samples)
    ]
    return {"bytes": np.stack(rows).astype(np.int32)}


def _voice(samples: int) -> Arrays:
    """Silero VAD reads 576 samples of sound at 16 kHz: harmonics that swell, in noise."""
    rng = np.random.default_rng(_SEED)
    t = np.arange(576) / 16000
    pitch, loudness = rng.uniform(80, 300, (samples, 1)), rng.uniform(0, 0.3, (samples, 1))
    sound = sum(np.sin(2 * np.pi * pitch * k * t) / k for k in range(1, 9))
    swell = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(2, 8, (samples, 1)) * t)
    noise = 0.01 * rng.standard_normal((samples, 576))
    return {
        "input": (loudness * swell * sound + noise).astype(np.float32),
        "state": np.zeros((2, samples, 128), np.float32),
        "sr": np.array(16000),
    }


def _spectra(samples: int) -> Arrays:
    """DTLN reads the magnitudes of a frame's spectrum, and a state."""
    rng = np.random.default_rng(_SEED)
    return {
        "input_2": np.abs(rng.standard_normal((samples, 1, 257))).astype(np.float32),
        "input_3": np.zeros((samples, 2, 128, 2), np.float32),
    }


def _bicubic(size: int, wanted: int) -> npt.NDArray[np.float64]:
    """The matrix that resizes a row of pixels, as MATLAB's ``imresize`` does."""
    scale = min(1.0, wanted / size)
    centres = (np.arange(wanted) + 0.5) * size / wanted - 0.5
    x = np.abs(centres[:, None] - np.arange(-size, 2 * size)[None, :]) * scale
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x <= 1, near, np.where(x <= 2, far, 0.0))
    # Beyond the border the image is mirrored.
    folded = weights[:, size : 2 * size].copy()
    folded += weights[:, size - 1 :: -1][:, :size] + weights[:, : 2 * size - 1 : -1]
    matrix: npt.NDArray[np.float64] = folded / folded.sum(axis=1, keepdims=True)
    return matrix


def blurred_luma(samples: int) -> Arrays:
    """VDSR reads the luma of images that were shrunk and enlarged again; here of CIFAR-10.

    Four images side by side give more than the 41 x 41 pixels that the network looks at around
    one; the middle 48 x 48 are kept, which 2, 3 and 4 divide.
    """
    images = TASKS["resnet8"].arrays("train")["x"]
    rng = np.random.default_rng(_SEED)
    coefficients = np.array([65.481, 128.553, 24.966]) / 255
    rows = []
    for index in range(samples):
        chosen = images[rng.integers(len(images), size=4)]
        luma = (np.tensordot(coefficients, chosen / 255, (0, 1)) * 255 + 16) / 255
        image = np.block([[luma[0], luma[1]], [luma[2], luma[3]]])[8:56, 8:56]
        small = 48 // (2, 3, 4)[index % 3]
        resize = _bicubic(small, 48) @ _bicubic(48, small)
        rows.append(np.clip(resize @ image @ resize.T, 0, 1))
    return {"x": np.stack(rows)[:, None].astype(np.float32)}


@dataclass(frozen=True)
class Recipe:
    """Data and sizes for one model, small enough that a step takes about a second."""

    samples: int = 256
    batch: int = 32
    task: str | None = None
    """Labelled data (see ``tasks``)."""
    data: Callable[[int], Arrays] | None = None
    """Data without labels; where both are missing, normal numbers are made up."""

    def arrays(self, model: Path) -> Arrays:
        """The training data, as its file holds it."""
        if self.task is not None:
            return {k: v[: self.samples] for k, v in TASKS[self.task].arrays("train").items()}
        if self.data is not None:
            return self.data(self.samples)
        specs = input_specs(load_model(model))
        return dict(synthetic(specs, self.samples, _SEED).stored_inputs)


_CIFAR: Final = Recipe(samples=4000, batch=64, task="resnet20")
_RAW_CIFAR: Final = Recipe(samples=4000, batch=64, task="resnet8")
_IMAGENET: Final = Recipe(samples=16, batch=2)
RECIPES: Final[Mapping[str, Recipe]] = {
    "resnet20_cifar10_jpegft_bn": _CIFAR,
    "resnet20_cifar10_jpegft_bnfold": _CIFAR,
    "mlperftiny_resnet8_cifar10_bn": _RAW_CIFAR,
    "mlperftiny_resnet8_cifar10_bnfold": _RAW_CIFAR,
    "vit_fmnist": Recipe(samples=4000, batch=64, task="vit"),
    "mobilenetv2_fmnist": Recipe(samples=4000, batch=64, task="mobilenetv2"),
    "vdsr_sr": Recipe(samples=64, batch=4, data=blurred_luma),
    "magika_standard_v3_3": Recipe(samples=128, batch=16, data=_bytes_of_files),
    # Its state has the batch on the second axis, so that it counts as a constant: one sample.
    "silero_vad_16k_op15": Recipe(samples=1, batch=1, data=_voice),
    "dtln_1": Recipe(data=_spectra),
    "light_resnet50": _IMAGENET,
    "light_inception_v2": _IMAGENET,
    "light_shufflenet": _IMAGENET,
    "squeezenet_v1.1_f16w": Recipe(samples=64, batch=4),
    "mobilenet_v1_0.25_128_deq8": Recipe(samples=128, batch=16),
    "mlperftiny_vww_mobilenetv1_025_96_bn": Recipe(samples=256, batch=32),
    "ultraface_rfb_320": Recipe(samples=32, batch=4),
    "espcn_nnresize_float": Recipe(samples=32, batch=4),
}


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int | None
    """The exit code; None where it was stopped for its time."""
    result: Mapping[str, Any]
    """What it printed as JSON."""
    reason: str
    """The last line of its complaint."""
    seconds: float


def command(limit: int, *arguments: object, python: str = sys.executable) -> Ran:
    """Run the command line, and read what it says.

    Args:
        limit: Seconds after which it is stopped.
        arguments: Of ``onnx-fliqs``.
        python: The interpreter, which may have another ONNX Runtime; it finds onnx-fliqs here.
    """
    code = "from onnx_fliqs.cli.main import main; main()"
    words = [python, "-c", code, *map(str, arguments), "--json"]
    started = time.monotonic()
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    except subprocess.TimeoutExpired:
        return Ran(None, {}, f"stopped after {limit} s", limit)
    complaint = (done.stderr.strip().splitlines() or ["killed"])[-1].removeprefix("Error: ")
    if done.returncode:
        return Ran(done.returncode, {}, complaint, time.monotonic() - started)
    return Ran(0, json.loads(done.stdout), "", time.monotonic() - started)
