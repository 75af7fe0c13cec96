"""Puts a searchable quantize/dequantize site in front of every operand that is searched."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.formats import FORMATS, GridCode, grid_code
from onnx_fliqs.passes._graph import with_bodies
from onnx_fliqs.site_functions import (
    ANY_CODES,
    ANY_SITE,
    DOMAIN,
    INTEGER_CODES,
    INTEGER_SITE,
    site_function,
)
from onnx_fliqs.sites import SearchSpace, Site

__all__ = ["CODES", "SCALES", "SITE_KEY", "InsertSearchSitesPass", "unquantized"]

CODES: Final = "onnx_fliqs.codes"
"""Initializer of shape [4 * sites]: the grid codes, site after site."""
SCALES: Final = "onnx_fliqs.scales"
"""Initializer of shape [sum of channels]: the scales, site after site."""
SITE_KEY: Final = "onnx_fliqs.site"
"""Metadata key of a site's node: the site's name."""
_FLOAT: Final = "{}@float"
"""The name of a tensor in front of the site that has taken its name."""


class InsertSearchSitesPass(ir.passes.InPlacePass):
    """Route every searched operand through a site whose format is an input of the graph.

    Before:  y = Conv (x, w)
    After:   x_q = onnx_fliqs.SearchQDQ (x, scale_0, lo_0, hi_0, ...)
             w_q = onnx_fliqs.SearchQDQ (w, scale_1, lo_1, hi_1, ...)
             y = Conv (x_q, w_q)

    The numbers come from two new initializers, ``onnx_fliqs.codes`` and ``onnx_fliqs.scales``,
    which at first mean float32: the outputs do not change until others are fed.

    A site ``after`` another reads that one's output. Where a quantized tensor ``y`` is an
    output of the graph, the site's output is called ``y``, and what it quantizes ``y@float``.

    Requires: the nodes and values that the sites name; unique node names.
    Ensures: every consumer that a site names, and the output that it feeds, reads the site;
        signature and outputs unchanged.
    Idempotent: an operand already behind its site is left alone.
    """

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self._sites = space.sites
        self._function = ANY_SITE if space.needs_mantissa else INTEGER_SITE

    def requires(self, model: ir.Model) -> None:
        """Every named node and value exists."""
        nodes = {node.name for node in model.graph.all_nodes()}
        for site in self._sites:
            missing = [name for name, _ in site.consumers if name not in nodes]
            if missing:
                raise ir.passes.PreconditionError(
                    f"site {site.name} is read by {missing[0]!r}, which the graph lacks"
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the sites that are missing."""
        graph = model.graph
        if CODES in graph.initializers:
            return ir.passes.PassResult(model, modified=False)
        order = {node: index for index, node in enumerate(graph)}
        by_name = {str(node.name): (node, top) for top in graph for node in with_bodies(top)}
        values = ir.convenience.create_value_mapping(graph)
        identity = np.array(grid_code(FORMATS["float32"]), np.float32)
        codes = _initializer(graph, CODES, np.tile(identity, len(self._sites)))
        scale_values = self._scales(graph, order)
        quantized: dict[str, ir.Value] = {}
        for index, site in enumerate(self._sites):
            tensor = values[site.tensor] if site.after is None else quantized[site.after]
            nodes = self._site_nodes(graph, site, tensor, index, codes, scale_values)
            result = quantized[site.name] = nodes[-1].outputs[0]
            # A site that follows has to find this one in front of it.
            following = [other for other in self._sites if other.after == site.name]
            uses = [use for each in (site, *following) for use in each.consumers]
            tops = [by_name[name][1] for name, _ in uses]
            if tops:
                graph.insert_before(min(tops, key=order.__getitem__), nodes)
            else:
                graph.extend(nodes)
            for name, position in site.consumers:
                by_name[name][0].replace_input_with(position, result)
            if site.is_output:
                _hand_out(graph, tensor, result)
        function = site_function(self._function)
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Count the sites anew."""
        found = {node.metadata_props.get(SITE_KEY) for node in model.graph.all_nodes()}
        missing = [site.name for site in self._sites if site.name not in found]
        if missing:
            raise ir.passes.PostconditionError(f"site {missing[0]} was not inserted")

    def _scales(self, graph: ir.Graph, order: dict[ir.Node, int]) -> list[ir.Value]:
        """One value per site, cut from the flat initializer."""
        sizes = [math.prod(site.broadcast_shape) for site in self._sites]
        scales = _initializer(graph, SCALES, np.ones(sum(sizes), np.float32))
        split = ir.node(
            "Split",
            [scales, _initializer(graph, f"{SCALES}.sizes", np.array(sizes, np.int64))],
            num_outputs=len(sizes),
            attributes={"axis": 0},
            name=f"{SCALES}.split",
        )
        for site, value in zip(self._sites, split.outputs, strict=True):
            value.name = f"{site.name}.scales"
        graph.insert_before(next(iter(order)), split)
        return list(split.outputs)

    def _site_nodes(
        self,
        graph: ir.Graph,
        site: Site,
        tensor: ir.Value,
        index: int,
        codes: ir.Value,
        scales: Sequence[ir.Value],
    ) -> list[ir.Node]:
        """The nodes of one site, the site itself last."""
        shape = _initializer(
            graph,
            f"{site.name}.scale_shape",
            np.array(site.broadcast_shape, np.int64).reshape(-1),
        )
        nodes = [ir.node("Reshape", [scales[index], shape], name=f"{site.name}.scale")]
        nodes[0].outputs[0].name = f"{site.name}.scale"
        operands = [tensor, nodes[0].outputs[0]]
        if site.group_axis is not None:
            # Cut into groups, so that each has its own scale.
            sizes = list(_lengths(tensor))
            sizes[site.group_axis : site.group_axis + 1] = [site.groups, -1]
            nodes.append(_reshape(graph, tensor, sizes, f"{site.name}.grouped"))
            operands[0] = nodes[-1].outputs[0]
        fields = ANY_CODES if self._function == ANY_SITE else INTEGER_CODES
        for field in fields:
            position = len(GridCode._fields) * index + GridCode._fields.index(field)
            at = _initializer(
                graph, f"{site.name}.{field}.index", np.array(position, np.int64)
            )
            nodes.append(ir.node("Gather", [codes, at], name=f"{site.name}.{field}"))
            nodes[-1].outputs[0].name = f"{site.name}.{field}"
            operands.append(nodes[-1].outputs[0])
        nodes.append(
            ir.node(
                self._function,
                operands,
                domain=DOMAIN,
                name=f"{site.name}.site",
                metadata_props={SITE_KEY: site.name},
            )
        )
        if site.group_axis is not None:
            nodes[-1].outputs[0].name = f"{site.name}.quantized.grouped"
            quantized = nodes[-1].outputs[0]
            nodes.append(
                _reshape(graph, quantized, _lengths(tensor), f"{site.name}.quantized")
            )
        output = nodes[-1].outputs[0]
        output.name = f"{site.name}.quantized"
        output.shape, output.type = tensor.shape, tensor.type
        return nodes


def _hand_out(graph: ir.Graph, tensor: ir.Value, quantized: ir.Value) -> None:
    """Make the quantized tensor an output of the graph, under the tensor's name."""
    places = [index for index, value in enumerate(graph.outputs) if value is tensor]
    for index in places:
        graph.outputs[index] = quantized
    quantized.name, tensor.name = tensor.name, _FLOAT.format(tensor.name)


def unquantized(values: Mapping[str, ir.Value], tensor: str) -> ir.Value:
    """What the site of a tensor quantizes; outputs of the graph give their name to the site.

    Args:
        values: Those of a graph with sites, by name.
        tensor: The tensor's name in the graph without.
    """
    return values.get(_FLOAT.format(tensor), values[tensor])


def _lengths(weight: ir.Value) -> tuple[int, ...]:
    assert weight.const_value is not None
    return tuple(weight.const_value.shape.numpy())


def _reshape(graph: ir.Graph, value: ir.Value, sizes: Sequence[int], name: str) -> ir.Node:
    shape = _initializer(graph, f"{name}.shape", np.array(sizes, np.int64))
    node = ir.node("Reshape", [value, shape], name=name)
    node.outputs[0].name = name
    return node


def _initializer(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value
