"""What ``speed.py`` times in ONNX Runtime, and the files from which PyTorch's twin is made."""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from architectures import ARCHITECTURES
from onnx import parser

from onnx_fliqs.batch_parts import part_sizes, values_per_sample
from onnx_fliqs.config import SearchConfig
from onnx_fliqs.controller import sample, uniform
from onnx_fliqs.critic import Critic
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.formats import grid_code
from onnx_fliqs.gradient import promote_initializers
from onnx_fliqs.learned_thresholds import Growth, learned_thresholds
from onnx_fliqs.model import load_model
from onnx_fliqs.objective import LossKind, LossTerm
from onnx_fliqs.passes.add_loss import LABELS, LOSS, AddLossPass, teacher_input
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.passes.expose_optional_outputs import ExposeOptionalOutputsPass
from onnx_fliqs.passes.remove_unused import RemoveUnusedPass
from onnx_fliqs.prepare import make_batch, with_sites
from onnx_fliqs.runtime import (
    load_onnxruntime,
    load_training,
    make_session,
    quiet_options,
    run_bound,
    run_session,
)
from onnx_fliqs.search_setup import Setup, set_up
from onnx_fliqs.train_step import Batch, TrainStep
from onnx_fliqs.trainability import trainable_parameters

__all__ = [
    "LOGITS",
    "ORT",
    "OURS",
    "Contender",
    "Task",
    "contender",
    "references",
    "twin_files",
]

ORT = ("ORT float forward", "ORT float step", "ORT float step, in parts")
"""Names of the contenders without quantization."""
_SPACES = {
    "search step, 2 formats (int-s)": "int-s",
    "search step, 5 formats (int-l)": "int-l",
    "search step, 2 formats (fp-s)": "fp-s",
    "search step, 14 formats (fp-l)": "fp-l",
}
_ON_DRAWS = "search step on draws, 14 formats (fp-l)"
_LEARNED = "search step, 14 formats (fp-l), thresholds learned"
OURS = (*_SPACES, _LEARNED, _ON_DRAWS)
"""Names of the contenders that search."""
_TWINS = {"any": ("e2m1,fp16", "fp16"), "integer": ("int4,int16", "int16")}
"""Kind of site → a space that needs it, and the precision in which PyTorch does the same.

It has 16 bits, so that a number rounded the other way weighs little: in 8 bits, such numbers
change the gradient of a deep untrained network by a percent. Time does not depend on it."""
_RATE = 1e-5
_HELD_OUT = 64
LOGITS = "logits"
"""The output that every model has."""


