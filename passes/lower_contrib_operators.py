"""Write the operators that ONNX Runtime's optimizer fuses as operators of ONNX again."""

import logging
from collections.abc import Mapping
from typing import Final

import onnx_ir as ir

from onnx_fliqs.dialects import CONTRIB
from onnx_fliqs.passes._contrib_attention import ATTENTION
from onnx_fliqs.passes._contrib_elementwise import ELEMENTWISE
from onnx_fliqs.passes._contrib_normalizations import NORMALIZATIONS
from onnx_fliqs.passes._contrib_products import PRODUCTS
from onnx_fliqs.passes._contrib_rule import Rule
from onnx_fliqs.passes._graph import formula_for, replace_node, require_opset

__all__ = ["LowerContribOperatorsPass", "why_contrib_stays"]

_RULES: Final[Mapping[str, Rule]] = {**ATTENTION, **ELEMENTWISE, **NORMALIZATIONS, **PRODUCTS}
_LAYERS: Final = ("Conv", "Gemm", "MatMul")
_FUSED: Final = "ONNX Runtime's fused operator is left as it is"
_LAID_OUT: Final = (f"{CONTRIB}.nchwc", "com.ms.internal.nhwc")
_OPSET: Final = 20
"""The first that has Gelu."""

logger = logging.getLogger(__name__)

# Operators that multiply and have no rule.
_WITHOUT_RULE: Final = frozenset(
    """
    BeamSearch ConvTransposeWithDynamicPads DecoderAttention DecoderMaskedMultiHeadAttention
    DecoderMaskedSelfAttention GatedRelativePositionBias GemmFastGelu GemmFloat8 GreedySearch
    GroupQueryAttention LongformerAttention MoE NhwcConv NhwcFusedConv PackedAttention
    PackedMultiHeadAttention PagedAttention QMoE Sampling SparseAttention SparseToDenseMatMul
    WhisperBeamSearch WordConvEmbedding AttnLSTM
    """.split()  # noqa: SIM905 - reads as a list
)


class LowerContribOperatorsPass(ir.passes.InPlacePass):
    """Replace operators of the domain com.microsoft that ONNX can express.

    Before:  y = com.microsoft.FusedConv <activation = "Relu"> (x, w, b)
    After:   c = Conv (x, w, b);  y = Relu (c)

    So the layers within are found, quantized and trained, and ONNX Runtime can fuse them anew.
    Of several layers in one operator, as in Attention, each gets a name of its own.

    Requires: opset >= 20; inferred shapes, for those that need them.
    Ensures: an operator with a rule is left only where why_contrib_stays gives a reason;
        results change by float32 rounding only; the graph's signature is unchanged.
    Idempotent: what is left has a reason that still holds.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse older opsets, which have no Gelu."""
        require_opset(model, _OPSET)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each, in the main graph and in subgraphs."""
        found = [
            node
            for node in model.graph.all_nodes()
            if node.domain == CONTRIB
            and node.op_type in _RULES
            and _RULES[node.op_type].why_not(node) is None
        ]
        for node in found:
            _lower(node)
        logger.info("lowered %d operators of ONNX Runtime", len(found))
        return ir.passes.PassResult(model, modified=bool(found))


def _lower(node: ir.Node) -> None:
    op = formula_for(node)
    results = _RULES[node.op_type].formula(op, node)
    layers = [each for each in op.nodes if each.op_type in _LAYERS]
    replace_node(node, op, results, heir=layers[0].outputs[0] if len(layers) == 1 else None)
    logger.debug("lowered %s %s", node.op_type, node.name)


def why_contrib_stays(node: ir.Node) -> str | None:
    """Why an operator of ONNX Runtime that multiplies is still there, in words for users.

    None for other operators.
    """
    if node.domain in _LAID_OUT and node.op_type in _LAYERS:
        return "its weights are laid out for one processor: give the model from before that"
    if node.domain != CONTRIB:
        return None
    if node.op_type in _WITHOUT_RULE:
        return _FUSED
    rule = _RULES.get(node.op_type)
    reason = None if rule is None else rule.why_not(node)
    return None if reason is None else f"{_FUSED}: {reason}"
