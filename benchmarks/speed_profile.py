"""Where the time of a search step goes, by operator."""

import gc
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from speed_contenders import ORT, Task, contender

from onnx_fliqs import runtime

__all__ = ["profile_table"]

_ROWS = 25
_LIMIT = 3.0


@dataclass(frozen=True)
class _Profile:
    """Microseconds and calls by operator, of one session."""

    time: Counter[str]
    calls: Counter[str]


@contextmanager
def _profiled(folder: Path) -> Iterator[None]:
    """Let every session that is made write what it does, once it is gone."""
    make = runtime.quiet_options
    made = iter(range(1_000_000))

    def options() -> Any:
        found = make()
        found.enable_profiling = True
        found.profile_file_prefix = str(folder / f"{next(made):03}")
        return found

    with mock.patch.object(runtime, "quiet_options", options):
        yield


def _read(path: Path, since: int) -> _Profile:
    """Operators that ran after some event number."""
    found = _Profile(Counter(), Counter())
    for event in json.loads(path.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            operator = event["args"]["op_name"]
            found.time[operator] += event["dur"]
            found.calls[operator] += 1
    return found


def profile_table(task: Task, name: str, rounds: int) -> str:
    """Time of each operator of the sessions that a contender runs.

    Args:
        task: The model.
        name: The contender.
        rounds: Steps.
    """
    with contender(task, ORT[0]) as forward:
        forward.step()
        start = time.perf_counter()
        for _ in range(rounds):
            forward.step()
        limit = _LIMIT * (time.perf_counter() - start) / rounds * 1e3
    return str(limit)
