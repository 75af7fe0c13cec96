"""What ONNX Runtime is handed for a model: the graph as bytes, big weights where they lie.

Protobuf ends at 2 GB, and bytes are a second copy of every weight. So weights that lie in a
file stay there, for ONNX Runtime to map as well; and where the others are too many for one
message, they are handed over as arrays that the session borrows.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from onnx_fliqs.passes._graph import weight_bytes

__all__ = [
    "COPY_LIMIT",
    "INLINE_LIMIT",
    "Payload",
    "fits_inline",
    "is_plain",
    "pack",
    "settle",
    "shareable",
    "skeleton",
]

INLINE_LIMIT: Final = 2_000_000_000
"""Most bytes of weights within a message: protobuf ends at 2 GiB, and the graph needs some."""
COPY_LIMIT: Final = 1 << 28
"""Most bytes of weights that a session gets by way of a message, and so several copies."""
_SMALL: Final = 1024
"""Weights of so few bytes stay in the graph."""
_SMALL_INTEGERS: Final = 1 << 20
"""The same for int64, the type of shapes: inference reads what is in the graph only."""
_BORROWED: Final = "borrowed"
"""The file in which a graph claims to have the weights that its session borrows."""

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Payload:
    """A model, ready to be loaded."""

    graph: bytes
    in_files: bool = False
    """Whether the graph refers to weights in files."""
    folder: Path | None = None
    """To which the paths of these files are relative; None where they are absolute."""
    borrowed: Mapping[str, Array] = field(default_factory=dict)
    """Initializers that are handed over beside the graph, by name."""


def fits_inline(model: ir.Model) -> bool:
    """Whether one message can hold the model with all its weights."""
    return weight_bytes(model) <= INLINE_LIMIT


def is_plain(model: ir.Model) -> bool:
    """Whether its weights are few and none lies in a file, so that all go into a message."""
    return weight_bytes(model) <= COPY_LIMIT and not _in_files(model)


def pack(model: ir.Model, *, absolute: bool) -> Payload:
    """Serialize a model without copying the weights that need not be.

    Args:
        model: It is not changed.
        absolute: Whether the graph may refer to files by absolute paths; otherwise they are
            relative to the payload's folder.

    Raises:
        ValueError: The graph is still too big for a message (or protobuf's own EncodeError).
    """
    if is_plain(model):
        return Payload(ir.to_proto(model).SerializeToString())
    model = model.clone()
    settle(model)
    mapped = _in_files(model)
    folder: Path | None = None
    for value in mapped:
        tensor = value.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        path = Path(tensor.path).resolve()
        if not absolute:
            folder = Path(path.anchor)
            path = path.relative_to(folder)
        value.const_value = _reference(tensor, path, tensor.offset, tensor.length)
    borrowed: dict[str, Array] = {}
    if weight_bytes(model) - sum(_tensor(value).nbytes for value in mapped) > COPY_LIMIT:
        borrowed = shareable(model, but=[str(value.name) for value in mapped])
        for name in borrowed:
            value = model.graph.initializers[name]
            tensor = _tensor(value)
            value.const_value = _reference(tensor, Path(_BORROWED), 0, tensor.nbytes)
    return Payload(ir.to_proto(model).SerializeToString(), bool(mapped), folder, borrowed)


def settle(model: ir.Model) -> None:
    """Bring weights of subgraphs into the main graph, small ones from files into memory.

    In place. ONNX Runtime takes neither files nor arrays for the initializers of a subgraph,
    and looks into small ones, which may be shapes, before it opens files.
    """
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    for value in _in_files(model):
        tensor = _tensor(value)
        if _is_small(tensor):
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)


def shareable(model: ir.Model, *, but: Container[str] = ()) -> dict[str, Array]:
    """Big initializers of the main graph that ONNX Runtime can use where they are, by name.

    Args:
        model: It is not changed.
        but: Names to leave out.
    """
    return {
        name: np.ascontiguousarray(value.const_value.numpy())
        for name, value in model.graph.initializers.items()
        if name not in but
        and value.const_value is not None
        and not _is_small(value.const_value)
        and _is_native(value.const_value)
    }


def skeleton(model: ir.Model) -> onnx.ModelProto:
    """The model as a message in which big weights are inputs: for looks at the graph only.

    Args:
        model: It is not changed.
    """
    model = model.clone()
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or _is_small(tensor):
            continue
        del graph.initializers[name]
        value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape.numpy())
        if not value.is_graph_input():
            graph.inputs.append(value)
    return ir.to_proto(model)


def _in_files(model: ir.Model) -> list[ir.Value]:
    return [
        value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    ]


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    tensor = value.const_value
    assert tensor is not None
    return tensor


def _reference(
    tensor: ir.TensorProtocol, path: Path, offset: int | None, length: int | None
) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        path.as_posix(),
        offset,
        length,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
    )


def _is_small(tensor: ir.TensorProtocol) -> bool:
    limit = _SMALL_INTEGERS if tensor.dtype is ir.DataType.INT64 else _SMALL
    return tensor.nbytes <= limit


def _is_native(tensor: ir.TensorProtocol) -> bool:
    """Whether NumPy itself has the type: ONNX Runtime's values are made of such arrays."""
    dtype = tensor.dtype.numpy()
    return dtype.isbuiltin == 1 and dtype.kind in "biuf"
