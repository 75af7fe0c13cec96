"""``onnx-fliqs validate``."""

from pathlib import Path

import click

from onnx_fliqs.cli import options
from onnx_fliqs.errors import VerificationError

__all__ = ["command"]


@click.command("validate")
@options.model
@options.target(None)
@options.file("--reference", "The float model that MODEL was made from.")
@options.data(
    False, "Samples (.npz, or a folder of .npy) to compare on; otherwise they are made up."
)
@click.option(
    "--runtime",
    "runtimes",
    type=click.Choice(["onnxruntime", "openvino"]),
    multiple=True,
    help="Has to compute MODEL right; may be repeated.  [default: the target's]",
)
@options.custom_ops
@options.json_output
def command(
    model: Path,
    target: str | None,
    reference: Path | None,
    data: Path | None,
    runtimes: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run MODEL unoptimised and as its target's runtimes would, and compare.

    Where these are ONNX Runtime, it is asked at its basic and its default level. Exit code 5
    if a runtime that must compute the graph right does not, with the node where that begins,
    or if the graph breaks a rule of the target.
    """
    from onnx_fliqs import api
    from onnx_fliqs.cli import render

    found = api.validate(
        model, target=target, reference=reference, data=data, runtimes=runtimes
    )
    if as_json:
        render.print_json(found.to_dict())
    else:
        render.print_validation(found)
    if found.problems:
        count = f"{len(found.problems)} rule{'s' * (len(found.problems) > 1)}"
        raise VerificationError(
            f"the graph breaks {count} of {found.target}: {found.problems[0]}"
        )
