"""``onnx-fliqs search``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnx_fliqs.cli import options
from onnx_fliqs.errors import InterruptedSearchError

if TYPE_CHECKING:
    from onnx_fliqs.cost import Budget
    from onnx_fliqs.rules import Rule

__all__ = ["command"]


@click.command("search")
@options.model
@options.data(
    False,
    "Training samples (.npz, or a folder of .npy): an array per model input, by its name (`x`"
    " will do for a single one), and `labels`. Without labels the search distils from the"
    " float model; without data, from made-up inputs.",
)
@click.option(
    "--space",
    help="int-s, int-l, fp-s, fp-l, or formats joined by commas (int4,int8,e4m3)."
    "  [default: the target's]",
)
@options.separate
@options.target(None, shown="generic, or the assignment's")
@options.rules
@options.remove_quantization
@click.option("--bits", type=float, help="Budget: effective bits, sqrt(BOPs / MACs).")
@click.option("--bops", type=float, help="Budget: BOPs as a fraction of uniform int8's.")
@click.option(
    "--size", type=float, help="Budget: weight bytes as a fraction of uniform int8's."
)
@click.option(
    "--latency",
    type=float,
    help="Budget: latency as a fraction of the float model's, by a --latency-table.",
)
@options.file(
    "--latency-table",
    "What `onnx-fliqs profile` measured; with another budget, latency is only reported.",
)
@click.option(
    "--strategy",
    type=click.Choice(["fliqs", "ilp", "greedy", "uniform", "random"]),
    show_default="fliqs",
    help="How formats are chosen. All but fliqs choose before training: by an integer program"
    " or greedily from measured sensitivities, the best uniform format, or at random.",
)
@options.file(
    "--assignment",
    "Train this assignment, which a search wrote, in all steps: no search, no budget.",
)
@click.option("--steps", type=click.IntRange(min=1), default=500, help="Training steps.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, help="Samples per step.")
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True, max=1, max_open=True),
    default=2e-3,
    help="Largest change of a weight per step, relative to its tensor's size.",
)
@click.option(
    "--loss",
    type=click.Choice(["auto", "cross-entropy", "kl", "mse"]),
    default="auto",
    help="auto: with labels half their own loss (classes: cross-entropy, floats: squared"
    " error), half distillation from the float model; else distillation alone. cross-entropy:"
    " classes alone. kl, mse: distillation alone.",
)
@options.seed
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Worker threads; the result depends on them.  [default: one per core]",
)
@options.output(False, "The quantized model.  [default: MODEL.fliqs.onnx beside MODEL.onnx]")
@click.option(
    "--trained",
    type=click.Path(path_type=Path),
    help="Write the float model with the trained weights here as well: what `emit` needs to"
    " make graphs of this search for other targets.",
)
@click.option("--resume", is_flag=True, help="Continue a search that was stopped or killed.")
@options.custom_ops
@options.json_output
def command(
    model: Path,
    data: Path | None,
    space: str | None,
    separate: bool | None,
    target: str | None,
    rules: "tuple[Rule, ...]",
    remove_quantization: bool,
    bits: float | None,
    bops: float | None,
    size: float | None,
    latency: float | None,
    latency_table: Path | None,
    strategy: str | None,
    assignment: Path | None,
    steps: int,
    batch_size: int,
    learning_rate: float,
    loss: str,
    seed: int,
    threads: int | None,
    output: Path | None,
    trained: Path | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Search the format of each layer of MODEL and train its weights, within a budget.

    Of several budgets, every one is met.

    Writes the quantized model, the assignment (.assignment.json) beside it, and while it runs
    a checkpoint folder. Ctrl-C or SIGTERM stops; --resume continues to the same result.
    """
    from onnx_fliqs.assignment import Assignment
    from onnx_fliqs.checkpoint import Checkpoint
    from onnx_fliqs.cli import render
    from onnx_fliqs.config import SearchConfig
    from onnx_fliqs.latency import LatencyTable
    from onnx_fliqs.search_loop import search
    from onnx_fliqs.strategies import Strategy

    path = output or model.with_suffix(".fliqs.onnx")
    inputs = model, data, latency_table, assignment
    options.check_output(path, *inputs)
    chosen = path.with_suffix(".assignment.json")
    config = SearchConfig(
        target=target,
        space=space,
        separate=separate,
        rules=rules,
        remove_quantization=remove_quantization,
        budget=_budgets(bits, bops, size, latency),
        latency_table=None if latency_table is None else LatencyTable.read(latency_table),
        strategy=Strategy(strategy or ("fliqs" if assignment is None else "fixed")),
        assignment=None if assignment is None else Assignment.read(assignment),
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        loss=loss,
        seed=seed,
        workers=threads,
    )
    options.check_output(chosen, *inputs)
    if trained is not None:
        options.check_output(trained, *inputs)
        options.check_output(trained, path, chosen, what="another output")
    folder = path.with_suffix(".checkpoint")
    Checkpoint(folder, {}).check()
    try:
        with render.SearchProgress() as progress:
            result = search(
                model, data, config, checkpoint=folder, resume=resume, progress=progress
            )
    except InterruptedSearchError as error:
        if not folder.is_dir():
            raise
        raise InterruptedSearchError(
            f"{error}; the same command with --resume continues (checkpoint: {folder})"
        ) from None
    result.save(path, chosen, trained=trained)
    Checkpoint(folder, {}).remove()
    render.print_warnings(result.warnings)
    if as_json:
        render.print_json(result.to_dict(path, chosen))
    else:
        render.print_result(result)
        click.echo(f"wrote    {path}\n         {chosen}")


def _budgets(
    bits: float | None, bops: float | None, size: float | None, latency: float | None
) -> "tuple[Budget, ...]":
    from onnx_fliqs.cost import Budget, BudgetKind

    return tuple(
        Budget(kind, value)
        for kind, value in (
            (BudgetKind.BITS, bits),
            (BudgetKind.BOPS, bops),
            (BudgetKind.SIZE, size),
            (BudgetKind.LATENCY, latency),
        )
        if value is not None
    )
