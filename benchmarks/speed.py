"""Time and memory of a search step beside ONNX Runtime's float step and PyTorch's.

Untrained models made by ``architectures.py`` and made-up data. In one run, in turn, one step
of each a round, in a random order:

* the float forward pass in ONNX Runtime as a user runs it;
* ONNX Runtime's float training step: its own gradient graph, cross-entropy, Adam; and the same
  configured as the search is: parts of the batch in single-threaded runs, and distillation;
* a search step with 2, 5 and 14 candidate formats; and one of a search whose weights train on
  draws, with four of them scored on held-out samples;
* PyTorch with the same fake quantization of the same tensors, straight-through gradients, the
  same loss, fused Adam, contiguous and channels last, and with PyTorch's own fused operators.

PyTorch runs in a process of its own, whose interpreter is named (it needs ``torch`` and
``onnx``); without one its rows are left out. It waits, as this process does, while the other
one is timed; how little it works meanwhile is printed. Peak memory is that of a process for
each contender alone::

    python benchmarks/speed.py --torch-python ../torch/bin/python --models resnet20 vit
    python benchmarks/speed.py --models resnet18 --scaling
    python benchmarks/speed.py --models resnet20 --profile
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from architectures import ARCHITECTURES
from common import provenance
from peak_memory import peak_bytes
from speed_contenders import ORT, OURS, Contender, Task, contender, references, twin_files
from speed_profile import group_table, profile_tables

_PAUSE = 0.02
"""Seconds before each timed step: threads of the last one stop looking for work."""
_WARM_UP = 3
_TORCH = tuple(
    f"{arithmetic}, {layout}"
    for arithmetic in ("float", "any", "integer", "fused")
    for layout in ("contiguous", "channels last")
)
_TOLERANCE = 1e-3
"""Of losses, and of the gradient's length in float."""
_LOOSE = 1e-2
"""Of the gradient's length behind sites: sums in another order fall on the other side of a
rounding here and there, by which PyTorch's own two layouts of one model differ up to 1 %."""
_FORWARD, _PLAIN, _ALIKE = ORT
_FEW, _MANY = "search step, 2 formats (fp-s)", "search step, 14 formats (fp-l)"
_LEARNED = f"{_MANY}, thresholds learned"
_HEADER = (
    "| | ms | quartiles | x forward | x ORT float step | x the same in parts"
    " | x best PyTorch | peak MB | x ORT float step |"
)
_LIMIT = 3.0
"""Of the float forward pass."""


