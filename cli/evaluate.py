"""``onnx-fliqs evaluate``."""

from pathlib import Path

import click

from onnx_fliqs.cli import options

__all__ = ["command"]


@click.command("evaluate")
@options.model
@options.data(
    True, "Samples (.npz, or a folder of .npy), with `labels` unless --against is given."
)
@options.file("--against", "Measure the agreement with this model instead of the accuracy.")
@options.custom_ops
@options.json_output
def command(model: Path, data: Path, against: Path | None, as_json: bool) -> None:
    """Measure in ONNX Runtime how well MODEL meets labels, or agrees with another.

    A model that onnx-fliqs emitted runs at the optimisation level that it asks for.
    """
    from onnx_fliqs import api
    from onnx_fliqs.cli import render

    found = api.evaluate(model, data, against=against)
    render.print_warnings(found.warnings)
    if as_json:
        render.print_json(found.to_dict())
    else:
        click.echo(
            f"{found.metric.value} {found.value:.4f} on {found.samples} samples"
            f" (optimisation level {found.level.value!r})"
        )
