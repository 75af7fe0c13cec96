"""``onnx-fliqs emit``."""

from pathlib import Path

import click

from onnx_fliqs.cli import options

__all__ = ["command"]


@click.command("emit")
@options.model
@options.file(
    "--assignment", "JSON file that a search wrote: a format for each layer.", required=True
)
@options.data(
    False, "Samples (.npz, or a folder of .npy) to calibrate the activations' thresholds."
)
@options.target(None)
@options.remove_quantization
@click.option(
    "--equalize/--no-equalize",
    help="Equalize the weight ranges of neighbouring layers first (cross-layer equalization).",
    show_default=True,
)
@click.option(
    "--bias-correction/--no-bias-correction",
    default=True,
    help="Take the mean error of each layer, measured on --data, out of its bias.",
    show_default=True,
)
@options.output(True, "The quantized model.")
@options.custom_ops
@options.json_output
def command(
    model: Path,
    assignment: Path,
    data: Path | None,
    target: str | None,
    remove_quantization: bool,
    equalize: bool,
    bias_correction: bool,
    output: Path,
    as_json: bool,
) -> None:
    """Emit an assignment with the weights of MODEL: post-training quantization, no search."""
    from onnx_fliqs import api
    from onnx_fliqs.assignment import Assignment
    from onnx_fliqs.cli import render
    from onnx_fliqs.model import save_model

    options.check_output(output, model, data, assignment)
    chosen = Assignment.read(assignment)
    result = api.emit(
        model,
        chosen,
        data,
        target=target,
        remove_quantization=remove_quantization,
        equalize=equalize,
        bias_correction=bias_correction,
    )
    save_model(result.model, output)
    render.print_warnings(result.warnings)
    if as_json:
        render.print_json(result.to_dict(output, assignment))
    else:
        render.print_result(result)
        click.echo(f"wrote    {output}")
