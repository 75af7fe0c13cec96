"""Every pass keeps the promises of its docstring on every small model."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.kernels import block_of_channels
from onnx_fliqs.objective import LossKind, LossTerm
from onnx_fliqs.passes.add_loss import LABELS, LOSS, AddLossPass, teacher_input
from onnx_fliqs.passes.block_channels import BlockChannelsPass
from onnx_fliqs.passes.compute_in_float32 import ComputeInFloat32Pass
from onnx_fliqs.passes.convert_opset import ConvertOpsetPass
from onnx_fliqs.passes.dequantize_after_gather import DequantizeAfterGatherPass
from onnx_fliqs.passes.equalize_layers import EqualizeLayersPass
from onnx_fliqs.passes.expand_vector_matmul import ExpandVectorMatmulPass
from onnx_fliqs.passes.expose_optional_outputs import ExposeOptionalOutputsPass
from onnx_fliqs.passes.fold_batch_normalization import FoldBatchNormalizationPass
from onnx_fliqs.passes.fold_known_sizes import FoldKnownSizesPass
from onnx_fliqs.passes.fold_leading_batch_normalization import (
    FoldLeadingBatchNormalizationPass,
)
from onnx_fliqs.passes.fold_scaling import FoldScalingPass
from onnx_fliqs.passes.fold_splits import FoldSplitsPass
from onnx_fliqs.passes.hoist_initializers import HoistInitializersPass
from onnx_fliqs.passes.inline_operator_definitions import InlineOperatorDefinitionsPass
from onnx_fliqs.passes.lower_batch_normalization import LowerBatchNormalizationPass
from onnx_fliqs.passes.lower_contrib_operators import LowerContribOperatorsPass
from onnx_fliqs.passes.lower_einsum import LowerEinsumPass
from onnx_fliqs.passes.lower_for_gradient import LowerForGradientPass
from onnx_fliqs.passes.lower_opset import LowerOpsetPass
from onnx_fliqs.passes.merge_masks import MergeMasksPass
from onnx_fliqs.passes.name_everything import NameEverythingPass
from onnx_fliqs.passes.pad_codes import PadCodesPass
from onnx_fliqs.passes.prefer_integer_operators import PreferIntegerOperatorsPass
from onnx_fliqs.passes.raise_scalars import RaiseScalarsPass
from onnx_fliqs.passes.remove_dropout import RemoveDropoutPass
from onnx_fliqs.passes.remove_identities import RemoveIdentitiesPass
from onnx_fliqs.passes.remove_quantization import RemoveQuantizationPass
from onnx_fliqs.passes.remove_redundant_clips import RemoveRedundantClipsPass
from onnx_fliqs.passes.remove_unused import RemoveUnusedPass
from onnx_fliqs.passes.resolve_auto_padding import ResolveAutoPaddingPass
from onnx_fliqs.passes.separate_biases import SeparateBiasesPass
from onnx_fliqs.passes.simplify_gemm import SimplifyGemmPass
from onnx_fliqs.passes.specialise_sites import SpecialiseSitesPass
from onnx_fliqs.passes.spell_out_windows import SpellOutWindowsPass
from onnx_fliqs.passes.transpose_compressed_weights import TransposeCompressedWeightsPass
from pass_models import CASES
from support import check_pass, f32, model, random_feeds, run

PASSES = (
    BlockChannelsPass(block_of_channels(), batch=2),
    ComputeInFloat32Pass(),
    ConvertOpsetPass(target=21),
    HoistInitializersPass(),
    InlineOperatorDefinitionsPass(target=21),
    RemoveQuantizationPass(),
    RemoveRedundantClipsPass(),
    DequantizeAfterGatherPass(),
    FoldBatchNormalizationPass(),
    LowerBatchNormalizationPass(),
    MergeMasksPass(),
    NameEverythingPass(),
    RemoveDropoutPass(),
    RemoveIdentitiesPass(),
    RemoveUnusedPass(),
    ExposeOptionalOutputsPass(),
    ResolveAutoPaddingPass(),
    EqualizeLayersPass(),
    SeparateBiasesPass(),
    ExpandVectorMatmulPass(),
    FoldKnownSizesPass(),
    FoldLeadingBatchNormalizationPass(),
    FoldScalingPass(),
    FoldSplitsPass(),
    LowerContribOperatorsPass(),
    LowerEinsumPass(),
    LowerForGradientPass(["x", "w", "w1"]),
    LowerOpsetPass(oldest=13),
    PadCodesPass(),
    PreferIntegerOperatorsPass(),
    RaiseScalarsPass(),
    SimplifyGemmPass(),
    SpecialiseSitesPass(["x"], ["y"]),
    SpellOutWindowsPass(),
    TransposeCompressedWeightsPass(),
)
# Folding multiplies before the sum what the original multiplies after it; another opset may
# have another kernel.
ROUNDED = {
    "BlockChannelsPass",
    "ComputeInFloat32Pass",
    *("ConvertOpsetPass", "LowerContribOperatorsPass", "LowerEinsumPass"),
    "LowerForGradientPass",
    *("ExpandVectorMatmulPass", "SimplifyGemmPass"),
    "EqualizeLayersPass",
    *("FoldBatchNormalizationPass", "FoldLeadingBatchNormalizationPass"),
    "LowerBatchNormalizationPass",
    *("FoldScalingPass", "PreferIntegerOperatorsPass"),
}
SECTIONS = ("Before:", "After:", "Requires:", "Ensures:", "Idempotent:")


@pytest.mark.parametrize("pass_", PASSES, ids=lambda pass_: type(pass_).__name__)
@pytest.mark.parametrize("case", CASES)
def test_a_pass_keeps_its_contract(pass_: ir.passes.InPlacePass, case: str) -> None:
    model = with_shapes(CASES[case].build())
    try:
        pass_.requires(model)
    except ir.passes.PreconditionError:
        assert model.functions or model.opset_imports[""] < 20
        return
    tolerance = 1e-5 if type(pass_).__name__ in ROUNDED else 0
    check_pass(pass_, model, rtol=tolerance, atol=tolerance)


def test_a_pass_that_needs_constants_says_so() -> None:
    model = CASES["bn_alone"].build()
    for name in ("s", "b", "m", "var"):
        model.graph.inputs.append(model.graph.initializers[name])
    with pytest.raises(UnsupportedError, match="parameters that are not constant"):
        LowerBatchNormalizationPass()(with_shapes(model))


@pytest.mark.parametrize(
    "module",
    sorted(
        path.stem
        for path in Path(
            inspect.getfile(importlib.import_module("onnx_fliqs.passes"))
        ).parent.glob("*.py")
        if not path.stem.startswith("_")
    ),
)
def test_a_pass_documents_its_contract(module: str) -> None:
    loaded = importlib.import_module(f"onnx_fliqs.passes.{module}")
    for name, member in inspect.getmembers(loaded, inspect.isclass):
        if not issubclass(member, ir.passes.PassBase) or member.__module__ != loaded.__name__:
            continue
        assert issubclass(member, ir.passes.InPlacePass)
        assert name == "".join(word.capitalize() for word in module.split("_")) + "Pass"
        text = inspect.getdoc(member) or ""
        places = [text.find(f"\n{section}") for section in SECTIONS]
        assert -1 not in places, f"{name} lacks {SECTIONS[places.index(-1)]}"
        assert places == sorted(places)
        assert re.match(r"[A-Z][a-z]+ .*\.\n", text), f"{name} begins with no imperative line"


SCORES = """g (float[N,4] x) => (float[N,3] y) {
    a = MatMul (x, w)
    y = Softmax <axis = 1> (a) }"""


@pytest.mark.parametrize("kind", LossKind)
@pytest.mark.parametrize("scores", ["a", "y"])
def test_the_loss_is_what_its_name_says(kind: LossKind, scores: str) -> None:
    plain = with_shapes(model(SCORES, weights={"w": (4, 3)}))
    term = LossTerm(kind=kind, output="y", scores=scores, weight=0.5, variance=2.0)
    graph = check_pass(AddLossPass([term]), plain, signature=False)
    assert [value.name for value in graph.graph.outputs] == ["y", LOSS]
    feeds = _loss_feeds(plain)
    needed = {str(value.name) for value in graph.graph.inputs}
    assert needed - {"x"} == ({teacher_input("y")} if term.needs_teacher else {LABELS})
    if kind is LossKind.LABEL_ERROR:
        feeds[LABELS] = f32(np.arange(6))
    y, loss = run(graph, {name: feeds[name] for name in needed})
    teacher, labels = feeds[teacher_input("y")], feeds[LABELS]
    logits = np.log(y) if scores == "a" else y
    log_q = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    if kind is LossKind.CROSS_ENTROPY:
        expected = -log_q[np.arange(len(labels)), labels].mean()
    elif kind is LossKind.DIVERGENCE:
        p = teacher if scores == "a" else np.exp(teacher) / np.exp(teacher).sum(1)[:, None]
        expected = (p * (np.log(p) - log_q)).sum(axis=1).mean()
    else:
        wanted = labels.reshape(2, 3) if kind is LossKind.LABEL_ERROR else teacher
        expected = np.square(y - wanted).mean() / 2.0
    np.testing.assert_allclose(loss, 0.5 * expected, rtol=1e-5)  # float32 sums


def _loss_feeds(plain: ir.Model) -> dict[str, Any]:
    feeds = random_feeds(plain, 2)
    teacher = np.random.default_rng(3).dirichlet(np.ones(3), 2).astype(np.float32)
    return feeds | {teacher_input("y"): teacher, LABELS: np.array([2, 0])}


def test_terms_add_up_and_share_the_teacher() -> None:
    plain = with_shapes(model(SCORES, weights={"w": (4, 3)}))
    kinds = (LossKind.CROSS_ENTROPY, LossKind.DIVERGENCE, LossKind.SQUARED_ERROR)
    terms = [LossTerm(kind=kind, output="y", scores="a") for kind in kinds]
    feeds = _loss_feeds(plain)
    graphs = [
        AddLossPass(chosen)(plain.clone()).model for chosen in (terms, *([t] for t in terms))
    ]
    losses = []
    for graph in graphs:
        names = [str(value.name) for value in graph.graph.inputs]
        assert len(names) == len(set(names))
        losses.append(run(graph, {name: feeds[name] for name in names})[-1])
    np.testing.assert_allclose(losses[0], sum(losses[1:]), rtol=1e-6)


def test_a_loss_of_a_value_that_is_not_there_is_refused() -> None:
    plain = model(SCORES, weights={"w": (4, 3)})
    term = LossTerm(kind=LossKind.DIVERGENCE, output="y", scores="logits")
    with pytest.raises(ir.passes.PreconditionError, match="no value 'logits'"):
        AddLossPass([term])(plain)


def test_what_gradients_read_is_added() -> None:
    graph = ExposeOptionalOutputsPass()(
        with_shapes(CASES["normalised_and_pooled"].build())
    ).model
    outputs = [[value.name for value in node.outputs] for node in graph.graph]
    assert outputs == [["n", "n.mean", "n.inv_std_dev"], ["y", "y.indices"]]


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (2, 2), (5, 3), (4, 1), (1, 2)])
def test_written_down_padding_pads_as_the_word_did(
    mode: str, size: int, kernel: int, stride: int
) -> None:
    plain = model(
        f"""g (float[2,1,{size}] x) => (float[2,1,M] y, float[2,1,K] z) {{
            y = Conv <auto_pad = "{mode}", strides = [{stride}]> (x, w)
            z = AveragePool <auto_pad = "{mode}", kernel_shape = [{kernel}],
                             strides = [{stride}]> (x) }}""",
        weights={"w": (1, 1, kernel)},
    )
    explicit = ResolveAutoPaddingPass()(with_shapes(plain)).model
    feeds = random_feeds(plain)
    for want, got in zip(run(plain, feeds), run(explicit, feeds), strict=True):
        np.testing.assert_array_equal(got, want)


def with_shapes(model: ir.Model) -> ir.Model:
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
