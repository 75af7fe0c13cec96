"""Rules for single layers, from a user: what they may take, and which share a precision.

A file of rules is one object: ``schema`` (1) and ``rules``, a list of objects with the fields
of :class:`Rule`. Rules are taken in their order: what comes later changes what came before, so
that a general rule can have exceptions.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os import PathLike, fspath
from typing import Any, Final

from onnx_fliqs.errors import ConfigError
from onnx_fliqs.formats import is_passthrough
from onnx_fliqs.json_files import json_object, read_text
from onnx_fliqs.layer_operators import LAYER_OPERATORS
from onnx_fliqs.layer_positions import Position
from onnx_fliqs.precision import Precision, parse_precision
from onnx_fliqs.sites import Layer

__all__ = ["Rule", "Ruled", "apply_rules", "named", "read_rules", "rules_from_json"]

_SCHEMA: Final = 1
_SELECTORS: Final = ("layers", "ops", "positions")
_ACTIONS: Final = ("fix", "allow", "forbid", "share")
_POSITIONS: Final = tuple(position.value for position in Position)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What the layers may take that all of its selectors admit: one action."""

    layers: tuple[str, ...] = ()
    """Names, or shell-style patterns of names; none: whatever the name."""
    ops: tuple[str, ...] = ()
    """Operator types; none: whatever the operator."""
    positions: tuple[str, ...] = ()
    """``first``, ``last``: no other layer comes before, or after; none: wherever it is."""
    fix: str | None = None
    """The precision that they take, of the space or not."""
    allow: tuple[str, ...] = ()
    """The precisions among which they choose in place of the space."""
    forbid: tuple[str, ...] = ()
    """Precisions that they do not take; a number format, for both operands or either."""
    share: bool = False
    """Whether they all take the same precision."""

    def __post_init__(self) -> None:
        if not any(getattr(self, name) for name in _SELECTORS):
            raise ConfigError(f"needs one of {', '.join(_SELECTORS)}")
        if sum(bool(getattr(self, name)) for name in _ACTIONS) != 1:
            raise ConfigError(f"needs exactly one of {', '.join(_ACTIONS)}")
        for field, known in (("ops", tuple(LAYER_OPERATORS)), ("positions", _POSITIONS)):
            for name in getattr(self, field):
                if name not in known:
                    raise ConfigError(f"{field}: {name!r} is none of {', '.join(known)}")
        for field, names in (
            ("fix", self._offered if self.fix else ()),
            ("allow", self.allow),
            ("forbid", self.forbid),
        ):
            _parsed(names, f"{field}: ")

    def __str__(self) -> str:
        selected = " & ".join(
            ", ".join(names) for names in (self.layers, self.ops, self.positions) if names
        )
        if self.share:
            return f"{selected}: share"
        action = next(name for name in _ACTIONS if getattr(self, name))
        return f"{selected}: {action} {', '.join(self._offered or self.forbid)}"

    @property
    def _offered(self) -> tuple[str, ...]:
        return self.allow if self.fix is None else (self.fix,)

    @property
    def offered(self) -> tuple[Precision, ...]:
        """What the layers choose from in place of the space, cheapest first; else nothing."""
        return tuple(sorted(_parsed(self._offered), key=lambda precision: precision.order))

    def admits(self, layer: Layer, positions: Iterable[Position]) -> bool:
        """Whether the rule is for a layer at some positions."""
        return (
            (not self.layers or any(_matches(layer.name, name) for name in self.layers))
            and (not self.ops or layer.op_type in self.ops)
            and (not self.positions or any(p.value in self.positions for p in positions))
        )


@dataclass(frozen=True, slots=True)
class Ruled:
    """What the rules say about one layer."""

    choices: tuple[Precision, ...]
    """What it may take, cheapest first, as far as its target runs it."""
    by: str | None = None
    """The last rule that says so, as messages name it."""
    tied: bool = False
    """Whether it has to share its precision with others."""


