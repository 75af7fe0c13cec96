"""Write newer operators in terms of those that an older opset has."""

from typing import Any, Final

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from onnx_fliqs.passes._opsets import default_of, misfit, schema_of

__all__ = ["InlineOperatorDefinitionsPass"]

_DOMAIN: Final = "onnx_fliqs.definitions"


class InlineOperatorDefinitionsPass(ir.passes.InPlacePass):
    """Replace operators that an older opset lacks by what ONNX says they compute.

    Before:  <opset 24>  y = Swish (x)
    After:   <opset 24>  a = Mul (CastLike (1.0, x), x);  s = Sigmoid (a);  y = Mul (x, s)

    ONNX defines most of its newer operators as functions of older ones.

    Requires: no model-local functions; inferred types, on which some definitions depend.
    Ensures: every operator of ONNX that has a definition exists in opset ``target``, with the
        attributes and the number of operands that the node has; the opset and the graph's
        signature are unchanged.
    Idempotent: operators that exist are left alone.
    """

    def __init__(self, *, target: int) -> None:
        super().__init__()
        self.target = target

    def requires(self, model: ir.Model) -> None:
        """Refuse functions, whose bodies have no types."""
        if model.functions:
            raise ir.passes.PreconditionError(
                f"the model has {len(model.functions)} functions, but needs 0: inline them"
            )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace, until no definition needs a further one."""
        modified = False
        while self._replace(model):
            modified = True
        return ir.passes.PassResult(model, modified=modified)

    def _replace(self, model: ir.Model) -> bool:
        """Turn the operators into calls of functions, and inline those."""
        opset = model.opset_imports.get("", self.target)
        for node in list(model.graph.all_nodes()):
            if misfit(node, opset, self.target) is None:
                continue
            definition = _definition(node, opset)
            if definition is not None:
                function = _as_function(definition, node, len(model.functions))
                function.opset_imports[""] = opset
                model.functions[function.identifier()] = function
                _spell_out_attributes(node, opset)
                node.domain, node.op_type, node.version = _DOMAIN, function.name, None
        if not model.functions:
            return False
        model.opset_imports[_DOMAIN] = 1
        common.InlinePass()(model)
        del model.opset_imports[_DOMAIN]
        return True


def _definition(node: ir.Node, opset: int) -> onnx.FunctionProto | None:
    """ONNX's definition of an operator, for the types and attributes of the node."""
    # The type stubs of onnx lack what a schema says about functions.
    schema: Any = schema_of(node, opset)
    if schema is None:
        return None
    definition = onnx.FunctionProto()
    if schema.has_function:
        definition.CopyFrom(schema.function_body)
        return definition
    if not schema.has_context_dependent_function:
        return None
    version = max(schema.context_dependent_function_opset_versions)
    data = schema.get_context_dependent_function_with_opset_version(
        version, ir.to_proto(node).SerializeToString(), [_type(v) for v in node.inputs]
    )
    definition.ParseFromString(data)
    return definition if definition.node else None  # none without types


def _type(value: ir.Value | None) -> bytes:
    if value is None or value.type is None:
        return bytes(onnx.TypeProto().SerializeToString())
    return bytes(ir.to_proto(value).type.SerializeToString())


def _as_function(definition: onnx.FunctionProto, node: ir.Node, number: int) -> ir.Function:
    """A function for one node, whose inner nodes are named after it."""
    definition.domain, definition.name = _DOMAIN, f"{node.op_type}_{number}"
    del definition.output[len(node.outputs) :]
    for inner in definition.node:
        inner.name = f"{node.name or node.op_type}_{inner.op_type}"
    return ir.serde.deserialize_function(definition)


def _spell_out_attributes(node: ir.Node, opset: int) -> None:
    """Give the node the attributes that it leaves at their defaults."""
    schema = schema_of(node, opset)
    assert schema is not None
    for name in schema.attributes:
        default = default_of(schema, name)
        if default is not None:
            node.attributes.setdefault(name, default)
