"""Every design choice of the search against its alternatives, judged on held-out data.

A *choice* lists variants, each a change of ``SearchConfig`` or ``ControllerConfig``; the
defaults are run once for all of them. A fifth of each training set is split off before a
search sees the rest, and judges what it emits by accuracy and cross-entropy. Test data is
never read. (The float models have seen all of the training data, so that what is judged is how
well they are kept.) ::

    python benchmarks/ablations.py FOLDER                               # runs and a table
    python benchmarks/ablations.py FOLDER --choices freeze --seeds 0 1  # a part of it
    python benchmarks/ablations.py FOLDER --report                      # the table alone

With ``--development MODELS`` on models that have not seen what judges them, from the folder
that ``development_models.py`` wrote.

Stopped, it goes on where it was. Processes may share a folder if their subsets are disjoint.
Differences are taken between runs of one seed; so that models can be compared, they are
divided by the spread between the seeds of each model.
"""

import argparse
import functools
import itertools
import json
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from common import provenance
from tasks import TASKS

from onnx_fliqs import Budget, BudgetKind, Dataset, Rule, SearchConfig, search
from onnx_fliqs.controller import ControllerConfig, Method, RewardForm, Schedule, Signal
from onnx_fliqs.data import input_specs
from onnx_fliqs.data_files import load_npz
from onnx_fliqs.evaluation import open_session, run_dataset
from onnx_fliqs.model import load_model
from onnx_fliqs.optimizer import Optimizer
from onnx_fliqs.thresholds import Statistics, Thresholds

DEFAULT = "default"
_JUDGED_SHARE = 0.2
"""Of the training set: never shown to a search."""


class Workload(NamedTuple):
    """Where variants differ: a budget at which quantization costs accuracy."""

    space: str
    bits: float


WORKLOADS = {
    "resnet20": Workload("int-l", 4.28),
    "mobilenetv2": Workload("int3,int4,int5,int6,int7,int8", 4.0),
    "vit": Workload("int2,int3,int4,int5,int6,int7,int8", 3.0),
}


_EVERY_INTEGER = "int2,int3,int4,int5,int6,int7,int8"
DEVELOPMENT = {
    "resnet20": Workload(_EVERY_INTEGER, 3.21),
    "mobilenetv2": Workload(_EVERY_INTEGER, 4.28),
    "vit": Workload(_EVERY_INTEGER, 4.28),
}
"""The same for the models of ``development_models.py``."""
_UNSIGNED = Path(__file__).with_name("unsigned_activations.json")
"""A profile: ``generic`` with zero point 0."""


@dataclass(frozen=True)
class Variant:
    """A change of the default settings."""

    search: Mapping[str, Any] = field(default_factory=dict)
    controller: Mapping[str, Any] = field(default_factory=dict)

    def config(self, **settings: Any) -> SearchConfig:
        """The settings of a search."""
        controller = ControllerConfig(**self.controller)
        return SearchConfig(**{**settings, **self.search}, controller=controller)


def _searches(name: str, *values: Any) -> dict[str, Variant]:
    """Values of one field of SearchConfig."""
    return {_title(value): Variant({name: value}) for value in values}


_ON_DRAWS: Mapping[str, Any] = {"observe": 0.5, "freeze": 0.1}
"""Weights train on draws of the critic's policy."""


def _on_draws(name: str, *values: Any) -> dict[str, Variant]:
    """Values of a setting that counts only where draws are scored; compare "trained on"."""
    if name in ControllerConfig.__dataclass_fields__:
        return {_title(value): Variant(_ON_DRAWS, {name: value}) for value in values}
    return {_title(value): Variant({**_ON_DRAWS, name: value}) for value in values}


def _title(value: Any) -> str:
    return value.value if isinstance(value, Enum) else f"{value:g}"


def _reinforce(**settings: Any) -> Variant:
    """As published: a policy that learns slowly needs more of the steps."""
    published = {"method": Method.REINFORCE, "signal": Signal.LOSS}
    return Variant({"delay": 0.2, "freeze": 0.75}, published | settings)


