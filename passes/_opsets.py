"""What an operator was in which opset."""

from collections.abc import Sequence

import onnx
import onnx_ir as ir

__all__ = ["default_of", "extra_attributes", "misfit", "schema_of"]


def schema_of(node: ir.Node, opset: int) -> onnx.defs.OpSchema | None:
    """The definition of an operator of ONNX in an opset; None where it has none."""
    known = min(opset, onnx.defs.onnx_opset_version())
    try:
        return onnx.defs.get_schema(node.op_type, known, node.domain)
    except onnx.defs.SchemaError:
        return None


def misfit(node: ir.Node, opset: int, older: int) -> str | None:
    """What keeps a node of a newer opset from being one of the older opset."""
    if node.domain:
        return None
    new, old = schema_of(node, opset), schema_of(node, older)
    if new is None or old is None or old.deprecated:
        return "does not exist"
    if new.since_version == old.since_version:
        return None
    for name in extra_attributes(node, old):
        if node.attributes[name] != default_of(new, name):
            return f"has no attribute {name!r}"
    if _present(node.inputs) > old.max_input or _present(node.outputs) > old.max_output:
        return "has fewer inputs or outputs"
    return None


def extra_attributes(node: ir.Node, schema: onnx.defs.OpSchema) -> list[str]:
    """The attributes that a definition does not know."""
    return [name for name in node.attributes if name not in schema.attributes]


def default_of(schema: onnx.defs.OpSchema, name: str) -> ir.Attr | None:
    """The attribute that counts where a node has none; None where it must have one."""
    proto = schema.attributes[name].default_value
    return ir.serde.deserialize_attribute(proto) if proto.name else None


def _present(values: Sequence[ir.Value | None]) -> int:
    """The number of operands up to the last that is there."""
    return max((i + 1 for i, value in enumerate(values) if value is not None), default=0)
