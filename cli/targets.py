"""``onnx-fliqs targets``."""

from typing import TYPE_CHECKING, Any

import click

from onnx_fliqs.cli import options

if TYPE_CHECKING:
    from onnx_fliqs.targets import Target

__all__ = ["command"]


@click.command("targets")
@click.argument("name", required=False, metavar="[NAME|FILE]")
@options.json_output
def command(name: str | None, as_json: bool) -> None:
    """List what models can be quantized for, or show one profile as JSON.

    A profile that is saved, renamed and edited is a target as well: --target FILE.json.
    """
    from onnx_fliqs.cli import render
    from onnx_fliqs.target_files import parse_target, target_to_json
    from onnx_fliqs.targets import TARGETS

    if name is not None:
        click.echo(target_to_json(parse_target(name)), nl=False)
    elif as_json:
        render.print_json({"schema": 1, "targets": [_row(each) for each in TARGETS.values()]})
    else:
        render.print_targets(tuple(TARGETS.values()))


def _row(target: "Target") -> dict[str, Any]:
    return {
        "name": target.name,
        "description": target.description,
        "precisions": None if target.precisions is None else list(target.precisions),
        "default_space": target.default_space,
        "default_bits": target.default_bits,
    }