def _refreshed(statistics: Statistics, steps: int) -> Variant:
    """Thresholds that are fitted anew, not learned."""
    return Variant({"statistics": statistics, "refresh": steps, "threshold_rate": 0.0})


def _optimizer(kind: Optimizer, *rates: float) -> dict[str, Variant]:
    """Each at several rates, since theirs are no comparable numbers."""
    return {
        f"{kind.value}, rate {rate:g}": Variant({"optimizer": kind, "learning_rate": rate})
        for rate in rates
    }


CHOICES: dict[str, dict[str, Variant]] = {
    "learning rate": _searches("learning_rate", 5e-4, 1e-3, 4e-3),
    "distillation": _searches("distillation", 0.0, 1.0),
    "observe": _searches("observe", 0.15, 0.3, 0.5),
    "trained on": {
        "draws": Variant(_ON_DRAWS),
        "draws, not observed": Variant({"delay": 0.2, "freeze": 0.5}),
    },
    "weight damage": _searches("weight_damage", 0.03, 0.3, 1.0),
    "freeze": _on_draws("freeze", 0.3, 0.9),
    "draws": _on_draws("draws", 2, 8),
    "held-out batch": _on_draws("held_out_batch", 16, 32, 128),
    "temperature": _on_draws("temperature", 0.05, 0.5, 1.0),
    "threshold rate": _searches("threshold_rate", 0.0, 3.0, 30.0),
    "refresh": {f"{steps}": _refreshed(Statistics.RUNNING, steps) for steps in (10, 25, 50)},
    "controller": {
        "REINFORCE": _reinforce(),
        "REINFORCE, beta -0.3": _reinforce(beta=-0.3),
        "REINFORCE, beta -3": _reinforce(beta=-3.0),
        "REINFORCE, rate 0.005": _reinforce(learning_rate=0.005),
        "REINFORCE, rate 0.2": _reinforce(learning_rate=0.2),
        "REINFORCE, entropy 0": _reinforce(entropy_end=0.0),
        "REINFORCE, entropy 0.1": _reinforce(entropy_end=0.1),
        "REINFORCE, linear entropy": _reinforce(entropy_schedule=Schedule.LINEAR),
        "REINFORCE, constant entropy": _reinforce(entropy_schedule=Schedule.CONSTANT),
        "REINFORCE, accuracy": _reinforce(signal=Signal.ACCURACY),
        "REINFORCE, agreement": _reinforce(signal=Signal.AGREEMENT),
        "REINFORCE, one-sided": _reinforce(reward=RewardForm.ONE_SIDED),
        **{
            f"REINFORCE, accuracy, {form.value}": _reinforce(
                signal=Signal.ACCURACY, reward=form
            )
            for form in (
                RewardForm.ONE_SIDED,
                RewardForm.EXPONENTIAL,
                RewardForm.HARD_EXPONENTIAL,
            )
        },
    },
    "signal": _on_draws("signal", Signal.LOSS, Signal.ACCURACY, Signal.AGREEMENT),
    "cooling": _on_draws("cooling", Schedule.COSINE, Schedule.CONSTANT),
    "thresholds": _searches(
        "thresholds", Thresholds.SHARED, Thresholds.PERCENTILE, Thresholds.MAXIMUM
    ),
    "statistics": {
        **{f"{kind.value}, refreshed": _refreshed(kind, 50) for kind in Statistics},
        "latest, at every step": _refreshed(Statistics.LATEST, 1),
    },
    "optimizer": {
        **_optimizer(Optimizer.RELATIVE_MOMENTUM, 5e-4, 1e-3, 2e-3, 4e-3),
        **_optimizer(Optimizer.ADAM, 1e-5, 3e-5, 1e-4, 3e-4),
    },
    "space": {
        "first and last layer fixed": Variant(
            {"rules": (Rule(positions=("first", "last"), fix="int8"),)}
        ),
        "tied formats": Variant({"separate": False}),
        "zero point 0": Variant({"target": str(_UNSIGNED)}),
        "tied formats, zero point 0": Variant({"separate": False, "target": str(_UNSIGNED)}),
    },
    "memory": _on_draws("memory", 0.98, 0.99, 1.0),
    "shrinkage": _on_draws("shrinkage", 0.01, 1.0),
}
"""Choice → variant → what it changes; the most important choices first."""


