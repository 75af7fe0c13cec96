"""Bring a model of any opset to one opset."""

import re
from typing import Final

import onnx
import onnx_ir as ir
from onnx import version_converter

from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.passes._graph import (
    all_nodes,
    is_standard,
    label,
    used_names,
    weight_bytes,
)
from onnx_fliqs.passes._opset_changes import after_conversion, before_conversion
from onnx_fliqs.passes._opsets import extra_attributes, misfit, schema_of

__all__ = ["ConvertOpsetPass"]

_BIG: Final = 1024
_CONVERTER_NAME: Final = re.compile(r"_v_\d+")


class ConvertOpsetPass(ir.passes.InPlacePass):
    """Bring the model to one opset of the standard operators.

    Before:  <opset 11>  y = Squeeze <axes = [2]> (x)
    After:   <opset 21>  y_axes = Constant <value = int64[1] {2}> ();  y = Squeeze (x, y_axes)

    Requires: no model-local functions; no initializer is a graph input.
    Ensures: the opset of the standard operators is ``target``; nodes of other domains stay.
    Idempotent: a model of that opset is left alone, but for attributes that ONNX's checker
        needs.
    """

    def __init__(self, *, target: int) -> None:
        super().__init__()
        self.target = target

    def requires(self, model: ir.Model) -> None:
        """Refuse functions, which the converter of ONNX does not enter."""
        if model.functions:
            raise ir.passes.PreconditionError(
                f"the model has {len(model.functions)} functions, but needs 0: inline them"
            )

    def ensures(self, model: ir.Model) -> None:
        """Look at the imports, not at what was done."""
        if model.opset_imports.get("") != self.target:
            raise ir.passes.PostconditionError(
                f"opset is {model.opset_imports.get('')}, not {self.target}"
            )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Convert upwards with ONNX's converter, downwards by relabelling."""
        alias = model.opset_imports.pop("ai.onnx", None)
        opset = model.opset_imports.get("", alias)
        if opset == self.target and alias is None:
            return ir.passes.PassResult(model, modified=_spell_out_axes(model))
        if opset is None or not any(node.domain == "" for node in model.graph.all_nodes()):
            opset = self.target
        model.opset_imports[""] = opset
        if opset > self.target:
            _relabel(model, opset, self.target)
        elif opset < self.target:
            before_conversion(model, opset)
            _convert_upwards(model, opset, self.target)
            after_conversion(model, opset)
        _spell_out_axes(model)
        return ir.passes.PassResult(model, modified=True)


def _spell_out_axes(model: ir.Model) -> bool:
    """Write down the default axes of MeanVarianceNormalization.

    ONNX's checker fails where they are missing: it does not know defaults in definitions.
    """
    found = [
        node
        for node in model.graph.all_nodes()
        if is_standard(node, "MeanVarianceNormalization") and "axes" not in node.attributes
    ]
    for node in found:
        node.attributes["axes"] = ir.AttrInt64s("axes", [0, 2, 3])
    return bool(found)


def _relabel(model: ir.Model, opset: int, target: int) -> None:
    """Keep every node: newer versions of most operators only admit more types."""
    for node in all_nodes(model):
        if problem := misfit(node, opset, target):
            raise UnsupportedError(
                f"the model uses opset {opset} and {label(node)} {problem} in opset {target};"
                f" export it with opset {target} or lower"
            )
        node.version = None
        if (schema := schema_of(node, target)) is not None:
            for name in extra_attributes(node, schema):  # at their defaults
                del node.attributes[name]
    model.opset_imports[""] = target
    proto = ir.to_proto(model) if weight_bytes(model) < 1 << 30 else None
    try:
        if proto is not None:
            onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise UnsupportedError(
            f"the model uses opset {opset} and is not valid in opset {target}:"
            f" {' '.join(str(error).split())[:300]}"
        ) from error


def _convert_upwards(model: ir.Model, opset: int, target: int) -> None:
    """Run ONNX's converter on the graph without its big weights, then put them back."""
    _free_converter_names(model)
    big = {
        name: value
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
        or (value.const_value is not None and value.const_value.nbytes > _BIG)
    }
    inputs = len(model.graph.inputs)
    for name, value in big.items():
        del model.graph.initializers[name]
        model.graph.inputs.append(value)
    model.ir_version = max(model.ir_version, 4)  # older ones list initializers as inputs
    try:
        converted = version_converter.convert_version(ir.to_proto(model), target)
    except Exception as error:
        raise UnsupportedError(
            f"the model uses opset {opset} and cannot be brought to opset {target}:"
            f" {' '.join(str(error).split())[:300]}"
        ) from error
    graph = ir.from_proto(converted).graph
    for value in list(graph.inputs)[inputs:]:
        graph.inputs.remove(value)
        assert value.name is not None
        value.const_value = big[value.name].const_value
        graph.register_initializer(value)
    graph.metadata_props.update(model.graph.metadata_props)
    graph.doc_string = model.graph.doc_string
    model.graph = graph
    _name_new_constants(model)


def _free_converter_names(model: ir.Model) -> None:
    """Rename what an earlier run of ONNX's converter named: it would use the name again."""
    signature = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.name and _CONVERTER_NAME.fullmatch(value.name) and value not in signature:
                value.name = f"{value.name}_"
    for graph in model.graphs():
        for value in list(graph.initializers.values()):
            if value.name and _CONVERTER_NAME.fullmatch(value.name) and value not in signature:
                value.name = f"{value.name}_"


def _name_new_constants(model: ir.Model) -> None:
    """Name the converter's numbered values after what reads them: ``y_axes``."""
    taken = used_names(model)
    values = [value for node in model.graph.all_nodes() for value in node.outputs]
    values += [v for graph in model.graphs() for v in graph.initializers.values()]
    for value in values:
        if not (value.name and _CONVERTER_NAME.fullmatch(value.name) and value.uses()):
            continue
        user, index = next(iter(value.uses()))
        name = f"{user.outputs[0].name}_{_formal_input(user, index)}"
        if name not in taken:
            value.name = name
            taken.add(name)


def _formal_input(node: ir.Node, index: int) -> str:
    try:
        formal = onnx.defs.get_schema(node.op_type, node.domain).inputs
    except onnx.defs.SchemaError:
        return f"input{index}"
    return formal[index].name if index < len(formal) else f"input{index}"
