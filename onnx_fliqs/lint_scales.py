"""Rules of types, scales and zero points: what a single quantizer has to be."""

from typing import Final

import numpy as np

from onnx_fliqs.lint_rule import Findings, QdqGraph, is_hardware
from onnx_fliqs.targets import Activations, Target

__all__ = [
    "block_shapes",
    "constant_scales",
    "normal_scales",
    "opset",
    "per_tensor_activations",
    "power_of_two_scales",
    "static_shapes",
    "symmetric",
    "symmetric_weights",
    "types",
]

_OPSETS: Final = {
    **dict.fromkeys(("UINT8", "INT8", "INT32"), 10),
    **dict.fromkeys(("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"), 19),
    **dict.fromkeys(("UINT16", "INT16", "UINT4", "INT4"), 21),
    "FLOAT4E2M1": 23,
    **dict.fromkeys(("UINT2", "INT2"), 25),
}
"""Type of codes → the opset that brought it to QuantizeLinear and DequantizeLinear."""
_CHANNELS_OPSET: Final = 13
_BLOCKS_OPSET: Final = 21


def types(graph: QdqGraph, target: Target) -> Findings:
    """The target reads and writes the codes' types."""
    allowed = target.qdq_types
    for each in graph.quantizers:
        if allowed is not None and each.dtype is not None and each.dtype.name not in allowed:
            message = f"{each.dtype.name} is not among {', '.join(allowed)}"
            yield each.node, message


def opset(graph: QdqGraph, _: Target) -> Findings:
    """The declared opset has what the nodes need."""
    declared = graph.model.opset_imports.get("", 0)
    for each in graph.quantizers:
        if each.node.domain:
            continue
        reasons = [(_OPSETS.get(each.dtype.name, 0) if each.dtype else 0, "this type")]
        reasons.append((0 if each.has_one_scale else _CHANNELS_OPSET, "a scale per channel"))
        reasons.append((_BLOCKS_OPSET if each.block else 0, "a scale per block"))
        needed, reason = max(reasons)
        if needed > declared:
            message = f"{reason} needs opset {needed}, the model declares {declared}"
            yield each.node, message


def block_shapes(graph: QdqGraph, _: Target) -> Findings:
    """Scales per block are as many as there are blocks, and as numbers on the other axes."""
    for each in graph.quantizers:
        codes, scale = each.codes_shape, each.scale_shape
        if not each.block or codes is None or scale is None:
            continue
        wanted = [
            -(-size // each.block) if axis == each.axis else size
            for axis, size in enumerate(codes)
        ]
        if list(scale) != wanted:
            yield each.node, f"its scales have the shape {list(scale)}, not {wanted}"


def static_shapes(graph: QdqGraph, target: Target) -> Findings:
    """Inputs have fixed shapes."""
    if not target.static_shapes:
        return
    for value in graph.model.graph.inputs:
        if value.shape is None or not value.shape.is_static():
            shape = "an unknown shape" if value.shape is None else f"the shape {value.shape}"
            message = f"input {value.name} has {shape}; the target needs fixed sizes"
            yield None, message


def constant_scales(graph: QdqGraph, target: Target) -> Findings:
    """Hardware wants to know scales and zero points before it runs."""
    if not is_hardware(target):
        return
    for each in graph.quantizers:
        for what, numbers in (("scale", each.scale), ("zero point", each.zero_point)):
            if numbers is None:
                yield each.node, f"its {what} is not constant"


def normal_scales(graph: QdqGraph, _: Target) -> Findings:
    """Scales are positive, finite, and not flushed to zero."""
    for each in graph.quantizers:
        if each.scale is None:
            continue
        good = np.isfinite(each.scale) & (each.scale >= each.least_scale)
        if not good.all():
            worst = each.scale[~good].flat[0]
            message = f"the scale {worst:g} is not a positive normal number"
            yield each.node, message


def symmetric(graph: QdqGraph, target: Target) -> Findings:
    """Zero points are 0 where hardware has none."""
    if target.activations is not Activations.SYMMETRIC:
        return
    for each in graph.quantizers:
        if not each.has_zeros:
            yield each.node, "its zero point is not 0"


def symmetric_weights(graph: QdqGraph, target: Target) -> Findings:
    """Zero points of signed weights are 0."""
    if not target.symmetric_weights:
        return
    for each in graph.quantizers:
        signed = each.dtype is not None and not each.dtype.name.startswith("UINT")
        if each.is_stored and signed and not each.has_zeros:
            yield each.node, "its zero point is not 0"


def power_of_two_scales(graph: QdqGraph, target: Target) -> Findings:
    """Scales are powers of two where hardware shifts."""
    if not target.power_of_two_scales:
        return
    for each in graph.quantizers:
        if each.scale is not None and (np.frexp(each.scale)[0] != 0.5).any():
            yield each.node, "a scale is no power of two"


def per_tensor_activations(graph: QdqGraph, target: Target) -> Findings:
    """Activations have one scale."""
    if not is_hardware(target):
        return
    for each in graph.quantizers:
        if not each.is_stored and not each.has_one_scale:
            message = "activations need one scale for the whole tensor"
            yield each.node, message
