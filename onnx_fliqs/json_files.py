"""Reads the JSON artefacts: one object each, with the number of its schema."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from onnx_fliqs.errors import ConfigError

__all__ = ["json_object", "read_text"]


def read_text(path: str | PathLike[str]) -> str:
    """The text of a file.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands there twice")
    return found


def json_object(text: str, source: str, kind: str, schema: int) -> dict[str, Any]:
    """The fields of an artefact, but for its schema.

    Args:
        text: JSON.
        source: What to call it in messages.
        kind: What it has to be, with its article.
        schema: The number that it has to carry.

    Raises:
        ConfigError: It is not JSON, or something else, or says something twice.
    """
    try:
        content: Any = json.loads(text, object_pairs_hook=_without_repetition)
    # ValueError: also a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not JSON: {error}") from None
    found = content.pop("schema", None) if isinstance(content, dict) else None
    if isinstance(found, bool) or found != schema:
        raise ConfigError(f"{source} is not {kind} of schema {schema}")
    fields: dict[str, Any] = content
    return fields
