"""``onnx-fliqs inspect``."""

from pathlib import Path

import click

from onnx_fliqs.cli import options

__all__ = ["command"]


@click.command("inspect")
@options.model
@options.separate
@options.target("generic")
@options.remove_quantization
@options.custom_ops
@options.json_output
def command(
    model: Path, separate: bool, target: str, remove_quantization: bool, as_json: bool
) -> None:
    """List the layers of MODEL, what they cost, and what cannot be quantized or trained."""
    from onnx_fliqs import api
    from onnx_fliqs.cli import render

    found = api.inspect(
        model, target=target, separate=separate, remove_quantization=remove_quantization
    )
    render.print_warnings(found.warnings)
    if as_json:
        render.print_json(found.to_dict())
    else:
        render.print_inspection(found)
