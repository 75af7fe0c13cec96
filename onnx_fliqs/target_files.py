"""Targets by name or from a file: profiles as JSON, which users write for their own hardware.

A profile is one object: ``schema`` (1), ``name``, and any fields of
:class:`~onnx_fliqs.targets.Target`, by the same names. Those that are left out are taken from
the built-in target that ``base`` names, or else are the defaults.
"""

import dataclasses
import enum
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import onnx

from onnx_fliqs.errors import ConfigError
from onnx_fliqs.json_files import json_object
from onnx_fliqs.layer_operators import LAYER_OPERATORS
from onnx_fliqs.precision import parse_precision
from onnx_fliqs.targets import TARGETS, Kernels, Target

__all__ = ["parse_target", "recorded_target", "target_from_json", "target_to_json"]

_SCHEMA: Final = 1
_SUFFIX: Final = ".json"
_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_RUNTIMES: Final = ("onnxruntime", "openvino")
_EIGHT_BITS: Final = ("UINT8", "INT8")
_QDQ_TYPES: Final = (
    *("UINT2", "INT2", "UINT4", "INT4", "UINT8", "INT8", "UINT16", "INT16", "INT32"),
    *("FLOAT4E2M1", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"),
)


# --- by name or path -----------------------------------------------------------------------


def parse_target(text: str) -> Target:
    """Find the target that a user names.

    Args:
        text: The name of a built-in target, or the path of a profile.

    Raises:
        ConfigError: It is neither, or the profile is wrong.
    """
    if text in TARGETS:
        return TARGETS[text]
    path = Path(text)
    try:
        if path.is_file() or path.suffix == _SUFFIX:
            return target_from_json(path.read_text(encoding="utf-8"), text)
    # ValueError: what is no text, and names that no file can have.
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the target {text!r}: {reason}") from None
    raise ConfigError(
        f"unknown target {text!r}; known: {', '.join(TARGETS)}, and the path of a profile"
        f" ({_SUFFIX})"
    )


def recorded_target(name: str, carrier: str) -> Target:
    """Look up the target whose name a file carries, which is never a path.

    Args:
        name: The name.
        carrier: What carries it, for messages.

    Raises:
        ConfigError: It is not a built-in target.
    """
    if name not in TARGETS:
        raise ConfigError(
            f"{carrier} is for the target {name!r}, which is none of {', '.join(TARGETS)}:"
            f" pass its profile, --target FILE{_SUFFIX}"
        )
    return TARGETS[name]


# --- writing -------------------------------------------------------------------------------


def target_to_json(target: Target) -> str:
    """Write every field of a target."""
    content = {"schema": _SCHEMA, **_plain(target)}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """Objects, lists, and values of enumerations in place of classes."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: _plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value


# --- reading -------------------------------------------------------------------------------


def target_from_json(text: str, source: str = "target") -> Target:
    """Read a profile.

    Args:
        text: JSON.
        source: What to call it in messages.

    Raises:
        ConfigError: It is not JSON, of another schema, or a field is unknown or wrong.
    """
    content = json_object(text, source, "a target profile", _SCHEMA)
    if "name" not in content:
        raise ConfigError(f"{source}: name: is missing")
    try:
        target = _build(content)
    except _WrongError as error:
        raise ConfigError(f"{source}: {error}") from None
    for path, mistake in _mistakes(target):
        raise ConfigError(f"{source}: {path}: {mistake}")
    return target


class _WrongError(Exception):
    """What is wrong with a field."""

    def __init__(self, path: str, mistake: str) -> None:
        super().__init__(f"{path}: {mistake}" if path else mistake)


def _build(content: dict[str, Any]) -> Target:
    base = content.pop("base", None)
    if base is not None and (not isinstance(base, str) or base not in TARGETS):
        raise _WrongError("base", f"{base!r} is none of {', '.join(TARGETS)}")
    if base is None:
        return typing.cast("Target", _read(Target, {"description": "", **content}, ""))
    given = {name: getattr(TARGETS[base], name) for name in _types(Target)}
    given |= _fields(Target, {"description": f"like {base}", **content}, "")
    return Target(**given)


def _types(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}


def _read(kind: Any, content: Any, path: str) -> Any:
    """Turn JSON into a value of a type: what :func:`_plain` made of it, back."""
    if isinstance(kind, types.UnionType):
        (some,) = (each for each in typing.get_args(kind) if each is not types.NoneType)
        return None if content is None else _read(some, content, path)
    if typing.get_origin(kind) is tuple:
        if not isinstance(content, list):
            raise _WrongError(path, f"needs a list, got {_shown(content)}")
        item = typing.get_args(kind)[0]
        return tuple(_read(item, each, f"{path}[{i}]") for i, each in enumerate(content))
    if dataclasses.is_dataclass(kind):
        if not isinstance(content, dict):
            raise _WrongError(path, f"needs an object, got {_shown(content)}")
        return _object(typing.cast("type", kind), content, path)
    if issubclass(kind, enum.Enum):
        return _member(kind, content, path)
    return _scalar(kind, content, path)


def _object(kind: type, content: dict[str, Any], path: str) -> Any:
    found = _fields(kind, content, path)
    for field in dataclasses.fields(kind):
        if field.name not in found and field.default is dataclasses.MISSING:
            raise _WrongError(_inside(path, field.name), "is missing")
    return kind(**found)


def _fields(kind: type, content: dict[str, Any], path: str) -> dict[str, Any]:
    """The fields of a class that are given."""
    known = _types(kind)
    for name in content:
        if name not in known:
            raise _WrongError(
                _inside(path, name), f"is no field; known: {', '.join(sorted(known))}"
            )
    return {
        name: _read(known[name], value, _inside(path, name)) for name, value in content.items()
    }


def _member(kind: type[enum.Enum], content: Any, path: str) -> enum.Enum:
    for member in kind:
        if content == member.value:
            return member
    names = ", ".join(str(member.value) for member in kind)
    raise _WrongError(path, f"needs one of {names}, got {_shown(content)}")


def _scalar(kind: type, content: Any, path: str) -> Any:
    accepted = (int, float) if kind is float else kind
    if not isinstance(content, accepted) or (isinstance(content, bool) and kind is not bool):
        name = {str: "a string", bool: "true or false", int: "an integer", float: "a number"}
        raise _WrongError(path, f"needs {name[kind]}, got {_shown(content)}")
    try:
        return kind(content)
    except OverflowError:
        raise _WrongError(path, f"{_shown(content)} is too large") from None


def _inside(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shown(content: Any) -> str:
    text = json.dumps(content)
    return text if len(text) <= 40 else f"{text[:40]}..."


# --- what types do not tell ----------------------------------------------------------------


def _mistakes(target: Target) -> Iterator[tuple[str, str]]:
    """Where the values of a profile make no sense: the field, and why."""
    if not re.fullmatch(_NAME, target.name):
        yield "name", "needs letters, digits and . _ - only"
    if target.name in TARGETS:
        yield "name", f"{target.name} is a built-in target; choose another name"
    for index, kernels in enumerate(target.kernels or ()):
        yield from _wrong_kernels(kernels, f"kernels[{index}]")
    yield from _wrong_space(target)
    for field in ("per_channel_ops", "float_output_ops", "integer_output_ops"):
        yield from _strange(field, getattr(target, field), LAYER_OPERATORS)
    for field in ("between_ops", "shared_scale_ops"):
        yield from _wrong_operators(field, getattr(target, field))
    for index, fixed in enumerate(target.fixed_ranges):
        path = f"fixed_ranges[{index}]"
        yield from _wrong_operators(f"{path}.op", (fixed.op,))
        if not -math.inf < fixed.low < fixed.high < math.inf:
            yield path, f"needs low < high, got {fixed.low} and {fixed.high}"
    yield from _wrong_types(target)
    yield from _strange("runtimes", target.runtimes, _RUNTIMES)


def _wrong_kernels(kernels: Kernels, path: str) -> Iterator[tuple[str, str]]:
    yield from _strange(f"{path}.ops", kernels.ops, LAYER_OPERATORS)
    for index, name in enumerate(kernels.precisions):
        where = f"{path}.precisions[{index}]"
        try:
            canonical = parse_precision(name).name
        except ConfigError as error:
            yield where, str(error)
        else:
            if name != canonical:
                yield where, f"write {name!r} as {canonical!r}"
    if kernels.least_channels < 1:
        yield f"{path}.least_channels", f"needs at least 1, got {kernels.least_channels}"


def _wrong_space(target: Target) -> Iterator[tuple[str, str]]:
    try:
        target.space(None)
    except ConfigError as error:
        yield "default_space", str(error)
    if not 0 < target.default_bits < math.inf:
        yield "default_bits", f"needs a positive number, got {target.default_bits}"


def _wrong_types(target: Target) -> Iterator[tuple[str, str]]:
    if target.activation_type is not None:
        yield from _strange("activation_type", (target.activation_type,), _EIGHT_BITS)
    for field in ("qdq_types", "per_channel_types"):
        yield from _strange(field, getattr(target, field), _QDQ_TYPES)
    for index, pair in enumerate(target.operand_types or ()):
        path = f"operand_types[{index}]"
        yield from _strange(f"{path}.activations", (pair.activations,), _QDQ_TYPES)
        yield from _strange(f"{path}.weights", pair.weights, _QDQ_TYPES)


def _strange(
    path: str, names: Sequence[str] | None, known: Sequence[str]
) -> Iterator[tuple[str, str]]:
    for name in names or ():
        if name not in known:
            yield path, f"{name!r} is none of {', '.join(known)}"


def _wrong_operators(path: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        if not onnx.defs.has(name):
            yield path, f"{name!r} is no operator of ONNX"
