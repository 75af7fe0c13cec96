"""The form in which everything else sees a model, and the passes that bring it there."""

import contextlib
import logging
import math
import sys
from collections.abc import Iterator
from typing import Final, TypeAlias

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from onnx_fliqs.dialects import CONTRIB
from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.passes._qonnx_quantizers import is_qonnx
from onnx_fliqs.passes.compute_in_float32 import ComputeInFloat32Pass
from onnx_fliqs.passes.convert_opset import ConvertOpsetPass
from onnx_fliqs.passes.expand_vector_matmul import ExpandVectorMatmulPass
from onnx_fliqs.passes.fold_batch_normalization import FoldBatchNormalizationPass
from onnx_fliqs.passes.fold_known_sizes import FoldKnownSizesPass
from onnx_fliqs.passes.fold_leading_batch_normalization import (
    FoldLeadingBatchNormalizationPass,
)
from onnx_fliqs.passes.fold_scaling import FoldScalingPass
from onnx_fliqs.passes.fold_splits import FoldSplitsPass
from onnx_fliqs.passes.hoist_initializers import HoistInitializersPass
from onnx_fliqs.passes.infer_shapes_afresh import InferShapesAfreshPass, reconciled
from onnx_fliqs.passes.inline_operator_definitions import InlineOperatorDefinitionsPass
from onnx_fliqs.passes.lower_batch_normalization import LowerBatchNormalizationPass
from onnx_fliqs.passes.lower_contrib_operators import LowerContribOperatorsPass
from onnx_fliqs.passes.lower_einsum import LowerEinsumPass
from onnx_fliqs.passes.name_everything import NameEverythingPass
from onnx_fliqs.passes.prefer_integer_operators import PreferIntegerOperatorsPass
from onnx_fliqs.passes.refuse_unsupported import (
    refuse_bad_numbers,
    refuse_quantized,
    refuse_reserved_names,
    refuse_training_mode,
    refuse_unfeedable,
)
from onnx_fliqs.passes.remove_dropout import RemoveDropoutPass
from onnx_fliqs.passes.remove_identities import RemoveIdentitiesPass
from onnx_fliqs.passes.remove_quantization import RemoveQuantizationPass
from onnx_fliqs.passes.remove_unused import RemoveUnusedPass
from onnx_fliqs.passes.resolve_auto_padding import ResolveAutoPaddingPass
from onnx_fliqs.passes.simplify_gemm import SimplifyGemmPass

__all__ = ["IR_VERSION", "OPSET", "canonicalise"]

OPSET: Final = 21
"""The opset of the standard operators: the newest that ONNX Runtime 1.19.2 loads."""
IR_VERSION: Final = 10
"""The IR version: the newest that ONNX Runtime 1.19.2 loads."""

# A constant of 128 MB in float32; what is larger, and larger than what it is computed from,
# stays computed, so that files stay small.
_FOLD_LIMIT: Final = 1 << 25
_ROUNDS: Final = 8
_KEPT: Final = frozenset(("Identity", "Constant", "Dropout"))
_NOISY: Final = ("onnxscript", "onnx_ir")

_LIFT: Final = common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
_SHAPES: Final = common.ShapeInferencePass(check_type=False, strict_mode=False)
_Declared: TypeAlias = tuple[ir.TypeProtocol | None, ir.Shape | None]

logger = logging.getLogger(__name__)


def canonicalise(model: ir.Model, *, remove_quantization: bool = False) -> ir.Model:
    """Bring a model into the form that the other passes expect, in place.

    Afterwards the opset is OPSET and the IR version IR_VERSION; there are no functions,
    BatchNormalization, inference-mode Dropout, or Identity but for graph outputs. Products
    are MatMul, of matrices, or Gemm without alpha, beta and transA; no Einsum and no fused
    operator of ONNX Runtime hides one that can be written so. Constants are initializers and
    no initializer is a graph input; what can be computed beforehand is; every node and value
    has a unique name; shapes are inferred as far as they can be. The graph's own inputs and
    outputs stay as they are, but for declared sizes of outputs that it does not compute.

    Args:
        model: Any model.
        remove_quantization: Turn a quantized model back into a float model, not refuse it.

    Returns:
        The same model.

    Raises:
        UnsupportedError: It is already quantized, in training mode, or of an opset that cannot
            be converted.
        ModelError: A weight is not finite, or a name is reserved.
    """
    with _quiet():
        _flatten(model)
        refuse_reserved_names(model)
        if not remove_quantization:
            refuse_quantized(model)
        refuse_training_mode(model)
        refuse_unfeedable(model)
        declared = _signature(model)
        _run(model, InferShapesAfreshPass(), ComputeInFloat32Pass())
        if remove_quantization:
            _run(model, RemoveQuantizationPass(), _SHAPES)
            refuse_quantized(model, removed=True)
        _run(
            model, InlineOperatorDefinitionsPass(target=OPSET), ConvertOpsetPass(target=OPSET)
        )
        model.ir_version = IR_VERSION
        _spell_out(model)
        refuse_bad_numbers(model)
        _run(
            model,
            ResolveAutoPaddingPass(),
            FoldBatchNormalizationPass(),
            FoldLeadingBatchNormalizationPass(),
            LowerBatchNormalizationPass(),
            FoldScalingPass(),
            PreferIntegerOperatorsPass(),
        )
        refuse_bad_numbers(model)
        _clean_up(model, declared)
    return model


