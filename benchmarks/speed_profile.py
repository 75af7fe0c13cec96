"""Where the time of a step goes, by operator and purpose, as ONNX Runtime's profiles tell."""

import gc
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

import onnxruntime
from speed_contenders import LOGITS, ORT, Task, contender

from onnx_fliqs.gradient import GRADIENT

__all__ = ["group_table", "profile_tables"]

_ROWS = 20
_BEHIND: Final = 1.15
"""How long a search step may take, in steps of the float model in the same configuration."""
_PRODUCTS: Final = r"(FusedConv|Conv|Gemm|MatMul|FusedMatMul|FusedGemm)"
_GROUPS: Final = (
    # Pattern of "operator name-of-node", what it stands for; the first that fits counts.
    (r"Reorder(In|Out)put ", "rearranging images for kernels"),
    (r"ConvGrad ", "gradients by ConvGrad"),
    (r".*_Grad/.*/input/", "gradients of convolutions' inputs"),
    (r".*_Grad/.*/kernel/", "gradients of kernels"),
    (r".*_Grad/.*/bias/|ReduceSum .*_Grad/", "gradients of biases"),
    (rf"{_PRODUCTS} .*_Grad", "gradients of matrix products"),
    (rf"{_PRODUCTS} ", "convolutions and matrix products, forward"),
    (r".* Search\w*QDQ/", "sites, forward"),
    (r".*(StraightThrough/|/mask/|(Relu|Clip)Gradient/)", "masks of sites, Relu and Clip"),
    (r"(Relu|Clip) ", "Relu and Clip, forward"),
    (r"(Transpose|Reshape|Gather) Conv.*/blocked/", "rearranging kernels, forward"),
    (r"(Max|Average|GlobalAverage)Pool(Grad)? ", "pools and their gradients"),
    (
        r"(Layer|Skip).*Normalization|\w*Softmax|Bias(Soft|Drop)|\w*Gelu|.* GeluGradient/",
        "normalization, softmax, Gelu, and their gradients",
    ),
    (r"(Add|Sum) ", "residual additions and sums of gradients"),
    (
        r"(Transpose|Reshape|Squeeze|Unsqueeze|Split|Slice|Concat|Expand|Gather|Pad)\w* ",
        "moving data",
    ),
)
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


def _read(session: _Session, since: float) -> list[tuple[str, str, int]]:
    """Operator, name and microseconds of each node that ran after some time."""
    (path,) = session.file.parent.glob(f"{session.file.name}_*.json")
    found = []
    for event in json.loads(path.read_text(encoding="utf-8")):
        late = session.created + event.get("ts", 0) / 1e6 > since
        if late and event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            # The time of a Scan is that of its body.
            if "/body_" not in name:
                found.append((event["args"]["op_name"], name, event["dur"]))
    return found


def _profiled(
    task: Task, name: str, rounds: int
) -> list[tuple[_Session, list[tuple[str, str, int]]]]:
    """What the sessions of a contender do in some steps."""
    with tempfile.TemporaryDirectory() as folder:
        with _profiling(Path(folder)) as sessions, contender(task, name) as profiled:
            _milliseconds(profiled.step, 3)
            time.sleep(_SETTLED)
            since = time.perf_counter() - _SETTLED / 2
            _milliseconds(profiled.step, rounds)
        del profiled  # with its sessions, which write their profiles
        gc.collect()
        return [(session, _read(session, since)) for session in sessions]


def _of_session(outputs: Sequence[str]) -> str | None:
    """What all of a session is for; None for the gradient of a part, known by its loss."""
    first = outputs[0]
    if "loss" in first:
        return None
    if first.endswith("_next"):
        return "optimizer"
    return {
        LOGITS: "teacher",
        GRADIENT: "sum of the parts' gradients and masks of weights, once a step",
    }.get(first, "quantizing weights and rearranging them, once a step")


def _group(operator: str, name: str) -> str:
    line = f"{operator} {name}"
    return next((group for pattern, group in _GROUPS if re.match(pattern, line)), "other")


def _by_group(task: Task, name: str, rounds: int) -> Counter[str]:
    """Milliseconds of a step for each purpose; what runs side by side is divided."""
    groups: Counter[str] = Counter()
    for session, events in _profiled(task, name, rounds):
        unit = 1e3 * rounds * (task.threads if session.threads == 1 else 1)
        whole = _of_session(session.outputs)
        for operator, node, spent in events:
            groups[whole or _group(operator, node)] += spent / unit  # type: ignore[assignment]
    return groups


def group_table(task: Task, name: str, rounds: int) -> str:
    """What a step of a contender is spent on, beside the float step's.

    Args:
        task: The model.
        name: The contender.
        rounds: Steps.
    """
    taken = {}
    for each in (name, ORT[2]):
        with contender(task, each) as alone:
            _milliseconds(alone.step, 3)
            taken[each] = _milliseconds(alone.step, rounds)
        del alone
    limit = _BEHIND * taken[ORT[2]]
    ours, floats = (_by_group(task, each, rounds) for each in (name, ORT[2]))
    total = ours.total()
    floor = sum(
        spent
        for group, spent in floats.items()
        if "ConvGrad" in group or "products" in group or "convolutions" in group
    )
    summary = (
        f"{name}: {taken[name]:.0f} ms; {ORT[2]}: {taken[ORT[2]]:.0f} ms; limit, {_BEHIND}"
        f" times that: {limit:.0f} ms. Convolutions, matrix products and their gradients alone"
        f" take ONNX Runtime {floor:.1f} ms in float. Work side by side is divided by the"
        " number of threads."
    )
    lines = [
        f"### Purposes: {task.title}, {task.threads} threads, batch {task.batch}",
        "",
        summary,
        "",
        "| purpose | ms | share | share of the limit | float step, ms |",
        "|---|---|---|---|---|",
    ]
    for group in sorted({*ours, *floats}, key=lambda group: (-ours[group], -floats[group])):
        spent = ours[group]
        lines.append(
            f"| {group} | {spent:.2f} | {100 * spent / total:.1f} %"
            f" | {100 * spent / limit:.1f} % | {floats[group]:.2f} |"
        )
    lines.append(
        f"| all operators | {total:.1f} | 100 % | {100 * total / limit:.0f} %"
        f" | {floats.total():.1f} |"
    )
    return "\n".join(lines)


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
    found = []
    for session, events in _profiled(task, name, rounds):
        taken: Counter[str] = Counter()
        for operator, _, spent in events:
            taken[operator] += spent
        found.append((session, taken, Counter(operator for operator, _, _ in events)))
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
