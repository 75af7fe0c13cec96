"""Peak memory of a short search, by how its samples are given.

    python benchmarks/data_memory.py --megabytes 1000

Writes images of noise, with a label for each sample or for each place (8 bits), into a folder
of ``.npy`` files and into an ``.npz``, and searches a small CNN on each in a process of its
own. Counted is memory of the process itself: pages of mapped files can be dropped at any time.
Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from common import provenance

import onnx_fliqs
from onnx_fliqs import SearchConfig

_SHAPE: Final = (3, 64, 64)
_CLASSES: Final = 10
_CHUNK: Final = 256
_STEPS: Final = 20
_CLASSIFIER: Final = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[N,{",".join(map(str, _SHAPE))}] image) => (float[N,{_CLASSES}] y)
    <float[8,3,3,3] w, float[8,{_CLASSES}] v> {{
        c = Conv <strides = [4, 4]> (image, w)
        r = Relu (c)
        p = GlobalAveragePool (r)
        f = Flatten (p)
        y = MatMul (f, v)
    }}
"""
_SEGMENTER: Final = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[N,{",".join(map(str, _SHAPE))}] image)
        => (float[N,{_CLASSES},{",".join(map(str, _SHAPE[1:]))}] y)
    <float[8,3,3,3] w, float[{_CLASSES},8,1,1] v> {{
        c = Conv <pads = [1, 1, 1, 1]> (image, w)
        r = Relu (c)
        y = Conv (r, v)
    }}
"""


def _write(folder: Path, megabytes: int, *, places: bool) -> tuple[Path, ...]:
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(_SEGMENTER if places else _CLASSIFIER)
    last = (_CLASSES, 8, 1, 1) if places else (8, _CLASSES)
    for value, shape in (("w", (8, 3, 3, 3)), ("v", last)):
        weights = (0.2 * rng.standard_normal(shape)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weights, value))
    onnx.save(model, folder / "model.onnx")
    count = megabytes * 10**6 // (4 * int(np.prod(_SHAPE)))
    mapped = folder / "mapped"
    mapped.mkdir()
    images = np.lib.format.open_memmap(
        mapped / "image.npy", "w+", np.dtype(np.float32), (count, *_SHAPE)
    )
    for start in range(0, count, _CHUNK):
        piece = images[start : start + _CHUNK]
        piece[:] = rng.standard_normal(piece.shape, np.float32)
    images.flush()
    each = _SHAPE[1:] if places else ()
    labels = rng.integers(0, _CLASSES, (count, *each), np.uint8)
    np.save(mapped / "labels.npy", labels)
    archive = folder / "archive.npz"
    np.savez(archive, image=images, labels=labels)
    return mapped, archive


def _peak(model: Path, data: Path) -> float:
    """Megabytes."""
    most = 0

    def watch() -> None:
        nonlocal most
        while True:
            lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            line = next(line for line in lines if line.startswith("RssAnon:"))
            most = max(most, int(line.split()[1]))
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    onnx_fliqs.search(model, data, SearchConfig(steps=_STEPS, workers=1))
    return most * 1024 / 1e6


def main() -> None:
    """Measure each in its process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=1000, help="of images")
    parser.add_argument("--search", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.search:
        print(_peak(*options.search))
        return
    print(json.dumps(provenance()))
    print("\n| labels | samples | peak, MB |\n|---|---|---|")
    for kind, places in (("of a sample", False), ("of each place", True)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for data in _write(folder, options.megabytes, places=places):
                command = [sys.executable, __file__, "--search", folder / "model.onnx", data]
                found = subprocess.run(command, capture_output=True, text=True, check=True)
                print(f"| {kind} | {data.name} | {float(found.stdout):.0f} |")


if __name__ == "__main__":
    main()
