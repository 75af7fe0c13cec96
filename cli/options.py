"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from onnx_fliqs.errors import ConfigError, FliqsError

if TYPE_CHECKING:
    from onnx_fliqs.rules import Rule

__all__ = [
    "TARGET_NAMES",
    "check_output",
    "custom_ops",
    "data",
    "file",
    "json_output",
    "model",
    "output",
    "remove_quantization",
    "rules",
    "seed",
    "separate",
    "target",
]

_F = TypeVar("_F", bound=Callable[..., Any])
_FILE = click.Path(path_type=Path)

TARGET_NAMES: Final = (
    *("generic", "ort-cpu", "ort-cpu-avx2", "tensorrt"),
    *("openvino", "qonnx", "xnnpack", "qnn", "vitis-ai"),
)
"""The built-in targets; written down here too, so that --help need not load them."""


def _existing(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Like click's own check, but one line."""
    if value is not None and not value.is_file():
        raise ConfigError(f"there is no file {value}")
    return value


def _file_or_folder(
    ctx: click.Context, param: click.Parameter, value: Path | None
) -> Path | None:
    return value if value is not None and value.is_dir() else _existing(ctx, param, value)


def model(function: _F) -> _F:
    """The argument MODEL."""
    return click.argument("model", type=_FILE, callback=_existing)(function)


def file(name: str, text: str, *, required: bool = False) -> Callable[[_F], _F]:
    """An option that names a file to read."""
    return click.option(name, type=_FILE, required=required, callback=_existing, help=text)


def data(required: bool, text: str) -> Callable[[_F], _F]:
    """The option --data: a file, or a folder of files."""
    return click.option(
        "--data", type=_FILE, required=required, callback=_file_or_folder, help=text
    )


def target(default: str | None, *, shown: str | None = None) -> Callable[[_F], _F]:
    """The option --target, with the default as --help tells it where it depends."""
    return click.option(
        "--target",
        default=default,
        show_default=shown or True,
        metavar="NAME|FILE",
        help=f"{', '.join(TARGET_NAMES)}, or a profile of your own (see `targets`).",
    )


def rules(function: _F) -> _F:
    """The option --rules, read; no rules without it."""
    return click.option(
        "--rules",
        type=_FILE,
        callback=_read_rules,
        help="JSON file: what single layers may take, and which share a precision.",
    )(function)


def _read_rules(
    ctx: click.Context, param: click.Parameter, value: Path | None
) -> "tuple[Rule, ...]":
    if value is None:
        return ()
    from onnx_fliqs.rules import read_rules

    return read_rules(value)


def seed(function: _F) -> _F:
    """The option --seed."""
    return click.option(
        "--seed", type=click.IntRange(min=0), default=0, help="Seed of everything random."
    )(function)


def separate(function: _F) -> _F:
    """The flags --separate and --tied."""
    return click.option(
        "--separate/--tied",
        default=None,
        help="Choose the formats of weights and of activations apart, from every pair of the"
        " space's formats that the target runs, or together. Default: apart, but for formats"
        " that leave tensors as they are, unless the space names pairs itself.",
    )(function)


def remove_quantization(function: _F) -> _F:
    """The flag --remove-quantization."""
    return click.option(
        "--remove-quantization",
        is_flag=True,
        help="Turn a MODEL that is already quantized back into a float model first.",
    )(function)


def custom_ops(function: _F) -> _F:
    """The option --custom-ops, which takes effect where it is read."""
    return click.option(
        "--custom-ops",
        type=_FILE,
        multiple=True,
        expose_value=False,
        metavar="LIBRARY",
        callback=_register,
        help="Shared library of custom operators that MODEL uses; may be repeated.",
    )(function)


def _register(ctx: click.Context, param: click.Parameter, value: tuple[Path, ...]) -> None:
    if value:
        from onnx_fliqs.runtime import register_custom_ops

        for library in value:
            register_custom_ops(library)


def output(required: bool, text: str) -> Callable[[_F], _F]:
    """The option -o."""
    return click.option("-o", "--output", type=_FILE, required=required, help=text)


def json_output(function: _F) -> _F:
    """The flag --json."""
    return click.option(
        "--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else."
    )(function)


def check_output(path: Path, *inputs: Path | None, what: str = "the input") -> None:
    """Refuse an output that would overwrite an input, or cannot be written, before any work.

    Raises:
        ConfigError: The output is one of the inputs, or a folder.
        FliqsError: Its folder is missing or read-only.
    """
    for source in inputs:
        if source is not None and path.resolve() == source.resolve():
            raise ConfigError(f"the output {path} is {what}: it would be overwritten")
    if path.is_dir():
        raise ConfigError(f"the output {path} is a folder")
    folder = path.parent
    if not folder.is_dir():
        raise FliqsError(f"cannot write {path}: there is no folder {folder}")
    probe = folder / f".{path.name}.probe"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise FliqsError(f"cannot write {path}: {error.strerror}") from error
