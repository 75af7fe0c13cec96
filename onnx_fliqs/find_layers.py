"""Finds the layers of a canonical model: what is quantized, and what is left with a reason.

Nothing is changed here: the result is the :class:`~onnx_fliqs.sites.SearchSpace` that
``InsertSearchSitesPass`` puts into the graph.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, NoReturn

import onnx_ir as ir

from onnx_fliqs.errors import ConfigError, UnsupportedError
from onnx_fliqs.layer_operators import (
    LAYER_OPERATORS,
    PRODUCTS,
    RECURRENT,
    constant,
    operands,
    weights,
)
from onnx_fliqs.layer_positions import layer_positions
from onnx_fliqs.legality import legal_precisions
from onnx_fliqs.passes.lower_contrib_operators import why_contrib_stays
from onnx_fliqs.place_every_tensor import why_tensors_stay_float
from onnx_fliqs.place_sites import place_sites
from onnx_fliqs.precision import Precision, in_words
from onnx_fliqs.rules import Rule, Ruled, apply_rules, named
from onnx_fliqs.signs import mark_unsigned
from onnx_fliqs.sites import Layer, SearchSpace, Skipped
from onnx_fliqs.targets import Activations, Placement, Target

__all__ = ["find_layers"]

_WORTH_IT: Final = 1024
"""Elements of a matrix outside products that is quantized, or at least accounted for; smaller
ones are tables of a few rows, or vectors in disguise."""
_FLOATS: Final = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
)


def find_layers(
    model: ir.Model,
    target: Target,
    precisions: Sequence[Precision],
    rules: Sequence[Rule] = (),
    *,
    distinct: bool = True,
) -> SearchSpace:
    """Find what can be quantized in a canonical model.

    Args:
        model: A model after ``canonicalise``.
        target: Decides which operators run in which precision, and which activations get a
            site.
        precisions: What the layers choose from, cheapest first.
        rules: What single layers choose from instead, and which share a precision.
        distinct: Of precisions that are the same to a layer, it has one as a choice. Where the
            choice is made already, it may be any of them.

    Returns:
        The search space; the multiply-accumulates of its layers are still 0.

    Raises:
        ConfigError: A rule is for no layer, or leaves one without a choice.
        UnsupportedError: There is no quantizable layer.
    """
    found: dict[str, Layer | Skipped] = {}
    nodes: dict[str, ir.Node] = {}
    for place in _places(model.graph):
        what = _classify(place, model.graph)
        if what is not None:
            found[what.name] = what
            nodes[what.name] = place.node
    candidates = [layer for layer in found.values() if isinstance(layer, Layer)]
    ruled, scopes = apply_rules(
        rules,
        candidates,
        layer_positions(model.graph, {layer.name for layer in candidates}),
        precisions,
    )
    legal: dict[str, list[Precision]] = {}
    for layer in candidates:
        name = layer.name
        choices = _legal(layer, nodes[name], target, precisions, ruled[name], distinct)
        if isinstance(choices, Skipped):
            found[name] = choices
        else:
            legal[name] = choices
    skipped = [item for item in found.values() if isinstance(item, Skipped)]
    every = {*precisions, *itertools.chain.from_iterable(legal.values())}
    precisions = sorted(every, key=lambda precision: precision.order)
    layers = []
    readers: dict[str, list[str]] = {}
    for layer in candidates:
        if layer.name not in legal:
            continue
        new = {weight for weight in layer.weights if weight not in readers}
        for weight in layer.weights:
            readers.setdefault(weight, []).append(layer.name)
        bounded = replace(
            layer,
            params=_elements(nodes[layer.name], new),
            excluded=frozenset(p.name for p in every.difference(legal[layer.name])),
            rule=ruled[layer.name].by,
        )
        layers.append(bounded)
    if not layers:
        raise UnsupportedError(
            f"no quantizable layer: the model has no float32 {', '.join(LAYER_OPERATORS)}"
            + _left_out(skipped)
        )
    tied = _tied(rules, scopes, layers, skipped)
    decided = {layer.name: nodes[layer.name] for layer in layers}
    sites = place_sites(model, layers, decided, target, precisions)
    if target.placement is Placement.EVERY_TENSOR:
        # What is no layer may have its constants quantized all the same.
        reading = {name for s in sites if s.is_weight for name, _ in s.consumers}
        skipped = [item for item in skipped if item.name not in reading]
        skipped += why_tensors_stay_float(model, sites)
    space = SearchSpace(
        layers=tuple(layers),
        sites=sites,
        precisions=tuple(precisions),
        skipped=tuple(skipped),
        # A weight is stored once, in one format.
        groups=(
            *(tuple(names) for names in readers.values() if len(names) > 1),
            *tied,
        ),
        power_of_two_scales=target.power_of_two_scales,
    )
    for names, common in zip(space.decisions, space.choices, strict=True):
        if not common:
            _refuse(names, space, target, rules, scopes)
    if target.activations is Activations.SYMMETRIC:
        return space
    return mark_unsigned(model, space)


@dataclass(frozen=True, slots=True)
class _Place:
    """A node, and where it lies."""

    node: ir.Node
    inside: ir.Node | None = None
    """The node of the main graph in whose body it is."""


def _places(graph: ir.Graph, inside: ir.Node | None = None) -> Iterator[_Place]:
    """Every node of a graph and of the bodies in it, in order."""
    for node in graph:
        yield _Place(node, inside)
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH:
                yield from _places(attribute.as_graph(), inside or node)
            elif attribute.type is ir.AttributeType.GRAPHS:
                for body in attribute.as_graphs():
                    yield from _places(body, inside or node)


def _left_out(skipped: Sequence[Skipped]) -> str:
    """The first of what was skipped, for a message."""
    items = "; ".join(f"{item.op_type} {item.name}: {item.reason}" for item in skipped[:3])
    return f" (left out: {items})" if items else ""


def _elements(node: ir.Node, names: set[str]) -> int:
    sizes = {v.name: t.size for _, v in weights(node) if (t := constant(v)) is not None}
    return sum(size for name, size in sizes.items() if name in names)


def _classify(place: _Place, graph: ir.Graph) -> Layer | Skipped | None:
    """A layer, a node that is left although it has weights, or neither."""
    node = place.node
    name, op_type = str(node.name), node.op_type
    reason = _why_left(place, graph)
    if reason is not None:
        return Skipped(name=name, op_type=op_type, reason=reason)
    if not _may_be_layer(node):
        return None
    return Layer(
        name=name,
        op_type=op_type,
        weights=tuple(dict.fromkeys(str(value.name) for _, value in weights(node))),
        params=0,
        weight_only=_why_weight_only(place),
    )


def _legal(
    layer: Layer,
    node: ir.Node,
    target: Target,
    precisions: Sequence[Precision],
    ruled: Ruled,
    distinct: bool,
) -> list[Precision] | Skipped:
    """What a layer may take, or why it stays float.

    Raises:
        ConfigError: A rule leaves it nothing.
    """
    legal = functools.partial(
        legal_precisions,
        node,
        target,
        weights_only=layer.weight_only is not None,
        distinct=distinct and not ruled.tied,
    )
    offered = sorted({*precisions, *ruled.choices}, key=lambda precision: precision.order)
    names = in_words([p for p in offered if p.name != "float32"])
    if names and all(precision.name == "float32" for precision in legal(offered)):
        reason = f"target {target.name} has no kernel for it in {names}"
        if target.kernels is None:
            reason = f"its weights cannot be cut into the groups of {names}"
        return Skipped(name=layer.name, op_type=layer.op_type, reason=reason)
    found = legal(ruled.choices)
    if not found:
        wanted = in_words(ruled.choices)
        raise ConfigError(
            f"{ruled.by} leaves layer {layer.name!r} nothing that it may take"
            + (f": {target.name} does not run {wanted} there" if wanted else "")
        )
    return found


def _tied(
    rules: Sequence[Rule],
    scopes: Sequence[frozenset[str]],
    layers: Sequence[Layer],
    skipped: Sequence[Skipped],
) -> list[tuple[str, ...]]:
    """The groups of the rules that tie layers.

    Raises:
        ConfigError: A rule is only for what stays float, or ties fewer than two layers.
    """
    groups = []
    reasons = {item.name: item.reason for item in skipped}
    for number, (rule, scope) in enumerate(zip(rules, scopes, strict=True)):
        names = tuple(layer.name for layer in layers if layer.name in scope)
        if not names:
            name = min(scope)
            raise ConfigError(
                f"{named(number, rule)} is for no layer: {name!r} stays float: {reasons[name]}"
            )
        if rule.share and len(names) < 2:
            raise ConfigError(f"{named(number, rule)} is for one layer only, {names[0]!r}")
        if rule.share:
            groups.append(names)
    return groups


def _refuse(
    names: Sequence[str],
    space: SearchSpace,
    target: Target,
    rules: Sequence[Rule],
    scopes: Sequence[frozenset[str]],
) -> NoReturn:
    """Report layers that share a precision, of which none is left.

    Raises:
        ConfigError: By a rule.
        UnsupportedError: By the target alone.
    """
    involved = [
        named(number, rule)
        for number, (rule, scope) in enumerate(zip(rules, scopes, strict=True))
        if scope & set(names)
    ]
    if not involved:
        raise UnsupportedError(
            f"layers {', '.join(names)} share a weight, and {target.name} runs them in no"
            " precision that they could share"
        )
    # Of layers that may take the same, one.
    left: dict[str, str] = {}
    for name in names:
        excluded = space.layer[name].excluded
        choices = in_words([p for p in space.precisions if p.name not in excluded])
        left.setdefault(choices, f"{name}: {choices}")
    raise ConfigError(
        f"{' and '.join(involved)} leave{'s' * (len(involved) == 1)} layers that share a"
        f" precision none in common ({'; '.join(left.values())})"
    )


def _may_be_layer(node: ir.Node) -> bool:
    if node.domain or node.op_type not in LAYER_OPERATORS:
        return False
    return node.op_type != "Gather" or bool(_matrices(node))


def _why_left(place: _Place, graph: ir.Graph) -> str | None:
    """Why a node with operands worth quantizing keeps them in float; else None."""
    node = place.node
    if not _may_be_layer(node):
        if (fused := why_contrib_stays(node)) is not None:
            return fused
        if not _matrices(node):
            return None
        if node.domain:
            return f"operators of the domain {node.domain} are left as they are"
        return "its constant is no factor of a product of matrices"
    unfit = _why_unfit(node)
    if unfit is not None:
        return unfit
    found = weights(node)
    weight_only = _why_weight_only(place)
    if weight_only is None:
        return None
    if not found:
        return weight_only if node.op_type in PRODUCTS else "none of its operands is constant"
    if any(value.graph is not graph for _, value in found):
        return "its weights belong to the body that holds it"
    return None


def _why_unfit(node: ir.Node) -> str | None:
    """What is wrong with the operands themselves."""
    found = weights(node)
    if node.op_type in PRODUCTS:
        if any(value is None for value in node.inputs[:2]):
            return "an operand is missing"
        if len(found) == 2:
            return "both operands are constant"
    if node.op_type == "Gather":
        if constant(node.inputs[1]) is not None:
            return "both operands are constant"
        table = constant(node.inputs[0])
        if table is None or len(table.shape) != 2 or node.attributes.get_int("axis", 0) != 0:
            return "only tables of two axes that are read by rows are quantized"
    for index in operands(node):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and value.dtype not in (None, ir.DataType.FLOAT):
            return f"its operand {value.name} is {value.dtype.name}, not FLOAT"
    if any((tensor := constant(value)) is not None and not tensor.size for _, value in found):
        return "its weight is empty"
    return None


def _why_weight_only(place: _Place) -> str | None:
    """Why the activations of a layer stay float; None where they are quantized."""
    if place.inside is not None:
        inside = f"{place.inside.op_type} {place.inside.name!r}"
        return f"its activations lie inside {inside}, where they cannot be calibrated"
    if place.node.op_type in RECURRENT:
        return "its activations lie inside a recurrent cell"
    if place.node.op_type == "Gather":
        return "it reads rows of a table and multiplies nothing"
    if place.node.op_type == "Einsum":
        return "no runtime has an integer kernel for Einsum"
    return None


def _matrices(node: ir.Node) -> list[ir.Value]:
    """Its constants of floating point that are matrices of some size."""
    found = []
    for value in node.inputs:
        tensor = constant(value)
        if value is None or tensor is None or tensor.dtype not in _FLOATS:
            continue
        sizes = [size for size in tensor.shape.numpy() if size > 1]
        if len(sizes) > 1 and tensor.size >= _WORTH_IT:
            found.append(value)
    return found