class _Worker:
    """PyTorch, in another process."""

    def __init__(self, python: Path, folder: Path, threads: int) -> None:
        script = Path(__file__).with_name("torch_steps.py")
        command = [str(python), str(script), str(folder), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, do: str, name: str = "") -> dict[str, Any]:
        """Send a request and wait for the reply."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, "contender": name}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the PyTorch process has ended; see its message above")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def cpu_seconds(self) -> float:
        """Time that its threads have worked so far; 0 where the system does not tell."""
        try:
            text = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii")
        except OSError:
            return 0.0
        user, system = text.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def _worker(python: Path | None, folder: Path, threads: int) -> Iterator[_Worker | None]:
    if python is None:
        yield None
        return
    worker = _Worker(python, folder, threads)
    try:
        yield worker
    finally:
        worker.close()


# --- time ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Times:
    """Seconds of every contender in every round."""

    seconds: dict[str, list[float]]
    idle: tuple[float, float]
    """Work of the process that waits, in seconds for each second that it waited: PyTorch,
    and this one."""
    others: float
    """Work of all other processes, likewise."""

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, other: str) -> tuple[float, float, float]:
        """First quartile, median and third quartile of the ratios of the rounds."""
        pairs = zip(self.seconds[name], self.seconds[other], strict=True)
        return _quartiles([mine / theirs for mine, theirs in pairs])

    def best(self, names: Sequence[str]) -> str | None:
        """The fastest of some, of those that were run."""
        return min((n for n in names if n in self.seconds), key=self.median, default=None)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


def _measure(
    ours: Sequence[Contender], worker: _Worker | None, rounds: int, seed: int
) -> _Times:
    """Time one step of each a round."""
    mine = {c.name: c for c in ours}
    theirs = {f"PyTorch, {name}": name for name in _TORCH} if worker is not None else {}
    seconds: dict[str, list[float]] = {name: [] for name in (*mine, *theirs)}
    waited, worked = [1e-9, 1e-9], [0.0, 0.0]
    rng = np.random.default_rng(seed)
    began, began_busy = time.perf_counter(), _busy_seconds()
    began_ours = time.process_time() + (worker.cpu_seconds() if worker else 0.0)
    for number in range(-_WARM_UP, rounds):
        for index in rng.permutation(len(seconds)):
            name = list(seconds)[index]
            time.sleep(_PAUSE)
            before = (worker.cpu_seconds() if worker else 0.0, time.process_time())
            start = time.perf_counter()
            if name in mine:
                mine[name].step()
                taken = time.perf_counter() - start
            else:
                assert worker is not None
                taken = worker.ask("step", theirs[name])["seconds"]
            after = (worker.cpu_seconds() if worker else 0.0, time.process_time())
            waiting = 0 if name in mine else 1
            waited[waiting] += time.perf_counter() - start
            worked[waiting] += after[waiting] - before[waiting]
            if number >= 0:
                seconds[name].append(taken)
    ours_busy = time.process_time() + (worker.cpu_seconds() if worker else 0.0) - began_ours
    others = max(0.0, _busy_seconds() - began_busy - ours_busy)
    return _Times(
        seconds,
        (worked[0] / waited[0], worked[1] / waited[1]),
        others / (time.perf_counter() - began),
    )


def _busy_seconds() -> float:
    """Work of all cores since the machine started; 0 where the system does not tell."""
    try:
        with Path("/proc/stat").open(encoding="ascii") as file:
            fields = [int(field) for field in file.readline().split()[1:]]
    except OSError:
        return 0.0
    idle, waiting = fields[3:5]
    return (sum(fields[:8]) - idle - waiting) / os.sysconf("SC_CLK_TCK")


# --- memory ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Memory:
    """Peaks of a process that ran one contender alone, in bytes."""

    imported: int
    """After its imports."""
    made: int
    """Before its first step: with its set-up."""
    peak: int


def _memory(task: Task, names: Sequence[str], python: Path | None) -> dict[str, _Memory]:
    found = {}
    for name in names:
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            f"--models={task.name}",
            f"--threads={task.threads}",
            f"--seed={task.seed}",
            f"--memory-of={name}",
        ]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[name] = _Memory(**json.loads(text))
    if python is None:
        return found
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, so that this one stays small.
        command = [*command[:-1], f"--write-twin={folder}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for name in _TORCH:
            with _worker(python, Path(folder), task.threads) as worker:
                assert worker is not None
                worker.ask("make", name)
                made = worker.ask("peak")["peak"]
                for _ in range(_WARM_UP):
                    worker.ask("step", name)
                found[f"PyTorch, {name}"] = _Memory(made=made, **worker.ask("peak"))
    return found


def _print_memory(task: Task, name: str) -> None:
    """What the process for one contender does."""
    imported = peak_bytes()
    with contender(task, name) as one:
        made = peak_bytes()
        for _ in range(_WARM_UP):
            one.step()
    print(json.dumps({"imported": imported, "made": made, "peak": peak_bytes()}))


# --- the same numbers ------------------------------------------------------------------------


def _check(task: Task, worker: _Worker) -> dict[str, float]:
    """Compare losses and gradients' lengths at the same weights and formats.

    Returns:
        The relative difference of the lengths, by the name of the PyTorch contender.
    """
    known, differences = references(task), {}
    for name in _TORCH:
        worker.ask("make", name)
        theirs = worker.ask("step", name)
        loss, norm = known[name.partition(",")[0]]
        differences[name] = abs(theirs["norm"] / norm - 1)
        loss_differs = abs(theirs["loss"] / loss - 1) > _TOLERANCE
        allowed = _LOOSE if _is_quantized(name) else _TOLERANCE
        if loss_differs or differences[name] > allowed:
            raise SystemExit(
                f"PyTorch, {name}: loss {theirs['loss']:.6f} and gradient"
                f" {theirs['norm']:.6f}, not {loss:.6f} and {norm:.6f}"
            )
    return differences


# --- the report ------------------------------------------------------------------------------


def _table(task: Task, times: _Times, memory: dict[str, _Memory]) -> str:
    best = times.best([f"PyTorch, {name}" for name in _TORCH if _is_quantized(name)])
    lines = [
        f"### {task.title}, {task.threads} threads, batch {task.batch}",
        "",
        _HEADER,
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, seconds in times.seconds.items():
        low, middle, high = (1e3 * value for value in _quartiles(seconds))
        ratios = [
            f"{times.ratio(name, other)[1]:.2f}" if other else ""
            for other in (_FORWARD, _PLAIN, _ALIKE, best)
        ]
        marked = f"**{name}**" if name == best else name
        lines.append(
            f"| {marked} | {middle:.1f} | {low:.1f} to {high:.1f} | {' | '.join(ratios)}"
            f" | {_peak(name, memory)} |"
        )
    lines += ["", *_verdicts(times, memory, best)]
    return "\n".join(lines)


def _is_quantized(name: str) -> bool:
    """Of a PyTorch contender."""
    return not name.startswith("float")


def _peak(name: str, memory: dict[str, _Memory]) -> str:
    if name not in memory:
        return " | "
    return f"{memory[name].peak / 1e6:.0f} | {memory[name].peak / memory[_PLAIN].peak:.2f}"


def _verdicts(times: _Times, memory: dict[str, _Memory], best: str | None) -> list[str]:
    """What the search step has to reach, and what it does."""
    limit = 1e3 * _LIMIT * times.median(_FORWARD)
    lines = [f"* 3 x forward: {limit:.1f} ms; the step takes {_said(times, _MANY, _FORWARD)}"]
    if best is not None:
        lines.append(f"* at most 1.0 x {best}: {_said(times, _MANY, best)}")
    lines += [
        f"* at most 1.15 x ONNX Runtime's float step in parts: {_said(times, _MANY, _ALIKE)}",
        f"* 14 formats at most 1.02 x 2 formats: {_said(times, _MANY, _FEW)}",
        f"* learned thresholds: {_said(times, _LEARNED, _MANY)}",
    ]
    if _MANY in memory:
        peak = memory[_MANY].peak / memory[_PLAIN].peak
        lines.append(f"* memory at most 1.25 x ONNX Runtime's float step: {peak:.2f} x")
    work = ", ".join(f"{100 * share:.1f} %" for share in times.idle)
    lines.append(f"* work of the process that waits (PyTorch, ONNX Runtime): {work} of a core")
    lines.append(
        f"* work of all other processes: {times.others:.2f} cores (a machine that is not idle"
        " slows PyTorch down more than ONNX Runtime)"
    )
    return lines


def _said(times: _Times, name: str, other: str) -> str:
    low, middle, high = times.ratio(name, other)
    return f"{middle:.3f} x ({low:.3f} to {high:.3f})"


def _run(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one model, print its table, and give what the table was made of."""
    python = options.torch_python
    names = (*ORT, *OURS)
    # First, as a big process would be copied to start each of the others.
    memory = {} if options.no_memory else _memory(task, names, python)
    with contextlib.ExitStack() as stack:
        ours = [stack.enter_context(contender(task, name)) for name in names]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        differences, version = {}, None
        if python is not None:
            twin_files(task, folder)
        worker = stack.enter_context(_worker(python, folder, task.threads))
        if worker is not None:
            version = worker.ask("version")["torch"]
            differences = _check(task, worker)
        times = _measure(ours, worker, options.rounds, options.seed)
    print(_table(task, times, memory), end="\n\n", flush=True)
    return {
        "model": task.name,
        "threads": task.threads,
        "torch": version,
        "ms": {
            name: [round(1e3 * s, 2) for s in _quartiles(v)]
            for name, v in times.seconds.items()
        },
        "peak_mb": {name: round(m.peak / 1e6, 1) for name, m in memory.items()},
        "imported_mb": {name: round(m.imported / 1e6, 1) for name, m in memory.items()},
        "set_up_mb": {name: round(m.made / 1e6, 1) for name, m in memory.items()},
        "gradient_differences": {name: float(f"{d:.1e}") for name, d in differences.items()},
    }


