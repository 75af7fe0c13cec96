"""Searches real models and measures what they gave, on test data that nothing else has seen.

Needs the models and data beside the project (see ``tasks``). Each case prints one JSON
line: test accuracy of the float and of the emitted model, cost, size, seconds. With
``--runtime-python`` the emitted file is also evaluated there, by that environment's own ONNX
Runtime at its default settings (without onnx-fliqs)::

    python benchmarks/real_models.py --case resnet20-int-l --seeds 0 1 2 \
        --runtime-python ../runtime/bin/python
"""

import argparse
import json
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import provenance
from tasks import TASKS

from onnx_fliqs import Budget, BudgetKind, SearchConfig, evaluate, search
from onnx_fliqs.progress import Progress

_PLAIN = """
import json, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
data = np.load(sys.argv[2])
x, labels = data["x"], data["labels"]
kind = np.float32
name = session.get_inputs()[0].name
rows = [session.run(None, {name: x[i:i + 64].astype(kind)})[0] for i in range(0, len(x), 64)]
print(json.dumps({"version": onnxruntime.__version__,
                  "accuracy": float(np.mean(np.concatenate(rows).argmax(1) == labels))}))
"""


@dataclass(frozen=True)
class Case:
    """A task and the settings of its search."""

    task: str
    bits: float
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "resnet20-int-l": Case("resnet20", 5.0, {"space": "int-l"}),
    "resnet20-int-l-4.28": Case("resnet20", 4.28, {"space": "int-l"}),
    "resnet20-fp-l": Case("resnet20", 5.0, {"space": "fp-l"}),
    "resnet20-ort-cpu": Case("resnet20", 8.0, {"target": "ort-cpu"}),
    "resnet8-int-l": Case("resnet8", 5.0, {"space": "int-l"}),
    "vit-int-l": Case("vit", 6.0, {"space": "int-l"}),
    "mobilenetv2-int-l": Case("mobilenetv2", 5.0, {"space": "int-l"}),
}


def _run(
    name: str, seed: int, steps: int, runtime: Path | None, folder: Path
) -> dict[str, Any]:
    case = CASES[name]
    task = TASKS[case.task]
    model = task.model
    for part in ("train", "test"):
        np.savez(folder / f"{part}.npz", **task.arrays(part))
    losses: list[float] = []
    config = SearchConfig(
        steps=steps,
        batch_size=128,
        seed=seed,
        budget=Budget(BudgetKind.BITS, case.bits),
        **case.settings,
    )

    def remember(progress: Progress) -> None:
        if progress.phase.trains:
            losses.append(progress.loss)

    result = search(model, folder / "train.npz", config, progress=remember)
    output = folder / "out.onnx"
    result.save(output)
    row: dict[str, Any] = {
        "benchmark": "real_models",
        "case": name,
        "seed": seed,
        "steps": steps,
        "test_float": evaluate(model, folder / "test.npz").value,
        "test_quantized": evaluate(output, folder / "test.npz").value,
        "effective_bits": round(result.cost.effective_bits, 4),
        "cost_of_budget": round((result.cost.effective_bits / case.bits) ** 2, 4),
        "size_ratio": round(output.stat().st_size / model.stat().st_size, 3),
        "optimization_level": result.optimization_level.value,
        "loss_first_20": round(float(np.mean(losses[:20])), 4),
        "loss_last_20": round(float(np.mean(losses[-20:])), 4),
        "seconds": round(result.seconds),
    }
    if runtime is not None:
        command = [str(runtime), "-c", _PLAIN, str(output), str(folder / "test.npz")]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        row["default_session"] = json.loads(found.stdout)
    return row


def main() -> None:
    """Run the chosen cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=[*CASES, "all"], default=["all"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--runtime-python", type=Path)
    options = parser.parse_args()
    for name in CASES if "all" in options.case else options.case:
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                row = _run(name, seed, options.steps, options.runtime_python, Path(folder))
            print(json.dumps({**row, **provenance()}), flush=True)


if __name__ == "__main__":
    main()