@dataclass(frozen=True)
class Run:
    """One search."""

    models: str
    """The folder of models that do not know what judges them; empty: those of ``TASKS``."""
    model: str
    space: str
    bits: float
    choice: str
    variant: str
    seed: int
    steps: int
    batch_size: int

    @property
    def settings(self) -> SearchConfig:
        """Of the search."""
        default = self.choice == DEFAULT
        variant = Variant() if default else CHOICES[self.choice][self.variant]
        return variant.config(
            space=self.space,
            budget=Budget(BudgetKind.BITS, self.bits),
            steps=self.steps,
            batch_size=self.batch_size,
            seed=self.seed,
            workers=1,
        )


def _runs(options: argparse.Namespace) -> Iterator[Run]:
    """The defaults first: everything is compared with them."""
    variants = [(DEFAULT, DEFAULT)]
    variants += [
        (name, variant)
        for name in options.choices
        for variant in CHOICES[name]
        if options.variants is None or variant in options.variants
    ]
    for seed, (choice, variant), model in itertools.product(
        options.seeds, variants, options.models
    ):
        models = str(options.development or "")
        space, bits = (DEVELOPMENT if models else WORKLOADS)[model]
        bits = bits if options.bits is None else options.bits
        steps, batch_size = options.steps, options.batch_size
        yield Run(models, model, space, bits, choice, variant, seed, steps, batch_size)


@functools.cache
def _parts(models: str, model: str) -> tuple[Path, Dataset, Dataset]:
    """The float model, what the search sees, and what judges it."""
    if models:
        folder = Path(models)
        path = folder / f"{model}.onnx"
        specs = input_specs(load_model(path))
        seen, judges = (load_npz(folder / f"{n}.npz", specs) for n in ("train", "judged"))
        return path, seen, judges
    path, arrays = TASKS[model].model, TASKS[model].arrays("train")
    specs = input_specs(load_model(path))
    labels = np.asarray(arrays["labels"], np.int64)
    data = Dataset({specs[0].name: arrays["x"]}, labels, specs)
    order = np.random.default_rng(0).permutation(len(data))
    judged = round(_JUDGED_SHARE * len(data))
    seen, judges = (data.take(np.sort(rows)) for rows in (order[judged:], order[:judged]))
    return path, seen, judges


def _execute(run: Run) -> dict[str, Any]:
    path, data, judges = _parts(run.models, run.model)
    started = time.process_time()
    result = search(path, data, run.settings)
    used = time.process_time() - started
    session, _ = open_session(result.model)
    names = [output.name for output in session.get_outputs()]
    accuracy, loss = _judged(next(iter(run_dataset(session, judges, names).values())), judges)
    return {
        **vars(run),
        "accuracy": accuracy,
        "loss": loss,
        "effective_bits": result.cost.effective_bits,
        "entropy": result.entropy,
        "assignment": dict(result.assignment.layers),
        "cpu_seconds": round(used, 1),
    }


def _judged(logits: Any, data: Dataset) -> tuple[float, float]:
    """Accuracy and mean cross-entropy of the logits, which all the models here end with."""
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    surprise = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(data)), data.labels]
    return float(np.mean(logits.argmax(axis=1) == data.labels)), float(surprise.mean())


def _rows(log: Path) -> list[dict[str, Any]]:
    if not log.exists():
        return []
    # The last line may be half written by another process.
    lines = log.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in Run.__dataclass_fields__)


