"""The command ``onnx-fliqs``.

Only click is imported here: the commands load what they need when they run, so that ``--help``
is quick and works without ONNX Runtime.
"""

import importlib
import logging
import signal
import threading
from typing import Any, Final

import click

from onnx_fliqs._version import __version__
from onnx_fliqs.errors import FliqsError

__all__ = ["main"]

_COMMANDS: Final = {
    "inspect": "List the layers of a model and what cannot be quantized or trained.",
    "profile": "Measure what each layer costs in each format, for search --latency.",
    "search": "Search a mixed-precision assignment and train the weights for it.",
    "emit": "Emit an assignment post-training, without a search.",
    "evaluate": "Measure a model's accuracy, or its agreement with another.",
    "validate": "Check that ONNX Runtime computes a quantized graph right.",
    "targets": "List the targets, or show the profile of one.",
}


class _Failure(click.ClickException):
    """An error of the library, with its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance


class _Commands(click.Group):
    """Loads commands when they are asked for, and turns errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"onnx_fliqs.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FliqsError as error:
            raise _Failure(str(error), error.exit_code) from error
        except KeyboardInterrupt:
            raise _Failure("interrupted", 1) from None
        except MemoryError:
            raise _Failure("out of memory", 1) from None
        except OSError as error:
            raise _Failure(
                f"{error.strerror or error}: {error.filename or ''}".strip(": "), 1
            ) from error


@click.group(
    cls=_Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "show_default": True,
        "max_content_width": 100,
        "auto_envvar_prefix": "ONNX_FLIQS",
    },
)
@click.version_option(__version__, prog_name="onnx-fliqs")
@click.option("-v", "--verbose", is_flag=True, help="Log what the passes do.")
@click.pass_context
def main(ctx: click.Context, verbose: bool) -> None:
    """Mixed-precision quantization search for ONNX models.

    Exit codes: 0 done, 1 other error, 2 usage, 3 model not supported, 4 budget infeasible,
    5 verification failed.
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(levelname)s: %(message)s",
    )
    for library in ("onnxscript", "onnx_ir"):
        logging.getLogger(library).setLevel(logging.ERROR)
    _end_as_by_ctrl_c(ctx)


def _end_as_by_ctrl_c(ctx: click.Context) -> None:
    """Let SIGTERM do what Ctrl-C does: schedulers send it some time before they kill."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        ctx.call_on_close(lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
