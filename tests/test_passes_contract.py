"""Every pass keeps the promises of its docstring on every small model."""

import importlib
import inspect
import re
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.passes.convert_opset import ConvertOpsetPass
from onnx_fliqs.passes.fold_batch_normalization import FoldBatchNormalizationPass
from onnx_fliqs.passes.lower_batch_normalization import LowerBatchNormalizationPass
from onnx_fliqs.passes.name_everything import NameEverythingPass
from onnx_fliqs.passes.remove_dropout import RemoveDropoutPass
from onnx_fliqs.passes.remove_identities import RemoveIdentitiesPass
from onnx_fliqs.passes.remove_unused import RemoveUnusedPass
from pass_models import CASES
from support import check_pass

PASSES = (
    ConvertOpsetPass(target=21),
    FoldBatchNormalizationPass(),
    LowerBatchNormalizationPass(),
    NameEverythingPass(),
    RemoveDropoutPass(),
    RemoveIdentitiesPass(),
    RemoveUnusedPass(),
)
# Folding multiplies before the sum what the original multiplies after it; another opset may
# have another kernel.
ROUNDED = {"FoldBatchNormalizationPass", "LowerBatchNormalizationPass", "ConvertOpsetPass"}
SECTIONS = ("Before:", "After:", "Requires:", "Ensures:", "Idempotent:")


@pytest.mark.parametrize("pass_", PASSES, ids=lambda pass_: type(pass_).__name__)
@pytest.mark.parametrize("case", CASES)
def test_a_pass_keeps_its_contract(pass_: ir.passes.InPlacePass, case: str) -> None:
    model = with_shapes(CASES[case].build())
    try:
        pass_.requires(model)
    except ir.passes.PreconditionError:
        assert model.functions or model.opset_imports[""] < 14
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


def with_shapes(model: ir.Model) -> ir.Model:
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
