"""``onnx-fliqs validate``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnx_fliqs.cli import options
from onnx_fliqs.errors import VerificationError

if TYPE_CHECKING:
    from onnx_fliqs.api import Validation

__all__ = ["command"]


@click.command("validate")
@options.model
@options.target(None)
@options.file("--reference", "The float model that MODEL was made from.")
@options.data(False, "Samples (.npz) to compare on; otherwise they are made up.")
@options.custom_ops
@options.json_output
def command(
    model: Path, target: str | None, reference: Path | None, data: Path | None, as_json: bool
) -> None:
    """Run MODEL unoptimised, at the basic and at the default level, and compare.

    Exit code 5 if a level that must compute the graph right does not, or if the graph breaks a
    rule of the target.
    """
    from onnx_fliqs import api
    from onnx_fliqs.cli import render

    found = api.validate(model, target=target, reference=reference, data=data)
    if as_json:
        render.print_json(found.to_dict())
    else:
        _print(found)
    if found.problems:
        count = f"{len(found.problems)} rule{'s' * (len(found.problems) > 1)}"
        raise VerificationError(
            f"the graph breaks {count} of {found.target}: {found.problems[0]}"
        )


def _print(found: "Validation") -> None:
    for check in found.verification.levels:
        difference = "" if check.difference is None else f"{check.difference.rms:.2e}"
        verdict = "agrees" if check.agrees else (check.error or "differs")
        click.echo(f"{check.level.value:8} {verdict} {difference}".rstrip())
    if found.reference is not None:
        click.echo(f"reference differs by {found.reference.rms:.3f} of the output")
    for problem in found.problems:
        click.echo(f"rule     {problem}")
    if not found.problems:
        click.echo(f"valid for {found.target}, to be run at {found.level.value!r}")
