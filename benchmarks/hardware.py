"""Emitted models against those of the tools that users would take instead, on real models.

Each model is emitted for ``ort-cpu`` and ``openvino``, post-training and, with ``--steps``,
for ``ort-cpu`` also trained where there are labels; and quantized by
``onnxruntime.quantization.quantize_static`` and by NNCF,
all from the same samples of the training data. In the environment of ``--runtime-python``,
which needs onnxruntime, openvino and nncf, they run in turn; accuracy is measured on test data
at the end. Results are kept line by line in ``--lines``, so that a stopped run goes on; then
a section for ``docs/measurements.md`` is printed::

    python benchmarks/hardware.py --runtime-python ../runtime/bin/python --lines hardware.jsonl
    python benchmarks/hardware.py --runtime-python ../runtime/bin/python --quick
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from common import SHARED, provenance
from tasks import TASKS

from onnx_fliqs import SearchConfig, search
from onnx_fliqs.api import emit, inspect
from onnx_fliqs.assignment import Assignment
from onnx_fliqs.data import input_specs
from onnx_fliqs.model import load_model

Array = npt.NDArray[Any]
Row = dict[str, Any]

_TARGETS: Final = {"fliqs.onnx": "ort-cpu", "fliqs-openvino.onnx": "openvino"}
"""File → what it is emitted for."""
_SAMPLES: Final = 256
"""For calibration, of each tool."""
_SEED: Final = 0
_RUNTIME: Final = Path(__file__).with_name("hardware_runtime.py")
_ALLOCATION: Final = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}
"""Keeps freed memory in the process: whether the next output needs new pages would depend on
what ran before."""


def _enlarged(count: int, size: int) -> Array:
    """CIFAR-10's training images, NCHW, RGB from 0 to 255, each pixel repeated."""
    pixels = TASKS["resnet8"].arrays("train")["x"][:count].astype(np.float32)
    times = -(-size // pixels.shape[-1])
    large: Array = pixels.repeat(times, axis=2).repeat(times, axis=3)[:, :, :size, :size]
    return large


def _squeezenet() -> Array:
    mean = np.array([123.7, 116.3, 103.5], np.float32)[:, None, None]
    deviation = np.array([58.4, 57.1, 57.4], np.float32)[:, None, None]
    scaled: Array = (_enlarged(64, 227) - mean) / deviation
    return scaled


@dataclass(frozen=True)
class Case:
    """A model and what it reads."""

    model: Path
    samples: Callable[[], Array] | None = None
    """For calibration, where there is no task."""
    task: str | None = None
    """Labelled data (see ``tasks``)."""


def _labelled(task: str) -> Case:
    return Case(TASKS[task].model, task=task)


CASES: Final[Mapping[str, Case]] = {
    "ResNet-20": _labelled("resnet20"),
    "MobileNetV2": _labelled("mobilenetv2"),
    "MLPerf-Tiny ResNet-8": _labelled("resnet8"),
    "ViT": _labelled("vit"),
    "SqueezeNet": Case(SHARED / "zoo" / "squeezenet_v1.1_f16w.onnx", _squeezenet),
    "MLPerf-Tiny MobileNetV1": Case(
        SHARED / "models" / "mlperftiny_vww_mobilenetv1_025_96_bn.onnx",
        lambda: _enlarged(_SAMPLES, 96) / 255,
    ),
    "MLPerf-Tiny autoencoder": Case(
        SHARED / "models" / "mlperftiny_ad_autoencoder_bn.onnx",
        lambda: np.random.default_rng(_SEED).standard_normal((_SAMPLES, 640)),
    ),
}
_NAMES: Final = {
    "float": "float",
    "fliqs": "onnx-fliqs",
    "fliqs-trained": "onnx-fliqs, trained",
    "static": "quantize_static",
    "static-default": "quantize_static, defaults",
    "nncf": "NNCF",
}


# --- one model -----------------------------------------------------------------------------


def _prepare(case: Case, folder: Path, steps: int) -> None:
    """Write the float model, the data, and what onnx-fliqs makes of them."""
    shutil.copy(case.model, folder / "float.onnx")
    (name,) = (spec.name for spec in input_specs(load_model(case.model)))
    if case.task is not None:
        train, test = (TASKS[case.task].arrays(part) for part in ("train", "test"))
        x = train["x"][:_SAMPLES]
        np.savez(folder / "train.npz", **{name: train["x"], "labels": train["labels"]})
        test_x = test["x"].astype(np.float32)
        np.savez(folder / "test.npz", **{name: test_x, "labels": test["labels"]})
    else:
        assert case.samples is not None
        x = case.samples()
    calibration = folder / "calibration.npz"
    np.savez(calibration, **{name: x.astype(np.float32)})
    for file, target in _TARGETS.items():
        layers = inspect(case.model, target=target).layers
        chosen = Assignment({layer.name: "int8" for layer in layers}, target)
        emit(case.model, chosen, calibration).save(folder / file)
    if case.task is not None and steps:
        config = SearchConfig(
            target="ort-cpu", space="int8", steps=steps, batch_size=128, seed=_SEED
        )
        trained = search(case.model, folder / "train.npz", config)
        trained.save(folder / "fliqs-trained.onnx")


def _other(python: Path, part: str, folder: Path, **settings: int) -> Row:
    """Let the other environment do its part."""
    options = [f"--{name}={value}" for name, value in settings.items()]
    command = [str(python), str(_RUNTIME), part, str(folder), *options]
    environment = {**os.environ, **_ALLOCATION}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{part}: {done.stderr.strip().splitlines()[-1]}")
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def _measured(name: str, options: argparse.Namespace) -> Row:
    python, rounds = options.runtime_python, options.rounds
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _prepare(CASES[name], folder, options.steps)
        row: Row = {"benchmark": "hardware", "model": name, "seed": _SEED}
        row |= {"steps": options.steps, "rounds": rounds}
        row["quantizing"] = _other(python, "quantize", folder)
        row["latency"] = [
            {"batch": batch, "threads": threads}
            | _other(python, "measure", folder, batch=batch, threads=threads, rounds=rounds)
            for batch in options.batches
            for threads in options.threads
        ]
        row |= _other(python, "evaluate", folder)
    return {**row, **provenance()}


# --- the section ---------------------------------------------------------------------------


_INTRODUCTION: Final = """\
Commit `{commit}`, {tools}; {machine}. All models are quantized
post-training from the same {samples} training samples (SqueezeNet: 64); `quantize_static` is
U8S8 per channel on the pre-processed model, and once with its defaults (S8S8 per tensor). A
ratio is the time of onnx-fliqs by that of the other: below 1, onnx-fliqs is faster. Medians
(and quartiles) of {rounds} rounds, in which all models of a runtime run in turn. On one
thread, the time is the processor's; on several it is the wall clock's, and the ratio is that
of the shortest times, as the machine was busy with other work."""
_MISSING: Final = "-"


def _section(rows: Sequence[Row]) -> str:
    """What stands in docs/measurements.md."""
    first = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["runtime"].items())
    lines = [
        "## Against quantize_static and NNCF",
        "",
        "    python benchmarks/hardware.py --runtime-python RUNTIME/bin/python",
        "",
        *_INTRODUCTION.format(**first, tools=versions, samples=_SAMPLES).splitlines(),
        "",
    ]
    for runtime, others in (
        ("onnxruntime", ("float", "static", "static-default")),
        ("openvino", ("float", "nncf")),
    ):
        heads = [f"to {_NAMES[other]}" for other in others]
        lines += [
            f"| {runtime} | batch | threads | ms | {' | '.join(heads)} |",
            "|" + "---|" * (4 + len(others)),
        ]
        for row in rows:
            for timed in row["latency"]:
                batch, threads, found = timed["batch"], timed["threads"], timed[runtime]
                cells = [_ratio(found.get(other), threads) for other in others]
                ours = found["fliqs"]["milliseconds"]
                lines.append(
                    f"| {row['model']} | {batch} | {threads} | {ours} | {' | '.join(cells)} |"
                )
        lines.append("")
    lines += [*_accuracies(rows), "", *_sizes(rows), "", *_operators(rows), "", _summary(rows)]
    return "\n".join(lines)


