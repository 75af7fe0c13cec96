"""The grid of ``quality.py``: its search spaces, and what identifies a run."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from tasks import TASKS

from onnx_fliqs.formats import SPACES as NAMED
from onnx_fliqs.model import atomic_write

__all__ = ["SPACES", "Row", "Run", "Space", "adopt", "data_file", "model_file", "read_rows"]

Row = dict[str, Any]
"""A line of ``runs.jsonl``: the fields of its Run, what was measured, and where."""


@dataclass(frozen=True)
class Space:
    """A search space, and the uniform formats that it is measured against."""

    formats: str
    floors: tuple[str, ...]
    """Uniform formats from which *gap recovered* is counted; the widest that fits a budget."""
    ceilings: tuple[str, ...]
    """Uniform formats to which it is counted; the best of them."""
    between: tuple[str, ...] = ()
    """Further uniform formats, as baselines."""
    budgets: tuple[float, ...] = (4.28, 4.5, 5.0, 6.0)
    """Effective bits. At 4.28, the BOPs are 1.14 times those of uniform 4-bit."""

    @property
    def uniform(self) -> tuple[str, ...]:
        """All of its uniform formats."""
        return (*self.floors, *self.between, *self.ceilings)


SPACES: Final = {
    "int-s": Space("int-s", ("int4",), ("int8",)),
    "int-l": Space("int-l", ("int4",), ("int8",), ("int5", "int6")),
    "fp-s": Space("fp-s", ("e2m1",), ("e4m3",)),
    "fp-l": Space("fp-l", ("e2m1",), ("e4m3",), ("e2m2", "e3m2")),
    "int+fp": Space(
        ",".join(NAMED["int-l"] + NAMED["fp-l"]),
        ("int4", "e2m1"),
        ("int8", "e4m3"),
        ("int5", "int6", "e2m2", "e3m2"),
    ),
    # Where 4 bits are nearly free, the gap is counted from 3 and 2 bits.
    "int-low": Space(
        "int2,int3,int4,int5,int6,int7,int8",
        ("int2", "int3", "int4"),
        ("int8",),
        budgets=(2.14, 3.21, 4.28),
    ),
}


@dataclass(frozen=True)
class Run:
    """What identifies a run; the commit it was made at is noted beside it."""

    model: str
    space: str
    """A name of SPACES; of a uniform run its format."""
    bits: float | None
    """The budget in effective bits; None for uniform formats, which cost what they cost."""
    strategy: str
    seed: int
    steps: int
    batch_size: int

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Run":
        """The run of a line."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    @property
    def name(self) -> str:
        """Of its files."""
        bits = "" if self.bits is None else f"_{self.bits:g}"
        settings = f"{self.seed}_{self.steps}x{self.batch_size}"
        return f"{self.model}_{self.space}{bits}_{self.strategy}_{settings}"

    def with_strategy(self, strategy: str) -> "Run":
        """The same cell, by another strategy."""
        return replace(self, strategy=strategy)


def read_rows(path: Path) -> list[Row]:
    """All lines, or none where there is no file yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def adopt(models: Path, folder: Path) -> None:
    """Link what ``development_models.py`` wrote: in this folder it stands for the tasks.

    Raises:
        SystemExit: There are no models, or the folder has others: tasks would be judged by
            their test data.
    """
    sources = list(models.resolve().glob("*.onnx"))
    if not sources:
        raise SystemExit(f"{models}: no models; write them with development_models.py")
    for source in sources:
        linked = {
            source.name: source,
            f"{source.stem}.train.npz": source.with_name("train.npz"),
            f"{source.stem}.test.npz": source.with_name("judged.npz"),
        }
        for name, target in linked.items():
            # Another process may have linked it.
            with contextlib.suppress(FileExistsError):
                (folder / name).symlink_to(target)
            if not (folder / name).samefile(target):
                raise SystemExit(f"{folder / name}: not of {models}; take another folder")


def model_file(folder: Path, model: str) -> Path:
    """The float model: the folder's own, if it has adopted one."""
    own = folder / f"{model}.onnx"
    return own if own.exists() else TASKS[model].model


def data_file(folder: Path, model: str, part: str) -> Path:
    """The ``train`` or the ``test`` part of a model's data, written once."""
    path = folder / f"{model}.{part}.npz"
    if not path.exists():
        arrays: dict[str, Any] = dict(TASKS[model].arrays(part))
        atomic_write(path, lambda file: np.savez(file, **arrays))
    return path