@dataclass(frozen=True)
class Task:
    """A model, and how a step is run."""

    name: str
    threads: int
    seed: int

    @property
    def title(self) -> str:
        """For people."""
        return ARCHITECTURES[self.name].title

    @property
    def batch(self) -> int:
        """Samples of a step."""
        return ARCHITECTURES[self.name].batch

    @cached_property
    def proto(self) -> onnx.ModelProto:
        """The float model."""
        return ARCHITECTURES[self.name].model(self.seed)

    def load(self) -> ir.Model:
        """The float model, as a search loads it."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnx.save(self.proto, path)
            return load_model(path)

    def dataset(self) -> Dataset:
        """Made-up samples: a quarter will be held out."""
        one, rng = ARCHITECTURES[self.name], np.random.default_rng(self.seed)
        count = 4 * one.batch
        x = rng.standard_normal((count, *one.shape), np.float32)
        return Dataset(
            {"input": x}, rng.integers(0, one.classes, count), input_specs(self.load())
        )

    def samples(self) -> Batch:
        """The batch that every contender trains on."""
        return make_batch(self.dataset(), np.arange(self.batch))

    def parts(self, batch: Batch) -> list[Batch]:
        """The batch cut as a search cuts it."""
        values = values_per_sample(canonicalise(self.load()))
        sizes = part_sizes(batch.size, self.threads, values)
        cuts = np.split(np.arange(batch.size), np.cumsum(sizes)[:-1])
        assert batch.labels is not None
        return [
            Batch(
                {name: array[rows] for name, array in batch.inputs.items()},
                batch.labels[rows],
                len(rows),
            )
            for rows in cuts
        ]


@dataclass(frozen=True)
class Contender:
    """Something that is timed."""

    name: str
    step: Callable[[], object]


@contextlib.contextmanager
def contender(task: Task, name: str) -> Iterator[Contender]:
    """Make one, and let go of what it holds."""
    if name == ORT[0]:
        batch = task.samples()
        session = make_session(task.proto, threads=task.threads)
        yield Contender(name, lambda: run_session(session, [LOGITS], batch.inputs))
    elif name in ORT:
        plain = _PlainStep(task, in_parts=name == ORT[2])
        with contextlib.closing(plain):
            yield Contender(name, plain.step)
    else:
        search = _SearchStep(task, _SPACES.get(name, "fp-l"), learned=name == _LEARNED)
        with contextlib.closing(search):
            yield Contender(name, search.on_draws if name == _ON_DRAWS else search.step)


def references(task: Task) -> dict[str, tuple[float, float]]:
    """Loss and length of the gradient at the float model's weights, by what PyTorch does.

    In float, and with a precision that every layer takes.
    """
    with contextlib.closing(_PlainStep(task, in_parts=True)) as plain:
        found = {"float": plain.first()}
    for twin, (space, precision) in _TWINS.items():
        with contextlib.closing(_SearchStep(task, space, learned=False)) as search:
            found[twin] = search.first(precision)
    return {**found, "fused": found["integer"]}


# --- ONNX Runtime's float step ---------------------------------------------------------------


class _PlainStep:
    """What ONNX Runtime's gradient builder makes of the float model, and Adam.

    Alone it sees cross-entropy, and one session that uses all threads. In parts it is run
    as the search is: the same loss, with the float model as its teacher, and a
    single-threaded run for each part of the batch.
    """

    def __init__(self, task: Task, *, in_parts: bool) -> None:
        batch = task.samples()
        self._parts = task.parts(batch) if in_parts else [batch]
        threads = 1 if in_parts else task.threads
        model = canonicalise(task.load())
        self._teacher = make_session(model, threads=1) if in_parts else None
        names = trainable_parameters(model, [LOGITS])
        arrays = {n: model.graph.initializers[n].const_value.numpy() for n in names}
        self._session = make_session(_gradient(model, names, in_parts), threads=threads)
        shares = [part.size / batch.size for part in self._parts]
        update = _adam({name: array.shape for name, array in arrays.items()}, shares)
        self._update = make_session(update, threads=task.threads)
        make = load_onnxruntime().OrtValue.ortvalue_from_numpy
        self._arrays = list(arrays.values())  # the values borrow their memory
        self._weights = [make(array) for array in self._arrays]
        self._names = names
        self._moments = [
            make(np.zeros(array.shape, np.float32)) for _ in range(2) for array in self._arrays
        ]
        self._pool = ThreadPoolExecutor(task.threads)

    def step(self) -> list[list[Any]]:
        """One step; gives the loss and the gradients of every part."""
        results = list(self._pool.map(self._part, self._parts))
        binding = self._update.io_binding()
        values = [*self._weights, *self._moments, *(g for r in results for g in r[1:])]
        for slot, value in zip(self._update.get_inputs(), values, strict=True):
            binding.bind_ortvalue_input(slot.name, value)
        for slot in self._update.get_outputs():
            binding.bind_output(slot.name)
        run_bound(self._update, binding)
        outputs = binding.get_outputs()
        count = len(self._names)
        self._weights, self._moments = outputs[:count], outputs[count:]
        return results

    def first(self) -> tuple[float, float]:
        """The loss, and the length of the gradient."""
        results = self.step()
        sizes = np.array([part.size for part in self._parts])
        shares = sizes / sizes.sum()
        loss = sum(s * float(r[0].numpy()) for s, r in zip(shares, results, strict=True))
        squares = 0.0
        for gradients in zip(*(r[1:] for r in results), strict=True):
            mean = sum(s * g.numpy() for s, g in zip(shares, gradients, strict=True))
            squares += float(np.square(mean, dtype=np.float64).sum())
        return float(loss), float(np.sqrt(squares))

    def close(self) -> None:
        """Stop its threads."""
        self._pool.shutdown()

    def _part(self, part: Batch) -> list[Any]:
        feeds: dict[str, Any] = {**part.inputs, LABELS: part.labels}
        if self._teacher is not None:
            feeds[teacher_input(LOGITS)] = run_session(self._teacher, [LOGITS], part.inputs)[0]
        binding = self._session.io_binding()
        for name, value in zip(self._names, self._weights, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for slot in self._session.get_outputs():
            binding.bind_output(slot.name)
        run_bound(self._session, binding)
        outputs: list[Any] = binding.get_outputs()
        return outputs


def _gradient(model: ir.Model, names: Sequence[str], distilled: bool) -> onnx.ModelProto:
    """The loss and all gradients, by ONNX Runtime's builder alone."""
    kinds = {LossKind.CROSS_ENTROPY: 0.5, LossKind.DIVERGENCE: 0.5}
    if not distilled:
        kinds = {LossKind.CROSS_ENTROPY: 1.0}
    copy = model.clone()
    promote_initializers(copy, names)
    AddLossPass(
        [LossTerm(kind=k, output=LOGITS, scores=LOGITS, weight=w) for k, w in kinds.items()]
    )(copy)
    copy.graph.outputs[:] = [value for value in copy.graph.outputs if value.name == LOSS]
    RemoveUnusedPass()(copy)
    ExposeOptionalOutputsPass()(copy)
    text = ir.to_proto(copy).SerializeToString()
    training = load_training()
    builder = training.GradientGraphBuilder(text, {LOSS}, set(names), LOSS, quiet_options())
    builder.build()
    result = onnx.load_from_string(builder.get_model())
    values = {value.name: value for value in result.graph.output}
    del result.graph.output[:]
    result.graph.output.extend(values[name] for name in (LOSS, *(f"{n}_grad" for n in names)))
    for index, node in enumerate(result.graph.node):
        # ONNX Runtime's own optimizers confuse nodes that have no name.
        node.name = node.name or f"backward_{index}"
    return result