def _ratio(measured: Row | None, threads: int) -> str:
    if measured is None:
        return _MISSING
    if threads > 1:
        return f"{measured['ratio_of_least']:.2f}"
    median, low, high = measured["ratio"]
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def _accuracies(rows: Sequence[Row]) -> list[str]:
    names = ("float", "fliqs", "fliqs-trained", "static", "static-default")
    known = {name for row in rows for name in row.get("onnxruntime", ())}
    columns = [
        *(("onnxruntime", name) for name in names if name in known),
        *(("openvino", name) for name in ("fliqs", "nncf")),
    ]
    heads = [
        _NAMES[name] + (" (OpenVINO)" if runtime == "openvino" else "")
        for runtime, name in columns
    ]
    lines = [
        f"| test accuracy, % | {' | '.join(heads)} |",
        "|" + "---|" * (1 + len(columns)),
    ]
    for row in rows:
        if "onnxruntime" in row:
            found = [row[runtime].get(name) for runtime, name in columns]
            cells = [_MISSING if value is None else f"{100 * value:.2f}" for value in found]
            lines.append(f"| {row['model']} | {' | '.join(cells)} |")
    return lines


def _sizes(rows: Sequence[Row]) -> list[str]:
    names = ("float", "fliqs", "static", "static-default", "nncf")
    lines = [
        f"| bytes | {' | '.join(_NAMES[name] for name in names)} |",
        "|" + "---|" * (1 + len(names)),
    ]
    for row in rows:
        cells = [f"{row['bytes'][name]:,}" for name in names]
        lines.append(f"| {row['model']} | {' | '.join(cells)} |")
    return lines


