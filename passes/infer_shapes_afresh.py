"""Infer the shapes of a graph, whatever the file notes about them."""

from typing import Final

import onnx_ir as ir
from onnx_ir.passes import common

__all__ = ["InferShapesAfreshPass", "reconciled"]

_MADE_UP: Final = "unk__"
"""How the names begin that inference gives to sizes which it does not know."""


class InferShapesAfreshPass(ir.passes.InPlacePass):
    """Replace noted shapes by inferred ones wherever the two contradict each other.

    Before:  x: [N,3,8,8], y: [1,4,6,6] = Conv(x, w)
    After:   x: [N,3,8,8], y: [N,4,6,6] = Conv(x, w)

    A batch that was made free by editing the inputs alone leaves the old size in all notes
    behind. ONNX Runtime warns and goes on; shape inference would believe them.

    Requires: no model-local functions.
    Ensures: a size that follows from the inputs is the inferred one; what inference does not
        know, and what operators of other domains give, is as noted. Shapes of graph inputs
        stay; those of outputs are inferred like any other.
    Idempotent: inferred shapes are inferred again.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse functions, in which nothing is inferred."""
        if model.functions:
            raise ir.passes.PreconditionError(
                f"the model has {len(model.functions)} functions, but needs 0: inline them"
            )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Forget what is noted, infer, and fill in what was noted where that says more."""
        nodes = list(model.graph.all_nodes())
        noted = {value: (value.type, value.shape) for node in nodes for value in node.outputs}
        doubted = [value for node in nodes if not node.domain for value in node.outputs]
        for value in doubted:
            if isinstance(value.type, ir.TensorType):
                value.shape = None
        common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
        for value in doubted:
            value.shape = reconciled(value.shape, noted[value][1])
        changed = any((v.type, v.shape) != before for v, before in noted.items())
        return ir.passes.PassResult(model, modified=changed)


def reconciled(
    inferred: ir.Shape | None, noted: ir.Shape | None, *, free: bool = False
) -> ir.Shape | None:
    """The shape of a value: what inference knows of it, and the note where it knows nothing.

    Of two names for a size, the noted one is kept.

    Args:
        inferred: As inferred.
        noted: As noted.
        free: Whether a size that is noted as free stays so if inference knows the number.
    """
    if inferred is None or noted is None:
        return noted if inferred is None else inferred
    if len(inferred) != len(noted):
        return inferred
    return ir.Shape(
        note if _fits(found, note) or (free and not isinstance(note, int)) else found
        for found, note in zip(inferred, noted, strict=True)
    )


def _fits(found: int | ir.SymbolicDim, note: int | ir.SymbolicDim) -> bool:
    if isinstance(found, int):
        return found == note
    return found.value is None or found.value.startswith(_MADE_UP) or not isinstance(note, int)
