"""What happens to models as exporters wrote them: searched and emitted, or refused, and why.

Every model beside the project (see ``common.SHARED``) and every further file goes through the
command line, in processes of its own: ``inspect``, a short ``search``, ``validate`` against
the float model; then ViT and VDSR, searched as a user would. The results are kept line by
line, so that ``--resume`` goes on where a run was stopped; at the end a page is written::

    python benchmarks/coverage.py -o docs/coverage.md
    python benchmarks/coverage.py --no-quality more/*.onnx
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from common import SHARED, provenance
from recipes import RECIPES, Recipe, blurred_luma, command
from tasks import TASKS

from onnx_fliqs.runtime import make_session, run_session

Row = dict[str, Any]

_SEED: Final = 0
_LIMIT: Final = 600
"""Seconds after which a command is stopped."""
_VDSR_PATCHES: Final = 128
_VDSR_STEPS: Final = 40
_VDSR_BATCH: Final = 4
_VDSR_SPACE: Final = "int6,int7,int8,int16"
_FLAT: Final = 0.02
"""Share by which a loss may rise and still counts as flat: the weights that are served are
those of the best quality, not of the least loss."""


# --- one model -----------------------------------------------------------------------------


def _cover(model: Path, folder: Path, options: argparse.Namespace) -> Row:
    """Everything that is found out about a model."""
    row: Row = {"model": model.name, "nodes": _nodes(model)}
    found = command(options.limit, "inspect", model)
    row["inspect"] = {"code": found.code, "reason": found.reason}
    if found.code != 0:
        return {**row, "code": found.code, "reason": found.reason}
    row["skipped"] = found.result["skipped"]
    recipe = RECIPES.get(model.stem, Recipe())
    data, output = folder / "data.npz", folder / f"{model.stem}.fliqs.onnx"
    np.savez(data, **recipe.arrays(model))
    ran = command(
        options.limit,
        *("search", model, "--data", data, "-o", output, "--seed", _SEED),
        *("--steps", options.steps, "--batch-size", recipe.batch),
    )
    row |= {"code": ran.code, "reason": ran.reason, "seconds": round(ran.seconds)}
    if ran.code != 0:
        return row
    onnx.checker.check_model(str(output), full_check=True)
    checked = command(options.limit, "validate", output, "--reference", model, "--data", data)
    result = ran.result
    return row | {
        "labelled": recipe.task is not None,
        "layers": [
            {
                key: layer.get(key)
                for key in ("op", "trained", "reason", "weight_only", "params")
            }
            for layer in result["layers"]
        ],
        "skipped": result["skipped"],
        "untrained_loss": result["quality"]["untrained_loss"],
        "loss": result["quality"]["loss"],
        "bits": result["cost"]["effective_bits"],
        "searched_rms": result["verification"]["searched_rms"],
        "float_rms": checked.result.get("reference_rms"),
        "validate": {"code": checked.code, "reason": checked.reason},
        "level": result["optimization_level"],
        "warnings": result["warnings"],
    }


def _nodes(model: Path) -> int:
    """Nodes of the file, those of bodies and functions included."""

    def count(nodes: Any) -> int:
        bodies = (g for n in nodes for a in n.attribute for g in (a.g, *a.graphs))
        return len(nodes) + sum(count(body.node) for body in bodies)

    proto = onnx.load(str(model), load_external_data=False)
    return count(proto.graph.node) + sum(count(f.node) for f in proto.functions)


# --- two models, as a user would search them -----------------------------------------------


def _vit(folder: Path, options: argparse.Namespace) -> Row:
    """ViT at six bits: accuracy on the test images."""
    task = TASKS["vit"]
    for part in ("train", "test"):
        np.savez(folder / f"{part}.npz", **task.arrays(part))
    output = folder / "vit.fliqs.onnx"
    ran = command(
        options.limit,
        *("search", task.model, "--data", folder / "train.npz", "-o", output, "--bits", 6),
        *("--steps", 300, "--batch-size", 128, "--seed", _SEED),
    )
    if ran.code != 0:
        return {"code": ran.code, "reason": ran.reason}
    values = {
        name: command(options.limit, "evaluate", model, "--data", folder / "test.npz").result[
            "value"
        ]
        for name, model in (("float", task.model), ("emitted", output))
    }
    products = [layer for layer in ran.result["layers"] if not layer["params"]]
    return {
        "code": 0,
        **values,
        "bits": ran.result["cost"]["effective_bits"],
        "products": {layer["name"]: layer["format"] for layer in products},
        "seconds": round(ran.seconds),
    }


def _vdsr(folder: Path, options: argparse.Namespace) -> Row:
    """VDSR at eight bits, distilled on blurred CIFAR-10 luma: PSNR on Set5."""
    model = SHARED / "models" / "vdsr_sr.onnx"
    np.savez(folder / "luma.npz", **blurred_luma(_VDSR_PATCHES))
    output = folder / "vdsr.fliqs.onnx"
    ran = command(
        options.limit,
        *("search", model, "--data", folder / "luma.npz", "-o", output),
        *("--bits", 8, "--space", _VDSR_SPACE, "--learning-rate", 2e-4),
        *("--steps", _VDSR_STEPS, "--batch-size", _VDSR_BATCH, "--seed", _SEED),
    )
    if ran.code != 0:
        return {"code": ran.code, "reason": ran.reason}
    return {
        "code": 0,
        "float": _set5(model),
        "emitted": _set5(output),
        "bits": ran.result["cost"]["effective_bits"],
        "untrained_loss": ran.result["quality"]["untrained_loss"],
        "loss": ran.result["quality"]["loss"],
        "seconds": round(ran.seconds),
    }


def _set5(model: Path) -> dict[str, float]:
    """Mean PSNR over Set5 for each factor, as many pixels at the border left out."""
    images = np.load(SHARED / "data" / "set5_y.npz")
    session = make_session(model)
    (name,) = (value.name for value in session.get_inputs())
    (output,) = (value.name for value in session.get_outputs())
    found = {}
    for factor in (2, 3, 4):
        values = []
        for image in ("baby", "bird", "butterfly", "head", "woman"):
            low, high = (images[f"{image}_x{factor}_{kind}"] for kind in ("lr", "hr"))
            made = run_session(session, [output], {name: low[None, None]})[0][0, 0]
            inner = (slice(factor, -factor),) * 2
            error = (np.clip(made, 0, 1) - high)[inner].astype(np.float64)
            values.append(-10 * np.log10(np.mean(error**2)))
        found[f"x{factor}"] = round(float(np.mean(values)), 3)
    return found


QUALITY: Final = {"ViT at 6 bits": _vit, "VDSR at 8 bits": _vdsr}


# --- the page ------------------------------------------------------------------------------

_NONE: Final = "-"
_COLUMNS: Final = (
    "model",
    "nodes",
    "found",
    "searched",
    "weight-only",
    "trained",
    "loss before → after",
    "bits",
    "emitted / searched",
    "emitted / float",
    "level",
    "s",
    "exit",
)


def _other_commits(rows: Sequence[Row]) -> list[str]:
    """Which rows an earlier run left, on other commits: the page names the last one."""
    models: dict[str, list[str]] = {}
    for row in rows:
        if row["commit"] != provenance()["commit"]:
            models.setdefault(row["commit"], []).append(row["model"])
    return [f"* commit of the rows {', '.join(names)}: {c}" for c, names in models.items()]


def _page(rows: Sequence[Row], quality: Mapping[str, Row], steps: int) -> str:
    """The whole page."""
    lines = [
        "# Coverage",
        "",
        "Written by `benchmarks/coverage.py`; where this was run:",
        "",
        *(f"* {key}: {_plain(value)}" for key, value in provenance().items()),
        *_other_commits([*rows, *quality.values()]),
        f"* seed: {_SEED}",
        "",
        "## Models as their exporters wrote them",
        "",
        _explanation(steps),
        "| " + " | ".join(_COLUMNS) + " |",
        "|" + "---|" * len(_COLUMNS),
        *("| " + " | ".join(_cells(row)) + " |" for row in rows),
        "",
        "## Reasons",
        "",
        *(line for row in rows for line in _reasons(row)),
        *(line for name, row in quality.items() for line in _quality_section(name, row)),
    ]
    return "\n".join(lines) + "\n"


def _explanation(steps: int) -> str:
    return f"""\
