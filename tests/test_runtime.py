"""ONNX Runtime's door: what is said when it is absent, doubled, damaged or cannot train."""

import importlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from onnx_fliqs import runtime
from onnx_fliqs.errors import (
    ConfigError,
    EnvironmentMissingError,
    FliqsError,
    ModelError,
    UnknownOperatorError,
    UnsupportedError,
)
from onnx_fliqs.runtime import (
    OptimizationLevel,
    load_onnxruntime,
    load_training,
    make_session,
    quiet_options,
    reason_of,
    register_custom_ops,
    run_session,
)

HEADER = '<ir_version: 10, opset_import: ["" : 17]>'
RELU = f"{HEADER} g (float[2,3] x) => (float[2,3] y) {{ y = Relu(x) }}"

Install = Callable[..., None]


def serialized(text: str, **changes: int) -> bytes:
    model = onnx.parser.parse_model(text)
    for field, value in changes.items():
        setattr(model, field, value)
    return bytes(model.SerializeToString())


@pytest.fixture(autouse=True)
def _forget_what_is_loaded() -> Iterator[None]:
    load_onnxruntime.cache_clear()
    load_training.cache_clear()
    yield
    load_onnxruntime.cache_clear()
    load_training.cache_clear()


def distribution(
    name: str | None, place: str = "site", *, owns: bool = True
) -> SimpleNamespace:
    files = [PurePosixPath("onnxruntime/__init__.py"), PurePosixPath("other.py")]
    return SimpleNamespace(
        metadata={"Name": name},
        files=files if owns else None,
        locate_file=lambda file: PurePosixPath(place) / str(file),
    )


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Install:
    def install(*distributions: SimpleNamespace) -> None:
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: iter(distributions))

    return install


def importable(monkeypatch: pytest.MonkeyPatch, **modules: ModuleType | Exception) -> None:
    """Let imports of onnxruntime and its parts give these, by name with ``__`` for dots."""

    def import_module(name: str) -> ModuleType:
        module = modules[name.replace(".", "__")]
        if isinstance(module, Exception):
            raise module
        return module

    monkeypatch.setattr(importlib, "import_module", import_module)


def fake_runtime() -> ModuleType:
    module = ModuleType("onnxruntime")
    module.__dict__.update(
        __version__="9.9.9",
        InferenceSession=object,
        SessionOptions=object,
        set_default_logger_severity=lambda level: None,
    )
    return module


