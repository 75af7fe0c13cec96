"""``onnx-fliqs inspect``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnx_fliqs.cli import options

if TYPE_CHECKING:
    from onnx_fliqs.rules import Rule

__all__ = ["command"]


@click.command("inspect")
@options.model
@click.option(
    "--space",
    help="int-s, int-l, fp-s, fp-l, or formats joined by commas.  [default: the target's]",
)
@options.separate
@options.target("generic")
@options.rules
@options.remove_quantization
@options.custom_ops
@options.json_output
def command(
    model: Path,
    space: str | None,
    separate: bool | None,
    target: str,
    rules: "tuple[Rule, ...]",
    remove_quantization: bool,
    as_json: bool,
) -> None:
    """List the layers of MODEL, what they cost, and what cannot be quantized or trained."""
    from onnx_fliqs import api
    from onnx_fliqs.cli import render

    found = api.inspect(
        model,
        target=target,
        space=space,
        separate=separate,
        rules=rules,
        remove_quantization=remove_quantization,
    )
    render.print_warnings(found.warnings)
    if as_json:
        render.print_json(found.to_dict())
    else:
        render.print_inspection(found)
