"""Every form of a layer is found, searched and emitted alike."""

import functools

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from layer_forms import FORMS
from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.precision import Precision
from onnx_fliqs.runtime import OptimizationLevel, make_session
from onnx_fliqs.verify import compare
from support import PRECISIONS, Calibrated, calibrated, on_targets, random_feeds, run

EVERY = pytest.mark.parametrize("form", FORMS)
NOT_FOR_INTEGER_KERNELS = {
    "convtranspose_1d_grouped",
    *("lstm", "lstm_both_ways", "two_rnns_of_one_weight", "einsums", "layer_in_a_loop"),
    "recurrent_cell_in_a_branch",
}
FORMS_AND_TARGETS = pytest.mark.parametrize(("form", "target"), on_targets(FORMS))
SEEDS = (2, 3)
"""Both branches of an If."""


@functools.cache
def prepared(form: str, target: str = "generic") -> Calibrated:
    names = ("int4", "int6", "e3m4", "int8", "e4m3", "bf16", "float32")
    searched = [PRECISIONS[name] for name in names] if target == "generic" else None
    return calibrated(FORMS[form].build(), target, searched)


def assert_same(actual: ir.Model, expected: ir.Model, form: str) -> None:
    # Exact, but for a constant of one column: ONNX Runtime adds up its products in another
    # order than those of a computed one.
    rtol = 1e-6 if form == "scalar_product" else 0
    for seed in SEEDS:
        feeds = random_feeds(expected, seed)
        for want, got in zip(run(expected, feeds), run(actual, feeds), strict=True):
            np.testing.assert_allclose(got, want, rtol=rtol, atol=0)


def assert_as_searched(form: str, target: str, chosen: dict[str, Precision]) -> ir.Model:
    case = prepared(form, target)
    graph = case.emitted(chosen)
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    assert_same(graph, case.searchable(chosen), form)
    return graph


@EVERY
def test_the_model_becomes_canonical(form: str) -> None:
    graph = prepared(form).canonical.graph
    assert [node.op_type for node in graph.all_nodes()] == list(FORMS[form].ops)


@FORMS_AND_TARGETS
def test_at_float32_not_a_bit_of_the_outputs_changes(form: str, target: str) -> None:
    case = prepared(form, target)
    assert_same(case.searchable(), case.canonical, form)
    assert_same(case.emitted(case.space.uniform(PRECISIONS["float32"])), case.canonical, form)


@pytest.mark.parametrize("name", ["int4", "int6", "e3m4", "int8", "e4m3", "bf16"])
@EVERY
def test_every_format_computes_what_was_searched(form: str, name: str) -> None:
    assert_as_searched(form, "generic", prepared(form).space.uniform(PRECISIONS[name]))


@pytest.mark.parametrize("seed", range(3))
@FORMS_AND_TARGETS
def test_random_mixes_compute_what_was_searched(form: str, target: str, seed: int) -> None:
    assert_as_searched(form, target, prepared(form, target).random_mix(seed))


@FORMS_AND_TARGETS
def test_8_bits_run_right_at_every_level(form: str, target: str) -> None:
    case = prepared(form, target)
    graph = assert_as_searched(form, target, case.eight_bits())
    names = [str(value.name) for value in graph.graph.outputs]
    data = ir.to_proto(graph).SerializeToString()
    for seed in SEEDS:
        feeds = random_feeds(case.canonical, seed)
        plain = dict(zip(names, run(graph, feeds), strict=True))
        for level in OptimizationLevel:
            got = make_session(data, level=level, threads=1).run(names, feeds)
            assert compare(dict(zip(names, got, strict=True)), plain).rms < 0.02


@pytest.mark.parametrize("form", sorted(NOT_FOR_INTEGER_KERNELS))
def test_integer_kernels_leave_what_would_be_slower(form: str) -> None:
    with pytest.raises(UnsupportedError, match="ort-cpu has no kernel for it in int8"):
        prepared(form, "ort-cpu")
