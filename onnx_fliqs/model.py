"""Model files in and out: every fault of a file becomes one line, every write is atomic."""

import contextlib
import errno
import hashlib
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

import onnx
import onnx_ir as ir
from google.protobuf.message import (  # type: ignore[import-untyped]
    DecodeError,
    EncodeError,
)

from onnx_fliqs.dialects import translate
from onnx_fliqs.errors import FliqsError, ModelError, UnsupportedError
from onnx_fliqs.payload import fits_inline

__all__ = ["atomic_write", "fingerprint", "load_model", "read_proto", "save_model"]

_EXTERNAL_THRESHOLD: Final = 1024
"""Weights of more bytes stay in, or go to, files of their own."""


def load_model(path: Path) -> ir.Model:
    """Read and check an ONNX file. Weights beside the file are mapped, not copied.

    They may lie in several files, in folders below the model's, and behind symbolic links, as
    in the cache of Hugging Face.

    Raises:
        ModelError: The file is missing, unreadable, empty, cut short, not ONNX or invalid.
        UnsupportedError: An input or output is a map.
    """
    _require_file(path)
    proto = _parse(path)
    _require_content(path, proto)
    _require_no_maps(path, proto)
    return _checked(path, proto, _find_external_data(path, proto))


def read_proto(proto: onnx.ModelProto) -> ir.Model:
    """Check a model that is in memory, and take a copy of it.

    Args:
        proto: With its weights; it is not changed.

    Raises:
        ModelError: It is empty, invalid, or keeps weights in files beside it, or there are
            more than 2 GB of it.
        UnsupportedError: An input or output is a map.
    """
    name = "the model"
    if external := next((t.name for t, _ in _tensors(proto) if _is_external(t)), None):
        raise ModelError(
            f"{name} keeps the weight {external!r} in a file: give the path of the model, or"
            " load its external data"
        )
    _require_content(name, proto)
    if not _fits_in_a_message(proto):
        raise ModelError(f"{name} has more than 2 GB: save it, and give the path")
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    _require_no_maps(name, copied)
    return _checked(name, copied, ())


def _fits_in_a_message(proto: onnx.ModelProto) -> bool:
    try:
        proto.ByteSize()
    except EncodeError:
        return False
    return True


def _checked(
    name: Path | str, proto: onnx.ModelProto, mapped: Sequence[onnx.TensorProto]
) -> ir.Model:
    try:
        translate(proto)
        with _emptied(mapped), _shaped(proto):
            onnx.checker.check_model(proto)
        return ir.from_proto(proto)
    # ValidationError for what is wrong, RuntimeError and others for what it cannot read.
    except Exception as error:
        raise ModelError(f"{name} is not a valid ONNX model: {_one_line(error)}") from error


def save_model(model: ir.Model, path: Path) -> None:
    """Write a model so that ``path`` holds either its old content or the whole new model.

    A model of more than 2 GB keeps its weights in ``<file name>.data`` beside the file, or in
    ``<file name>.1.data`` while the model that is replaced needs the first.

    Raises:
        FliqsError: The file cannot be written.
    """
    if not fits_inline(model):
        _save_with_external_data(model, path)
        return
    # What was read from another file's external data has to live in this one.
    whole = model.clone()
    for graph in whole.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                tensor = value.const_value
                value.const_value = ir.Tensor(
                    tensor.numpy(), dtype=tensor.dtype, name=tensor.name
                )
    try:
        data = ir.to_proto(whole).SerializeToString()
    except (EncodeError, ValueError) as error:
        raise FliqsError(f"cannot write {path}: {_one_line(error)}") from error
    atomic_write(path, data)


