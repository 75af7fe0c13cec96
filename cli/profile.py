"""``onnx-fliqs profile``."""

from pathlib import Path

import click

from onnx_fliqs.cli import options

__all__ = ["command"]


@click.command("profile")
@options.model
@options.data(
    False, "Samples (.npz, or a folder of .npy) to run, of which only the shapes matter."
)
@click.option(
    "--space",
    help="Formats to measure: a name or a comma list, as for search.  [default: the target's]",
)
@options.separate
@options.target("ort-cpu")
@options.remove_quantization
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Samples per run.  [default: what the model fixes, or 1]",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads within one operator.  [default: the runtime's choice]",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    help="About how long to measure, but at least ten graphs.",
)
@options.seed
@options.output(True, "The table (.json), for search --latency-table.")
@options.custom_ops
@options.json_output
def command(
    model: Path,
    data: Path | None,
    space: str | None,
    separate: bool | None,
    target: str,
    remove_quantization: bool,
    batch_size: int | None,
    threads: int | None,
    seconds: float,
    seed: int,
    output: Path,
    as_json: bool,
) -> None:
    """Measure what each layer of MODEL costs in each format, in the target's runtime.

    Where that is not here, in ONNX Runtime, with a warning.
    Times random assignments in turn with the float model, whole graphs, and finds the costs of
    layers and of borders between them that explain the latencies best.
    """
    from onnx_fliqs.cli import render
    from onnx_fliqs.latency_profile import ProfileConfig, profile
    from onnx_fliqs.model import atomic_write

    options.check_output(output, model, data)
    config = ProfileConfig(
        target=target,
        space=space,
        separate=separate,
        remove_quantization=remove_quantization,
        batch_size=batch_size,
        threads=threads,
        seconds=seconds,
        seed=seed,
    )
    with render.ProfileBar() as progress:
        table, warnings = profile(model, data, config, progress=progress)
    atomic_write(output, table.to_json().encode())
    render.print_warnings(warnings)
    if as_json:
        render.print_json({"output": str(output), **table.to_dict(), "warnings": warnings})
    else:
        render.print_latency_table(table)
        click.echo(f"wrote    {output}")
