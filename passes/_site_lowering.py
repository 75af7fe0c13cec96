"""How a pass turns searchable sites into the nodes of a dialect, whichever that is."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.formats import Format
from onnx_fliqs.passes.insert_search_sites import SITE_KEY
from onnx_fliqs.precision import PrecisionMap
from onnx_fliqs.site_functions import ANY_SITE, DOMAIN, INTEGER_SITE
from onnx_fliqs.sites import ScaleTable, SearchSpace, Site

__all__ = ["Lower", "SiteBuilder", "lower_every_site", "require_no_site"]


class SiteBuilder:
    """Inserts nodes in front of a site's node, named after the site."""

    def __init__(self, graph: ir.Graph, before: ir.Node, site: Site, tensor: ir.Value) -> None:
        self._graph = graph
        self.node = before
        """The site's node."""
        self.site = site
        self.tensor = tensor
        """What the site quantizes."""

    def __call__(
        self,
        op_type: str,
        inputs: list[ir.Value],
        attributes: dict[str, Any] | None = None,
        *,
        domain: str = "",
    ) -> ir.Value:
        """Insert a node, named ``<site>.<operator>``; its output."""
        name = f"{self.site.name}.{op_type}"
        return self.insert(
            ir.node(op_type, inputs, attributes or {}, domain=domain, name=name)
        )

    def insert(self, node: ir.Node) -> ir.Value:
        """Insert a node that has a name; its output."""
        node.outputs[0].name = f"{node.name}.out"
        self._graph.insert_before(self.node, node)
        return node.outputs[0]

    def constant(self, suffix: str, array: npt.ArrayLike | ir.TensorProtocol) -> ir.Value:
        """An initializer named after the site; the same name means the same content."""
        name = f"{self.site.name}.{suffix}"
        if name in self._graph.initializers:
            return self._graph.initializers[name]
        tensor = array if isinstance(array, ir.TensorProtocol) else ir.tensor(array, name=name)
        value = ir.val(name, const_value=tensor)
        self._graph.register_initializer(value)
        return value


Lower: TypeAlias = Callable[[SiteBuilder, Format, npt.NDArray[np.float32]], ir.Value]
"""Makes what a site's readers read, from its format (never float32) and its scales."""


def lower_every_site(
    model: ir.Model, space: SearchSpace, chosen: PrecisionMap, scales: ScaleTable, lower: Lower
) -> bool:
    """Replace each site, and forget the functions that computed them.

    Sites that quantize one tensor in the same way become one. A site in float32 disappears.

    Args:
        model: Its sites are in the main graph.
        space: The sites.
        chosen: A precision for every layer.
        scales: Scales for every site in the format it takes.
        lower: The dialect.

    Returns:
        Whether there was any site.
    """
    nodes = [node for node in model.graph if SITE_KEY in node.metadata_props]
    if not nodes:
        return False
    taken = space.formats_taken(chosen)
    steps = space.scales_taken(taken, scales)
    made: dict[tuple[Any, ...], ir.Value] = {}
    for node in nodes:
        site = space.site[node.metadata_props[SITE_KEY]]
        tensor, last = _ends(node, site)
        fmt, scale = taken[site.name], steps[site.name]
        key = (tensor, fmt.name, scale.tobytes(), site.axis)
        if fmt.name == "float32":
            made[key] = tensor
        elif key not in made:
            made[key] = lower(SiteBuilder(model.graph, node, site, tensor), fmt, scale)
        # Quantized once more on the same grid, numbers stay what they are.
        made[(made[key], *key[1:])] = made[key]
        _replace(last.outputs[0], made[key])
        model.graph.remove(dict.fromkeys((last, node)), safe=True)
    for name in (ANY_SITE, INTEGER_SITE):
        model.functions.pop((DOMAIN, name, ""), None)
    model.opset_imports.pop(DOMAIN, None)
    return True


def _ends(node: ir.Node, site: Site) -> tuple[ir.Value, ir.Node]:
    """What a site quantizes, and its last node: groups have a Reshape on either side."""
    tensor, last = node.inputs[0], node
    if site.group_axis is not None and tensor is not None:
        cut = tensor.producer()
        assert cut is not None
        tensor, last = cut.inputs[0], next(iter(node.outputs[0].uses())).node
    assert tensor is not None  # a site always has its tensor
    return tensor, last


def _replace(quantized: ir.Value, made: ir.Value) -> None:
    """Let all that reads a site, an output of the graph included, read another value."""
    is_output, name = quantized.is_graph_output(), quantized.name
    quantized.replace_all_uses_with(made, replace_graph_outputs=True)
    if is_output:
        made.name, made.shape, made.type = name, quantized.shape, quantized.type


def require_no_site(model: ir.Model) -> None:
    """Check the postcondition of passes that lower.

    Raises:
        onnx_ir.passes.PostconditionError: A site is left.
    """
    if any(node.domain == DOMAIN for node in model.graph.all_nodes()):
        raise ir.passes.PostconditionError("a searchable site was not lowered")
