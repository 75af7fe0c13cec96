"""OpenVINO on the CPU, behind one door: this is the only module that imports it.

It is optional, and a second opinion: a graph that two independent runtimes compute alike is a
graph that other devices have a chance with. Importing this module does not import OpenVINO.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.errors import EnvironmentMissingError, RunError, UnsupportedError
from onnx_fliqs.passes._graph import weight_bytes
from onnx_fliqs.payload import fits_inline

if TYPE_CHECKING:
    from openvino import CompiledModel

__all__ = ["compile_model", "is_installed", "load_openvino", "run_compiled", "version"]

Array: TypeAlias = npt.NDArray[Any]

_FLOAT32: Final[Mapping[str, Any]] = {"INFERENCE_PRECISION_HINT": "f32"}
"""Without it, processors that have bfloat16 units compute in bfloat16, and differ for that."""
_PLACE: Final = re.compile(r"Exception from \S+:\d+:|failed at \S+:\d+:?")
_CHECK: Final = re.compile(r"Check '.*?'\s*")


def is_installed() -> bool:
    """Whether an import would find it."""
    return importlib.util.find_spec("openvino") is not None


def version() -> str:
    """The installed version; it must be installed."""
    return importlib.metadata.version("openvino")


@functools.cache
def load_openvino() -> ModuleType:
    """Import OpenVINO.

    Raises:
        EnvironmentMissingError: It is not installed, or is damaged.
    """
    if not is_installed():
        raise EnvironmentMissingError(
            'OpenVINO is not installed: pip install "onnx-fliqs[openvino]"'
        )
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise EnvironmentMissingError(
            f"the installed OpenVINO is damaged ({' '.join(str(error).split())}):"
            " run pip install --force-reinstall --no-deps openvino"
        ) from error


def compile_model(model: ir.Model, settings: Mapping[str, Any] = _FLOAT32) -> "CompiledModel":
    """Compile a model for the CPU.

    Args:
        model: It is not changed.
        settings: Properties of the plugin; by default, what is not quantized is computed in
            float32.

    Raises:
        EnvironmentMissingError: There is no OpenVINO.
        UnsupportedError: OpenVINO refuses the model, or its weights exceed one message.
    """
    openvino = load_openvino()
    if not fits_inline(model):
        raise UnsupportedError(
            f"the model has {weight_bytes(model) / 1e9:.1f} GB of weights: OpenVINO is handed"
            " models of up to 2 GB"
        )
    content = ir.to_proto(ir.external_data.load_to_model(model.clone())).SerializeToString()
    core = openvino.Core()
    try:
        return core.compile_model(core.read_model(content), "CPU", dict(settings))
    except Exception as error:  # Which types it raises is not documented.
        raise UnsupportedError(
            f"OpenVINO cannot compile the model: {_reason(error)}"
        ) from error


def run_compiled(
    compiled: "CompiledModel", names: Sequence[str], feeds: Mapping[str, Array]
) -> list[Array]:
    """Run a compiled model on arrays.

    Args:
        compiled: What :func:`compile_model` gave.
        names: Outputs to return.
        feeds: Input name → array.

    Raises:
        RunError: OpenVINO gives up while it runs.
    """
    try:
        results = compiled(dict(feeds))
    except Exception as error:  # Which types it raises is not documented.
        raise RunError(f"OpenVINO cannot run the model: {_reason(error)}") from error
    found = []
    for name in names:
        array = np.array(results[name])
        if compiled.output(name).get_element_type().get_type_name() == "bf16":
            # NumPy has no such type; the bits are handed over as float16.
            array = array.view(ml_dtypes.bfloat16)
        found.append(array)
    return found


def _reason(error: BaseException) -> str:
    """What OpenVINO says, on one line and without places in its source."""
    text = " ".join(_PLACE.sub("", str(error)).split())
    # Some checks say nothing but their condition.
    return _CHECK.sub("", text) or text or type(error).__name__
