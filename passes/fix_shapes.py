"""Gives a graph fixed shapes, for hardware that compiles it for one size."""

import logging
from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes import common

__all__ = ["FixShapesPass", "is_static"]

logger = logging.getLogger(__name__)


class FixShapesPass(ir.passes.InPlacePass):
    """Fix the sizes of the inputs, and infer all other shapes from them.

    Before:  g (float[N,3,32,32] x) => (float[N,10] y)
    After:   g (float[1,3,32,32] x) => (float[1,10] y)

    Requires: sizes for all inputs with a free dimension, equal to those that are fixed.
    Ensures: every input has fixed sizes, and so has each value whose shape follows from
        theirs; nodes, names and types are unchanged, and so are the outputs for such inputs.
    Idempotent: inputs with fixed sizes are left alone.
    """

    def __init__(self, sizes: Mapping[str, Sequence[int]]) -> None:
        """Set the sizes.

        Args:
            sizes: Input name → shape.
        """
        super().__init__()
        self._sizes = {name: tuple(shape) for name, shape in sizes.items()}

    def requires(self, model: ir.Model) -> None:
        """Each free input has a shape that agrees with what is fixed."""
        for value in _free(model):
            wanted = self._sizes.get(str(value.name))
            known = value.shape
            if wanted is None:
                raise ir.passes.PreconditionError(f"no sizes are given for input {value.name}")
            if known is not None and (
                len(known) != len(wanted)
                or any(
                    isinstance(a, int) and a > 0 and a != b
                    for a, b in zip(known, wanted, strict=True)
                )
            ):
                raise ir.passes.PreconditionError(
                    f"input {value.name} has the shape {known}, not {list(wanted)}"
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Write the sizes down and infer again."""
        inputs = _free(model)
        if not inputs:
            return ir.passes.PassResult(model, modified=False)
        for value in inputs:
            value.shape = ir.Shape(self._sizes[str(value.name)])
        # A symbol that is left would be taken for what inference found.
        values = [value for node in model.graph for value in node.outputs]
        before = {value: value.shape for value in values if not is_static(value)}
        for value in before:
            value.shape = None
        common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
        for value, shape in before.items():
            if value.shape is None:
                value.shape = shape
        logger.info("fixed the shapes of %d inputs", len(inputs))
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """No input is left free."""
        if free := _free(model):
            raise ir.passes.PostconditionError(f"the shape of input {free[0].name} is free")


def _free(model: ir.Model) -> list[ir.Value]:
    inputs = (value for value in model.graph.inputs if not value.is_initializer())
    return [value for value in inputs if not is_static(value)]


def is_static(value: ir.Value) -> bool:
    """Whether all sizes are known; exporters also write 0 and -1 for a free one."""
    return value.shape is not None and all(isinstance(n, int) and n > 0 for n in value.shape)