def _cores() -> int:
    return (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )


def _thread_counts(options: argparse.Namespace) -> list[int]:
    most = options.threads or _cores()
    if not options.scaling:
        return [most]
    return [*(1 << i for i in range(most.bit_length()) if 1 << i < most), most]


def main() -> None:
    """Measure, or profile, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=ARCHITECTURES, default=[*ARCHITECTURES])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of every contender; default: the cores")
    parser.add_argument("--torch-python", type=Path, help="of an environment with PyTorch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-memory", action="store_true", help="time alone")
    parser.add_argument("--scaling", action="store_true", help="with 1, 2, 4, ... threads")
    parser.add_argument(
        "--profile", action="store_true", help="purposes and operators of a search step"
    )
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--write-twin", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    tasks = [
        Task(name, threads, options.seed)
        for name in options.models
        for threads in _thread_counts(options)
    ]
    if options.memory_of is not None:
        _print_memory(tasks[0], options.memory_of)
    elif options.write_twin is not None:
        twin_files(tasks[0], options.write_twin)
    elif options.profile:
        for task in tasks:
            print(group_table(task, _MANY, options.rounds), end="\n\n", flush=True)
            for name in (_MANY, _ALIKE):
                print(profile_tables(task, name, options.rounds), end="\n\n", flush=True)
        print(json.dumps({"benchmark": "speed", "profile": True, **provenance()}))
    else:
        if options.torch_python is None:
            print("no --torch-python: PyTorch's rows are left out", file=sys.stderr)
        rows = [_run(task, options) for task in tasks]
        settings = {"rounds": options.rounds, "seed": options.seed}
        print(json.dumps({"benchmark": "speed", **settings, "runs": rows, **provenance()}))


if __name__ == "__main__":
    main()
