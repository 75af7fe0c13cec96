"""ONNX Runtime, behind one door: this is the only module that imports it.

Its builds (``onnxruntime``, ``onnxruntime-training-cpu``, ...) install the same import package
and overwrite each other, so what is importable is checked here, and every failure names the
command that mends it. Importing this module does not import ONNX Runtime.
"""

import contextlib
import enum
import functools
import importlib
import importlib.metadata
import re
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

from onnx_fliqs.errors import (
    ConfigError,
    EnvironmentMissingError,
    ModelError,
    RunError,
    UnknownOperatorError,
    UnsupportedError,
)
from onnx_fliqs.payload import fits_inline, pack

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

__all__ = [
    "OptimizationLevel",
    "load_onnxruntime",
    "load_training",
    "make_session",
    "quiet_options",
    "reason_of",
    "register_custom_ops",
    "run_bound",
    "run_session",
]

_PACKAGE_FILE: Final = "onnxruntime/__init__.py"
_TRAINING_SYMBOLS: Final = (
    "GradientGraphBuilder",
    "GradientNodeDefinition",
    "register_custom_stop_gradient_edges",
    "register_gradient_definition",
)
_INSTALL_TRAINING: Final = 'pip install "onnx-fliqs[cpu]" (Python 3.12 or older)'
_INSTALL_RUNTIME: Final = 'pip install "onnx-fliqs[runtime]"'
_SEVERITY_ERROR: Final = 3
_SEVERITY_FATAL: Final = 4

# "[ONNXRuntimeError] : 1 : FAIL : " and the place in its source, "/src/model.cc:180 f(int) "
_ERROR_CODE: Final = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")
_SOURCE_PLACE: Final = re.compile(
    r"\S+\.(?:cc|h|cpp):\d+ (?:[^()]*\([^()]*\)(?:::<lambda\([^()]*\)>)? )?"
)
_UNKNOWN: Final = re.compile(
    r"Fatal error: (?P<domain>.+):(?P<operator>\w+)\(-?\d+\) is not a "
)

_FOLDER_OPTION: Final = "session.model_external_initializers_file_folder_path"
_FOLDER_SINCE: Final = (1, 22)
"""The first release that heeds it. Earlier ones take absolute paths, later ones no longer."""

_custom_ops: list[Path] = []
"""Libraries that every session and gradient graph is built with."""
_borrowed: "weakref.WeakKeyDictionary[InferenceSession, dict[str, OrtValue]]" = (
    weakref.WeakKeyDictionary()
)
"""Values whose memory a session uses without owning it."""


class OptimizationLevel(enum.Enum):
    """How much ONNX Runtime may rewrite a graph before it runs it."""

    NONE = "none"
    """Nothing: the graph runs as it is written."""
    BASIC = "basic"
    """Constant folding and removal of redundant nodes."""
    EXTENDED = "extended"
    """Also fusions for the chosen execution provider."""
    DEFAULT = "default"
    """Everything, layout changes included: what a user's session does."""


_ORT_LEVELS: Final = {
    OptimizationLevel.NONE: "ORT_DISABLE_ALL",
    OptimizationLevel.BASIC: "ORT_ENABLE_BASIC",
    OptimizationLevel.EXTENDED: "ORT_ENABLE_EXTENDED",
    OptimizationLevel.DEFAULT: "ORT_ENABLE_ALL",
}


def _owners() -> list[str]:
    """Names of the distributions that own the ``onnxruntime`` that an import would find.

    Two builds in different folders do not overwrite each other: the first folder of the
    search path wins, as it does for ``import``, and only its owners count.
    """
    owners: dict[Path, set[str]] = {}
    for distribution in importlib.metadata.distributions():
        # A half-removed distribution has metadata without a name.
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if not name.startswith("onnxruntime"):
            continue
        if any(file.as_posix() == _PACKAGE_FILE for file in distribution.files or ()):
            place = Path(str(distribution.locate_file(_PACKAGE_FILE)))
            owners.setdefault(place, set()).add(name)
    return sorted(next(iter(owners.values()), ()))


def _one_line(error: BaseException) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


