"""Where the time of a step goes, by operator, as ONNX Runtime's own profiles tell."""

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

import onnxruntime
from speed_contenders import ORT, Task, contender

__all__ = ["profile_tables"]

_ROWS = 20
_LIMIT = 3.0
_SETTLED = 0.2
"""Seconds between the set-up and the steps, which the clock of a profile is surely off by
less than."""


@dataclass(frozen=True)
class _Session:
    """A session that writes a profile."""

    file: Path
    """Begins so."""
    created: float
    threads: int
    outputs: tuple[str, ...]


@contextmanager
def _profiling(folder: Path) -> Iterator[list[_Session]]:
    """Let every session that is made write what it does, once it is gone."""
    made: list[_Session] = []

    class Profiled(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, source: Any, options: Any, **how: Any) -> None:
            file = folder / f"{len(made):03}"
            options.enable_profiling = True
            options.profile_file_prefix = str(file)
            created = time.perf_counter()
            super().__init__(source, options, **how)
            outputs = tuple(value.name for value in self.get_outputs())
            made.append(_Session(file, created, options.intra_op_num_threads, outputs))

    with mock.patch.object(onnxruntime, "InferenceSession", Profiled):
        yield made


def _read(session: _Session, since: float) -> tuple[Counter[str], Counter[str]]:
    """Microseconds and calls of each operator after some time."""
    taken: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    (path,) = session.file.parent.glob(f"{session.file.name}_*.json")
    for event in json.loads(path.read_text(encoding="utf-8")):
        late = session.created + event.get("ts", 0) / 1e6 > since
        if late and event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            taken[event["args"]["op_name"]] += event["dur"]
            calls[event["args"]["op_name"]] += 1
    return taken, calls


def profile_tables(task: Task, name: str, rounds: int) -> str:
    """Times of the operators of all sessions that a contender runs in a step.

    Args:
        task: The model.
        name: The contender.
        rounds: Steps.
    """
    with contender(task, ORT[0]) as forward:
        _milliseconds(forward.step, 3)
        limit = _LIMIT * _milliseconds(forward.step, rounds)
    with contender(task, name) as alone:
        _milliseconds(alone.step, 3)
        unprofiled = _milliseconds(alone.step, rounds)
    del alone
    with tempfile.TemporaryDirectory() as folder:
        with _profiling(Path(folder)) as sessions, contender(task, name) as profiled:
            _milliseconds(profiled.step, 3)
            time.sleep(_SETTLED)
            since = time.perf_counter() - _SETTLED / 2
            _milliseconds(profiled.step, rounds)
        del profiled  # with its sessions, which write their profiles
        gc.collect()
        found = [(session, *_read(session, since)) for session in sessions]
    lines = [
        f"### {name}: {task.title}, {task.threads} threads, batch {task.batch}",
        "",
        f"A step takes {unprofiled:.0f} ms; the limit, 3 forward passes: {limit:.0f} ms.",
        "The work of runs side by side is divided by the number of threads.",
    ]
    found.sort(key=lambda entry: -entry[1].total())
    for session, taken, calls in found:
        if not taken:
            continue
        side_by_side = task.threads if session.threads == 1 else 1
        unit = 1e3 * rounds * side_by_side
        total = taken.total()
        outputs = ", ".join(f"`{output}`" for output in session.outputs[:2])
        more = ", ..." if len(session.outputs) > 2 else ""
        lines += [
            "",
            f"Session for {outputs}{more}: {total / unit:.1f} ms",
            "",
            "| operator | calls | ms | share | share of the limit |",
            "|---|---|---|---|---|",
        ]
        rows = taken.most_common(_ROWS)
        rest = total - sum(spent for _, spent in rows)
        rows += [("the others", rest)] if rest else []
        for operator, spent in rows:
            count = calls[operator] / rounds if operator in calls else calls.total() / rounds
            if operator not in calls:
                count -= sum(calls[known] for known, _ in rows) / rounds
            lines.append(
                f"| {operator} | {count:.0f} | {spent / unit:.2f}"
                f" | {100 * spent / total:.1f} % | {100 * spent / unit / limit:.1f} % |"
            )
    return "\n".join(lines)


def _milliseconds(step: Any, rounds: int) -> float:
    """Mean time of a step."""
    start = time.perf_counter()
    for _ in range(rounds):
        step()
    return 1e3 * (time.perf_counter() - start) / rounds
