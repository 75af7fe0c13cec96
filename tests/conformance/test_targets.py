"""What is emitted for every target is right in the runtimes that its users have."""

import functools
from pathlib import Path

import pytest

from onnx_fliqs.emission import simulate
from onnx_fliqs.errors import UnsupportedError
from onnx_fliqs.model import load_model
from onnx_fliqs.targets import TARGETS
from onnx_fliqs.verify import verify_graph
from pass_models import LAYERED
from support import Calibrated, calibrated, random_feeds

WHY = "run by .ci/run, step conformance: needs onnxruntime 1.31 and openvino"
pytest.importorskip("openvino", reason=WHY)
pytest.importorskip("onnxruntime", "1.31", reason=WHY)

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits_cnn.onnx"
SHARED_BOTH_WAYS = "shared_weight"
"""OpenVINO 2026.4 computes this float model wrong: a MatMul and a transposing Gemm that share
a square weight get it the same way round."""
FLOAT8 = ("e4m3", "e5m2")


@functools.cache
def prepared(name: str, target: str) -> Calibrated:
    model = load_model(DIGITS) if name == DIGITS.stem else LAYERED[name].build()
    try:
        return calibrated(model, target)
    except UnsupportedError:
        pytest.skip(f"{target} has no kernel for any layer of {name}")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [*LAYERED, DIGITS.stem])
def test_every_runtime_of_the_target_computes_what_was_searched(
    name: str, target: str
) -> None:
    runtimes = TARGETS[target].runtimes
    if name == SHARED_BOTH_WAYS:
        runtimes = tuple(each for each in runtimes if each != "openvino")
    case = prepared(name, target)
    batches = [random_feeds(case.canonical, seed) for seed in (3, 4)]
    mixes = [case.space.assign(level) for level in case.space.levels]
    for chosen in [*mixes, case.random_mix(0), case.random_mix(1)]:
        searched = simulate(case.canonical, case.space, chosen, case.scales, batches)
        found = verify_graph(case.emitted(chosen), batches, searched, runtimes=runtimes)
        names = {precision.name for precision in chosen.values()}
        for check in (*found.levels, *found.others):
            # ONNX Runtime fuses float8 groups into operators that it does not have.
            refused = check.name == "default" and check.error and names.intersection(FLOAT8)
            assert check.agrees or refused, f"{names}: {check.name} {check.problem}"
        assert "onnxruntime" not in runtimes or found.levels[0].agrees
