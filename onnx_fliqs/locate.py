"""Where in a graph a runtime goes wrong.

An inner value can only be looked at by making it an output, and that may keep a runtime from
the very fusion that is at fault. So values are exposed one at a time, and each look also tells
whether the fault is still there.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.errors import FliqsError
from onnx_fliqs.judged import FLOATS, exposed, values_read
from onnx_fliqs.passes._graph import label
from onnx_fliqs.verify import FUSED, Batches, Way, compare, watch, watched_names, way_of

__all__ = ["Origin", "find_origin", "named_node"]

Feeds: TypeAlias = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Origin:
    """The node where a disagreement begins."""

    node: str
    """Operator and name."""
    difference: float
    """Of what it writes: root mean square, as a share of what it should be."""
    sources: tuple[str, ...]
    """The nodes whose outputs it works on, as far as these can be looked at."""
    before: float
    """How far those outputs are off; the largest."""
    mended: bool
    """Whether the disagreement is gone when such an output is exposed: then a fusion of the
    nodes is at fault."""

    def __str__(self) -> str:
        """What a message says of it."""
        text = f"beginning at {self.node}: off by {self.difference:.3g}"
        if self.sources:
            text += f", what it gets from {', '.join(self.sources)} by {self.before:.3g}"
        if self.mended:
            text += ", and right once that is exposed"
        return text


def find_origin(model: ir.Model, batches: Batches, check: str) -> Origin | None:
    """Find a node that reads what is right and writes what is not.

    Args:
        model: A graph that runs unoptimised.
        batches: Feeds.
        check: Name of the check that found another result.

    Returns:
        None if the disagreement is nowhere but in the output, or vanishes at every look.
    """
    way = way_of(check)
    wrong = _wrong_output(model, batches, way)
    if wrong is None:
        return None
    target, feeds = wrong
    search = _Search(model, way, target, feeds)
    value = search.target
    while (earlier := search.earlier(value)) is not None:
        value = earlier
    sources = {source: search.look(source) for source in search.sources(value)}
    looks = search.looks.items()
    elsewhere = [look for seen, look in looks if seen is not value and seen not in sources]
    if value is search.target and elsewhere and not any(look.present for look in elsewhere):
        return None
    node = value.producer()
    if node is None:
        return None
    known = {source: look for source, look in sources.items() if look is not _NOTHING}
    return Origin(
        label(node),
        search.look(value).difference,
        tuple(label(each) for source in known if (each := source.producer()) is not None),
        max((look.difference for look in known.values()), default=0.0),
        any(not look.present for look in known.values()),
    )


def named_node(message: str, model: ir.Model) -> str | None:
    """The node of a graph that a runtime's message names: by itself, or by an output."""
    nodes = list(model.graph.all_nodes())
    named = [(node, node.name) for node in nodes]
    named += [(node, value.name) for node in nodes for value in node.outputs]
    for node, name in named:
        if name and re.search(rf"""['"(]{re.escape(name)}['")]""", message):
            return label(node)
    return None


@dataclass(frozen=True, slots=True)
class _Look:
    """What is seen with one inner value exposed."""

    difference: float
    """Of that value."""
    present: bool
    """Whether the output is still wrong."""


_NOTHING: Final = _Look(0.0, present=False)
"""The value cannot be exposed, or holds no floats."""


class _Search:
    """Looks at the values behind one wrong output, for one batch."""

    def __init__(self, model: ir.Model, way: Way, target: str, feeds: Feeds) -> None:
        self.looks: dict[ir.Value, _Look] = {}
        self.target = ir.convenience.create_value_mapping(model.graph)[target]
        self._model = model
        self._way = way
        self._feeds = feeds
        self._moving = _moving(model.graph)

    def look(self, value: ir.Value) -> _Look:
        """Expose a value, and compare."""
        if value not in self.looks:
            self.looks[value] = self._look(value)
        return self.looks[value]

    def earlier(self, value: ir.Value) -> ir.Value | None:
        """A value that differs and that this one depends on, if one is found."""
        behind = set(_behind(value, self._moving))
        before = [each for each in self._moving if each in behind and _is_visible(each)]
        right, wrong = -1, len(before)
        while wrong - right > 1:
            middle = (right + wrong) // 2
            if self._differs(before[middle]):
                wrong = middle
            else:
                right = middle
        if wrong < len(before):
            return before[wrong]
        return next(filter(self._differs, self.sources(value)), None)

    def sources(self, value: ir.Value) -> list[ir.Value]:
        """The nearest values before this one that can be looked at."""
        return list(_behind(value, self._moving, nearest=True))

    def _differs(self, value: ir.Value) -> bool:
        return self.look(value).difference > FUSED

    def _look(self, value: ir.Value) -> _Look:
        names = [str(value.name), str(self.target.name)]
        graph = exposed(self._model, names)
        try:
            (right,), (wrong,) = (
                way(graph, names, [self._feeds]) for way in (way_of("none"), self._way)
            )
        except FliqsError:
            return _NOTHING
        if value is not self.target and right[0].dtype.kind in "biuOSU":
            return _NOTHING
        inner, outer = (
            compare({n: a}, {n: b}).rms for n, a, b in zip(names, wrong, right, strict=True)
        )
        return _Look(inner, outer > FUSED)


def _wrong_output(model: ir.Model, batches: Batches, way: Way) -> tuple[str, Feeds] | None:
    """A judged value, and feeds for which it is wrong."""
    names = watched_names(model)
    for feeds in batches:
        (right,), (wrong,) = (
            watch(model, names, [feeds], run) for run in (way_of("none"), way)
        )
        for name in names:
            if compare({name: wrong[name]}, {name: right[name]}).rms > FUSED:
                return name, feeds
    return None


def _moving(graph: ir.Graph) -> dict[ir.Value, None]:
    """The values that nodes compute from the graph's inputs, in topological order."""
    found: dict[ir.Value, None] = {}
    inputs = {value for value in graph.inputs if not value.is_initializer()}
    for node in graph:
        if any(value in found or value in inputs for value in values_read(node)):
            found.update(dict.fromkeys(node.outputs))
    return found


def _behind(
    value: ir.Value, moving: Mapping[ir.Value, None], *, nearest: bool = False
) -> Iterator[ir.Value]:
    """The moving values that a value depends on; or the nearest that can be looked at."""
    pending, seen = [value], {value}
    while pending:
        node = pending.pop().producer()
        for source in values_read(node) if node is not None else ():
            if source not in moving or source in seen:
                continue
            seen.add(source)
            if not nearest:
                yield source
            elif _is_visible(source):
                yield source
                continue
            pending.append(source)


def _is_visible(value: ir.Value) -> bool:
    """Whether it may be a tensor of floats: codes need not even be readable."""
    node = value.producer()
    if node is None or node.op_type == "QuantizeLinear" or not value.name:
        return False
    return value.type is None or (
        isinstance(value.type, ir.TensorType) and value.dtype in FLOATS
    )