def _run(model: ir.Model, *passes: ir.passes.PassBase) -> bool:
    modified = [pass_(model).modified for pass_ in passes]
    return any(modified)


def _flatten(model: ir.Model) -> None:
    """One graph (and the bodies of control flow), constants apart from inputs."""
    # A quantizer that brings its definition along would dissolve into arithmetic.
    for key in [key for key in model.functions if is_qonnx(*key[:2])]:
        del model.functions[key]
    try:
        _run(
            model,
            common.RemoveInitializersFromInputsPass(),
            common.InlinePass(),
            common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        )
    except Exception as error:
        # The inliner refuses functions of another opset, and functions that call each other.
        raise UnsupportedError(
            f"the model's local functions cannot be inlined: {error.__cause__ or error}"
        ) from error
    _lift_constants(model)


def _lift_constants(model: ir.Model) -> bool:
    try:
        return _run(model, _LIFT)
    except Exception as error:
        raise UnsupportedError(
            f"the model has a constant of an unusual kind: {error.__cause__ or error}"
        ) from error


def _spell_out(model: ir.Model) -> None:
    """Write fused and general operators as plain ones, and compute what is constant."""
    while any(node.domain == CONTRIB for node in model.graph.all_nodes()):
        # Shape inference does not see through these: one may have to wait for another.
        _run(model, _SHAPES)
        if not _run(model, LowerContribOperatorsPass()):
            break
    for _ in range(_ROUNDS):
        _simplify(model)
        if not _run(model, LowerEinsumPass(), ExpandVectorMatmulPass(), SimplifyGemmPass()):
            return
    logger.debug("operators still change after %d rounds", _ROUNDS)


def _simplify(model: ir.Model) -> None:
    """Compute what is constant, until nothing more is."""
    for _ in range(_ROUNDS):
        changed = _lift_constants(model)
        _run(model, _SHAPES)
        changed |= _run(
            model,
            RemoveDropoutPass(),
            RemoveIdentitiesPass(),
            FoldKnownSizesPass(),
            FoldSplitsPass(),
        )
        changed |= _fold(model)
        _run(model, RemoveUnusedPass())
        if not changed:
            return
    logger.debug("constants still fold after %d rounds", _ROUNDS)


def _fold(model: ir.Model) -> bool:
    """Fold constants; a node at which the folder fails is left out in the next attempt."""
    left_out: set[ir.Node] = set()
    while True:
        current: list[ir.Node] = []

        def should_fold(node: ir.Node, current: list[ir.Node] = current) -> bool:
            current[:] = [node]
            kept = node.op_type in _KEPT or node in left_out
            return not kept and _is_worth_storing(node)

        try:
            with np.errstate(all="ignore"):  # log(0) in a mask is meant
                folded = optimizer.fold_constants_ir(
                    model,
                    onnx_shape_inference=True,
                    output_size_limit=sys.maxsize,
                    should_fold=should_fold,
                )
        except Exception as error:
            if not current or current[0] in left_out:
                logger.debug("constant folding stopped: %s", error)
                return False
            left_out.add(current[0])
            continue
        _forget_provenance(model)
        return folded.modified


def _is_worth_storing(node: ir.Node) -> bool:
    """Whether the result of a constant computation is small, or no larger than its operands.

    A weight that is transposed, cast or cut is stored as it is used, whatever its size.
    """
    known = [value.shape for value in node.outputs if value.shape is not None]
    if not all(shape.is_static() for shape in known):
        return True
    result = sum(math.prod(shape.numpy()) for shape in known)
    operands = (value.const_value for value in node.inputs if value is not None)
    return result <= max(_FOLD_LIMIT, sum(x.size for x in operands if x is not None))


def _forget_provenance(model: ir.Model) -> None:
    """Drop the folder's notes: they repeat the names of every node that went."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            value.metadata_props.pop(optimizer.FOLDED_FROM_KEY, None)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.pop(optimizer.FOLDED_FROM_KEY, None)


def _clean_up(model: ir.Model, declared: list[_Declared]) -> None:
    _run(model, HoistInitializersPass(), RemoveUnusedPass(), common.RemoveUnusedOpsetsPass())
    model.opset_imports[""] = OPSET
    _run(model, NameEverythingPass(), _SHAPES)
    for value, (type_, shape) in zip(
        (*model.graph.inputs, *model.graph.outputs), declared, strict=True
    ):
        value.type = type_ if type_ is not None else value.type
        value.shape = reconciled(value.shape, shape, free=True)


def _signature(model: ir.Model) -> list[_Declared]:
    """What the graph declares about its inputs and outputs."""
    return [
        (value.type, None if value.shape is None else value.shape.copy())
        for value in (*model.graph.inputs, *model.graph.outputs)
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' warnings from users, who can do nothing about them."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