def _run_all(options: argparse.Namespace, log: Path) -> None:
    for run in _runs(options):
        rows = _rows(log)
        if _key(vars(run)) in map(_key, rows):
            continue
        row = json.dumps({**_execute(run), **provenance()}) + "\n"
        with log.open("ab", buffering=0) as file:
            # One write to a file opened for appending: lines of two processes do not mix.
            file.write(row.encode())
        print(run.model, run.choice, run.variant, run.seed, file=sys.stderr, flush=True)


# --- the report ----------------------------------------------------------------------------

MEASURES = {"accuracy": ("accuracy, %", 100.0), "loss": ("cross-entropy", -1.0)}
"""Name in a row → title, and the factor that makes larger better."""
Cells = dict[tuple[str, str, str], dict[int, dict[str, Any]]]
"""(model, choice, variant) → seed → run."""


@dataclass(frozen=True)
class Difference:
    """From the default, of the same seeds, so that larger is better."""

    mean: float
    error: float
    """Standard error; NaN for one seed."""


def _difference(
    cells: Cells, model: str, variant: tuple[str, str], measure: str
) -> Difference:
    factor = MEASURES[measure][1]
    mine, theirs = cells.get((model, *variant), {}), cells.get((model, DEFAULT, DEFAULT), {})
    pairs = [factor * (mine[s][measure] - theirs[s][measure]) for s in mine if s in theirs]
    if not pairs:
        return Difference(math.nan, math.nan)
    error = stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
    return Difference(fmean(pairs), error)


def _unit(cells: Cells, model: str, measure: str) -> float:
    """The spread between seeds: pooled over all variants; NaN if each has one seed."""
    factor = MEASURES[measure][1]
    groups = [
        [factor * row[measure] for row in group.values()]
        for (its_model, *_), group in cells.items()
        if its_model == model and len(group) > 1
    ]
    squares = sum(stdev(group) ** 2 * (len(group) - 1) for group in groups)
    freedom = sum(len(group) - 1 for group in groups)
    return math.sqrt(squares / freedom) if freedom and squares else math.nan


def _summary(
    cells: Cells, models: Sequence[str], variant: tuple[str, str], measure: str
) -> Difference:
    """Mean over the models of the differences in units of each model's spread."""
    found = [
        (_difference(cells, m, variant, measure), _unit(cells, m, measure)) for m in models
    ]
    means = [difference.mean / unit for difference, unit in found]
    errors = [difference.error / unit for difference, unit in found]
    return Difference(fmean(means), math.hypot(*errors) / len(errors))


def _table(cells: Cells, models: Sequence[str], choice: str) -> str:
    variants = [(DEFAULT, DEFAULT), *((choice, name) for name in CHOICES[choice])]
    titles = [f"{model}, {title}" for model in models for title, _ in MEASURES.values()]
    overall = [f"mean standardised, {measure}" for measure in MEASURES]
    columns = ["variant", "seeds", *titles, *overall]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for variant in variants:
        groups = [cells.get((model, *variant), {}) for model in models]
        if not any(groups):
            continue
        shown = [
            _cell(cells, model, variant, measure) for model in models for measure in MEASURES
        ]
        if variant[0] != DEFAULT:
            totals = (_summary(cells, models, variant, measure) for measure in MEASURES)
            shown += [_signed(total, "{:+.2f}") for total in totals]
        else:
            shown += [""] * len(MEASURES)
        seeds = ", ".join(str(len(group)) for group in groups)
        lines.append(f"| {' | '.join([variant[1], seeds, *shown])} |")
    return "\n".join([f"### {choice}", "", *lines, "", _winner(cells, models, choice)])


def _cell(cells: Cells, model: str, variant: tuple[str, str], measure: str) -> str:
    """Mean ± standard deviation, and the difference from the default ± its error."""
    group = cells.get((model, *variant), {})
    if not group:
        return ""
    values = [abs(MEASURES[measure][1]) * row[measure] for row in group.values()]
    digits = 2 if measure == "accuracy" else 4
    text = f"{fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {stdev(values):.{digits}f}"
    if variant[0] == DEFAULT:
        return text
    difference = _difference(cells, model, variant, measure)
    return f"{text} ({_signed(difference, f'{{:+.{digits}f}}')})"


