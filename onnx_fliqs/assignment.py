"""The artefact of a search: which precision each layer got, as versioned JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Final

from onnx_fliqs.errors import ConfigError
from onnx_fliqs.json_files import json_object, read_text
from onnx_fliqs.precision import Precision, PrecisionMap, parse_precision
from onnx_fliqs.sites import SearchSpace
from onnx_fliqs.target_files import recorded_target
from onnx_fliqs.targets import Target

__all__ = ["Assignment"]

_SCHEMA: Final = 1


@dataclass(frozen=True, slots=True)
class Assignment:
    """Layer name → name of its precision, and the target they were chosen for.

    What the target leaves in float stands there as float32: another one may run it.
    """

    layers: Mapping[str, str]
    target: str = "generic"

    @classmethod
    def of(cls, space: SearchSpace, chosen: PrecisionMap, target: str) -> "Assignment":
        """Of all layers of a model, those that stay float included.

        Args:
            space: Of the model.
            chosen: A precision for every layer of the space.
            target: Name of the target.
        """
        left = {item.name: "float32" for item in space.skipped}
        return cls(
            left | {layer.name: chosen[layer.name].name for layer in space.layers}, target
        )

    def to_json(self) -> str:
        """Serialize; the same layers in the same order always give the same text."""
        content = {"schema": _SCHEMA, "target": self.target, "layers": dict(self.layers)}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "assignment") -> "Assignment":
        """Read what :meth:`to_json` wrote.

        Args:
            text: JSON.
            source: What to call it in messages.

        Raises:
            ConfigError: It is not JSON, of another schema, or names a format that does not
                exist or that a layer cannot take.
        """
        content = json_object(text, source, "an assignment", _SCHEMA)
        layers, target = content.pop("layers", None), content.pop("target", "generic")
        if not isinstance(layers, dict) or not isinstance(target, str) or content:
            raise ConfigError(
                f"{source} needs an object `layers`, a string `target` and nothing else"
            )
        for name, fmt in layers.items():
            _check_precision(f"{source}: layer {name!r}", fmt)
        return cls(layers, target)

    def own_target(self) -> Target:
        """The target that it names.

        Raises:
            ConfigError: It is not a built-in one, so that its profile is needed.
        """
        return recorded_target(self.target, "the assignment")

    @classmethod
    def read(cls, path: str | PathLike[str]) -> "Assignment":
        """Read a file.

        Raises:
            ConfigError: The file cannot be read, or as for :meth:`from_json`.
        """
        return cls.from_json(read_text(path), fspath(path))

    def space(self, target: Target) -> tuple[Precision, ...]:
        """The precisions that occur, cheapest first: a search space that holds it.

        Raises:
            ConfigError: The target cannot run one of them.
        """
        names = set(self.layers.values())
        found = {target.check(name) for name in names - {"float32"}}
        # What the target has no kernel for is no layer of a search either, so that float32
        # need not be one of its precisions.
        found = found or set(target.space(None))
        if "float32" in names and (
            target.precisions is None or "float32" in target.precisions
        ):
            found.add(parse_precision("float32"))
        return tuple(sorted(found, key=lambda precision: precision.order))

    def precisions(self, space: SearchSpace) -> PrecisionMap:
        """The precisions of exactly the layers of a model.

        Raises:
            ConfigError: A layer is missing here or in the model, cannot take its precision, or
                layers that share a format have different ones.
        """
        known = set(space.layer)
        left = {item.name: item.reason for item in space.skipped}
        for name in set(self.layers) & set(left):
            if self.layers[name] != "float32":
                raise ConfigError(
                    f"the assignment gives layer {name!r} {self.layers[name]}, but it stays"
                    f" float: {left[name]}"
                )
        # For another target, more than layers may have been left in float.
        named = {name for name, precision in self.layers.items() if precision != "float32"}
        missing, unknown = known - set(self.layers), named - known - set(left)
        if missing or unknown:
            name = min(missing or unknown)
            raise ConfigError(
                f"the assignment has no format for layer {name!r} of the model"
                if missing
                else f"the assignment names layer {name!r}, which the model does not have"
            )
        chosen: dict[str, Precision] = {
            layer.name: parse_precision(self.layers[layer.name]) for layer in space.layers
        }
        for layer in space.layers:
            taken = chosen[layer.name]
            left_out = taken.name == "float32" and taken not in space.precisions
            if taken.name in layer.excluded or left_out:
                raise ConfigError(
                    f"the assignment gives layer {layer.name!r} {taken.name},"
                    f" which {self.target} does not run there"
                )
        for first, *others in space.decisions:
            for other in others:
                if chosen[other] != chosen[first]:
                    raise ConfigError(
                        f"the assignment gives layer {first!r} {chosen[first].name} and layer"
                        f" {other!r} {chosen[other].name}, but the two share a format"
                    )
        return chosen


def _check_precision(where: str, name: object) -> None:
    """Refuse what is not the name of a precision."""
    if not isinstance(name, str):
        raise ConfigError(f"{where}: the format is not a string")
    try:
        parse_precision(name)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
