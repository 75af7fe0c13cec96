"""From a model and data to everything that a search or an emission starts from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_fliqs.calibrate import (
    Observer,
    activation_scales,
    layer_distortions,
    sample_values,
    weight_scales,
)
from onnx_fliqs.data import Dataset, input_specs, synthetic
from onnx_fliqs.find_layers import find_layers
from onnx_fliqs.formats import Format
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.sites import Layer, SearchSpace, Site
from onnx_fliqs.targets import Target
from onnx_fliqs.train_step import Batch

__all__ = [
    "Prepared",
    "calibrate",
    "calibration_batches",
    "make_batch",
    "prepare",
    "synthetic_data",
    "weights_of",
    "with_weights",
]

_CALIBRATION_SAMPLES: Final = 256
_CALIBRATION_BATCH: Final = 32


@dataclass(frozen=True, slots=True)
class Prepared:
    """A canonical model and what can be searched in it."""

    canonical: ir.Model
    space: SearchSpace
    """With multiply-accumulates."""


def prepare(
    model: ir.Model, dataset: Dataset | None, target: Target, formats: Sequence[Format]
) -> Prepared:
    """Canonicalise a model, find its layers and count their multiply-accumulates.

    Args:
        model: As loaded; it is not changed.
        dataset: For the sizes of free dimensions; None: one made-up sample.
        target: Decides the sites.
        formats: The formats to choose from, cheapest first.

    Raises:
        UnsupportedError: Nothing can be quantized, or the model cannot be run.
        DataError: The model needs real data to be run.
    """
    canonical = canonicalise(model.clone())
    space = find_layers(canonical, target, formats)
    if dataset is None:
        dataset = synthetic(input_specs(canonical), 1, 0)
    size = dataset.fixed_batch or 1
    feeds = dataset.batch(np.arange(size) % len(dataset))
    nodes = {str(node.name): node for node in canonical.graph}
    operands = {layer.name: str(nodes[layer.name].inputs[0].name) for layer in space.layers}  # type: ignore[union-attr]
    names = [name for layer in space.layers for name in (layer.output, operands[layer.name])]
    constants = canonical.graph.initializers
    seen: Mapping[str, npt.NDArray[Any]] = Observer(
        canonical, [name for name in names if name not in constants]
    ).run(feeds)
    shapes = {name: array.shape for name, array in seen.items()}
    shapes |= {name: _shape(value) for name, value in constants.items()}
    layers = tuple(
        replace(
            layer,
            macs=_macs(
                layer,
                nodes[layer.name],
                shapes[operands[layer.name]],
                shapes[layer.output],
                shapes.get(layer.weights[0]) if layer.weights else None,
            )
            // size,
        )
        for layer in space.layers
    )
    return Prepared(canonical, replace(space, layers=layers))


def _shape(value: ir.Value) -> tuple[int, ...]:
    return tuple(value.const_value.shape.numpy()) if value.const_value is not None else ()


def _macs(
    layer: Layer,
    node: ir.Node,
    operand: tuple[int, ...],
    output: tuple[int, ...],
    weight: tuple[int, ...] | None,
) -> int:
    """Multiply-accumulates of one run."""
    if layer.op_type == "Conv" and weight is not None:
        return int(np.prod(output) * np.prod(weight[1:]))
    if layer.op_type == "ConvTranspose" and weight is not None:
        return int(np.prod(operand) * np.prod(weight[1:]))
    if layer.op_type == "Gemm":
        inner = operand[0] if node.attributes.get_int("transA", 0) else operand[1]
        return int(np.prod(output)) * inner
    return int(np.prod(output)) * operand[-1] if operand else 0


def make_batch(dataset: Dataset, indices: npt.NDArray[Any]) -> Batch:
    """Gather samples and labels."""
    labels = None if dataset.labels is None else dataset.labels[indices].astype(np.int64)
    return Batch(dataset.batch(indices), labels, len(indices))


def calibration_batches(dataset: Dataset) -> list[Batch]:
    """At most 256 samples in batches of 32 (or of the size that the model fixes)."""
    size = dataset.fixed_batch or min(_CALIBRATION_BATCH, len(dataset))
    count = max(1, min(_CALIBRATION_SAMPLES, len(dataset)) // size)
    return [
        make_batch(dataset, np.arange(i * size, (i + 1) * size) % len(dataset))
        for i in range(count)
    ]


def _unsigned_inputs(
    space: SearchSpace, samples: Mapping[str, npt.NDArray[Any]]
) -> SearchSpace:
    """Mark sites on graph inputs that were never negative (raw pixels) as unsigned.

    Inside the graph, only what the operators guarantee counts, and what shares an input's
    scale.
    """

    def never_negative(site: Site) -> bool:
        source = space.site[site.same_scale_as or site.name]
        return source.tensor in samples and float(samples[source.tensor].min()) >= 0

    sites = (
        replace(site, unsigned=site.unsigned or never_negative(site)) for site in space.sites
    )
    return replace(space, sites=tuple(sites))


def calibrate(
    prepared: Prepared, dataset: Dataset, seed: int
) -> tuple[
    Prepared,
    dict[tuple[str, str], npt.NDArray[np.float32]],
    tuple[npt.NDArray[np.float64], ...],
]:
    """Scales for every site and format, from the float model and calibration samples.

    Returns:
        The prepared model, sites on never-negative inputs now unsigned; the scales; and for
        each layer the relative squared error of its operands in each format.
    """
    canonical, space = prepared.canonical, prepared.space
    tensors = [site.tensor for site in space.sites if not site.is_weight]
    observer = Observer(canonical, tensors)
    batches = calibration_batches(dataset)
    samples = sample_values((observer.run(b.inputs) for b in batches), len(batches), seed)
    if not dataset.synthetic:
        inputs = {str(value.name) for value in canonical.graph.inputs}
        space = _unsigned_inputs(
            space, {name: samples[name] for name in samples if name in inputs}
        )
    scales = activation_scales(space, samples)
    weights = weights_of(canonical, space)
    scales |= weight_scales(space, weights, seed)
    distortions = layer_distortions(space, samples, weights, scales)
    return Prepared(canonical, space), scales, distortions


def weights_of(model: ir.Model, space: SearchSpace) -> dict[str, npt.NDArray[Any]]:
    """The weights that have a site, by name."""
    return {
        site.tensor: model.graph.initializers[site.tensor].const_value.numpy()  # type: ignore[union-attr]
        for site in space.sites
        if site.is_weight
    }


def synthetic_data(model: ir.Model, samples: int, seed: int) -> Dataset:
    """Made-up inputs for a model without data (its ranges come from its input types)."""
    return synthetic(input_specs(model), samples, seed)


def with_weights(model: ir.Model, weights: Mapping[str, npt.NDArray[Any]]) -> ir.Model:
    """A copy of a canonical model with some initializers replaced."""
    copy = model.clone()
    for name, array in weights.items():
        copy.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return copy
