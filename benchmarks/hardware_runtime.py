"""The other tools' part of ``hardware.py``, which runs it in their own environment.

Needs onnxruntime, openvino and nncf, not onnx-fliqs. Works in a folder that holds
``float.onnx`` and ``calibration.npz``, and prints one JSON object::

    python hardware_runtime.py quantize FOLDER
    python hardware_runtime.py measure FOLDER --batch 1 --threads 1 --rounds 40
    python hardware_runtime.py evaluate FOLDER
"""

import argparse
import importlib.metadata
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import openvino as ov
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
Run = Callable[[], list[Array]]
Clock = Callable[[], float]

_STATIC = {
    "static": {
        "activation_type": QuantType.QUInt8,
        "weight_type": QuantType.QInt8,
        "per_channel": True,
    },
    "static-default": {},
}
"""File → options of ``quantize_static``: U8S8 per channel; its defaults, S8S8 per tensor."""
_CALIBRATION_BATCH = 32
_SHORTEST = 2e-3
"""Seconds that one measurement takes at least; shorter runs are repeated."""


def _feeds(path: Path) -> Feeds:
    with np.load(path) as file:
        return dict(file)


def _batches(feeds: Feeds, size: int) -> Iterator[Feeds]:
    count = len(next(iter(feeds.values())))
    for start in range(0, count, size):
        yield {name: array[start : start + size] for name, array in feeds.items()}


# --- quantizing ----------------------------------------------------------------------------


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Feeds) -> None:
        self._batches = _batches(feeds, _CALIBRATION_BATCH)

    def get_next(self) -> Feeds | None:
        return next(self._batches, None)


def _quantize(folder: Path) -> dict[str, Any]:
    """Write the rivals' models, and tell how long each took or why there is none."""
    feeds, found = _feeds(folder / "calibration.npz"), {}

    def static(name: str) -> None:
        quant_pre_process(str(folder / "float.onnx"), str(folder / "prepared.onnx"))
        quantize_static(
            str(folder / "prepared.onnx"),
            str(folder / f"{name}.onnx"),
            _Reader(feeds),
            **_STATIC[name],
        )

    def post_training(name: str) -> None:
        samples = nncf.Dataset(list(_batches(feeds, 1)))
        model = onnx.load(str(folder / "float.onnx"))
        onnx.save(nncf.quantize(model, samples, subset_size=_length(feeds)), folder / name)

    for name, make in ((n, static) for n in _STATIC):
        found[name] = _timed(make, name)
    found["nncf"] = _timed(post_training, "nncf.onnx")
    return found


def _length(feeds: Feeds) -> int:
    return len(next(iter(feeds.values())))


def _timed(make: Callable[[str], None], name: str) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        make(name)
    except Exception as error:  # what a rival cannot do is a result
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"seconds": round(time.perf_counter() - started, 1)}


# --- running -------------------------------------------------------------------------------


def _ort_session(path: Path, threads: int, optimized: Path | None = None) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _ort_run(path: Path, threads: int, feeds: Feeds) -> Run:
    session = _ort_session(path, threads)
    return lambda: session.run(None, feeds)  # type: ignore[no-any-return]


def _openvino_run(path: Path, threads: int, feeds: Feeds) -> Run:
    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    # Sizes are fixed, as OpenVINO wants them for its best kernels.
    model = core.read_model(path)
    model.reshape({name: list(array.shape) for name, array in feeds.items()})
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run() -> list[Array]:
        results = request.infer(feeds, share_inputs=True, share_outputs=True)
        return list(results.values())

    return run


_RUNTIMES = {
    "onnxruntime": (_ort_run, ("float", "fliqs", *_STATIC)),
    "openvino": (_openvino_run, ("float", "fliqs", "nncf")),
}
"""Runtime → how it runs a file, and which files."""


def _seconds(run: Run, times: int, clock: Clock) -> float:
    started = clock()
    for _ in range(times):
        run()
    return (clock() - started) / times


def _file(folder: Path, runtime: str, name: str) -> Path:
    """Of onnx-fliqs, each runtime runs what was emitted for it."""
    own = folder / f"{name}-{runtime}.onnx"
    return own if own.exists() else folder / f"{name}.onnx"


