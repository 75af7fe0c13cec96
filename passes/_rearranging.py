"""How numbers per channel look on the other side of nodes that only rearrange a tensor.

Such numbers are an array that broadcasts against the tensor: as many axes, each of the
tensor's size or 1.
"""

from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.passes._graph import constant_of, is_standard

__all__ = ["backwards", "channels", "forwards", "rearranges"]

_Array = npt.NDArray[np.float64]
_RESHAPING: Final = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


def rearranges(node: ir.Node) -> bool:
    """Whether the first output of a node is its first input in other places."""
    return is_standard(node, "Transpose", *_RESHAPING)


def forwards(node: ir.Node, array: _Array) -> _Array | None:
    """Numbers for the input of a rearranging node, as numbers for its output.

    None where they have no such form, or where the shapes do not tell it.
    """
    if node.op_type == "Transpose":
        return array.transpose(_permutation(node, array.ndim))
    dims = _dims(node)
    return None if dims is None else _regrouped(array, *dims)


def backwards(node: ir.Node, array: _Array) -> _Array | None:
    """Numbers for the output of a rearranging node, as numbers for its input."""
    if node.op_type == "Transpose":
        return array.transpose(np.argsort(_permutation(node, array.ndim)))
    dims = _dims(node)
    return None if dims is None else _regrouped(array, dims[1], dims[0])


def channels(array: _Array, axis: int) -> _Array | None:
    """The numbers along one axis, of shape [C] or [1]; None if they vary along another."""
    if not -array.ndim <= axis < array.ndim:
        return None
    collapsed = _collapsed(array)
    return None if collapsed.size > collapsed.shape[axis] else collapsed.reshape(-1)


def _collapsed(array: _Array) -> _Array:
    """With the axes shortened to 1 along which the numbers repeat."""
    for axis in range(array.ndim):
        first = array.take([0], axis)
        if (array == first).all():
            array = first
    return array


def _permutation(node: ir.Node, rank: int) -> Sequence[int]:
    return node.attributes.get_ints("perm", list(reversed(range(rank))))


def _dims(node: ir.Node) -> tuple[list[Hashable], list[Hashable]] | None:
    """Sizes of input and output: numbers or, where unknown, something equal if they are."""
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or result.shape is None:
        return None
    before, after = _tokens(source.shape), _tokens(result.shape)
    if node.op_type == "Reshape" and not node.attributes.get_int("allowzero", 0):
        target = constant_of(node.inputs[1])
        for axis in np.flatnonzero(target == 0) if target is not None else ():
            after[axis] = before[axis]
    return before, after


def _tokens(shape: ir.Shape) -> list[Hashable]:
    return [
        size if isinstance(size, int) else size.value if size.value is not None else object()
        for size in shape
    ]


def _regrouped(
    array: _Array, source: Sequence[Hashable], target: Sequence[Hashable]
) -> _Array | None:
    """Follow a reshape from the sizes ``source`` to the sizes ``target``."""
    if array.ndim != len(source):
        return None
    expanded: list[int] = []
    shape: list[int] = []
    for (i, j), (k, m) in pairwise(_boundaries(source, target)):
        before, after, sizes = source[i:k], target[j:m], array.shape[i:k]
        if all(size == 1 for size in sizes):
            expanded += sizes
            shape += [1] * len(after)
        elif len(before) == len(after) == 1:
            expanded += sizes
            shape += sizes
        elif all(isinstance(size, int) for size in (*before, *after)):
            expanded += [size for size in before if isinstance(size, int)]
            shape += [size for size in after if isinstance(size, int)]
        else:
            return None
    if any(size not in (1, wide) for size, wide in zip(array.shape, expanded, strict=True)):
        return None
    return _collapsed(np.broadcast_to(array, expanded).reshape(shape))


def _boundaries(
    source: Sequence[Hashable], target: Sequence[Hashable]
) -> list[tuple[int, int]]:
    """Pairs of axes with as many elements before them, from (0, 0) to both ends."""
    front = _prefixes(source, target)
    back = [
        (len(source) - i, len(target) - j)
        for i, j in reversed(_prefixes(source[::-1], target[::-1]))
    ]
    return [*front, *((i, j) for i, j in back if i >= front[-1][0] and j >= front[-1][1])]


def _prefixes(source: Sequence[Hashable], target: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Pairs of axes with as many elements before them, as far as sizes are known."""
    found = [(0, 0)]
    i = j = 0
    before = after = 1
    while i < len(source) or j < len(target):
        left = source[i] if i < len(source) else None
        right = target[j] if j < len(target) else None
        if before == after and left == right:
            i, j = i + 1, j + 1
        elif before == after and right == 1:
            j += 1
        elif before <= after and isinstance(left, int) and left > 0:
            before *= left
            i += 1
        elif before > after and isinstance(right, int) and right > 0:
            after *= right
            j += 1
        else:
            break
        if before == after:
            found.append((i, j))
    return found
