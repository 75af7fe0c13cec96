"""From a model and data to everything that a search or an emission starts from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from onnx_fliqs.calibrate import (
    Observer,
    activation_scales,
    fit_to_activations,
    negative_shares,
    sample_values,
    weight_scales,
)
from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.find_layers import find_layers
from onnx_fliqs.index_ranges import index_ranges
from onnx_fliqs.layer_operators import macs
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.passes.equalize_layers import EqualizeLayersPass
from onnx_fliqs.passes.insert_search_sites import InsertSearchSitesPass
from onnx_fliqs.passes.separate_biases import SeparateBiasesPass
from onnx_fliqs.passes.specialise_sites import SpecialiseSitesPass
from onnx_fliqs.precision import Precision
from onnx_fliqs.rules import Rule
from onnx_fliqs.signs import mark_unsigned, positive_sites
from onnx_fliqs.sites import SearchSpace
from onnx_fliqs.synthetic_data import synthetic
from onnx_fliqs.targets import Activations, Target
from onnx_fliqs.thresholds import Thresholds
from onnx_fliqs.train_step import Batch

__all__ = [
    "Prepared",
    "calibrate",
    "calibration_batches",
    "make_batch",
    "prepare",
    "synthetic_data",
    "weights_of",
    "with_sites",
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
    model: ir.Model,
    dataset: Dataset | None,
    target: Target,
    precisions: Sequence[Precision],
    *,
    rules: Sequence[Rule] = (),
    distinct: bool = True,
    remove_quantization: bool = False,
    equalize: bool = False,
    separate_biases: bool = False,
) -> Prepared:
    """Canonicalise a model, find its layers and count their multiply-accumulates.

    Args:
        model: As loaded; it is not changed.
        dataset: For the sizes of free dimensions; None: one made-up sample.
        target: Decides the sites.
        precisions: What the layers choose from, cheapest first.
        rules: As for :func:`~onnx_fliqs.find_layers.find_layers`.
        distinct: The same.
        remove_quantization: Turn a quantized model back into a float model, not refuse it.
        equalize: Equalize the ranges of the channels between layers.
        separate_biases: Give every layer that can have one a bias of its own.

    Raises:
        ConfigError: A rule is for no layer, or leaves one without a choice.
        UnsupportedError: Nothing can be quantized, or the model cannot be run.
        DataError: The model needs real data to be run.
    """
    canonical = canonicalise(model.clone(), remove_quantization=remove_quantization)
    if equalize:
        EqualizeLayersPass()(canonical)
    if separate_biases:
        SeparateBiasesPass()(canonical)
    space = find_layers(canonical, target, precisions, rules, distinct=distinct)
    if dataset is None:
        dataset = synthetic_data(canonical, 1, 0)
    return Prepared(canonical, _with_macs(canonical, space, dataset))


def _with_macs(model: ir.Model, space: SearchSpace, dataset: Dataset) -> SearchSpace:
    """Count multiply-accumulates by a run on one sample.

    Inside control flow, where nothing can be observed, they are known if the shapes are.
    """
    nodes = {str(node.name): node for node in model.graph.all_nodes()}
    outside = set(model.graph)
    # Unnamed: an optional output that is not there.
    wanted = {
        str(value.name): None
        for layer in space.layers
        if nodes[layer.name] in outside
        for value in (*nodes[layer.name].inputs, *nodes[layer.name].outputs)
        if value is not None and value.name and not value.is_initializer()
    }
    size = dataset.fixed_batch or 1
    feeds = dataset.batch(np.arange(size) % len(dataset))
    seen = Observer(model, list(wanted)).run(feeds)
    _note_ranks(model, seen)

    def shape_of(value: ir.Value) -> tuple[int, ...] | None:
        if value.name in seen:
            return seen[value.name].shape
        static = value.shape is not None and value.shape.is_static()
        return tuple(value.shape.numpy()) if static else None  # type: ignore[union-attr]

    layers = []
    for layer in space.layers:
        count = macs(nodes[layer.name], shape_of)
        if count is None:
            reason = f"{layer.weight_only}; its multiplications are not counted"
            layers.append(replace(layer, weight_only=reason))
        else:
            layers.append(replace(layer, macs=count // size))
    return replace(space, layers=tuple(layers))


def _note_ranks(model: ir.Model, seen: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write down the ranks of what was seen behind operators that inference does not know."""
    values = ir.convenience.create_value_mapping(model.graph)
    unknown = [values[name] for name in seen if values[name].shape is None]
    for value in unknown:
        array = seen[str(value.name)]
        value.dtype = value.dtype or ir.DataType.from_numpy(array.dtype)
        value.shape = ir.Shape([None] * array.ndim)
    if unknown:
        common.ShapeInferencePass(check_type=False, strict_mode=False)(model)