Each model goes through `onnx-fliqs inspect`, `search --steps {steps}` at the default budget,
and `validate`.

* *found*: nodes that multiply by weights, read rows of them, or multiply two activations;
  *searched*: those that got a format; *weight-only*: those of them whose activations stay
  float; *trained*: those whose weights the loss reaches, of those that have weights.
* *loss*: of the assignment that is served, on the same held-out samples, with the float
  model's own weights and with those that are served (the former, where training does not
  beat them). In *italics* it is the distance from the float model, for lack of labels.
* *emitted / searched*: root mean square difference of the unoptimised file from the searched
  network, as a share of the output; *emitted / float*: from the float model.
* *level*: the highest optimisation level at which this ONNX Runtime computes the file right.
  Every emitted file passes `onnx.checker`.
* *s*: seconds of the search; *exit*: exit code of the search (3: not supported).
"""


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return str(value)


def _cells(row: Row) -> Iterator[str]:
    yield row["model"].removesuffix(".onnx")
    yield str(row["nodes"])
    layers = row.get("layers")
    if layers is None:
        yield from [_NONE] * (len(_COLUMNS) - 3)
        yield _exit(row)
        return
    weighted = [layer for layer in layers if layer["params"]]
    yield str(len(layers) + len(row["skipped"]))
    yield str(len(layers))
    yield str(sum(layer["weight_only"] is not None for layer in layers))
    trained = sum(layer["trained"] for layer in layers)
    yield f"{trained} of {len(weighted)}"
    loss = f"{_number(row['untrained_loss'])} → {_number(row['loss'])}"
    yield loss if row["labelled"] else f"*{loss}*"
    yield f"{row['bits']:.2f}"
    yield f"{row['searched_rms']:.0e}" if row["searched_rms"] else "0"
    yield _NONE if row["float_rms"] is None else f"{row['float_rms']:.3f}"
    yield row["level"]
    yield str(row["seconds"])
    yield _exit(row)


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4g}"


def _exit(row: Row) -> str:
    return "time" if row["code"] is None else str(row["code"])


def _reasons(row: Row) -> Iterator[str]:
    """What was refused, frozen or left in float in a model, each reason once."""
    texts = [row["reason"]] if row["reason"] else []
    texts += _counted("not trained", row.get("layers", ()), "reason")
    texts += _counted("weight-only", row.get("layers", ()), "weight_only")
    texts += _counted("left in float", row.get("skipped", ()), "reason")
    before, after = row.get("untrained_loss"), row.get("loss")
    if before is not None and after is not None and after > before * (1 + _FLAT):
        texts.append("the loss rose")
    if row.get("validate", {}).get("code"):
        texts.append(f"validate: {row['validate']['reason']}")
    texts += row.get("warnings", ())
    if texts:
        yield f"* **{row['model'].removesuffix('.onnx')}**: {'; '.join(texts)}"


def _counted(fate: str, items: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """``2 LSTM not trained: ...`` for each reason."""
    counts: dict[tuple[str, str], int] = {}
    for item in items:
        if item[key]:
            kind = (item.get("op") or item["op_type"], item[key])
            counts[kind] = counts.get(kind, 0) + 1
    return [f"{count} {op} {fate}: {text}" for (op, text), count in counts.items()]


def _quality_section(name: str, row: Row) -> list[str]:
    written = {"ViT at 6 bits": _vit_section, "VDSR at 8 bits": _vdsr_section}[name]
    return ["", f"## {name}", "", written(row) if row["code"] == 0 else row["reason"]]


def _vit_section(row: Row) -> str:
    formats = ", ".join(f"{name} {fmt}" for name, fmt in row["products"].items())
    return f"""\
