"""What people see: tables, and the progress of a search."""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from typing_extensions import Self

    from onnx_fliqs.api import Inspection
    from onnx_fliqs.convergence import Convergence
    from onnx_fliqs.latency import LatencyTable
    from onnx_fliqs.latency_profile import ProfileProgress
    from onnx_fliqs.latency_report import LatencyReport
    from onnx_fliqs.progress import Progress as Step
    from onnx_fliqs.report import SearchResult
    from onnx_fliqs.targets import Target
    from onnx_fliqs.validation import Validation
    from onnx_fliqs.verify import Check

__all__ = [
    "ProfileBar",
    "SearchProgress",
    "print_inspection",
    "print_json",
    "print_latency_table",
    "print_result",
    "print_targets",
    "print_validation",
    "print_warnings",
]

_PLAIN_LINES = 20
"""Lines of progress where there is no terminal."""
_UNITS = {"measure": "batch", "observe": "round"}
"""What the phases before the first step are counted in."""
_BLOCKS = "▁▂▃▄▅▆▇█"
"""Of a curve, from its least to its largest number."""
_WIDTH = 100
"""Columns of a table where there is no terminal."""


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _WIDTH
    return Console(file=stream, width=width, highlight=False, soft_wrap=False)


def print_json(content: dict[str, Any]) -> None:
    """One object on stdout; NaN, which JSON lacks, becomes null."""
    sys.stdout.write(json.dumps(_finite(content), ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_warnings(warnings: tuple[str, ...]) -> None:
    """One line each, on stderr."""
    console = _console(stderr=True)
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


def _quantity(value: float) -> str:
    """Three digits and a unit: 1.23 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g}"


def _layer_table(columns: tuple[str, ...], left: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        table.add_column(
            name,
            justify="left" if index < left else "right",
            no_wrap=index > 0,
            overflow="fold",
        )
    return table


def print_result(result: "SearchResult") -> None:
    """The final table of a search or an emission, on stdout."""
    console = _console(stderr=False)
    table = _layer_table(("layer", "op", "format", "bits", "params", "MACs", "cost"), 3)
    for layer in result.layers:
        notes = ["weights"] if layer.weight_only else []
        notes += ["by rule"] if layer.rule else []
        notes += ["not trained"] if layer.reason and result.steps else []
        table.add_row(
            layer.name,
            layer.op,
            layer.format + (f" ({', '.join(notes)})" if notes else ""),
            str(layer.bits),
            _quantity(layer.params),
            _quantity(layer.macs),
            f"{layer.share:.1%}",
        )
    console.print(table, markup=False)
    only = [(f"{x.op} {x.name}", x.weight_only) for x in result.layers if x.weight_only]
    _print_reasons(console, "weights only", only)
    frozen = [(f"{x.op} {x.name}", x.reason) for x in result.layers if x.reason]
    _print_reasons(console, "not trained", frozen if result.steps else [])
    _print_left_out(console, result)
    cost = result.cost
    operations = (
        f"{cost.effective_bits:.2f} effective bits, {_quantity(cost.bops)} BOPs"
        f" ({cost.relative_to_int8:.2f} x int8), "
    )
    console.print(
        f"\ncost     {operations if cost.bops else ''}weights"
        f" {_quantity(cost.weight_bytes)} bytes",
        markup=False,
    )
    if len(result.budgets) > 1:
        used = ", ".join(f"{b.used:.4g} of --{b.kind} {b.value:g}" for b in result.budgets)
        console.print(f"budgets  {used}", markup=False, soft_wrap=True)
    if result.latency is not None:
        _print_latency(console, result.latency)
    kind = "held-out" if result.steps else "given"
    samples = f"{result.samples} {kind} sample{'' if result.samples == 1 else 's'}"
    form = ".4f" if result.metric.endswith("r2") else ".2%"
    console.print(
        f"quality  {result.metric} on {samples}: float {result.float_quality:{form}},"
        f" quantized {result.quantized_quality:{form}}",
        markup=False,
    )
    if result.convergence is not None:
        _print_convergence(console, result.convergence)
    console.print(
        f"checked  the graph computes what was searched; right in ONNX Runtime up to the"
        f" optimisation level {result.optimization_level.value!r}",
        markup=False,
        soft_wrap=True,
    )


def _print_convergence(console: Console, found: "Convergence") -> None:
    """A line for each curve, from its first number to its last."""
    title = "curves"
    for name, values in (
        ("loss", found.curves.loss),
        ("held-out", found.curves.held_out),
        ("cost", found.curves.cost),
        ("entropy", found.curves.entropy),
    ):
        known = [value for value in values if value is not None]
        if len(known) > 1:
            ends = f"{known[0]:.3g} to {known[-1]:.3g}"
            console.print(
                f"{title:8} {name:8} {_curve(values)} {ends}", markup=False, soft_wrap=True
            )
            title = ""


def _curve(values: Sequence[float | None]) -> str:
    """One character per point: its height, or a blank where nothing was measured."""
    known = [value for value in values if value is not None]
    low, unit = min(known), (max(known) - min(known)) / (len(_BLOCKS) - 1)

    def block(value: float) -> str:
        return _BLOCKS[round((value - low) / unit) if unit > 0 else 0]

    return "".join(" " if value is None else block(value) for value in values)


def _print_latency(console: Console, found: "LatencyReport") -> None:
    """Predicted and measured, side by side."""
    text = (
        f"latency  predicted {_milliseconds(found.predicted_ms)}"
        f" ({found.predicted_ms / found.float_ms:.2f} x float)"
    )
    if found.measured_ms is not None and found.measured_float_ms is not None:
        text += (
            f", measured {_milliseconds(found.measured_ms)}"
            f" ({found.measured_ms / found.measured_float_ms:.2f} x float)"
        )
    console.print(f"{text}, {found.runtime}", markup=False, soft_wrap=True)


def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms"


def print_latency_table(found: "LatencyTable") -> None:
    """What each layer costs in each format, on stdout."""
    console = _console(stderr=False)
    precisions = list(dict.fromkeys(name for row in found.layers.values() for name in row))
    table = _layer_table(("layer", *(f"{name}, ms" for name in precisions)), 1)
    for layer, row in found.layers.items():
        cells = []
        for name in precisions:
            cost = row.get(name)
            half = 0.0 if cost is None else (cost.high - cost.low) / 2
            cells.append("-" if cost is None else f"{cost.ms:+.4f} ± {half:.4f}")
        table.add_row(layer, *cells)
    console.print(table, markup=False)
    unit = found.float_model.ms
    for name in precisions:
        if all(name in row for row in found.layers.values()):
            everywhere = found.predict(dict.fromkeys(found.layers, name))
            console.print(
                f"{name:8} everywhere: {_milliseconds(everywhere)} ({everywhere / unit:.2f} x"
                " float)",
                markup=False,
            )
    worst = max(found.borders, key=lambda border: border.cost.ms, default=None)
    if worst is not None:
        console.print(
            f"borders  {len(found.borders)} between layers of different kinds, up to"
            f" {_milliseconds(worst.cost.ms)} ({' | '.join(worst.layers)})",
            markup=False,
            soft_wrap=True,
        )
    where = found.conditions
    console.print(
        f"float    {_milliseconds(unit)} (quartiles {found.float_model.low:.3g} to"
        f" {found.float_model.high:.3g}) in {where.runtime} {where.version}\n"
        f"fit      {found.assignments} graphs, {found.repetitions} runs; left-out graphs are"
        f" predicted within {found.median_error:.1%} (half of them), {found.p90_error:.1%}"
        " (90 %)",
        markup=False,
        soft_wrap=True,
    )


def _print_left_out(console: Console, result: "SearchResult | Inspection") -> None:
    skipped = [(f"{item.op_type} {item.name}", item.reason) for item in result.skipped]
    _print_reasons(console, "left in float", skipped)


def _print_reasons(console: Console, what: str, found: Sequence[tuple[str, str]]) -> None:
    """A line for each reason, with all that it holds for."""
    reasons: dict[str, list[str]] = {}
    for name, reason in found:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        console.print(f"{what}: {', '.join(names)} ({reason})", markup=False, soft_wrap=True)


def print_inspection(found: "Inspection") -> None:
    """The table of ``inspect``, on stdout."""
    console = _console(stderr=False)
    table = _layer_table(("layer", "op", "params", "MACs", "trains"), 2)
    for layer in found.layers:
        trains = "no" if layer.frozen else "yes"
        if not layer.weights:
            trains = "-"
        table.add_row(
            layer.name, layer.op_type, _quantity(layer.params), _quantity(layer.macs), trains
        )
    console.print(table, markup=False)
    only = [(f"{x.op_type} {x.name}", x.weight_only) for x in found.layers if x.weight_only]
    _print_reasons(console, "weights only", only)
    frozen = [(f"{x.op_type} {x.name}", x.frozen) for x in found.layers if x.frozen]
    _print_reasons(console, "not trained", frozen)
    _print_left_out(console, found)
    ruled = [(x.name, ", ".join(found.choices[x.name])) for x in found.layers if x.rule]
    _print_reasons(console, "by rule", ruled)
    for names in found.shared:
        console.print(f"one precision: {', '.join(names)}", markup=False, soft_wrap=True)
    params = sum(layer.params for layer in found.layers)
    macs = sum(layer.macs for layer in found.layers)
    console.print(
        f"\n{len(found.layers)} layers, {_quantity(params)} weights, {_quantity(macs)} MACs a"
        f" sample; target {found.target.name} searches {found.searched}",
        markup=False,
        soft_wrap=True,
    )


def print_targets(targets: "Sequence[Target]") -> None:
    """The table of ``targets``, on stdout."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("target", no_wrap=True)
    for name in ("description", "precisions", "searched by default"):
        table.add_column(name, overflow="fold")
    for target in targets:
        precisions = target.precisions
        table.add_row(
            target.name,
            target.description,
            "all" if precisions is None else ", ".join(precisions),
            target.default_space.replace(",", ", "),
        )
    _console(stderr=False).print(table, markup=False)


def print_validation(found: "Validation") -> None:
    """What each runtime made of a graph, on stdout."""
    console = _console(stderr=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    version = found.versions["onnxruntime"]
    for check in found.verification.levels:
        table.add_row("onnxruntime", version, check.name, _verdict(check))
    for check in found.verification.others:
        table.add_row(check.name, found.versions[check.name], "", _verdict(check))
    for runtime, reason in found.unchecked.items():
        table.add_row(runtime, "", "", f"not checked: {reason}")
    console.print(table, markup=False)
    if found.reference is not None:
        console.print(f"reference differs by {found.reference.rms:.3f} of the output")
    for problem in found.problems:
        console.print(f"rule     {problem}", markup=False, soft_wrap=True)
    if not found.problems:
        console.print(f"valid for {found.target}, to be run at {found.level.value!r}")


def _verdict(check: "Check") -> str:
    if check.difference is None:
        return check.problem
    return f"{'agrees' if check.agrees else 'differs'} {check.difference.rms:.2e}"


class _Bar:
    """A live bar on a terminal."""

    def __init__(self, title: str) -> None:
        """Find out where to draw."""
        self._console = _console(stderr=True)
        self._title = title
        self._bar: Progress | None = None

    def __enter__(self) -> "Self":
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=None, text="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _print(self, text: str) -> None:
        """A line, where there is no terminal."""
        self._console.print(text, markup=False, soft_wrap=True)


class SearchProgress(_Bar):
    """Shows the steps of a search: a live bar on a terminal, now and then a line elsewhere."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock."""
        super().__init__("prepare")
        self._clock = clock
        self._started = clock()
        self._first: int | None = None
        self._before = 0
        self._quality = ""

    def __call__(self, step: "Step") -> None:
        """Show one step."""
        if self._first is None or step.step <= self._before:
            # Counted from the end of the first step, of each phase that has steps of its own:
            # what was prepared before it is not done again.
            self._first, self._started = step.step, self._clock()
        self._before = step.step
        if step.quality is not None:
            self._quality = f"quality {step.quality:.4f}"
        text = self._text(step)
        if self._bar is not None:
            self._bar.update(
                self._task,
                description=step.phase.value,
                completed=step.step,
                total=step.steps,
                text=f"{step.step}/{step.steps} {text}",
            )
        elif step.step % max(1, step.steps // _PLAIN_LINES) == 0 or step.step == step.steps:
            phase = step.phase.value
            unit = _UNITS.get(phase, "step")
            count = f"{phase:7} {unit} {step.step}/{step.steps}"
            self._print(" ".join(filter(None, (count, text, self._left(step)))))

    def _text(self, step: "Step") -> str:
        parts = [] if math.isnan(step.loss) else [f"loss {step.loss:.4f}"]
        if not math.isnan(step.held_out):
            parts.append(f"held-out {step.held_out:.4f}")
        if not math.isnan(step.cost):
            parts.append(f"cost {step.cost:.2f} x budget")
        if not math.isnan(step.entropy):
            parts.append(f"entropy {step.entropy:.2f}")
        return " ".join([*parts, *filter(None, (self._quality,))])

    def _left(self, step: "Step") -> str:
        done = step.step - (self._first or 0)
        if not done or step.step == step.steps:
            return ""
        seconds = (self._clock() - self._started) / done * (step.steps - step.step)
        return f"{seconds:.0f} s left"


class ProfileBar(_Bar):
    """Shows the progress of a profile: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self) -> None:
        """Find out where to draw."""
        super().__init__("profile")

    def __call__(self, step: "ProfileProgress") -> None:
        """Show one graph."""
        text = f"{step.done}/{step.total} graphs, float {_milliseconds(step.float_ms)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step.done, total=step.total, text=text)
        elif step.done % max(1, step.total // _PLAIN_LINES) == 0 or step.done == step.total:
            self._print(f"profile {text}")
