"""What the layers of a model cost in a runtime: the table that ``profile`` writes.

Layers have no latency of their own: runtimes fuse them, and hand integers from one to the next
without a detour over floats. What can be measured is whole graphs, and the table explains
those as

    latency = base + sum of entries[layer, precision] + sum of crossed borders

The entries are differences from the most precise choice. A border lies between two
neighbouring layers; it is crossed where they compute on different kinds of numbers, so that
the runtime has to convert a tensor in between.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike, fspath
from typing import Any, Final

from onnx_fliqs.errors import ConfigError
from onnx_fliqs.json_files import json_object, read_text
from onnx_fliqs.sites import SearchSpace

__all__ = [
    "Conditions",
    "Estimate",
    "LatencyBorder",
    "LatencyTable",
    "choice_names",
    "kind_of",
]

_SCHEMA: Final = 2


def choice_names(space: SearchSpace) -> tuple[tuple[str, ...], ...]:
    """For each decision, the names of what it may choose."""
    return tuple(tuple(p.name for p in choices) for choices in space.choices)


def kind_of(precision: str) -> str:
    """The numbers that a layer of this precision reads and writes: its activations' format."""
    return precision.rpartition(":")[2]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Milliseconds, with the quartiles between which repeated measurements lie."""

    ms: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LatencyBorder:
    """What it costs if two neighbouring layers compute on different kinds of numbers."""

    layers: tuple[str, str]
    cost: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """Where and how latency is measured; only what is equal in all of it can be compared."""

    runtime: str
    version: str
    machine: str
    threads: int | None
    """Threads within one operator; None: the runtime's choice."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of the inputs, batch included."""

    def why_not(self, other: "Conditions") -> str | None:
        """Why measurements under two conditions cannot be compared; None if they can."""
        for name, here, there in (
            ("runtime", f"{self.runtime} {self.version}", f"{other.runtime} {other.version}"),
            ("machine", self.machine, other.machine),
            ("number of threads", _threads_text(self.threads), _threads_text(other.threads)),
            ("inputs", _shapes_text(self.shapes), _shapes_text(other.shapes)),
        ):
            if here != there:
                return f"the latency table's {name} is {here}; here it is {there}"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTable:
    """The latency of every assignment of a model, from measured whole graphs."""

    model: str
    """Fingerprint of the float model."""
    target: str
    conditions: Conditions
    seed: int
    assignments: int
    """Number of measured graphs."""
    repetitions: int
    """Runs of all graphs together, each paired with one of the float model."""
    median_error: float
    """Of the predictions for graphs that were left out of the fit, as a share."""
    p90_error: float
    """Ninety per cent of those predictions are better than this."""
    float_model: Estimate
    base_ms: float
    """All layers in their most precise choice."""
    layers: Mapping[str, Mapping[str, Estimate]]
    """Layer name → name of a precision → difference from the base."""
    borders: tuple[LatencyBorder, ...]

    @property
    def batch_size(self) -> int:
        """First dimension of the inputs."""
        return next((dims[0] for dims in self.conditions.shapes.values() if dims), 1)

    def predict(self, chosen: Mapping[str, str]) -> float:
        """Milliseconds of an assignment.

        Args:
            chosen: Layer name → name of its precision, for all layers of the table.
        """
        own = sum(row[chosen[name]].ms for name, row in self.layers.items())
        crossed = (
            border.cost.ms
            for border in self.borders
            if len({kind_of(chosen[name]) for name in border.layers}) > 1
        )
        return self.base_ms + own + sum(crossed)

    def check(self, space: SearchSpace, model: str, target: str) -> None:
        """Refuse a table that does not tell the latency of some model's assignments.

        Args:
            space: What can be chosen.
            model: Fingerprint of the float model.
            target: Name of the target.

        Raises:
            ConfigError: It is of another model or target, or lacks a layer or a precision.
        """
        if self.model != model:
            raise ConfigError("the latency table is of another model: profile this one")
        if self.target != target:
            raise ConfigError(
                f"the latency table is of target {self.target}, not {target}: search with"
                f" --target {self.target}, or profile with --target {target}"
            )
        for names, choices in zip(space.decisions, choice_names(space), strict=True):
            for name in names:
                row = self.layers.get(name)
                if row is None:
                    raise ConfigError(f"the latency table has no layer {name!r}")
                if lacking := [choice for choice in choices if choice not in row]:
                    raise ConfigError(
                        f"the latency table has no {lacking[0]} for layer {name!r}:"
                        " profile with the --space of the search, and its --separate or --tied"
                    )

    def digest(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """As JSON (schema 2)."""
        return {"schema": _SCHEMA, **asdict(self)}

    def to_json(self) -> str:
        """Serialize; equal tables give equal text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: str | PathLike[str]) -> "LatencyTable":
        """Read a file.

        Raises:
            ConfigError: The file cannot be read, or as for :meth:`from_json`.
        """
        return cls.from_json(read_text(path), fspath(path))

    @classmethod
    def from_json(cls, text: str, source: str = "latency table") -> "LatencyTable":
        """Read what :meth:`to_json` wrote.

        Args:
            text: JSON.
            source: What to call it in messages.

        Raises:
            ConfigError: It is not JSON, of another schema, or damaged.
        """
        content = json_object(text, source, "a latency table", _SCHEMA)
        try:
            return _parsed(content)
        except KeyError as error:
            raise ConfigError(f"{source} is damaged: it has no {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{source} is damaged: {error}") from None


def _parsed(content: Mapping[str, Any]) -> LatencyTable:
    """The table; KeyError, TypeError, ValueError or AttributeError if it is none."""
    where = content["conditions"]
    threads = where["threads"]
    layers = {
        name: {precision: _estimate(found) for precision, found in row.items()}
        for name, row in content["layers"].items()
    }
    borders = []
    for border in content["borders"]:
        first, second = (_text(name) for name in border["layers"])
        if unknown := {first, second} - set(layers):
            raise ValueError(f"a border names layer {min(unknown)!r}, which has no entries")
        borders.append(LatencyBorder((first, second), _estimate(border["cost"])))
    return LatencyTable(
        model=_text(content["model"]),
        target=_text(content["target"]),
        conditions=Conditions(
            runtime=_text(where["runtime"]),
            version=_text(where["version"]),
            machine=_text(where["machine"]),
            threads=None if threads is None else _whole(threads),
            shapes={name: tuple(map(_whole, dims)) for name, dims in where["shapes"].items()},
        ),
        seed=_whole(content["seed"]),
        assignments=_whole(content["assignments"]),
        repetitions=_whole(content["repetitions"]),
        median_error=_number(content["median_error"]),
        p90_error=_number(content["p90_error"]),
        float_model=_positive(_estimate(content["float_model"])),
        base_ms=_number(content["base_ms"]),
        layers=layers,
        borders=tuple(borders),
    )


def _estimate(found: Mapping[str, Any]) -> Estimate:
    return Estimate(*(_number(found[key]) for key in ("ms", "low", "high")))


def _positive(estimate: Estimate) -> Estimate:
    if estimate.ms <= 0:
        raise ValueError(f"a latency of {estimate.ms:g} ms")
    return estimate


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no number")
    if not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is no whole number")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no string")
    return value


def _threads_text(threads: int | None) -> str:
    return "the runtime's choice" if threads is None else str(threads)


def _shapes_text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} [{','.join(map(str, dims))}]" for name, dims in shapes.items())