def atomic_write(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Replace the content of ``path`` at once: a reader sees the old bytes or the new ones.

    Args:
        path: The file.
        content: Bytes, or what writes them into an open file.

    Raises:
        FliqsError: The folder is missing or read-only, the disk is full, ...
    """
    write = content if callable(content) else lambda file: file.write(content)
    with _writing(path) as target:
        if target.exists() and not target.is_file():
            # A device or a pipe must not be replaced by a file.
            with target.open("wb") as file:
                write(file)
            return
        temporary = _temporary_name(target)
        try:
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            _replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def fingerprint(model: ir.Model) -> str:
    """SHA-256 of the graph and its weights, wherever the weights lie.

    Args:
        model: It is not changed.
    """
    model = model.clone()
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = _digest(value.const_value)
    data = ir.to_proto(model).SerializeToString(deterministic=True)
    return hashlib.sha256(data).hexdigest()


class _Hash:
    """A hash as a file to write to."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return len(data)

    def digest(self) -> bytes:
        return self._hash.digest()


def _digest(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """What stands for a tensor in a fingerprint: its name, type, shape and hash."""
    found = _Hash()
    if tensor.dtype is ir.DataType.STRING:
        found.write(repr(tensor.numpy().tolist()).encode())
    elif isinstance(tensor, ir.ExternalTensor):
        tensor.tofile(found)  # piece by piece
    else:
        found.write(tensor.tobytes())
    kind = f"{tensor.dtype.name} {list(tensor.shape.numpy())}".encode()
    return ir.StringTensor([kind, found.digest()], shape=ir.Shape([2]), name=tensor.name)


def _save_with_external_data(model: ir.Model, path: Path) -> None:
    with _writing(path) as target:
        names = [f"{target.name}.data", f"{target.name}.1.data"]
        needed = _locations(target)
        name = next(name for name in names if name not in needed)
        # In a folder of its own the data file already has the name that the graph refers to.
        scratch = _temporary_name(target)
        scratch.mkdir()
        try:
            ir.save(
                model,
                scratch / target.name,
                external_data=name,
                size_threshold_bytes=_EXTERNAL_THRESHOLD,
            )
            for file in (name, target.name):
                with (scratch / file).open("rb+") as written:
                    os.fsync(written.fileno())
            # The old model does not read this file: until its own is replaced, it is whole.
            _replace(scratch / name, target.with_name(name))
            _replace(scratch / target.name, target)
            for other in needed.intersection(names):
                target.with_name(other).unlink(missing_ok=True)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _locations(path: Path) -> set[str]:
    """The files that the model of a file keeps its weights in; none if there is no model."""
    try:
        proto = onnx.ModelProto.FromString(path.read_bytes())
    except (OSError, DecodeError):
        return set()
    return {_external(t).get("location", "") for t, _ in _tensors(proto) if _is_external(t)}


def _replace(source: Path, target: Path) -> None:
    """Move a file to where another may be, whose permissions it takes over."""
    if target.exists():
        source.chmod(stat.S_IMODE(target.stat().st_mode))
    source.replace(target)


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


def _require_content(name: Path | str, proto: onnx.ModelProto) -> None:
    if not proto.ir_version:
        raise ModelError(f"{name} is not an ONNX model")
    if not proto.HasField("graph"):
        raise ModelError(f"{name} holds no graph: it is damaged or cut short")
    if not proto.graph.node:
        raise ModelError(f"{name} holds a graph without nodes")
    if not any(entry.version > 0 for entry in proto.opset_import):
        raise ModelError(f"{name} does not say which opset it uses")


def _require_no_maps(name: Path | str, proto: onnx.ModelProto) -> None:
    """Refuse what onnx_ir has no type for; notes on inner values can be done without."""
    graph = proto.graph
    for kind, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            if _is_map(value.type):
                raise UnsupportedError(
                    f"{kind} {value.name!r} of {name} is a map; export the model with tensors"
                    " (without ZipMap: in skl2onnx, the option zipmap=False)"
                )
    kept = [value for value in graph.value_info if not _is_map(value.type)]
    if len(kept) < len(graph.value_info):
        graph.value_info[:] = kept


def _is_map(kind: onnx.TypeProto) -> bool:
    if kind.HasField("sequence_type"):
        return _is_map(kind.sequence_type.elem_type)
    if kind.HasField("optional_type"):
        return _is_map(kind.optional_type.elem_type)
    return bool(kind.HasField("map_type"))


def _find_external_data(path: Path, proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Point all weights in other files to where they are, and read the small ones.

    Small ones may be shapes, which the inference of shapes has to see; what stands in an
    attribute is read as well.

    Returns:
        What is still in other files.
    """
    mapped = []
    for tensor, is_initializer in _tensors(proto):
        if not _is_external(tensor):
            continue
        file, offset, length = _place(path, tensor)
        if is_initializer and length > _EXTERNAL_THRESHOLD:
            entries = {"location": os.fspath(file), "offset": offset, "length": length}
            del tensor.external_data[:]
            tensor.external_data.extend(
                onnx.StringStringEntryProto(key=key, value=str(value))
                for key, value in entries.items()
            )
            mapped.append(tensor)
            continue
        with file.open("rb") as data:
            data.seek(offset)
            tensor.raw_data = data.read(length)
        del tensor.external_data[:]
        tensor.ClearField("data_location")
    return mapped


def _place(path: Path, tensor: onnx.TensorProto) -> tuple[Path, int, int]:
    """File, offset and length of an external weight, once they are known to be good."""
    entry = _external(tensor)
    location = Path(entry.get("location", ""))
    if location.is_absolute() or ".." in location.parts:
        raise ModelError(
            f"{path} keeps the weight {tensor.name!r} in {str(location)!r}, outside its folder"
        )
    file = path.parent / location
    if not file.is_file():
        raise ModelError(
            f"{path} keeps the weight {tensor.name!r} in {str(location)!r}, which is missing"
            " beside it"
        )
    try:
        needed = math.ceil(math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth / 8)
        offset, length = int(entry.get("offset", "0")), int(entry.get("length", str(needed)))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path} has a malformed external weight {tensor.name!r}") from error
    if offset < 0 or length != needed:
        raise ModelError(
            f"{path} has a malformed external weight {tensor.name!r}: it needs {needed} bytes,"
            f" and {length} at {offset} are given"
        )
    size = file.stat().st_size
    if offset + length > size:
        raise ModelError(
            f"{file} is cut short: the weight {tensor.name!r} ends at byte {offset + length},"
            f" the file at {size}"
        )
    return file.resolve(), offset, length


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {item.key: item.value for item in tensor.external_data}


@contextlib.contextmanager
def _emptied(tensors: Iterable[onnx.TensorProto]) -> Iterator[None]:
    """Let some tensors be empty for a while: the checker follows no links to their files."""
    kept = [(tensor, tensor.SerializeToString()) for tensor in tensors]
    for tensor, _ in kept:
        del tensor.external_data[:]
        tensor.ClearField("data_location")
        tensor.dims[:] = [0]
    try:
        yield
    finally:
        for tensor, data in kept:
            tensor.ParseFromString(data)


@contextlib.contextmanager
def _shaped(proto: onnx.ModelProto) -> Iterator[None]:
    """Let what has no shape be a number for a while: the checker wants one of any rank.

    Exporters leave out the shape of an input or output whose rank they do not know.
    """
    kept = [
        value.type.tensor_type
        for value in (*proto.graph.input, *proto.graph.output)
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape")
    ]
    for kind in kept:
        kind.shape.SetInParent()
    try:
        yield
    finally:
        for kind in kept:
            kind.ClearField("shape")


def _tensors(proto: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, bool]]:
    """All tensors of a model, and whether each is an initializer; the rest are attributes."""
    graphs = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    while graphs or nodes:
        for graph in graphs:
            yield from ((tensor, True) for tensor in graph.initializer)
            nodes += graph.node
        attributes = [attribute for node in nodes for attribute in node.attribute]
        for attribute in attributes:
            if attribute.HasField("t"):
                yield attribute.t, False
            yield from ((tensor, False) for tensor in attribute.tensors)
        graphs = [a.g for a in attributes if a.HasField("g")]
        graphs += [graph for a in attributes for graph in a.graphs]
        nodes = []


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