def _adam(shapes: dict[str, tuple[int, ...]], shares: Sequence[float]) -> onnx.ModelProto:
    """Adam on every tensor: weights, first and second moments, and each part's gradients."""
    indices, parts = range(len(shapes)), range(len(shares))
    types = [f"float[{', '.join(map(str, shape))}]" for shape in shapes.values()]
    inputs = [f"{types[i]} {kind}{i}" for kind in ("p", "m", "v") for i in indices]
    inputs += [f"{types[i]} g{j}_{i}" for j in parts for i in indices]
    outputs = [f"{types[i]} {kind}{i}_next" for kind in ("p", "m", "v") for i in indices]
    lines = []
    for i in indices:
        lines += [f"part{j}_{i} = Mul (g{j}_{i}, share{j})" for j in parts]
        lines += [
            f"g{i} = Sum ({', '.join(f'part{j}_{i}' for j in parts)})",
            f"m_kept{i} = Mul (m{i}, beta1)",
            f"m_taken{i} = Mul (g{i}, rest1)",
            f"m{i}_next = Add (m_kept{i}, m_taken{i})",
            f"square{i} = Mul (g{i}, g{i})",
            f"v_kept{i} = Mul (v{i}, beta2)",
            f"v_taken{i} = Mul (square{i}, rest2)",
            f"v{i}_next = Add (v_kept{i}, v_taken{i})",
            f"root{i} = Sqrt (v{i}_next)",
            f"deviation{i} = Add (root{i}, epsilon)",
            f"direction{i} = Div (m{i}_next, deviation{i})",
            f"change{i} = Mul (direction{i}, rate)",
            f"p{i}_next = Sub (p{i}, change{i})",
        ]
    constants = {"beta1": 0.9, "rest1": 0.1, "beta2": 0.999, "rest2": 0.001, "epsilon": 1e-8}
    constants |= {"rate": _RATE, **{f"share{j}": share for j, share in enumerate(shares)}}
    initializers = [f"float {name} = {{{value:.9g}}}" for name, value in constants.items()]
    body = "\n".join(lines)
    return parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        adam ({", ".join(inputs)}) => ({", ".join(outputs)})
        <{", ".join(initializers)}> {{
        {body}
        }}"""
    )


# --- our step --------------------------------------------------------------------------------


class _SearchStep:
    """A search step as ``search_loop`` runs it; thresholds, which PyTorch's keep, may stay."""

    def __init__(self, task: Task, space: str, *, learned: bool) -> None:
        self._task = task
        self._setup = setup = _set_up(task, space)
        self._parts = task.parts(task.samples())
        self._thresholds = learned_thresholds(setup.prepared.space) if learned else ()
        self._growth = Growth(self._thresholds, setup.scales)
        self._scales = setup.scales
        self._step = TrainStep(
            with_sites(setup.prepared),
            objective=setup.objective,
            parameters=trainable_parameters(setup.prepared.canonical, setup.objective.outputs),
            teacher=setup.prepared.canonical,
            parts=[part.size for part in self._parts],
            workers=task.threads,
            thresholds=self._thresholds,
        )
        held_out = np.arange(setup.config.held_out_batch)
        self._held_out = make_batch(setup.held_out, held_out)
        self._policy = uniform([len(row) for row in setup.costs])
        self._critic = Critic(setup.costs, setup.distortions, setup.config.controller)
        self._learned = self._critic.initial()
        self._rng = np.random.default_rng(task.seed)
        self._state = self._step.initial()

    def step(self) -> None:
        """Train the weights, each time on other formats."""
        draw = sample(self._policy, self._rng)
        values = self._drawn(draw)
        self._state, report = self._step.step(self._state, self._parts, values, _RATE)
        if self._thresholds:
            space = self._setup.prepared.space
            taken = space.formats_taken(space.assign(draw))
            self._scales = self._growth(self._scales, report.growth, taken)

    def on_draws(self) -> None:
        """Also score draws on held-out samples, and learn from them (``freeze``)."""
        self.step()
        draws = [sample(self._policy, self._rng) for _ in range(self._setup.config.draws)]
        candidates = [self._drawn(draw) for draw in draws]
        losses = self._step.losses(self._state, self._held_out, candidates)
        self._learned = self._critic.update(self._learned, draws, losses, 0.5)
        self._policy = self._critic.policy(self._learned, 0.5)

    def first(self, precision: str) -> tuple[float, float]:
        """Loss and length of the gradient with one precision everywhere."""
        space = self._setup.prepared.space
        chosen = space.uniform(self._setup.target.check(precision))
        values = space.values(chosen, self._setup.scales)
        _, report = self._step.step(self._step.initial(), self._parts, values, _RATE)
        return report.loss, report.norm

    def close(self) -> None:
        """Stop its threads."""
        self._step.close()

    def _drawn(self, choices: tuple[int, ...]) -> Any:
        space = self._setup.prepared.space
        return space.values(space.assign(choices), self._scales)