@functools.cache
def load_onnxruntime() -> ModuleType:
    """Import ONNX Runtime and silence its logger below errors.

    Raises:
        EnvironmentMissingError: It is not installed, is installed twice, or is damaged.
    """
    owners = _owners()
    if len(owners) > 1:
        raise EnvironmentMissingError(
            f"{' and '.join(owners)} overwrite each other's files: run"
            f" pip uninstall -y {' '.join(owners)}, then {_INSTALL_TRAINING} to search,"
            f" or {_INSTALL_RUNTIME} for everything else"
        )
    try:
        module = importlib.import_module("onnxruntime")
        # What two builds leave behind may import and still lack its contents.
        _ = module.InferenceSession, module.SessionOptions
        module.set_default_logger_severity(_SEVERITY_ERROR)
    except (ImportError, AttributeError) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime"
        if absent and not owners:
            raise EnvironmentMissingError(
                f"ONNX Runtime is not installed: {_INSTALL_TRAINING} to search,"
                f" or {_INSTALL_RUNTIME} for everything else"
            ) from None
        raise EnvironmentMissingError(
            f"the installed ONNX Runtime is damaged ({_one_line(error)}): run pip install"
            f" --force-reinstall --no-deps {owners[0] if owners else 'onnxruntime'}"
        ) from error
    return module


@functools.cache
def load_training() -> ModuleType:
    """Give the module that holds ``GradientGraphBuilder`` and its companions.

    ``onnxruntime.training``, the documented way to them, would import torch.

    Raises:
        EnvironmentMissingError: As for :func:`load_onnxruntime`, or this build of ONNX Runtime
            has no training kernels.
    """
    onnxruntime = load_onnxruntime()
    module = importlib.import_module("onnxruntime.capi._pybind_state")
    if not all(hasattr(module, symbol) for symbol in _TRAINING_SYMBOLS):
        owner = " ".join(_owners()) or "onnxruntime"
        raise EnvironmentMissingError(
            f"this onnxruntime {onnxruntime.__version__} has no training kernels, which a"
            f" search needs: run pip uninstall -y {owner}, then {_INSTALL_TRAINING}"
        )
    return module


def quiet_options() -> Any:
    """Make ``SessionOptions`` with a silent logger, for sessions and ``GradientGraphBuilder``.

    The builder prints a line per graph whatever the default severity is, unless its last
    argument is such options. Errors are raised as well, so nothing is lost.
    """
    options = load_onnxruntime().SessionOptions()
    options.log_severity_level = _SEVERITY_FATAL
    for library in _custom_ops:
        options.register_custom_ops_library(str(library))
    return options


def register_custom_ops(library: Path) -> None:
    """Let every session from now on know the operators of a shared library.

    Args:
        library: Built against ONNX Runtime's custom operator interface.

    Raises:
        ConfigError: It cannot be loaded.
    """
    path = library.resolve()
    try:
        load_onnxruntime().SessionOptions().register_custom_ops_library(str(path))
    except Exception as error:  # ONNX Runtime's exceptions share no other base.
        raise ConfigError(
            f"{library} is no library of custom operators: {reason_of(error)}"
        ) from error
    if path not in _custom_ops:
        _custom_ops.append(path)


def make_session(
    model: ir.Model | onnx.ModelProto | bytes | Path,
    *,
    level: OptimizationLevel = OptimizationLevel.DEFAULT,
    threads: int = 0,
    disabled: Sequence[str] = (),
    providers: Sequence[str] = ("CPUExecutionProvider",),
    frugal: bool = False,
    fuse_quantized: bool = True,
    in_turn: bool = False,
) -> "InferenceSession":
    """Load a model for inference.

    The weights of an ``onnx_ir`` model may be of any size: those in files are mapped there,
    and many others are used where they are.

    Args:
        model: A model; its message, with or without serialization; or the file of one.
        level: How much the graph may be rewritten.
        threads: Threads within one operator; 0 lets ONNX Runtime choose.
        disabled: Names of ONNX Runtime optimizers that must not run.
        providers: Execution providers, best first.
        frugal: Keep neither memory between runs nor a copy of the weights that is rearranged
            for the kernels, at some cost in time. An ``onnx_ir`` model of more than 2 GB is
            always run so.
        fuse_quantized: Look for operators between DequantizeLinear and QuantizeLinear that can
            compute with integers. Where scales are not constant there are none, and the search
            for them would dequantize once for each reader.
        in_turn: The session is one of several that run one after another, or a few at a time.
            They share their memory and take no more of it than a run needs, and their threads
            sleep between runs.

    Raises:
        EnvironmentMissingError: There is no ONNX Runtime, or it lacks a provider.
        ModelError: The model cannot be read.
        UnknownOperatorError: It has an operator of which ONNX Runtime knows nothing.
        UnsupportedError: ONNX Runtime refuses the model.
    """
    onnxruntime = load_onnxruntime()
    available = onnxruntime.get_available_providers()
    if missing := [provider for provider in providers if provider not in available]:
        raise EnvironmentMissingError(
            f"this onnxruntime {onnxruntime.__version__} has no {missing[0]};"
            f" it has {', '.join(available)}"
        )
    options = quiet_options()
    options.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel, _ORT_LEVELS[level]
    )
    options.intra_op_num_threads = threads
    if not fuse_quantized:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    values: dict[str, OrtValue] = {}
    if frugal or (isinstance(model, ir.Model) and not fits_inline(model)):
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
    elif in_turn:
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        # A plan asks for all memory of a run in one piece, beside the pieces of the first run.
        options.enable_mem_pattern = False
    if in_turn:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        with _source(model, options, values) as source:
            session = onnxruntime.InferenceSession(
                source,
                options,
                providers=list(providers),
                disabled_optimizers=list(disabled),
            )
    except Exception as error:  # ONNX Runtime's exceptions share no other base.
        raise _translate(error, model) from error
    if values:
        _borrowed[session] = values
    return session


