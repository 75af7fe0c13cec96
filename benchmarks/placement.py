"""What the choices of ``find_layers`` and ``ort-cpu`` rest on: weight-only layers and scales.

Times pairs of graphs that compute the same, in turn, on one thread, in the environment of
``--runtime-python`` (without onnx-fliqs), and prints the median ratio of their times::

    python benchmarks/placement.py --runtime-python ../runtime/bin/python

* recurrent cells in float, and with int8 weights that are dequantized in every run;
* an embedding in float, dequantized behind its Gather, and dequantized first;
* SqueezeNet in int8, concatenated tensors on one scale and each on its own, with the
  difference of each from the float model on JPEG images.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from common import SHARED, provenance
from onnx import numpy_helper

from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.emission import emit_graph
from onnx_fliqs.model import load_model, save_model
from onnx_fliqs.precision import parse_precision
from onnx_fliqs.prepare import calibrate, prepare
from onnx_fliqs.targets import TARGETS

INT8 = parse_precision("int8")
_HEADER = '<ir_version: 10, opset_import: ["" : 20]>'
_CELLS = [
    (kind, size, steps, batch)
    for kind in ("LSTM", "GRU")
    for size in (128, 512)
    for steps, batch in ((1, 1), (16, 1), (100, 1), (100, 8))
]
_ROWS, _COLUMNS = 8000, 256
_IMAGES = 64
_TIMED = """
import json, sys, time
import numpy as np, onnxruntime as ort
feeds = dict(np.load(sys.argv[1]))
pairs, sessions = int(sys.argv[2]), []
for path in sys.argv[3:]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    sessions.append(ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
outputs = [session.run(None, feeds)[0] for session in sessions]
times = []
for _ in range(pairs):
    row = []
    for session in sessions:
        started = time.perf_counter()
        session.run(None, feeds)
        row.append(time.perf_counter() - started)
    times.append(row)
times = np.array(times)
size = np.sqrt(np.mean(outputs[0] ** 2))
print(json.dumps({
    "microseconds": [round(float(t) * 1e6, 1) for t in np.median(times, axis=0)],
    "ratios": [round(float(r), 3) for r in np.median(times / times[:, :1], axis=0)],
    "quartiles": np.percentile(times / times[:, :1], [25, 75], axis=0).round(3).T.tolist(),
    "differences": [float(np.sqrt(np.mean((o - outputs[0]) ** 2)) / size) for o in outputs],
}))
"""

Models = Mapping[str, ir.Model]
Feeds = Mapping[str, np.ndarray[Any, Any]]


def parsed(text: str, **weights: np.ndarray[Any, Any]) -> ir.Model:
    """A model in ONNX's textual format, with initializers."""
    proto = onnx.parser.parse_model(f"{_HEADER}\n{text}")
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def int8(model: ir.Model, feeds: Feeds) -> ir.Model:
    """The model with its layers in int8, emitted for the generic target."""
    target = TARGETS["generic"]
    data = Dataset(feeds, None, input_specs(model))
    prepared, scales, _ = calibrate(prepare(model, data, target, (INT8,)), target, data, 0)
    space = prepared.space
    chosen = space.uniform(INT8)
    return emit_graph(prepared.canonical, space, chosen, scales, target)


def cells(kind: str, size: int, steps: int, batch: int) -> tuple[Models, Feeds]:
    """A recurrent cell in float and with int8 weights."""
    rng = np.random.default_rng(0)
    gates = {"LSTM": 4, "GRU": 3}[kind] * size
    shape = (1, gates, size)
    weights = {n: rng.standard_normal(shape).astype(np.float32) / size for n in ("w", "r")}
    plain = parsed(
        f"""g (float[{steps},{batch},{size}] x) => (float[{steps},1,{batch},{size}] y) {{
            y = {kind} <hidden_size = {size}> (x, w, r) }}""",
        **weights,
    )
    feeds = {"x": rng.standard_normal((steps, batch, size)).astype(np.float32)}
    return {"float": plain, "int8 weights": int8(plain, feeds)}, feeds


def embeddings() -> tuple[Models, Feeds]:
    """An embedding in float and in both orders of Gather and DequantizeLinear."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((_ROWS, _COLUMNS)).astype(np.float32)
    head = f"g (int64[N,4] i) => (float[N,4,{_COLUMNS}] y)"
    plain = parsed(f"{head} {{ y = Gather (w, i) }}", w=table)
    feeds = {"i": rng.integers(0, _ROWS, (32, 4))}
    scale = np.float32(np.abs(table).max() / 127)
    codes = np.rint(table / scale).astype(np.int8)
    first = parsed(
        f"{head} {{ w = DequantizeLinear (c, s) y = Gather (w, i) }}",
        c=codes,
        s=np.asarray(scale),
    )
    columns = parsed(
        f"{head} {{ w = DequantizeLinear <axis = 1> (c, s) y = Gather (w, i) }}",
        c=codes,
        s=np.full(_COLUMNS, scale),
    )
    behind = int8(plain, feeds)
    return {"float": plain, "behind": behind, "first": first, "first, columns": columns}, feeds


def concatenations() -> tuple[Models, Feeds]:
    """SqueezeNet in float, and in int8 with scales apart and shared."""
    with np.load(SHARED / "data" / "cifar10_jpeg_20k.npz") as file:
        pixels = file["train_x"][: 2 * _IMAGES].astype(np.float32)
    large = pixels.repeat(7, axis=1).repeat(7, axis=2)[:, :227, :, :][:, :, :227, :]
    large = np.pad(large, [(0, 0), (0, 3), (0, 3), (0, 0)], mode="edge")
    images = (large - [123.7, 116.3, 103.5]) / [58.4, 57.1, 57.4]
    x = np.ascontiguousarray(images.transpose(0, 3, 1, 2).astype(np.float32))
    plain = load_model(SHARED / "zoo" / "squeezenet_v1.1_f16w.onnx")
    data = Dataset({"input": x[:_IMAGES]}, None, input_specs(plain))
    models = {"float": plain}
    for name, operators in (("apart", ()), ("shared", ("Concat",))):
        target = replace(TARGETS["ort-cpu"], shared_scale_ops=operators)
        prepared, scales, _ = calibrate(prepare(plain, data, target, (INT8,)), target, data, 0)
        space = prepared.space
        models[name] = emit_graph(
            prepared.canonical, space, space.uniform(INT8), scales, target
        )
    return models, {"input": x[_IMAGES:]}


def timed(python: Path, models: Models, feeds: Feeds, pairs: int) -> dict[str, Any]:
    """Run the models in turn in another environment."""
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "feeds.npz", **feeds)
        paths = [Path(folder) / f"{index}.onnx" for index in range(len(models))]
        for model, path in zip(models.values(), paths, strict=True):
            save_model(model, path)
        command = [
            str(python),
            "-c",
            _TIMED,
            f"{folder}/feeds.npz",
            str(pairs),
            *map(str, paths),
        ]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(found.stdout)
    return {"graphs": list(models), **result}


def main() -> None:
    """Time every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runtime-python", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=60)
    options = parser.parse_args()
    cases = {f"{k} {h}, {s} steps, batch {b}": cells(k, h, s, b) for k, h, s, b in _CELLS}
    cases["embedding, 128 rows"] = embeddings()
    if (SHARED / "zoo").is_dir():
        cases[f"SqueezeNet, batch {_IMAGES}"] = concatenations()
    for name, (models, feeds) in cases.items():
        row = timed(options.runtime_python, models, feeds, options.pairs)
        print(json.dumps({"benchmark": "placement", "case": name, **row, **provenance()}))


if __name__ == "__main__":
    main()
