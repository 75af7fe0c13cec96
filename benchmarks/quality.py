"""Search against the baselines, at equal cost, steps and data.

For each model, space, budget and seed: the search; the baselines of the tool (``--strategy``);
what the search chose, trained alone for as many steps (``retrain``) and not trained at all
(``ptq``). Beside them uniform formats, each at its own cost (``uniform``). All have the
same data, step, optimizer and learning rate. ::

    python benchmarks/quality.py FOLDER --quick              # everything, in minutes
    python benchmarks/quality.py FOLDER --models resnet20 --spaces int-l --bits 4.28 5
    python benchmarks/quality.py FOLDER --report             # of all that lies in the folder

Runs are lines of ``runs.jsonl``; what is there is not run again, so a stopped benchmark goes
on where it was, and several processes may fill one folder, each with runs of its own. Test
data is read by the report alone (``quality_report.py``), when the runs are done. It writes
``results.jsonl``, which as ``runs.jsonl`` of another folder gives the same report, and can be
added to: ``results/`` holds those of docs/measurements.md, as far as they have been kept.

With ``--development MODELS``, the same on models that do not know the images which judge them,
from the folder that ``development_models.py`` wrote. These have judged settings as well.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
from common import provenance
from quality_report import report
from quality_runs import SPACES, Run, adopt, data_file, model_file, read_rows
from tasks import TASKS

from onnx_fliqs import (
    Assignment,
    Budget,
    BudgetKind,
    SearchConfig,
    SearchResult,
    Strategy,
    emit,
    search,
)
from onnx_fliqs.data import input_specs
from onnx_fliqs.data_files import load_npz
from onnx_fliqs.errors import InfeasibleError
from onnx_fliqs.model import load_model

_SEARCH: Final = Strategy.FLIQS.value
_UNIFORM: Final = Strategy.UNIFORM.value
_PTQ: Final = "ptq"
_RETRAIN: Final = "retrain"
_STRATEGIES: Final = (_SEARCH, "ilp", "greedy", "random", _UNIFORM, _RETRAIN, _PTQ)
"""The search first: without it there is no assignment for ``retrain`` and ``ptq``."""
_PTQ_SAMPLES: Final = 2000
"""Training samples for ``ptq``, which calibrates on a few hundred and measures the others."""
_MODELS: Final = ("resnet20", "mobilenetv2", "vit")


@dataclass(frozen=True)
class _Defaults:
    """What options that were not given stand for."""

    spaces: tuple[str, ...]
    bits: tuple[float, ...] | None
    """None: the budgets of each space."""
    formats: tuple[str, ...] | None
    """None: those of each space."""
    seeds: tuple[int, ...]
    steps: int
    batch_size: int


_FULL: Final = _Defaults(tuple(SPACES), None, None, (0, 1, 2), 300, 128)
_QUICK: Final = _Defaults(("int-l",), (4.28,), ("int4", "int8"), (0,), 30, 64)


def _runs(options: argparse.Namespace) -> Iterator[Run]:
    """Seed by seed, so that a benchmark that is stopped has seen everything once."""
    chosen = [name for name in _STRATEGIES if name in options.strategies]
    for seed, model in product(options.seeds, options.models):
        formats = options.formats or [f for s in options.spaces for f in SPACES[s].uniform]
        settings = seed, options.steps, options.batch_size
        if _UNIFORM in chosen:
            for name in dict.fromkeys(formats):
                yield Run(model, name, None, _UNIFORM, *settings)
        for space in options.spaces:
            for bits in options.bits or SPACES[space].budgets:
                for strategy in chosen:
                    if strategy != _UNIFORM:
                        yield Run(model, space, bits, strategy, *settings)


def _execute(run: Run, folder: Path, workers: int | None) -> dict[str, Any]:
    """Search, train or emit; nothing here reads test data."""
    data = data_file(folder, run.model, "train")
    model = model_file(folder, run.model)
    if run.strategy == _PTQ:
        samples = load_npz(data, input_specs(load_model(model)))
        result = emit(model, _found(run, folder), samples.take(np.arange(_PTQ_SAMPLES)))
    else:
        result = search(model, data, _config(run, folder, workers))
    result.save(folder / f"{run.name}.onnx")
    return {**_measured(result), "workers": workers}


def _config(run: Run, folder: Path, workers: int | None) -> SearchConfig:
    """Settings that differ in nothing but how the assignment is chosen."""
    strategy, space, budget, assignment = Strategy.FIXED, None, None, None
    if run.strategy == _RETRAIN:
        assignment = _found(run, folder)
    else:
        strategy = Strategy(run.strategy)
        space = SPACES[run.space].formats if run.space in SPACES else run.space
        budget = None if run.bits is None else Budget(BudgetKind.BITS, run.bits)
    return SearchConfig(
        strategy=strategy,
        space=space,
        budget=budget,
        assignment=assignment,
        steps=run.steps,
        batch_size=run.batch_size,
        seed=run.seed,
        workers=workers,
    )


def _found(run: Run, folder: Path) -> Assignment:
    """The assignment of the search with the same settings."""
    return Assignment.read(_file(run, folder))


def _file(run: Run, folder: Path) -> Path:
    return folder / f"{run.with_strategy(_SEARCH).name}.assignment.json"


def _measured(result: SearchResult) -> dict[str, Any]:
    return {
        "effective_bits": result.cost.effective_bits,
        "bops": result.cost.bops,
        "bytes": result.cost.weight_bytes,
        "float_held_out": result.float_quality,
        "held_out": result.quantized_quality,
        "entropy": result.entropy,
        "doubts": None if result.convergence is None else list(result.convergence.doubts),
        "seconds": round(result.seconds, 2),
    }


def _run_all(runs: Sequence[Run], folder: Path, workers: int | None) -> int:
    """Run what is missing; returns how many runs had to be left out."""
    log = folder / "runs.jsonl"
    left_out = 0
    for number, run in enumerate(runs, start=1):
        rows = {Run.of(row): row for row in read_rows(log)}
        if run in rows:
            continue
        if run.strategy in (_PTQ, _RETRAIN):
            if "refused" in rows.get(run.with_strategy(_SEARCH), {}):
                continue
            if not _file(run, folder).exists():
                print(f"{run.name}: needs the files of {_SEARCH} first", file=sys.stderr)
                left_out += 1
                continue
        try:
            row = _execute(run, folder, workers)
        except InfeasibleError as error:
            row = {"refused": str(error)}
        line = json.dumps({**asdict(run), **row, **provenance()})
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        found = row.get("refused") or f"held-out {row['held_out']:.4f}, {row['seconds']:.0f} s"
        print(f"{number}/{len(runs)} {run.name}: {found}", file=sys.stderr, flush=True)
    return left_out


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", choices=TASKS, default=_MODELS)
    parser.add_argument("--spaces", nargs="+", choices=SPACES)
    parser.add_argument("--bits", nargs="+", type=float, help="budgets, for every space")
    parser.add_argument("--formats", nargs="+", help="uniform formats, in place of a space's")
    parser.add_argument("--strategies", nargs="+", choices=_STRATEGIES, default=_STRATEGIES)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--workers", type=int, help="threads of a search (default: all cores)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="other defaults: one budget, one space, one seed, few steps; ten minutes at most",
    )
    parser.add_argument("--development", type=Path, metavar="MODELS")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--report", action="store_true", help="report only: nothing is run")
    what.add_argument("--runs-only", action="store_true", help="leave the report for later")
    options = parser.parse_args()
    for name, value in vars(_QUICK if options.quick else _FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    """Run what is missing, then test and report all that the folder holds."""
    options = _options()
    options.folder.mkdir(parents=True, exist_ok=True)
    left_out = 0
    if options.development:
        adopt(options.development, options.folder)
    if not options.report:
        left_out = _run_all(list(_runs(options)), options.folder, options.workers)
    if not options.runs_only:
        print(report(options.folder))
    if left_out:
        sys.exit(f"{left_out} runs were left out")


if __name__ == "__main__":
    main()