@functools.cache
def _share_arena() -> None:
    """Make the memory that sessions can share; once a process."""
    onnxruntime = load_onnxruntime()
    place = onnxruntime.OrtMemoryInfo(
        "Cpu",
        onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR,
        0,
        onnxruntime.OrtMemType.DEFAULT,
    )
    # Somebody else in this process may have made it.
    with contextlib.suppress(RuntimeError):
        onnxruntime.create_and_register_allocator(place, None)


@contextlib.contextmanager
def _source(
    model: ir.Model | onnx.ModelProto | bytes | Path,
    options: Any,
    values: "dict[str, OrtValue]",
) -> Iterator[bytes | str]:
    """What a session is made of: a message, or the path of a file.

    Args:
        model: What to load.
        options: The session's; they are told where big weights are.
        values: Filled with what must live as long as the session.
    """
    if isinstance(model, Path):
        yield str(model)
        return
    if not isinstance(model, ir.Model):
        yield model if isinstance(model, bytes) else model.SerializeToString()
        return
    onnxruntime = load_onnxruntime()
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    payload = pack(model, absolute=version < _FOLDER_SINCE)
    for name, array in payload.borrowed.items():
        values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    if values:
        # The first gives the optimizers the numbers; the second, in place of ONNX Runtime's
        # own copy of them, the kernels.
        options.add_external_initializers(list(values), list(values.values()))
        for name, value in values.items():
            options.add_initializer(name, value)
    if payload.in_files and version < _FOLDER_SINCE:
        # Its optimizers read files only for a model that was itself read from one.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(payload.graph)
            yield str(path)
        return
    if payload.in_files:
        options.add_session_config_entry(_FOLDER_OPTION, str(payload.folder))
    yield payload.graph


def run_session(
    session: "InferenceSession",
    names: Sequence[str],
    feeds: Mapping[str, Any],
    *,
    borrow: bool = False,
) -> list[Any]:
    """Run a session on arrays.

    Args:
        session: What to run.
        names: Outputs to compute.
        feeds: By input name.
        borrow: Give ONNX Runtime's own arrays, which keep the memory that they lie in: without
            ``in_turn``, all memory of the session.

    Raises:
        RunError: ONNX Runtime gives up while it runs: usually the inputs' free dimensions do
            not fit each other.
    """
    with _one_line_failures():
        results: list[Any] = session.run(list(names), dict(feeds))
    if borrow:
        return results
    return [np.array(r) if isinstance(r, np.ndarray) else r for r in results]


def run_bound(session: "InferenceSession", binding: Any) -> None:
    """Run a session on what its binding names, and let go of the inputs.

    Raises:
        RunError: As for :func:`run_session`.
    """
    with _one_line_failures():
        session.run_with_iobinding(binding)
    # Each of its outputs keeps the binding, which would keep the inputs.
    binding.clear_binding_inputs()


@contextlib.contextmanager
def _one_line_failures() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # ONNX Runtime's exceptions share no other base.
        raise RunError(f"ONNX Runtime cannot run the model: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """What ONNX Runtime says, without codes and places in its source."""
    return _SOURCE_PLACE.sub("", _ERROR_CODE.sub("", _one_line(error)))


def _translate(
    error: Exception, model: ir.Model | onnx.ModelProto | bytes | Path
) -> ModelError:
    """Turn what ONNX Runtime raised while loading into one line for the user."""
    reason = reason_of(error)
    if isinstance(error, (EncodeError, ValueError)):
        return UnsupportedError(f"the model is too big for one message: {reason}")
    name = str(model) if isinstance(model, Path) else "the model"
    if type(error).__name__ in {"NoSuchFile", "InvalidProtobuf"}:
        return ModelError(f"{name} is not a readable ONNX model: {reason}")
    if unknown := _UNKNOWN.search(reason):
        return UnknownOperatorError(
            f"ONNX Runtime does not know the operator {unknown['operator']} of the domain"
            f" {unknown['domain']!r}: name the library that implements it with --custom-ops"
        )
    return UnsupportedError(f"ONNX Runtime cannot load {name}: {reason}")