def with_sites(prepared: Prepared) -> ir.Model:
    """The canonical model with a site at every operand that is searched, for training."""
    model, space = prepared.canonical.clone(), prepared.space
    InsertSearchSitesPass(space)(model)
    SpecialiseSitesPass(space.byte_sites, positive_sites(prepared.canonical, space))(model)
    return model


def make_batch(dataset: Dataset, indices: npt.NDArray[Any]) -> Batch:
    """Gather samples and labels."""
    inputs, labels = dataset.batch(indices), dataset.labels_at(indices)
    return Batch(inputs, labels, len(indices), dataset, indices)


def calibration_batches(dataset: Dataset) -> list[Batch]:
    """At most 256 samples, drawn at random, in batches of 32 or, if they are big, of 8."""
    size = dataset.batch_within(_CALIBRATION_BATCH)
    count = max(1, min(_CALIBRATION_SAMPLES, len(dataset)) // size)
    # Not the first ones, which in many files are all of one class.
    order = np.random.default_rng(0).permutation(len(dataset))
    rows = order[np.arange(count * size) % len(dataset)].reshape(count, size)
    return [make_batch(dataset, row) for row in rows]


def calibrate(
    prepared: Prepared,
    target: Target,
    dataset: Dataset,
    seed: int,
    thresholds: Thresholds = Thresholds.SWITCHED,
) -> tuple[
    Prepared,
    dict[tuple[str, str], npt.NDArray[np.float32]],
    dict[str, npt.NDArray[np.float32]],
]:
    """Scales for every site and format, from the float model and calibration samples.

    Returns:
        The prepared model, sites of what is never negative because the inputs were not (raw
        pixels) now unsigned; the scales; and samples of the activations, flat, by name.
    """
    canonical, space = prepared.canonical, prepared.space
    tensors = [site.tensor for site in space.sites if not site.is_weight]
    observer = Observer(canonical, tensors)
    batches = calibration_batches(dataset)
    samples = sample_values((observer.run(b.inputs) for b in batches), len(batches), seed)
    if not dataset.synthetic:
        inputs = {str(value.name) for value in canonical.graph.inputs} & set(samples)
        never_negative = {n for n in inputs if samples[n].min(initial=0.0) >= 0}
        if target.activations is not Activations.SYMMETRIC:
            space = mark_unsigned(canonical, space, never_negative)
    if target.activations is Activations.ASYMMETRIC:
        shares = negative_shares(space, samples)
        sites = (
            replace(s, negative=shares.get(s.same_scale_as or s.name, s.negative))
            for s in space.sites
        )
        space = replace(space, sites=tuple(sites))
    scales = activation_scales(space, samples, thresholds)
    weights = weights_of(canonical, space)
    scales |= weight_scales(space, weights, seed, thresholds)
    return Prepared(canonical, space), fit_to_activations(space, scales, weights), samples


def weights_of(model: ir.Model, space: SearchSpace) -> dict[str, npt.NDArray[Any]]:
    """The weights that have a site, by name."""
    return {
        site.tensor: model.graph.initializers[site.tensor].const_value.numpy()  # type: ignore[union-attr]
        for site in space.sites
        if site.is_weight
    }


def synthetic_data(model: ir.Model, samples: int, seed: int) -> Dataset:
    """Made-up inputs for a model without data, in the ranges that its graph tells."""
    return synthetic(input_specs(model), samples, seed, ranges=index_ranges(model))


def with_weights(model: ir.Model, weights: Mapping[str, npt.NDArray[Any]]) -> ir.Model:
    """A copy of a canonical model with some initializers replaced."""
    copy = model.clone()
    for name, array in weights.items():
        copy.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return copy