def _measure(folder: Path, batch: int, threads: int, rounds: int) -> dict[str, Any]:
    """Time all models of each runtime in turn.

    On one thread, the processor's time is taken, which the machine's other work does not
    lengthen; the threads of a pool spend some of it waiting, so for several it is the wall
    clock's.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    feeds = {
        name: np.resize(array, (batch, *array.shape[1:]))
        for name, array in _feeds(folder / "calibration.npz").items()
    }
    return {
        runtime: _in_turn(
            {
                name: make(_file(folder, runtime, name), threads, feeds)
                for name in names
                if _file(folder, runtime, name).exists()
            },
            rounds,
            clock,
        )
        for runtime, (make, names) in _RUNTIMES.items()
    }


def _in_turn(runs: Mapping[str, Run], rounds: int, clock: Clock) -> dict[str, Any]:
    """Median milliseconds, and our time by that of each other, round by round and at best."""
    outputs = {name: run() for name, run in runs.items()}
    least = {
        name: min(_seconds(run, 1, clock) for _ in range(5)) for name, run in runs.items()
    }
    times = {name: max(1, round(_SHORTEST / seconds)) for name, seconds in least.items()}
    names = list(runs)
    rows = []
    for index in range(rounds):
        # Each goes first as often as the others.
        order = names[index % len(names) :] + names[: index % len(names)]
        took = {name: _seconds(runs[name], times[name], clock) for name in order}
        rows.append([took[name] for name in names])
    table = np.array(rows)
    ours = table[:, names.index("fliqs")]
    return {
        name: {
            "milliseconds": float(f"{np.median(table[:, i]) * 1e3:.3g}"),
            "ratio_of_least": round(float(ours.min() / table[:, i].min()), 3),
            "ratio": np.percentile(ours / table[:, i], [50, 25, 75]).round(3).tolist(),
            "difference": _difference(outputs[name], outputs["float"]),
        }
        for i, name in enumerate(names)
    }


def _difference(mine: list[Array], theirs: list[Array]) -> float:
    """Root mean square, as a share of that of the float model's output."""
    pairs = list(zip(mine, theirs, strict=True))
    error = sum(float(np.mean(np.square(a - b, dtype=np.float64))) for a, b in pairs)
    size = sum(float(np.mean(np.square(b, dtype=np.float64))) for _, b in pairs)
    return round(float(np.sqrt(error / size)), 5)


def _evaluate(folder: Path) -> dict[str, Any]:
    """Accuracy, where there are labels; sizes; and the operators that onnxruntime runs."""
    found: dict[str, Any] = {"runtime": _versions()}
    paths = {path.stem: path for path in folder.glob("*.onnx")}
    paths = {name: path for name, path in paths.items() if name != "prepared"}
    found["bytes"] = {name: path.stat().st_size for name, path in paths.items()}
    found["operators"] = {
        name: _operators(folder, name) for name in _RUNTIMES["onnxruntime"][1] if name in paths
    }
    if not (folder / "test.npz").exists():
        return found
    test = _feeds(folder / "test.npz")
    labels = test.pop("labels")
    for runtime, (make, names) in _RUNTIMES.items():
        found[runtime] = {
            name: _accuracy(make, _file(folder, runtime, name), test, labels)
            for name in (*names, "fliqs-trained")
            if _file(folder, runtime, name).exists()
        }
    return found


def _versions() -> dict[str, str]:
    names = ("onnxruntime", "openvino", "nncf")
    return {name: importlib.metadata.version(name) for name in names}


def _operators(folder: Path, name: str) -> dict[str, int]:
    """How often each operator runs, after the optimisations of a default session."""
    _ort_session(folder / f"{name}.onnx", 1, folder / "optimized.ort.tmp")
    nodes = onnx.load(str(folder / "optimized.ort.tmp")).graph.node
    return dict(sorted(Counter(node.op_type for node in nodes).items()))


def _accuracy(make: Any, path: Path, test: Feeds, labels: Array) -> float:
    size = 250
    batches = list(_batches({**test, "labels": labels}, size))
    buffers: Feeds = {n: np.array(a) for n, a in batches[0].items() if n != "labels"}
    run = make(path, 2, buffers)
    right = 0
    for batch in batches:
        for name, buffer in buffers.items():
            buffer[:] = batch[name]
        right += int((run()[0].argmax(1) == batch["labels"]).sum())
    return right / len(labels)


def main() -> None:
    """Do one part of the work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["quantize", "measure", "evaluate"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.part == "quantize":
        result = _quantize(options.folder)
    elif options.part == "measure":
        result = _measure(options.folder, options.batch, options.threads, options.rounds)
    else:
        result = _evaluate(options.folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
