"""The errors that a user can cause, each with the exit code of the command line.

Every message names the object, what was found and what is needed, on one line. Programmer
mistakes raise ``ValueError`` or ``TypeError`` instead.
"""

from typing import ClassVar

__all__ = [
    "ConfigError",
    "DataError",
    "EnvironmentMissingError",
    "FliqsError",
    "InfeasibleError",
    "InterruptedSearchError",
    "ModelError",
    "RunError",
    "UnknownOperatorError",
    "UnsupportedError",
    "VerificationError",
]


class FliqsError(Exception):
    """Base of all errors that onnx-fliqs reports to its user."""

    exit_code: ClassVar[int] = 1


class ConfigError(FliqsError):
    """An option or configuration value is wrong or contradicts another (exit code 2)."""

    exit_code = 2


class DataError(FliqsError):
    """The data file is missing arrays, or they have the wrong shape, type or values."""


class EnvironmentMissingError(FliqsError):
    """ONNX Runtime is absent, lacks training kernels, or is installed twice."""


class InterruptedSearchError(FliqsError):
    """The user stopped a search; where it has a folder for checkpoints, it can be resumed."""


class ModelError(FliqsError):
    """The file is not a valid ONNX model (exit code 3)."""

    exit_code = 3


class UnsupportedError(ModelError):
    """The model is valid, but uses something that onnx-fliqs cannot quantize (exit code 3)."""


class UnknownOperatorError(UnsupportedError):
    """ONNX Runtime has no operator of that name: its library was not given (exit code 3)."""


class RunError(FliqsError):
    """ONNX Runtime gave up while it ran a model: mostly, its inputs do not fit each other."""


class InfeasibleError(FliqsError):
    """No assignment of formats meets the budget (exit code 4)."""

    exit_code = 4


class VerificationError(FliqsError):
    """The emitted model does not compute what was searched (exit code 5)."""

    exit_code = 5