def _operators(rows: Sequence[Row]) -> list[str]:
    """How much of each graph onnxruntime runs in integers, and what lies between."""
    names = ("fliqs", "static")
    heads = " | ".join(_NAMES[name] for name in names)
    lines = [
        f"| operators in integers / conversions / others | {heads} |",
        "|" + "---|" * (1 + len(names)),
    ]
    for row in rows:
        cells = []
        for name in names:
            found = row["operators"][name]
            integer = sum(n for op, n in found.items() if op.startswith(_INTEGER))
            between = found.get("QuantizeLinear", 0) + found.get("DequantizeLinear", 0)
            cells.append(f"{integer} / {between} / {sum(found.values()) - integer - between}")
        lines.append(f"| {row['model']} | {' | '.join(cells)} |")
    return lines


_INTEGER: Final = ("QLinear", "QGemm", "MatMulInteger", "NhwcMaxPool")


def _summary(rows: Sequence[Row]) -> str:
    def middle(runtime: str, other: str) -> str:
        found = [
            timed[runtime][other]["ratio"][0]
            for row in rows
            for timed in row["latency"]
            if other in timed[runtime] and timed["threads"] == 1
        ]
        return f"{statistics.geometric_mean(found):.3f} (largest {max(found):.2f})"

    return (
        "Geometric means of the ratios on one thread: to quantize_static"
        f" {middle('onnxruntime', 'static')}, to float in onnxruntime"
        f" {middle('onnxruntime', 'float')}, to NNCF {middle('openvino', 'nncf')}."
    )


def main() -> None:
    """Measure what is missing, and print the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--runtime-python", type=Path, required=True)
    parser.add_argument("--lines", type=Path, help="where results are kept, one per line")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=0, help="of training")
    parser.add_argument("--quick", action="store_true", help="few rounds, no training")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps = 10, 0
    rows: dict[str, Row] = {}
    if options.lines is not None and options.lines.exists():
        kept = options.lines.read_text(encoding="utf-8").splitlines()
        rows = {row["model"]: row for row in map(json.loads, kept)}
    for name in options.case:
        if name not in rows:
            rows[name] = _measured(name, options)
            line = json.dumps(rows[name])
            if options.lines is None:
                print(line, flush=True)
            else:
                with options.lines.open("a", encoding="utf-8") as file:
                    file.write(f"{line}\n")
    print(_section([rows[name] for name in options.case]))


if __name__ == "__main__":
    main()
