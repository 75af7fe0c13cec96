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
    from onnx_fliqs.report import SearchResult
    from onnx_fliqs.search_loop import Progress as Step
    from onnx_fliqs.targets import Target

__all__ = [
    "SearchProgress",
    "print_inspection",
    "print_json",
    "print_result",
    "print_targets",
    "print_warnings",
]

_PLAIN_LINES = 20
"""Lines of progress where there is no terminal."""
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
    console.print(table)
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
    samples = "held-out samples" if result.steps else "the calibration samples"
    form = ".4f" if result.metric == "r2" else ".2%"
    console.print(
        f"quality  {result.metric} on {samples}: float {result.float_quality:{form}},"
        f" quantized {result.quantized_quality:{form}}",
        markup=False,
    )
    console.print(
        f"checked  the graph computes what was searched; right in ONNX Runtime up to the"
        f" optimisation level {result.optimization_level.value!r}",
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
    console.print(table)
    only = [(f"{x.op_type} {x.name}", x.weight_only) for x in found.layers if x.weight_only]
    _print_reasons(console, "weights only", only)
    frozen = [(f"{x.op_type} {x.name}", x.frozen) for x in found.layers if x.frozen]
    _print_reasons(console, "not trained", frozen)
    _print_left_out(console, found)
    params = sum(layer.params for layer in found.layers)
    macs = sum(layer.macs for layer in found.layers)
    console.print(
        f"\n{len(found.layers)} layers, {_quantity(params)} weights, {_quantity(macs)} MACs a"
        f" sample; target {found.target.name} searches {', '.join(found.precisions)}",
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


class SearchProgress:
    """Shows the steps of a search: a live bar on a terminal, now and then a line elsewhere."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock."""
        self._console = _console(stderr=True)
        self._clock = clock
        self._started = clock()
        self._first: int | None = None
        self._quality = ""
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
            self._task = self._bar.add_task("prepare", total=None, text="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, step: "Step") -> None:
        """Show one step."""
        if self._first is None:
            self._first = step.step - 1
        if step.quality is not None:
            self._quality = f" quality {step.quality:.4f}"
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
            self._console.print(
                f"{step.phase.value:7} step {step.step}/{step.steps} {text}{self._left(step)}",
                markup=False,
                soft_wrap=True,
            )

    def _text(self, step: "Step") -> str:
        parts = [] if math.isnan(step.loss) else [f"loss {step.loss:.4f}"]
        if not math.isnan(step.held_out):
            parts.append(f"held-out {step.held_out:.4f}")
        parts.append(f"cost {step.cost:.2f} x budget")
        if not math.isnan(step.entropy):
            parts.append(f"entropy {step.entropy:.2f}")
        return " ".join(parts) + self._quality

    def _left(self, step: "Step") -> str:
        done = step.step - (self._first or 0)
        seconds = (self._clock() - self._started) / max(1, done) * (step.steps - step.step)
        return f" {seconds:.0f} s left" if step.step < step.steps else ""