def named(number: int, rule: Rule) -> str:
    """A rule, for messages.

    Args:
        number: Its place in the list, 0 for the first.
        rule: The rule.
    """
    return f"rule {number + 1} ({rule})"


def apply_rules(
    rules: Sequence[Rule],
    layers: Sequence[Layer],
    positions: Mapping[str, frozenset[Position]],
    precisions: Sequence[Precision],
) -> tuple[dict[str, Ruled], tuple[frozenset[str], ...]]:
    """What the rules say about each layer.

    Args:
        rules: In their order.
        layers: What can be quantized.
        positions: Of each layer, by name.
        precisions: The space, cheapest first.

    Returns:
        By layer name; and for each rule, the names of its layers.

    Raises:
        ConfigError: A rule, or a name or pattern of one, is for no layer.
    """
    found = {layer.name: Ruled(tuple(precisions)) for layer in layers}
    scopes = []
    for number, rule in enumerate(rules):
        for name in rule.layers:
            if not any(_matches(layer.name, name) for layer in layers):
                raise ConfigError(f"{named(number, rule)}: no layer is named {name!r}")
        scope = [layer.name for layer in layers if rule.admits(layer, positions[layer.name])]
        if not scope:
            raise ConfigError(f"{named(number, rule)} is for no layer")
        for name in scope:
            found[name] = _ruled(found[name], number, rule)
        scopes.append(frozenset(scope))
    return found, tuple(scopes)


def _ruled(before: Ruled, number: int, rule: Rule) -> Ruled:
    if rule.share:
        return dataclasses.replace(before, tied=True)
    forbidden = _parsed(rule.forbid)
    left = tuple(p for p in before.choices if not any(_strikes(f, p) for f in forbidden))
    return dataclasses.replace(before, choices=rule.offered or left, by=named(number, rule))


def _strikes(forbidden: Precision, precision: Precision) -> bool:
    """Whether it is forbidden, or has an operand in the one format that is.

    One operand may be left alone where leaving both is forbidden.
    """
    if not forbidden.tied or is_passthrough(forbidden.weights):
        return precision == forbidden
    return forbidden.weights in (precision.weights, precision.activations)


def _parsed(names: Iterable[str], where: str = "") -> set[Precision]:
    try:
        return {parse_precision(name) for name in names}
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None


def _matches(name: str, pattern: str) -> bool:
    # A name may hold what means something in a pattern.
    return name == pattern or fnmatchcase(name, pattern)


# --- reading -------------------------------------------------------------------------------


def read_rules(path: str | PathLike[str]) -> tuple[Rule, ...]:
    """Read a file of rules.

    Raises:
        ConfigError: It cannot be read, or as for :func:`rules_from_json`.
    """
    return rules_from_json(read_text(path), fspath(path))


def rules_from_json(text: str, source: str = "rules") -> tuple[Rule, ...]:
    """Read rules.

    Args:
        text: JSON.
        source: What to call it in messages.

    Raises:
        ConfigError: It is not JSON, of another schema, or a rule is wrong.
    """
    content = json_object(text, source, "a list of rules", _SCHEMA)
    rules = content.pop("rules", None)
    if not isinstance(rules, list) or content:
        raise ConfigError(f"{source} needs a list `rules` and nothing else")
    return tuple(_rule(each, f"{source}: rules[{i}]") for i, each in enumerate(rules))


def _rule(content: Any, where: str) -> Rule:
    if not isinstance(content, dict):
        raise ConfigError(f"{where} is not an object")
    known = {field.name: field.default for field in dataclasses.fields(Rule)}
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in known:
            raise ConfigError(f"{where}: {name} is no field; known: {', '.join(known)}")
        if isinstance(known[name], tuple):
            right = isinstance(value, list) and all(isinstance(item, str) for item in value)
            needed = "a list of strings"
        elif name == "share":
            right, needed = value is True, "true"
        else:
            right, needed = isinstance(value, str), "a string"
        if not right:
            raise ConfigError(f"{where}: {name} needs {needed}, got {json.dumps(value)}")
        values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return Rule(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
