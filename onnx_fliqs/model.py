"""Model files in and out: every fault of a file becomes one line, every write is atomic."""

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import onnx
import onnx_ir as ir
from google.protobuf.message import (  # type: ignore[import-untyped]
    DecodeError,
    EncodeError,
)

from onnx_fliqs.errors import FliqsError, ModelError

__all__ = ["atomic_write", "load_model", "save_model"]

# Protobuf's limit is 2 GiB for a whole message; the graph itself needs some of it.
_INLINE_LIMIT: Final = 2_000_000_000
_EXTERNAL_THRESHOLD: Final = 1024


def load_model(path: Path) -> ir.Model:
    """Read and check an ONNX file. Weights beside the file are mapped, not copied.

    Raises:
        ModelError: The file is missing, unreadable, empty, cut short, not ONNX or invalid.
    """
    _require_file(path)
    proto = _parse(path)
    _require_content(path, proto)
    _require_external_data(path, proto)
    try:
        onnx.checker.check_model(os.fspath(path))
        model = ir.from_proto(proto)
    # ValidationError for what is wrong, RuntimeError and others for what it cannot read.
    except Exception as error:
        raise ModelError(f"{path} is not a valid ONNX model: {_one_line(error)}") from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    return model


def save_model(model: ir.Model, path: Path) -> None:
    """Write a model so that ``path`` holds either its old content or the whole new model.

    A model of more than 2 GB keeps its weights in ``<file name>.data`` beside the file.

    Raises:
        FliqsError: The file cannot be written.
    """
    size = sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )
    if size > _INLINE_LIMIT:
        _save_with_external_data(model, path)
        return
    # What was read from another file's external data has to live in this one.
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _in_memory(value.const_value)
    try:
        data = ir.to_proto(model).SerializeToString()
    except (EncodeError, ValueError) as error:
        raise FliqsError(f"cannot write {path}: {_one_line(error)}") from error
    atomic_write(path, data)


def atomic_write(path: Path, data: bytes) -> None:
    """Replace the content of ``path`` at once: a reader sees the old bytes or the new ones.

    Raises:
        FliqsError: The folder is missing or read-only, the disk is full, ...
    """
    with _writing(path) as target:
        if target.exists() and not target.is_file():
            target.write_bytes(data)  # a device or a pipe must not be replaced by a file
            return
        temporary = _temporary_name(target)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def _in_memory(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)


def _save_with_external_data(model: ir.Model, path: Path) -> None:
    with _writing(path) as target:
        data = target.with_name(target.name + ".data")
        # In a folder of its own the data file already has the name that the graph refers to.
        scratch = _temporary_name(target)
        scratch.mkdir()
        try:
            ir.save(
                model,
                scratch / target.name,
                external_data=data.name,
                size_threshold_bytes=_EXTERNAL_THRESHOLD,
            )
            (scratch / data.name).replace(data)
            (scratch / target.name).replace(target)
        finally:
            shutil.rmtree(scratch)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """Hand out the file behind ``path``, with links followed; report what goes wrong."""
    try:
        target = path.resolve()
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        yield target
    except OSError as error:
        raise FliqsError(f"cannot write {path}: {_reason(error)}") from error


def _require_file(path: Path) -> None:
    try:
        info = path.stat()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {_reason(error)}") from error
    if not stat.S_ISREG(info.st_mode):
        raise ModelError(f"cannot read {path}: it is not a file")
    if info.st_size == 0:
        raise ModelError(f"{path} is empty")


def _parse(path: Path) -> onnx.ModelProto:
    try:
        data = path.read_bytes()
        proto: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {_reason(error)}") from error
    except DecodeError as error:
        # Every ONNX writer begins with the IR version: field 1, a small number.
        if len(data) >= 2 and data[0] == 0x08 and data[1] < 0x80:
            raise ModelError(f"{path} is damaged or cut short") from error
        raise ModelError(f"{path} is not an ONNX model") from error
    return proto


def _require_content(path: Path, proto: onnx.ModelProto) -> None:
    if not proto.ir_version:
        raise ModelError(f"{path} is not an ONNX model")
    if not proto.HasField("graph"):
        raise ModelError(f"{path} holds no graph: it is damaged or cut short")
    if not proto.graph.node:
        raise ModelError(f"{path} holds a graph without nodes")
    if not any(entry.version > 0 for entry in proto.opset_import):
        raise ModelError(f"{path} does not say which opset it uses")


def _require_external_data(path: Path, proto: onnx.ModelProto) -> None:
    for tensor in _tensors(proto.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        location = path.parent / entry.get("location", "")
        if not location.is_file():
            raise ModelError(
                f"{path} keeps the weight {tensor.name!r} in {location.name!r}, which is"
                " missing beside it"
            )
        try:
            end = int(entry.get("offset", "0")) + int(entry.get("length", "0"))
        except ValueError as error:
            raise ModelError(
                f"{path} has a malformed external weight {tensor.name!r}"
            ) from error
        if end > location.stat().st_size:
            raise ModelError(
                f"{location} is cut short: the weight {tensor.name!r} ends at byte {end}, the"
                f" file at {location.stat().st_size}"
            )


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _tensors(subgraph)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
