"""One step of training, as a function of explicit state.

The parts of a batch go through single-threaded runs of one gradient session side by side
(ConvGrad and ReluGrad hardly use a second core). What they share is computed before them, and
their gradients are added up after them (``step_graphs``); an optimizer model updates the
weights. Weights and moments stay in ONNX Runtime's own values.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.data import Dataset
from onnx_fliqs.gradient import GRADIENT, build_gradient, promote_initializers
from onnx_fliqs.judged import exposed
from onnx_fliqs.kernels import for_fast_kernels
from onnx_fliqs.learned_thresholds import Threshold
from onnx_fliqs.objective import Objective, are_numbers
from onnx_fliqs.optimizer import BETA1, BETA2, Optimizer, build_optimizer
from onnx_fliqs.passes.add_loss import DIVERGENCE, LABELS, LOSS, AddLossPass, teacher_input
from onnx_fliqs.passes.add_threshold_gradients import AddThresholdGradientsPass
from onnx_fliqs.passes.insert_search_sites import CODES, SCALES, unquantized
from onnx_fliqs.payload import is_plain, settle, shareable
from onnx_fliqs.runtime import (
    OptimizationLevel,
    load_onnxruntime,
    make_session,
    run_bound,
    run_session,
)
from onnx_fliqs.sites import SiteValues
from onnx_fliqs.step_graphs import cut_step, part_value
from onnx_fliqs.teacher import Teacher

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

__all__ = ["Batch", "StepReport", "TrainState", "TrainStep"]

Array: TypeAlias = npt.NDArray[Any]
_THRESHOLDS: Final = "onnx_fliqs.thresholds"
"""What the optimizer calls them."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples, ready to be fed."""

    inputs: Mapping[str, Array]
    """By input name, first axis the samples (constants apart)."""
    labels: Array | None
    size: int
    source: Dataset | None = None
    """The data set that they were gathered from, if any."""
    rows: Array | None = None
    """Their indices in the data set."""


