"""Write Einsum as the matrix product, sum or transposition that it is."""

import functools
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.passes._graph import (
    changed_constant,
    constant_of,
    formula_for,
    is_standard,
    replace_node,
    require_opset,
    used_names,
)

__all__ = ["LowerEinsumPass"]

# One label per axis: a letter or, for the axes of an ellipsis, "..." and their number from
# the right.
_Labels: TypeAlias = tuple[str, ...]

_ELLIPSIS: Final = "..."

logger = logging.getLogger(__name__)


class LowerEinsumPass(ir.passes.InPlacePass):
    """Turn Einsum into Transpose, Reshape and MatMul, Mul or ReduceSum.

    Before:  y = Einsum <equation = "btd,dnh->bnth"> (x, w)                # w: [D,N,H]
    After:   p = MatMul (x, w');  r = Reshape (p, [0,0,N,H])               # w': [D,N*H]
             y = Transpose <perm = [0,2,1,3]> (r)

    A constant operand becomes the right one and is rearranged beforehand. Three and more
    operands are multiplied from left to right.

    Requires: opset >= 15; inferred shapes; constants are initializers.
    Ensures: an Einsum is left only where an operand repeats an index ("ii->i"), where an
        index has several sizes, or where an ellipsis stands in three operands, for an unknown
        number of axes, or not in the result; results change by float32 rounding only; the
        graph's signature is unchanged.
    Idempotent: such an Einsum is left alone.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse older opsets, whose Shape has no ``start``."""
        require_opset(model, 15)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower what can be, in the main graph and in subgraphs."""
        taken = used_names(model)
        found = [node for node in model.graph.all_nodes() if is_standard(node, "Einsum")]
        count = sum([_lower(node, taken) for node in found])
        logger.info("lowered %d of %d Einsum nodes", count, len(found))
        return ir.passes.PassResult(model, modified=count > 0)


@dataclass(frozen=True, slots=True)
class _Term:
    """A tensor and what its axes are called."""

    value: ir.Value
    labels: _Labels


def _lower(node: ir.Node, taken: set[str]) -> bool:
    parsed = _parse(node)
    if parsed is None:
        return False
    terms, result = parsed
    sizes = _sizes(terms)
    if sizes is None:
        return False
    _Lowering(node, taken, sizes, terms).run(terms, result)
    logger.debug("lowered %s", node.name)
    return True


# -- reading --------------------------------------------------------------------------------


def _parse(node: ir.Node) -> tuple[list[_Term], _Labels] | None:
    """The labelled operands and the labels of the result; None if it has to stay."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    operands = left.split(",")
    if len(operands) != len(node.inputs):
        return None
    terms = []
    for text, value in zip(operands, node.inputs, strict=True):
        labels = _labels(text, value)
        if value is None or labels is None or len(set(labels)) < len(labels):
            return None
        terms.append(_Term(value, labels))
    ellipsis = _longest_ellipsis(terms)
    if ellipsis and len(terms) > 2:
        return None  # of three sizes of one axis, which may be 1, no pair tells the result's
    result = _spelled_out(right, ellipsis) if arrow else _implied(terms, ellipsis)
    known = {label for term in terms for label in term.labels}
    unread = set(ellipsis) - set(result)
    if unread or not known.issuperset(result) or len(set(result)) < len(result):
        return None
    return terms, result


def _labels(text: str, value: ir.Value | None) -> _Labels | None:
    """One label per axis of an operand; None if there are not as many axes."""
    if value is None:
        return None
    letters = text.replace(_ELLIPSIS, "")
    rank = None if value.shape is None else len(value.shape)
    if _ELLIPSIS not in text:
        return tuple(letters) if rank in (None, len(letters)) else None
    if rank is None or rank < len(letters):
        return None
    return _spelled_out(text, _ellipsis(rank - len(letters)))


def _ellipsis(axes: int) -> _Labels:
    return tuple(f"{_ELLIPSIS}{position}" for position in range(axes, 0, -1))


def _longest_ellipsis(terms: Sequence[_Term]) -> _Labels:
    counts = [sum(label.startswith(_ELLIPSIS) for label in term.labels) for term in terms]
    return _ellipsis(max(counts))


