"""Bring a model of any opset to one opset."""

import re
from typing import Final

import numpy as np
import onnx
import onnx_ir as ir
from onnx import version_converter

from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.passes._graph import (
    all_nodes,
    constant_of,
    label,
    used_names,
    weight_bytes,
)

__all__ = ["ConvertOpsetPass"]

_BIG: Final = 1024
_CONVERTER_NAME: Final = re.compile(r"_v_\d+")
_GROUP_NORM_PER_CHANNEL: Final = 21
_HARDMAX_ALONG_ONE_AXIS: Final = 13
_RESIZE_WITH_MODES: Final = 11


class ConvertOpsetPass(ir.passes.InPlacePass):
    """Bring the model to one opset of the standard operators.

    Before:  <opset 11>  y = Squeeze <axes = [2]> (x)
    After:   <opset 21>  y_axes = Constant <value = int64[1] {2}> ();  y = Squeeze (x, y_axes)

    Requires: no model-local functions; no initializer is a graph input.
    Ensures: the opset of the standard operators is ``target``; nodes of other domains stay.
    Idempotent: a model of that opset is left alone.
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
            return ir.passes.PassResult(model, modified=False)
        if opset is None or not any(node.domain == "" for node in model.graph.all_nodes()):
            opset = self.target
        model.opset_imports[""] = opset
        if opset > self.target:
            _relabel(model, opset, self.target)
        elif opset < self.target:
            _refuse_changed_meaning(model, opset)
            _convert_upwards(model, opset, self.target)
            _spell_out_resize(model, opset)
        return ir.passes.PassResult(model, modified=True)


def _relabel(model: ir.Model, opset: int, target: int) -> None:
    """Keep every node: newer versions of most operators only admit more types."""
    for node in all_nodes(model):
        if node.domain == "" and (problem := _misfit(node, opset, target)):
            raise UnsupportedError(
                f"the model uses opset {opset} and {label(node)} {problem} in opset {target};"
                f" export it with opset {target} or lower"
            )
        node.version = None
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


def _misfit(node: ir.Node, opset: int, target: int) -> str | None:
    """What keeps a node of a newer opset from being one of the older opset."""
    try:
        known = min(opset, onnx.defs.onnx_opset_version())
        new = onnx.defs.get_schema(node.op_type, known, "")
        old = onnx.defs.get_schema(node.op_type, target, "")
    except onnx.defs.SchemaError:
        return "does not exist"
    if new.since_version == old.since_version:
        return None
    for name in node.attributes:
        if name not in old.attributes:
            return f"has no attribute {name!r}"
    if len(node.inputs) > old.max_input or len(node.outputs) > old.max_output:
        return "has fewer inputs or outputs"
    return None


def _refuse_changed_meaning(model: ir.Model, opset: int) -> None:
    """Stop at operators whose meaning has changed and that ONNX 1.23 hands on unchanged."""
    for node in model.graph.all_nodes():
        if node.domain != "":
            continue
        if node.op_type == "GroupNormalization" and opset < _GROUP_NORM_PER_CHANNEL:
            # Its scale was one number per group.
            raise UnsupportedError(
                f"{label(node)} is of opset {opset}; export the model with opset 21, which"
                " defines it anew, or with 17, which has none"
            )
        if node.op_type == "Hardmax" and opset < _HARDMAX_ALONG_ONE_AXIS:
            # It took all axes from ``axis`` on as one.
            shape = node.inputs[0].shape if node.inputs[0] is not None else None
            axis = node.attributes.get_int("axis", 1)
            if shape is None or axis % len(shape) != len(shape) - 1:
                raise UnsupportedError(
                    f"{label(node)} of opset {opset} runs over several axes; export the model"
                    " with opset 13 or newer"
                )
            node.attributes["axis"] = ir.AttrInt64("axis", -1)


def _spell_out_resize(model: ir.Model, opset: int) -> None:
    """Give Resize the coordinates that it had before opset 11 and Upsample always had.

    ONNX 1.23's converter leaves them at their new defaults, which changes the result. Opset
    10 does not say how to round; ONNX Runtime rounds down to enlarge and up to shrink.
    """
    if opset >= _RESIZE_WITH_MODES:
        return
    for node in model.graph.all_nodes():
        if node.domain != "" or node.op_type != "Resize":
            continue
        scales = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
        shrinks = scales is not None and bool((scales.astype(np.float64) < 1).any())
        for name, text in (
            ("coordinate_transformation_mode", "asymmetric"),
            ("nearest_mode", "ceil" if shrinks else "floor"),
        ):
            node.attributes.setdefault(name, ir.AttrString(name, text))


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
    for node in model.graph.all_nodes():
        for value in node.outputs:
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
