"""Whether emitted graphs compute the same at every optimisation level of another ONNX Runtime.

Emits a model post-training in each of many formats, then runs every file unoptimised, at the
basic and at the default level in the environment of ``--runtime-python`` (without onnx-fliqs),
and prints the difference from the unoptimised run: root mean square, as a share of that of the
output::

    python benchmarks/levels.py --runtime-python ../runtime/bin/python
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from common import SHARED, provenance

from onnx_fliqs.api import emit, inspect
from onnx_fliqs.assignment import Assignment

_CASES = [
    *(("generic", (name,)) for name in ("int2", "int3", "int4", "int6", "int8", "int16")),
    *(("generic", (name,)) for name in ("e2m1", "e3m2", "e4m3", "e5m2", "bf16", "fp16")),
    ("generic", ("int4", "int8", "e4m3", "e5m2")),
    ("ort-cpu", ("int8",)),
    ("ort-cpu", ("int8", "float32")),
]
_PLAIN = """
import json, sys
import numpy as np, onnxruntime as ort
x = np.load(sys.argv[2])
rows = []
for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"):
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    rows.append(session.run(None, {session.get_inputs()[0].name: x})[0])
size = np.sqrt(np.mean(rows[0] ** 2))
print(json.dumps([float(np.sqrt(np.mean((row - rows[0]) ** 2)) / size) for row in rows[1:]]))
"""


def main() -> None:
    """Run every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet20_cifar10_jpegft_bnfold")
    parser.add_argument("--runtime-python", type=Path, required=True)
    options = parser.parse_args()
    model = SHARED / "models" / f"{options.model}.onnx"
    with tempfile.TemporaryDirectory() as folder:
        inputs, output = Path(folder) / "x.npy", Path(folder) / "out.onnx"
        shape = [64, *(int(d) for d in _shape(model)[1:])]
        np.save(inputs, np.random.default_rng(0).standard_normal(shape).astype(np.float32))
        for target, names in _CASES:
            rng = np.random.default_rng(0)
            layers = inspect(model, target=target).layers
            chosen = {layer.name: str(rng.choice(names)) for layer in layers}
            emit(model, Assignment(chosen, target)).save(output)
            command = [str(options.runtime_python), "-c", _PLAIN, str(output), str(inputs)]
            found = subprocess.run(command, capture_output=True, text=True, check=False)
            last = (found.stderr.strip().splitlines() or ["?"])[-1]
            basic, default = (
                json.loads(found.stdout) if found.returncode == 0 else (last, last)
            )
            row = {
                "benchmark": "levels",
                "model": options.model,
                "target": target,
                "formats": ",".join(names),
                "basic": basic,
                "default": default,
            }
            print(json.dumps({**row, **provenance()}), flush=True)


def _shape(model: Path) -> list[int | str]:
    """Shape of the first input."""
    from onnx_fliqs.model import load_model

    shape = load_model(model).graph.inputs[0].shape
    assert shape is not None
    return [d if isinstance(d, int) else str(d) for d in shape]


if __name__ == "__main__":
    main()