@dataclass(frozen=True, slots=True)
class TrainState:
    """Everything that a step changes."""

    parameters: Mapping[str, "OrtValue"]
    m: "OrtValue"
    """First moments, flat."""
    v: "OrtValue"
    """Second moments, flat."""
    length: "OrtValue"
    """Running mean length of the gradient."""
    updates: int
    """Updates made; steps without a finite gradient do not count."""

    def arrays(self) -> dict[str, Array]:
        """The state as NumPy arrays, for a checkpoint."""
        return {
            **{f"parameter/{name}": value.numpy() for name, value in self.parameters.items()},
            "m": self.m.numpy(),
            "v": self.v.numpy(),
            "length": self.length.numpy(),
            "updates": np.asarray(self.updates),
        }


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step measured."""

    loss: float
    norm: float
    """Length of the gradient."""
    applied: bool
    """Whether the gradient was finite, so that the weights changed."""
    growth: Array
    """By what the logarithms of the thresholds change, one threshold after another."""


class TrainStep:
    """The sessions of a searchable model: training, evaluation, and the float teacher."""

    def __init__(
        self,
        searchable: ir.Model,
        *,
        objective: Objective,
        parameters: Sequence[str],
        teacher: ir.Model,
        parts: Sequence[int],
        workers: int,
        optimizer: Optimizer = Optimizer.RELATIVE_ADAM,
        thresholds: Sequence[Threshold] = (),
        threshold_rate: float = 1.0,
    ) -> None:
        """Build the sessions.

        Args:
            searchable: A canonical model with sites.
            objective: The loss.
            parameters: Initializers to train; may be empty.
            teacher: The float model.
            parts: Samples of each part of a training batch.
            workers: Parts and evaluations that run side by side.
            optimizer: How weights follow their gradients.
            thresholds: Those that are learned.
            threshold_rate: The step of the logarithm of a threshold, in learning rates.
        """
        self.objective = objective
        self._parameters = tuple(parameters)
        self._thresholds = thresholds
        self._no_growth = np.zeros(sum(each.count for each in thresholds), np.float32)
        self._pool = ThreadPoolExecutor(workers)
        self._float = make_session(
            exposed(teacher, objective.outputs), threads=1, in_turn=True
        )
        self._teacher = Teacher(self._float, objective.teacher_outputs)
        self._frugal = frugal = not is_plain(searchable)
        self._searchable = searchable.clone()
        self._initial = _tensors(self._searchable, parameters)
        self._frozen = _frozen_inputs(self._searchable, parameters)
        promote_initializers(
            self._searchable, [*self._parameters, *self._frozen, CODES, SCALES]
        )
        model = self._with_loss()
        scored = model.clone()
        AddLossPass(objective.comparison, DIVERGENCE)(scored)
        self._forward = _Runner(
            make_session(
                for_fast_kernels(scored, max(parts)),
                threads=1,
                frugal=frugal,
                fuse_quantized=False,
                in_turn=True,
            )
        )
        self._taps: _Runner | None = None
        self._gradient: _Gradient | None = None
        self._optimizer: _Runner | None = None
        if self._parameters:
            self._gradient = self._gradient_of(model, parts, workers)
            shapes = {name: t.shape.numpy() for name, t in self._initial.items()}
            if thresholds:
                shapes[_THRESHOLDS] = self._no_growth.shape
            rates = {_THRESHOLDS: threshold_rate}
            update = build_optimizer(shapes, parts[0] / sum(parts), optimizer, rates)
            self._optimizer = _Runner(
                make_session(
                    update,
                    level=OptimizationLevel.BASIC,
                    threads=workers,
                    frugal=frugal,
                    in_turn=True,
                )
            )

    def _gradient_of(self, model: ir.Model, parts: Sequence[int], workers: int) -> "_Gradient":
        gradient = ir.from_proto(build_gradient(model, LOSS, self._parameters))
        AddThresholdGradientsPass(self._thresholds)(gradient)
        graphs = cut_step(
            for_fast_kernels(gradient, max(parts)),
            (*self._parameters, *self._frozen),
            (CODES, SCALES),
            shares=workers,
            weights=[part / parts[0] for part in parts],
        )

        def runner(graph: ir.Model, threads: int) -> _Runner:
            return _Runner(
                make_session(
                    graph,
                    threads=threads,
                    disabled=["GatherSliceToSplitFusion"],
                    frugal=self._frugal,
                    fuse_quantized=False,
                    in_turn=True,
                )
            )

        return _Gradient(
            tuple(runner(graph, 1) for graph in graphs.before),
            runner(graphs.part, 1),
            runner(graphs.after, workers),
        )

    def _with_loss(self) -> ir.Model:
        model = exposed(self._searchable, self.objective.outputs).clone()
        AddLossPass(self.objective.terms)(model)
        return model

    def close(self) -> None:
        """Stop the worker threads."""
        self._pool.shutdown()

    # --- state -----------------------------------------------------------------------------

    def initial(self) -> TrainState:
        """The weights of the model and no history."""
        size = sum(t.size for t in self._initial.values()) + len(self._no_growth)
        zeros = np.zeros(size, np.float32)
        return self.restore(
            {
                **{f"parameter/{name}": t.numpy() for name, t in self._initial.items()},
                "m": zeros,
                "v": zeros,
                "length": np.zeros((), np.float32),
                "updates": np.asarray(0),
            }
        )

    def restore(self, arrays: Mapping[str, Array]) -> TrainState:
        """The state that :meth:`TrainState.arrays` wrote."""
        return TrainState(
            {name: _owned(arrays[f"parameter/{name}"]) for name in self._parameters},
            _owned(arrays["m"]),
            _owned(arrays["v"]),
            _owned(arrays["length"]),
            int(arrays["updates"]),
        )

    # --- training --------------------------------------------------------------------------

    def step(
        self, state: TrainState, parts: Sequence[Batch], values: SiteValues, lr: float
    ) -> tuple[TrainState, StepReport]:
        """Train on one batch, given in parts.

        Args:
            state: Before the step.
            parts: The batch, cut as ``parts`` of the constructor says.
            values: The formats in force.
            lr: Learning rate; a relative one is the share of a tensor's root mean square by
                which its weights change.

        Returns:
            The state after the step, and its loss (mean over the batch).
        """
        if self._gradient is None:
            raise ValueError("the model has no trainable parameters")
        loss, gradient = self._mean_gradient(state, parts, values)
        return self._update(state, gradient, loss, lr)

    def _mean_gradient(
        self, state: TrainState, parts: Sequence[Batch], values: SiteValues
    ) -> "tuple[float, OrtValue]":
        """The mean loss, and the sum of the gradients in units of the first part's share."""
        assert self._gradient is not None
        run_part, formats = self._gradient.part.run, _formats(values)
        fixed = {**state.parameters, **self._frozen}
        shared = dict(fixed)
        shares = self._gradient.before
        for found in self._pool.map(lambda share: share.run(fixed, formats), shares):
            shared |= found
        results = list(
            self._pool.map(
                lambda part: run_part(shared, self._feeds(part, self._taught(part), values)),
                parts,
            )
        )
        shared.clear()
        total = sum(part.size for part in parts)
        loss = sum(
            part.size / total * float(result[LOSS].numpy())
            for part, result in zip(parts, results, strict=True)
        )
        pieces = {
            part_value(name, index): value
            for index, result in enumerate(results)
            for name, value in result.items()
        }
        return loss, self._gradient.after.run({**fixed, **pieces}, formats)[GRADIENT]

    def _update(
        self, state: TrainState, gradient: "OrtValue", loss: float, lr: float
    ) -> tuple[TrainState, StepReport]:
        assert self._optimizer is not None
        t = state.updates + 1
        scalars = {
            "lr": np.float32(lr),
            "correction1": np.float32(1 / (1 - BETA1**t)),
            "correction2": np.float32(1 / (1 - BETA2**t)),
        }
        arrays = {name: np.asarray(value) for name, value in scalars.items()}
        parameters = {f"p{i}": value for i, value in enumerate(state.parameters.values())}
        if self._thresholds:
            # From the threshold that there is: what becomes of 0 is how its logarithm changes.
            arrays[f"p{len(parameters)}"] = self._no_growth
        flat = {"gradient": gradient, "m": state.m, "v": state.v, "length": state.length}
        *updated, m, v, length, norm = self._optimizer.run(
            {**parameters, **flat}, arrays
        ).values()
        length_of_gradient = float(norm.numpy())
        applied = math.isfinite(length_of_gradient)
        growth = updated.pop().numpy() if self._thresholds and applied else self._no_growth
        report = StepReport(loss, length_of_gradient, applied, growth)
        if not applied:
            return state, report
        after = TrainState(dict(zip(state.parameters, updated, strict=True)), m, v, length, t)
        return after, report

    # --- evaluation ------------------------------------------------------------------------

    def losses(
        self, state: TrainState, batch: Batch, candidates: Sequence[SiteValues]
    ) -> list[float]:
        """The loss of several assignments on the same batch, side by side."""
        return self._scalars(LOSS, state, batch, candidates)

    def divergences(
        self, state: TrainState, batch: Batch, candidates: Sequence[SiteValues]
    ) -> list[float]:
        """How far several assignments are from the float model on the same batch."""
        return self._scalars(DIVERGENCE, state, batch, candidates)

    def _scalars(
        self, name: str, state: TrainState, batch: Batch, candidates: Sequence[SiteValues]
    ) -> list[float]:
        teacher = self._teach(batch)
        return list(
            self._pool.map(
                lambda values: float(
                    self._run(self._forward, state, batch, teacher, values, [name])[0]
                ),
                candidates,
            )
        )

    def judge_each(
        self, state: TrainState, batch: Batch, candidates: Sequence[SiteValues]
    ) -> list[tuple[dict[str, Array], float]]:
        """The judged outputs and the loss of several assignments on the same batch."""
        names = self.objective.outputs
        teacher = self._teach(batch)
        rows = self._pool.map(
            lambda values: self._run(
                self._forward, state, batch, teacher, values, [*names, LOSS]
            ),
            candidates,
        )
        return [(dict(zip(names, row, strict=False)), float(row[-1])) for row in rows]

    def judge(
        self, state: TrainState, batches: Sequence[Batch], values: SiteValues
    ) -> tuple[dict[str, Array], float]:
        """The judged outputs over some batches, joined along samples, and the mean loss."""
        names = self.objective.outputs
        rows = list(
            self._pool.map(
                lambda batch: self._run(
                    self._forward, state, batch, self._teach(batch), values, [*names, LOSS]
                ),
                batches,
            )
        )
        loss = np.average([float(row[-1]) for row in rows], weights=[b.size for b in batches])
        return _join(names, rows), float(loss)

    def teacher_outputs(self, batches: Sequence[Batch]) -> dict[str, Array]:
        """The float model's judged outputs over some batches."""
        names = self.objective.outputs
        rows = self._pool.map(lambda b: run_session(self._float, names, b.inputs), batches)
        return _join(names, list(rows))

    def observe(
        self, state: TrainState, batch: Batch, values: SiteValues, names: Sequence[str]
    ) -> dict[str, Array]:
        """Values inside the searchable graph, as their sites read them.

        They are always asked for by the same names.
        """
        inputs = [name for name in names if name in batch.inputs]
        inside = [name for name in names if name not in batch.inputs]
        found = {name: batch.inputs[name] for name in inputs}
        if inside:
            if self._taps is None:
                model = self._searchable.clone()
                mapping = ir.convenience.create_value_mapping(model.graph)
                model.graph.outputs[:] = [unquantized(mapping, name) for name in inside]
                self._taps = _Runner(make_session(model, frugal=self._frugal, in_turn=True))
            arrays = self._run(self._taps, state, batch, {}, values, self._taps.outputs)
            found |= dict(zip(inside, arrays, strict=True))
        return found

    def _taught(self, batch: Batch) -> dict[str, Array]:
        """What of the float model enters the loss."""
        return self._teach(batch) if self.objective.distills else {}

    def _teach(self, batch: Batch) -> dict[str, Array]:
        return self._teacher.outputs(batch.inputs, batch.source, batch.rows)

    def _run(
        self,
        runner: "_Runner",
        state: TrainState,
        batch: Batch,
        teacher: Mapping[str, Array],
        values: SiteValues,
        names: Sequence[str],
    ) -> list[Array]:
        feeds = self._feeds(batch, teacher, values)
        results = runner.run({**state.parameters, **self._frozen}, feeds, names)
        return [value.numpy() for value in results.values()]

    def _feeds(
        self, batch: Batch, teacher: Mapping[str, Array], values: SiteValues
    ) -> dict[str, Array]:
        feeds = {**batch.inputs, **_formats(values)}
        if self.objective.uses_labels:
            assert batch.labels is not None
            numbers = are_numbers(batch.labels)
            feeds[LABELS] = batch.labels.ravel() if numbers else batch.labels
        for name, array in teacher.items():
            feeds[teacher_input(name)] = array
        return feeds