def message(error: pytest.ExceptionInfo[FliqsError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_importing_the_module_does_not_import_onnx_runtime() -> None:
    code = "import sys, onnx_fliqs.runtime; sys.exit('onnxruntime' in sys.modules)"
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_an_absent_runtime_is_reported_with_both_installs(
    monkeypatch: pytest.MonkeyPatch, installed: Install
) -> None:
    installed(distribution("numpy"))
    missing = ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")
    importable(monkeypatch, onnxruntime=missing)
    with pytest.raises(EnvironmentMissingError) as error:
        load_onnxruntime()
    text = message(error)
    assert text.startswith("ONNX Runtime is not installed: ")
    assert 'pip install "onnx-fliqs[cpu]"' in text
    assert 'pip install "onnx-fliqs[runtime]"' in text


@pytest.mark.parametrize(
    "second", ["onnxruntime-training-cpu", "onnxruntime_gpu", "ONNXRuntime.Gpu"]
)
def test_two_owners_are_named_with_the_way_out(installed: Install, second: str) -> None:
    installed(distribution("onnxruntime"), distribution("numpy"), distribution(second))
    normal = second.lower().replace("_", "-").replace(".", "-")
    with pytest.raises(EnvironmentMissingError) as error:
        load_onnxruntime()
    text = message(error)
    assert text.startswith(f"onnxruntime and {normal} overwrite each other's files: ")
    assert f"pip uninstall -y onnxruntime {normal}, then pip install" in text


@pytest.mark.parametrize(
    "others",
    [
        pytest.param([distribution("onnxruntime", "base")], id="in another folder"),
        pytest.param([distribution("onnxruntime-training-cpu")], id="found twice"),
        pytest.param([distribution("onnxruntime-extensions", owns=False)], id="owns nothing"),
        pytest.param([distribution("onnxscript"), distribution(None)], id="unrelated"),
    ],
)
def test_one_owner_is_enough(
    monkeypatch: pytest.MonkeyPatch, installed: Install, others: list[SimpleNamespace]
) -> None:
    installed(distribution("onnxruntime-training-cpu"), *others)
    module = fake_runtime()
    importable(monkeypatch, onnxruntime=module)
    assert load_onnxruntime() is module


@pytest.mark.parametrize(
    "broken",
    [
        ImportError("cannot import name 'x'\n  from 'onnxruntime.capi'"),
        AttributeError("no attribute 'get_all_providers'"),
        ModuleNotFoundError("No module named 'onnxruntime.capi'", name="onnxruntime.capi"),
        ModuleType("onnxruntime"),
    ],
    ids=["mixed files", "mixed versions", "half removed", "empty folder"],
)
def test_a_damaged_runtime_is_reinstalled(
    monkeypatch: pytest.MonkeyPatch, installed: Install, broken: ModuleType | Exception
) -> None:
    installed(distribution("onnxruntime-gpu"))
    importable(monkeypatch, onnxruntime=broken)
    with pytest.raises(EnvironmentMissingError) as error:
        load_onnxruntime()
    text = message(error)
    assert text.startswith("the installed ONNX Runtime is damaged (")
    assert text.endswith("pip install --force-reinstall --no-deps onnxruntime-gpu")


def test_a_runtime_that_cannot_train_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, installed: Install
) -> None:
    installed(distribution("onnxruntime"))
    importable(
        monkeypatch,
        onnxruntime=fake_runtime(),
        onnxruntime__capi___pybind_state=ModuleType("state"),
    )
    with pytest.raises(EnvironmentMissingError) as error:
        load_training()
    text = message(error)
    assert text.startswith("this onnxruntime 9.9.9 has no training kernels")
    assert "pip uninstall -y onnxruntime, then" in text
    assert 'pip install "onnx-fliqs[cpu]" (Python 3.12 or older)' in text


def test_the_failure_is_found_again_after_mending(
    monkeypatch: pytest.MonkeyPatch, installed: Install
) -> None:
    installed(distribution("onnxruntime"), distribution("onnxruntime-gpu"))
    with pytest.raises(EnvironmentMissingError):
        load_onnxruntime()
    installed(distribution("onnxruntime"))
    importable(monkeypatch, onnxruntime=fake_runtime())
    assert load_onnxruntime().__version__ == "9.9.9"


def test_every_level_is_one_of_onnx_runtime() -> None:
    levels = load_onnxruntime().GraphOptimizationLevel
    assert {getattr(levels, name) for name in runtime._ORT_LEVELS.values()} == set(
        levels.__members__.values()
    ) - {getattr(levels, "ORT_ENABLE_LAYOUT", None)}
    assert set(runtime._ORT_LEVELS) == set(OptimizationLevel)


@pytest.mark.parametrize("level", OptimizationLevel)
def test_a_model_runs_from_bytes_and_from_a_file(
    level: OptimizationLevel, tmp_path: Path
) -> None:
    path = tmp_path / "relu.onnx"
    path.write_bytes(serialized(RELU))
    x = np.array([[-1, 0, 1], [2, -3, 4]], np.float32)
    for model in (serialized(RELU), path):
        session = make_session(model, level=level, threads=1, disabled=["ConvAddFusion"])
        assert session.get_providers() == ["CPUExecutionProvider"]
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], np.maximum(x, 0))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (serialized(RELU.replace("Relu", "Foo")), "Foo"),
        (serialized(RELU, ir_version=99), "Unsupported model IR version: 99"),
        (serialized(RELU.replace(": 17", ": 99")), "Opset 99 is under development"),
    ],
    ids=["operator", "IR version", "opset"],
)
def test_a_refused_model_is_unsupported_in_one_line(model: bytes, reason: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        make_session(model)
    text = message(error)
    assert text.startswith("ONNX Runtime cannot load the model: ")
    assert reason in text
    assert "ONNXRuntimeError" not in text
    assert "onnxruntime_src" not in text


def test_a_reason_has_no_places_in_foreign_source() -> None:
    error = RuntimeError(
        "/onnxruntime_src/a/state.cc:621 onnxruntime::python::add(pybind11::module&)::<lambda("
        "onnxruntime::python::Context*)> [ONNXRuntimeError] : 1 : FAIL : Node (a) is wrong\n"
    )
    assert reason_of(error) == "Node (a) is wrong"


def test_an_unknown_operator_is_named_with_the_way_to_its_library() -> None:
    model = serialized(RELU.replace(": 17]", ': 17, "a.b" : 1]').replace("Relu", "a.b.F"))
    with pytest.raises(UnknownOperatorError) as error:
        make_session(model)
    assert message(error) == (
        "ONNX Runtime does not know the operator F of the domain 'a.b': name the library that"
        " implements it with --custom-ops"
    )
    assert error.value.exit_code == 3


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ops.so"
    for content in (None, b"no library"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"ops\.so is no library of custom op") as error:
            register_custom_ops(path)
        message(error)
    make_session(serialized(RELU))  # nothing is left behind


def test_bytes_that_are_no_model_are_named_so() -> None:
    with pytest.raises(ModelError, match=r"^the model is not a readable ONNX model") as error:
        make_session(b"junk")
    assert not isinstance(error.value, UnsupportedError)
    message(error)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.onnx is not a readable") as error:
        make_session(tmp_path / "absent.onnx")
    message(error)


def test_a_provider_that_is_not_there_is_refused() -> None:
    with pytest.raises(EnvironmentMissingError, match=r"has no NoProvider; it has .*CPU"):
        make_session(serialized(RELU), providers=["NoProvider", "CPUExecutionProvider"])


def test_a_session_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    make_session(serialized(RELU))
    with pytest.raises(UnsupportedError):
        make_session(serialized(RELU, ir_version=99))
    assert capfd.readouterr() == ("", "")


def test_building_a_gradient_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    try:
        training = load_training()
    except EnvironmentMissingError as error:
        pytest.skip(str(error))
    model = serialized(
        f"""{HEADER} g (float[2,3] x, float[3,4] w) => (float loss) {{
            y = MatMul(x, w)
            loss = ReduceMean<keepdims = 0>(y)
        }}"""
    )
    builder = training.GradientGraphBuilder(model, {"loss"}, {"w"}, "loss", quiet_options())
    builder.build()
    outputs = onnx.load_from_string(builder.get_model()).graph.output
    assert "w_grad" in {output.name for output in outputs}
    assert capfd.readouterr() == ("", "")


# -- quantized operators --------------------------------------------------------------------

# A searchable site that two read: its scale is fed.
SITE = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N,16,4,4] x, float[16,16,1,1] w, float s, uint8 z)
    => (float[N,16,4,4] y, float[N,16,4,4] t) {
    q = QuantizeLinear (x, s, z)
    d = DequantizeLinear (q, s, z)
    a = Relu (d)
    y = Conv (a, w)
    b = MaxPool <kernel_shape = [1, 1]> (d)
    t = Mul (d, b)
}"""


def optimised(
    text: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, fuse: bool
) -> list[str]:
    """The operators of the graph that ONNX Runtime really runs."""
    written = folder / f"{fuse}.onnx"

    def options() -> Any:
        made = quiet_options()
        made.optimized_model_filepath = str(written)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "quiet_options", options)
        make_session(onnx.parser.parse_model(text), threads=1, fuse_quantized=fuse)
    return [node.op_type for node in onnx.load(written).graph.node]


def test_a_site_is_dequantized_once_for_all_its_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = optimised(SITE, tmp_path, monkeypatch, fuse=False)
    assert apart.count("QuantizeLinear") == apart.count("DequantizeLinear") == 1
    # What that saves: looking for integer operators, the runtime copies it for each reader.
    fused = optimised(SITE, tmp_path, monkeypatch, fuse=True)
    assert fused.count("DequantizeLinear") > 1


def test_quantized_operators_are_fused_unless_that_is_unwanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """<ir_version: 9, opset_import: ["" : 20]>
    g (uint8[N,4] x, uint8[4,3] w) => (uint8[N,3] y) {
        s = Constant <value = float {0.5}> ()
        z = Constant <value = uint8 {3}> ()
        a = DequantizeLinear (x, s, z)
        b = DequantizeLinear (w, s, z)
        c = MatMul (a, b)
        y = QuantizeLinear (c, s, z)
    }"""
    assert optimised(text, tmp_path, monkeypatch, fuse=True) == ["QLinearMatMul"]
    assert "MatMul" in optimised(text, tmp_path, monkeypatch, fuse=False)


def test_what_sessions_in_turn_give_outlives_them() -> None:
    text = """<ir_version: 9, opset_import: ["" : 20]>
    g (float[N] x) => (float[N] y) { y = Neg (x) }"""
    x = np.arange(100_000, dtype=np.float32)

    def negated(array: Any) -> Any:
        session = make_session(onnx.parser.parse_model(text), in_turn=True)
        return run_session(session, ["y"], {"x": array}, borrow=True)[0]

    first = negated(x)
    others = [negated(x + number) for number in range(1, 20)]
    np.testing.assert_array_equal(first, -x)
    np.testing.assert_array_equal(others[-1], -x - 19)


def test_memory_that_somebody_else_shares_already_is_shared_with_them() -> None:
    runtime._share_arena.cache_clear()
    runtime._share_arena()
    runtime._share_arena.cache_clear()
    runtime._share_arena()
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (float x) => (float y) { y = Neg (x) }'
    )
    session = make_session(model, in_turn=True)
    assert run_session(session, ["y"], {"x": np.asarray(2, np.float32)}) == [-2]