def _set_up(task: Task, space: str) -> Setup:
    config = SearchConfig(
        space=space,
        batch_size=task.batch,
        held_out_batch=min(_HELD_OUT, task.batch),
        validation=0.25,
        workers=task.threads,
        seed=task.seed,
    )
    return set_up(task.load(), task.dataset(), config)


# --- PyTorch's twin --------------------------------------------------------------------------


def twin_files(task: Task, folder: Path) -> None:
    """Write the float graph, the sites in their formats, and the batch."""
    batch = task.samples()
    assert batch.labels is not None
    arrays = {"x": batch.inputs["input"], "labels": batch.labels}
    sites: dict[str, list[dict[str, Any]]] = {}
    for twin, (name, precision) in _TWINS.items():
        setup = _set_up(task, name)
        space = setup.prepared.space
        taken = space.formats_taken(space.uniform(setup.target.check(precision)))
        scales = space.scales_taken(taken, setup.scales)
        sites[twin] = []
        for site in space.sites:
            fmt = taken[site.name]
            arrays[f"{twin}/{len(sites[twin])}"] = site.against(scales[site.name], fmt)
            sites[twin].append(
                {
                    "tensor": site.tensor,
                    "consumers": site.consumers,
                    "axis": site.axis,
                    **grid_code(fmt)._asdict(),
                }
            )
    sites["fused"] = sites["integer"]
    arrays |= {f"fused/{i}": arrays[f"integer/{i}"] for i in range(len(sites["fused"]))}
    canonical = setup.prepared.canonical
    onnx.save(ir.to_proto(canonical), folder / "model.onnx")
    parameters = trainable_parameters(canonical, setup.objective.outputs)
    description = {"sites": sites, "parameters": parameters}
    (folder / "twin.json").write_text(json.dumps(description), encoding="utf-8")
    np.savez(folder / "twin.npz", **arrays)