`search --bits 6 --steps 300 --batch-size 128` on Fashion-MNIST: accuracy on the test images
{row["float"]:.2%} float, {row["emitted"]:.2%} emitted, at {row["bits"]:.2f} effective bits in
{row["seconds"]} s. Products of activations (QKᵀ and AV): {formats}."""


def _vdsr_section(row: Row) -> str:
    lines = [
        f"| {factor} | {value:.2f} | {row['emitted'][factor]:.2f} |"
        for factor, value in row["float"].items()
    ]
    table = "\n".join(lines)
    return f"""\
`search --bits 8 --space {_VDSR_SPACE} --learning-rate 2e-4
--steps {_VDSR_STEPS} --batch-size {_VDSR_BATCH}` without labels, on {_VDSR_PATCHES} patches
of 48 x 48 pixels: luma of CIFAR-10 training images, four side by side,
shrunk by 2, 3 or 4 and enlarged again (bicubic). PSNR in dB on Set5, on which nothing was
trained, at {row["bits"]:.2f} effective bits in {row["seconds"]} s:

| factor | float | emitted |
|---|---|---|
{table}"""


# --- the run -------------------------------------------------------------------------------


def _rows(results: Path, resume: bool) -> dict[str, Row]:
    """What an earlier run found out, by model."""
    if not resume or not results.exists():
        return {}
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return {row["model"]: row for row in lines}


def _models(options: argparse.Namespace) -> list[Path]:
    files: list[Path] = []
    for name in ("models", "zoo"):
        folder = options.shared / name
        found = sorted(folder.glob("*.onnx"))
        if not found:
            print(f"skipped: there are no models in {folder}", file=sys.stderr)
        files += found
    return [*files, *options.model]


def main() -> None:
    """Run what is not known yet, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="*", type=Path, help="further .onnx files")
    parser.add_argument("--shared", type=Path, default=SHARED, help="holds models/ and zoo/")
    parser.add_argument("--results", type=Path, default=Path("coverage.jsonl"))
    parser.add_argument("--resume", action="store_true", help="keep what --results holds")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--limit", type=int, default=_LIMIT, help="seconds for each command")
    parser.add_argument("--no-quality", action="store_true", help="leave out ViT and VDSR")
    parser.add_argument("-o", "--output", type=Path, help="the page; otherwise printed")
    options = parser.parse_args()
    known = _rows(options.results, options.resume)
    rows: dict[str, Row] = {}
    with options.results.open("a" if options.resume else "w", encoding="utf-8") as file:

        def settle(name: str, run: Callable[[Path], Row]) -> Row:
            if name not in known:
                with tempfile.TemporaryDirectory() as folder:
                    row = {"model": name, **run(Path(folder)), **provenance()}
                file.write(json.dumps(row) + "\n")
                file.flush()
                known[name] = row
            print(name, _exit(known[name]), known[name].get("reason", ""), file=sys.stderr)
            return known[name]

        for model in _models(options):
            rows[model.name] = settle(
                model.name, lambda folder, model=model: _cover(model, folder, options)
            )
        quality = {
            name: settle(name, lambda folder, run=run: run(folder, options))
            for name, run in QUALITY.items()
            if not options.no_quality and (options.shared / "models").is_dir()
        }
    page = _page(list(rows.values()), quality, options.steps)
    if options.output is None:
        print(page)
    else:
        options.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