class _Runner:
    """A session, run on values of ONNX Runtime's own and on arrays."""

    def __init__(self, session: "InferenceSession") -> None:
        self._session = session
        self._inputs = [value.name for value in session.get_inputs()]
        self.outputs: Final = tuple(value.name for value in session.get_outputs())

    def run(
        self,
        values: "Mapping[str, OrtValue]",
        feeds: Mapping[str, Array],
        names: Sequence[str] = (),
    ) -> "dict[str, OrtValue]":
        """Run on those of the values and arrays that the graph reads.

        Args:
            values: By input name.
            feeds: Likewise. They live until the run is over: the binding does not keep them.
            names: Outputs to compute; none means all.
        """
        names = names or self.outputs
        binding = self._session.io_binding()
        for name in self._inputs:
            if name in values:
                binding.bind_ortvalue_input(name, values[name])
            else:
                binding.bind_cpu_input(name, feeds[name])
        for name in names:
            binding.bind_output(name)
        run_bound(self._session, binding)
        return dict(zip(names, binding.get_outputs(), strict=True))


@dataclass(frozen=True, slots=True)
class _Gradient:
    """The sessions of a :class:`~onnx_fliqs.step_graphs.StepGraphs`."""

    before: tuple[_Runner, ...]
    part: _Runner
    after: _Runner