def _signed(difference: Difference, form: str) -> str:
    if math.isnan(difference.mean):
        return "n/a"
    text = form.format(difference.mean)
    if not math.isnan(difference.error):
        text += f" ± {form.format(difference.error).lstrip('+')}"
    return text


def _winner(cells: Cells, models: Sequence[str], choice: str) -> str:
    """By the mean standardised difference in accuracy; clear beyond two standard errors."""
    found = {
        name: _summary(cells, models, (choice, name), "accuracy") for name in CHOICES[choice]
    }
    found = {name: total for name, total in found.items() if not math.isnan(total.error)}
    if not found:
        return "Winner: unknown; it takes two seeds on every model."
    name = max(found, key=lambda each: found[each].mean)
    best = found[name]
    if best.mean <= 0:
        return "Winner: the default."
    clear = "clear" if best.mean > 2 * best.error else "within two standard errors"
    return f"Winner: {name}, {best.mean:+.2f} ± {best.error:.2f} spreads ({clear})."


def _report(options: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> str:
    wanted = {_key(vars(run)) for run in _runs(options)}
    cells: Cells = defaultdict(dict)
    for row in rows:
        if _key(row) in wanted:
            cells[row["model"], row["choice"], row["variant"]][row["seed"]] = dict(row)
    cells = dict(cells)
    legend = (
        "Mean ± standard deviation over seeds, and in parentheses the difference from the"
        " default of the same seed ± its standard error; positive is better."
    )
    tables = [
        _table(cells, options.models, choice)
        for choice in options.choices
        if any(key[1] == choice for key in cells)
    ]
    return "\n\n".join([legend, *tables, _effort(wanted, rows)])


def _effort(wanted: set[tuple[Any, ...]], rows: Sequence[Mapping[str, Any]]) -> str:
    """CPU time so far, and an estimate of what the missing runs take."""
    done = {_key(row): row for row in rows if _key(row) in wanted}
    times = defaultdict(list)
    for row in done.values():
        times[row["model"]].append(row["cpu_seconds"])
    model = list(Run.__dataclass_fields__).index("model")
    missing = [key[model] for key in wanted - set(done)]
    left = sum(fmean(times[name]) for name in missing if name in times)
    spent = sum(row["cpu_seconds"] for row in done.values())
    commits = ", ".join(
        f"{n} at {name}" for name, n in Counter(map(_commit, done.values())).items()
    )
    means = ", ".join(
        f"{model} {fmean(seen):.0f} s a run" for model, seen in sorted(times.items())
    )
    return (
        f"{len(done)} of {len(wanted)} runs, {spent / 3600:.2f} h of CPU time ({means});"
        f" about {left / 3600:.2f} h are missing. Runs by commit: {commits or 'none'}."
    )


def _commit(row: Mapping[str, Any]) -> str:
    return str(row["commit"])


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--variants", nargs="+", help="of these choices; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--bits", type=float, help="a budget in place of each model's own")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--development", type=Path, metavar="MODELS")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    known = {variant for choice in options.choices for variant in CHOICES[choice]}
    if unknown := set(options.variants or ()) - known:
        parser.error(f"no variants of these choices: {', '.join(sorted(unknown))}")
    options.folder.mkdir(parents=True, exist_ok=True)
    log = options.folder / "runs.jsonl"
    if not options.report:
        _run_all(options, log)
    report = _report(options, _rows(log))
    if not options.report:
        (options.folder / "ablations.md").write_text(f"{report}\n", encoding="utf-8")
    print(report)
    settings = {"steps": options.steps, "batch_size": options.batch_size, "workers": 1}
    print(json.dumps({**settings, **provenance()}))


if __name__ == "__main__":
    main()
