r"""Every model for every target: is what was emitted right in every runtime at hand?

Each model beside the project (see ``common.SHARED``) is emitted for each target,
post-training, in int8 (or the cheapest precision without it) and in a random mix of its
default space.
``validate`` runs each graph in this Python's ONNX Runtime and in others::

    python benchmarks/conformance.py --runtime-python RUNTIME/bin/python \
        -o docs/conformance.md
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from common import SHARED, provenance
from recipes import RECIPES, Recipe, command

from onnx_fliqs.targets import TARGETS

Row = dict[str, Any]

_SEED: Final = 0
_LIMIT: Final = 600
"""Seconds after which a command is stopped."""
_SAMPLES: Final = 64
_MIXES: Final = ("uniform", "mixed")


def _assignment(layers: Sequence[Mapping[str, Any]], target: str, mix: str) -> str:
    """The assignment's JSON: int8 where a layer can take it, or anything that it can take."""
    rng = np.random.default_rng(_SEED)
    chosen = {}
    for layer in layers:
        names = layer["precisions"]
        uniform = "int8" if "int8" in names else names[0]
        chosen[layer["name"]] = str(rng.choice(names)) if mix == "mixed" else uniform
    return json.dumps({"schema": 1, "target": target, "layers": chosen})


def _check(model: Path, target: str, mix: str, options: argparse.Namespace) -> Row:
    row: Row = {"model": model.stem, "target": target, "mix": mix}
    found = command(options.limit, "inspect", model, "--target", target)
    if found.code != 0:
        return {**row, "stage": "inspect", "code": found.code, "reason": found.reason}
    recipe = RECIPES.get(model.stem, Recipe())
    samples = min(_SAMPLES, recipe.samples)
    arrays = {
        # Not a state, which has the samples on another axis.
        name: array[:samples] if array.ndim and len(array) == recipe.samples else array
        for name, array in recipe.arrays(model).items()
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, plan, output = (folder / file for file in ("d.npz", "a.json", "q.onnx"))
        np.savez(data, **arrays)  # type: ignore[arg-type]
        plan.write_text(_assignment(found.result["layers"], target, mix), encoding="utf-8")
        ran = command(
            options.limit,
            *("emit", model, "--assignment", plan, "--data", data),
            *("--target", target, "-o", output),
        )
        row |= {"stage": "emit", "code": ran.code, "reason": ran.reason}
        if ran.code != 0:
            return row
        row["searched_rms"] = ran.result["verification"]["searched_rms"]
        row["level"] = ran.result["optimization_level"]
        row["runtimes"] = [
            _validated(output, data, options.limit, python)
            for python in (sys.executable, *options.runtime_python)
        ]
    return row


def _validated(output: Path, data: Path, limit: int, python: str) -> Row:
    """What ``validate`` says in one environment."""
    ran = command(limit, "validate", output, "--data", data, python=python)
    return {"code": ran.code, "reason": ran.reason, "result": ran.result}


# --- the page ------------------------------------------------------------------------------


def _page(rows: Sequence[Row], names: Sequence[str]) -> str:
    lines = [
        "# Conformance",
        "",
        "Written by `benchmarks/conformance.py`; where this was run:",
        "",
        *(f"* {key}: {_plain(value)}" for key, value in provenance().items()),
        f"* commits of the rows: {', '.join(dict.fromkeys(row['commit'] for row in rows))}",
        f"* runtimes: {', '.join(names)}",
        f"* seed: {_SEED}",
        "",
        "Models emitted post-training for each target, in int8 (or the cheapest precision of",
        "a layer without it) and in a random mix. *exact*: the unoptimised file computes what",
        "was searched, to float rounding. *default level*: ONNX Runtime may optimise it",
        "fully. The columns behind: files that `validate` finds right in that environment, of",
        "those that were emitted.",
        "",
        f"| target | graphs | exact | default level | {' | '.join(names)} |",
        "|---|---|---|---|" + "---|" * len(names),
        *(
            _line(target, rows, len(names))
            for target in dict.fromkeys(r["target"] for r in rows)
        ),
        "",
        "## What is not right, and what was not emitted",
        "",
        *_complaints(rows, names),
    ]
    return "\n".join(lines) + "\n"


def _line(target: str, rows: Sequence[Row], count: int) -> str:
    mine = [row for row in rows if row["target"] == target]
    emitted = [row for row in mine if "runtimes" in row]
    exact = sum((row["searched_rms"] or 0.0) < 1e-3 for row in emitted)
    free = sum(row["level"] == "default" for row in emitted)
    right = [sum(row["runtimes"][i]["code"] == 0 for row in emitted) for i in range(count)]
    cells = (len(mine), *(f"{n} of {len(emitted)}" for n in (exact, free, *right)))
    return f"| {target} | " + " | ".join(map(str, cells)) + " |"


def _complaints(rows: Sequence[Row], names: Sequence[str]) -> Iterator[str]:
    for row in rows:
        what = f"* {row['target']}, {row['model']}, {row['mix']}"
        if "runtimes" not in row:
            yield f"{what}: {row['stage']} ended with {row['code']}: {row['reason']}"
            continue
        for name, found in zip(names, row["runtimes"], strict=True):
            if found["code"] != 0:
                yield f"{what}, {name}: {found['reason']}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return str(value)


# --- the run -------------------------------------------------------------------------------


def _runtime_name(python: str) -> str:
    """The version of an environment's ONNX Runtime, and OpenVINO's where it is installed."""
    code = (
        "import importlib.metadata as m\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "wanted = ('onnxruntime', 'onnxruntime-training-cpu', 'openvino')\n"
        "print(' + '.join(f'{n} {found[n]}' for n in wanted if n in found))\n"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main() -> None:
    """Run what is not known yet, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", nargs="*", type=Path, help="instead of those beside the project"
    )
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--runtime-python", nargs="*", default=[])
    parser.add_argument("--results", type=Path, default=Path("conformance.jsonl"))
    parser.add_argument("--resume", action="store_true", help="keep what --results holds")
    parser.add_argument("--limit", type=int, default=_LIMIT, help="seconds for each command")
    parser.add_argument("-o", "--output", type=Path, help="the page; otherwise printed")
    options = parser.parse_args()
    models = options.model or [
        path for name in ("models", "zoo") for path in sorted((SHARED / name).glob("*.onnx"))
    ]
    known: dict[tuple[str, ...], Row] = {}
    if options.resume and options.results.exists():
        for line in options.results.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            known[row["model"], row["target"], row["mix"]] = row
    rows = []
    with options.results.open("a" if options.resume else "w", encoding="utf-8") as file:
        for model in models:
            for target in options.target:
                for mix in _MIXES:
                    key = (model.stem, target, mix)
                    if key not in known:
                        known[key] = _check(model, target, mix, options) | provenance()
                        file.write(json.dumps(known[key]) + "\n")
                        file.flush()
                    rows.append(known[key])
                    codes = [r["code"] for r in known[key].get("runtimes", ())]
                    print(*key, known[key]["code"], codes, file=sys.stderr)
    names = [_runtime_name(python) for python in (sys.executable, *options.runtime_python)]
    page = _page(rows, names)
    if options.output is None:
        print(page)
    else:
        options.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