def _formats(values: SiteValues) -> dict[str, Array]:
    return {CODES: values.codes.reshape(-1), SCALES: values.scales}


def _tensors(model: ir.Model, names: Sequence[str]) -> dict[str, ir.TensorProtocol]:
    """The contents of some initializers."""
    found = {name: model.graph.initializers[name].const_value for name in names}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _frozen_inputs(model: ir.Model, parameters: Sequence[str]) -> "dict[str, OrtValue]":
    """Big weights that do not train, as values that all sessions share.

    Only of a model whose weights lie in files or are too many for one message: as
    initializers, ONNX Runtime can rearrange them for its kernels.
    """
    if is_plain(model):
        return {}
    settle(model)
    make = load_onnxruntime().OrtValue.ortvalue_from_numpy
    arrays = shareable(model, but=(*parameters, CODES, SCALES))
    return {name: make(array) for name, array in arrays.items()}


def _owned(array: Array) -> "OrtValue":
    """A copy in ONNX Runtime's own memory.

    A value made by ``ortvalue_from_numpy`` borrows the array's memory, and so do the arrays
    that its ``numpy()`` hands out: they would dangle once the value is gone.
    """
    value: OrtValue = load_onnxruntime().OrtValue.ortvalue_from_shape_and_type(
        list(array.shape), array.dtype.type
    )
    value.update_inplace(np.ascontiguousarray(array))
    return value


def _join(names: Sequence[str], rows: Sequence[Sequence[Array]]) -> dict[str, Array]:
    return {
        name: np.concatenate([row[i] for row in rows]) if rows[0][i].ndim else rows[0][i]
        for i, name in enumerate(names)
    }
