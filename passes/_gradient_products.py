"""Gradients of matrix products, in the forms that ONNX Runtime's do not cover."""

from collections.abc import Mapping, Sequence
from typing import Final

import onnx_ir as ir

from onnx_fliqs.passes._gradient_rule import Call, Formula, Lowering, rank_of
from onnx_fliqs.passes._ops import Ops

__all__ = ["FORMULAS", "LOWERINGS"]

_ELLIPSIS: Final = "..."
_VECTOR: Final = 1


def _gemm(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    left, right, attributes = call.x(0), call.x(1), call.node.attributes
    flips = attributes.get_int("transA", 0), attributes.get_int("transB", 0)
    alpha, beta = (attributes.get_float(name, 1.0) for name in ("alpha", "beta"))

    def product(a: ir.Value, b: ir.Value, flip_a: int, flip_b: int) -> ir.Value:
        return op.Gemm(a, b, alpha=alpha, transA=flip_a, transB=flip_b)

    gradients = {
        0: product(right, call.dy, flips[1], 1)
        if flips[0]
        else product(call.dy, right, 0, 1 - flips[1]),
        1: product(call.dy, left, 1, flips[0])
        if flips[1]
        else product(left, call.dy, 1 - flips[0], 0),
    }
    addend = call.optional(2)
    if addend is not None:
        gradients[2] = op.sum_to(op.Mul(call.dy, beta), addend, call.y)
    return gradients


def _stacks(op: Ops, call: Call) -> Mapping[int, ir.Value]:
    """Of stacks of matrices, one of which may repeat for the other."""
    left, right = call.x(0), call.x(1)
    return {
        0: op.sum_to(op.MatMul(call.dy, _transposed(op, right)), left, call.y),
        1: op.sum_to(op.MatMul(_transposed(op, left), call.dy), right, call.y),
    }


def _transposed(op: Ops, matrices: ir.Value) -> ir.Value:
    rank = rank_of(matrices)
    return op.Transpose(matrices, perm=[*range(rank - 2), rank - 1, rank - 2])


FORMULAS: Final[dict[str, Formula]] = {"Gemm": _gemm, "MatMul": _stacks}


def _vectors(op: Ops, node: ir.Node) -> list[ir.Value] | None:
    """A product with a vector: a matrix of one row or one column, for a while."""
    left, right = node.inputs
    ranks = rank_of(left), rank_of(right)
    if _VECTOR not in ranks:
        return None
    row = op.Unsqueeze(left, [0]) if ranks[0] == _VECTOR else left
    column = op.Unsqueeze(right, [1]) if ranks[1] == _VECTOR else right
    made = [axis for axis, rank in ((-2, ranks[0]), (-1, ranks[1])) if rank == _VECTOR]
    return [op.Squeeze(op.MatMul(row, column), made)]


def _einsum(op: Ops, node: ir.Node) -> list[ir.Value]:
    """Line up the axes of all operands, multiply, and sum over those that go."""
    equation = node.attributes.get_string("equation").replace(" ", "")
    left, arrow, right = equation.partition("->")
    operands = list(zip(left.split(","), node.inputs, strict=True))
    ellipsis = max(_free_axes(text, value) for text, value in operands)
    labelled = [
        _diagonal(op, value, _labels(text, value, ellipsis)) for text, value in operands
    ]
    result = _spelled_out(right, ellipsis) if arrow else _implied(left, ellipsis)
    gone = {label: None for _, labels in labelled for label in labels if label not in result}
    order = [*result, *gone]
    product: ir.Value | None = None
    for value, labels in labelled:
        sorted_labels = sorted(labels, key=order.index)
        aligned = op.Transpose(value, perm=[labels.index(label) for label in sorted_labels])
        missing = [axis for axis, label in enumerate(order) if label not in labels]
        aligned = op.Unsqueeze(aligned, missing) if missing else aligned
        product = aligned if product is None else op.Mul(product, aligned)
    assert product is not None
    axes = list(range(len(result), len(order)))
    return [op.ReduceSum(product, axes, keepdims=0) if axes else op.Identity(product)]


def _free_axes(text: str, value: ir.Value | None) -> int:
    """How many axes the ellipsis of an operand stands for."""
    return rank_of(value) - len(text.replace(_ELLIPSIS, "")) if _ELLIPSIS in text else 0


def _spelled_out(text: str, ellipsis: int) -> list[str]:
    before, found, after = text.partition(_ELLIPSIS)
    numbers = range(ellipsis, 0, -1) if found else ()
    return [*before, *(f"{_ELLIPSIS}{number}" for number in numbers), *after]


def _labels(text: str, value: ir.Value | None, ellipsis: int) -> list[str]:
    # The axes of ellipses broadcast against each other from the right.
    return _spelled_out(text, min(_free_axes(text, value), ellipsis))


def _implied(left: str, ellipsis: int) -> list[str]:
    letters = left.replace(_ELLIPSIS, "").replace(",", "")
    once = sorted(letter for letter in set(letters) if letters.count(letter) == 1)
    return [*_spelled_out(_ELLIPSIS, ellipsis), *once]


def _diagonal(
    op: Ops, value: ir.Value | None, labels: Sequence[str]
) -> tuple[ir.Value, list[str]]:
    """Keep of axes with the same label only the elements of equal index."""
    assert value is not None
    kept = list(labels)
    while len(set(kept)) < len(kept):
        second = next(i for i, label in enumerate(kept) if label in kept[:i])
        first = kept.index(kept[second])
        size = op.Shape(value, start=first, end=first + 1)
        eye = op.EyeLike(op.zeros(op.Concat(size, size, axis=0)))
        others = [axis for axis in range(len(kept)) if axis not in (first, second)]
        mask = op.Unsqueeze(eye, others) if others else eye
        value = op.ReduceSum(op.Mul(value, mask), [second], keepdims=0)
        del kept[second]
    return value, kept


LOWERINGS: Final[dict[str, Lowering]] = {"Einsum": _einsum, "MatMul": _vectors}