def _spelled_out(text: str, ellipsis: _Labels) -> _Labels:
    before, found, after = text.partition(_ELLIPSIS)
    return (*before, *(ellipsis if found else ()), *after)


def _implied(terms: Sequence[_Term], ellipsis: _Labels) -> _Labels:
    """The result of an equation without arrow: what appears once, in alphabetical order."""
    found = [label for term in terms for label in term.labels if label not in ellipsis]
    once = {label for label in found if found.count(label) == 1}
    return (*ellipsis, *sorted(once))


def _sizes(terms: Sequence[_Term]) -> dict[str, int] | None:
    """The known sizes of labels; None if a letter has several.

    An axis of an ellipsis may be 1 in one operand and longer in another: it has no size then.
    """
    found: dict[str, set[int]] = {}
    for term in terms:
        for label, size in zip(term.labels, term.value.shape or (), strict=False):
            if isinstance(size, int):
                found.setdefault(label, set()).add(size)
    several = {label for label, numbers in found.items() if len(numbers) > 1}
    if not all(label.startswith(_ELLIPSIS) for label in several):
        return None
    return {label: min(sizes) for label, sizes in found.items() if label not in several}


# -- writing --------------------------------------------------------------------------------


class _Lowering:
    """Writes products of labelled tensors."""

    def __init__(
        self, node: ir.Node, taken: set[str], sizes: Mapping[str, int], terms: Sequence[_Term]
    ) -> None:
        self._node = node
        self._taken = taken
        self._sizes = sizes
        self._origins = {
            label: (term.value, axis)
            for term in terms
            for axis, label in enumerate(term.labels)
        }
        self._op = formula_for(node)

    def run(self, terms: Sequence[_Term], result: _Labels) -> None:
        """Put the product of the terms in the place of the Einsum."""
        term, product = terms[0], None
        for index, other in enumerate(terms[1:], 1):
            later = {label for each in terms[index + 1 :] for label in each.labels}
            term, product = self._product(term, other, {*result, *later}, result)
        value = self._arranged(self._summed(term, result), result).value
        replace_node(self._node, self._op, [value], heir=product)

    def _product(
        self, left: _Term, right: _Term, wanted: Collection[str], result: _Labels
    ) -> tuple[_Term, ir.Value]:
        """Multiply two tensors and sum over the labels that are not wanted any more.

        Returns:
            The product, and what Mul or MatMul computed for it.
        """
        left = self._summed(left, {*wanted, *right.labels})
        right = self._summed(right, {*wanted, *left.labels})
        shared = [label for label in left.labels if label in right.labels]
        inner = tuple(label for label in shared if label not in wanted)
        if not inner:
            return self._elementwise(left, right, result)
        if _belongs_left(right, left):
            left, right = right, left
        kept = (label for label in shared if label in wanted)
        batch = tuple(sorted(kept, key=_order(result)))
        rows = tuple(label for label in left.labels if label not in shared)
        columns = tuple(label for label in right.labels if label not in shared)
        # MatMul repeats the right matrices for all but the last of the rows' axes.
        leading = (*rows[:-1], *batch)
        product = self._op.MatMul(
            self._matrices(left, leading, rows[-1:], inner),
            self._matrices(right, batch, inner, columns),
        )
        value = self._without_matrix_axes(product, leading, rows[-1:], columns)
        return _Term(value, (*leading, *rows[-1:], *columns)), product

    def _elementwise(
        self, left: _Term, right: _Term, result: _Labels
    ) -> tuple[_Term, ir.Value]:
        union = dict.fromkeys((*left.labels, *right.labels))
        labels = tuple(sorted(union, key=_order(result)))
        operands = []
        for term in (left, right):
            present = tuple(label for label in labels if label in term.labels)
            # Axes that are missing in front are broadcast anyway.
            first = labels.index(present[0]) if present else len(labels)
            missing = [
                axis for axis, label in enumerate(labels[first:]) if label not in present
            ]
            operands.append(self._unsqueezed(self._arranged(term, present).value, missing))
        product = self._op.Mul(*operands)
        return _Term(product, labels), product

    def _matrices(
        self, term: _Term, leading: _Labels, rows: _Labels, columns: _Labels
    ) -> ir.Value:
        """A stack of matrices, with axes merged or added as the rows and columns need it."""
        order = (*leading, *rows, *columns)
        array = constant_of(term.value)
        if array is not None:
            moved = array.transpose([term.labels.index(label) for label in order])
            sizes = moved.shape[len(leading) :]
            matrix = (math.prod(sizes[: len(rows)]), math.prod(sizes[len(rows) :]))
            return self._constant(
                term.value, moved.reshape(*moved.shape[: len(leading)], *matrix)
            )
        value = self._arranged(term, order).value
        if len(rows) <= 1 and len(columns) <= 1:
            missing = [] if rows else [len(leading)]
            missing += [] if columns else [len(leading) + 1]
            return self._unsqueezed(value, missing)
        if len(rows) == 1:
            return self._reshaped(value, len(leading) + 1, [columns])
        return self._reshaped(value, len(leading), [rows, columns])

    def _without_matrix_axes(
        self, product: ir.Value, leading: _Labels, rows: _Labels, columns: _Labels
    ) -> ir.Value:
        """Undo in a product what ``_matrices`` did to its operands."""
        if len(columns) > 1:
            kept = len(leading) + len(rows)
            return self._reshaped(product, kept, [(label,) for label in columns])
        squeezed = ([] if rows else [-2]) + ([] if columns else [-1])
        return self._op.Squeeze(product, squeezed) if squeezed else product

    def _summed(self, term: _Term, wanted: Collection[str]) -> _Term:
        """Sum over the labels that are not wanted."""
        axes = [axis for axis, label in enumerate(term.labels) if label not in wanted]
        if not axes:
            return term
        labels = tuple(label for label in term.labels if label in wanted)
        array = constant_of(term.value)
        if array is None:
            return _Term(self._op.ReduceSum(term.value, axes, keepdims=0), labels)
        total = array.sum(axis=tuple(axes), dtype=array.dtype)
        return _Term(self._constant(term.value, np.asarray(total)), labels)

    def _arranged(self, term: _Term, labels: _Labels) -> _Term:
        if term.labels == labels:
            return term
        perm = [term.labels.index(label) for label in labels]
        return _Term(self._op.Transpose(term.value, perm=perm), labels)

    def _constant(self, value: ir.Value, array: npt.NDArray[np.generic]) -> ir.Value:
        """A constant operand with its numbers in other places."""
        suffix = str(self._node.outputs[0].name)
        return changed_constant(self._node, value, array.copy(), suffix, self._taken)

    def _unsqueezed(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        return self._op.Unsqueeze(value, axes) if axes else value

    def _reshaped(self, value: ir.Value, kept: int, groups: Sequence[_Labels]) -> ir.Value:
        """Keep the first axes; then one axis for each group of labels."""
        sizes: list[int | ir.Value] = [0] * kept
        for group in groups:
            if all(label in self._sizes for label in group):
                sizes.append(math.prod(self._sizes[label] for label in group))
            elif -1 in sizes:
                sizes.append(self._runtime_size(group))
            else:
                sizes.append(-1)
        numbers = [size for size in sizes if isinstance(size, int)]
        if len(numbers) == len(sizes):
            return self._op.Reshape(value, numbers)
        parts = [[size] if isinstance(size, int) else size for size in sizes]
        return self._op.Reshape(value, self._op.Concat(*parts, axis=0))

    def _runtime_size(self, group: _Labels) -> ir.Value:
        """The size of an axis that merges a group, as a vector of one number."""
        sizes = []
        for label in group:
            value, axis = self._origins[label]
            sizes.append(self._op.Shape(value, start=axis, end=axis + 1))
        return functools.reduce(self._op.Mul, sizes)


def _belongs_left(one: _Term, other: _Term) -> bool:
    """Whether ``one`` is the better left operand: ``other`` is constant, or smaller."""
    constants = [constant_of(term.value) is not None for term in (one, other)]
    if constants[0] != constants[1]:
        return constants[1]
    return len(one.labels) > len(other.labels)


def _order(result: _Labels) -> Callable[[str], int]:
    """A key that sorts labels as the result has them, and others behind."""
    positions = {label: position for position, label in enumerate(result)}
    return lambda label: positions.get(label, len(result))
