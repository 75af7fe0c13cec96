"""The command line as a user meets it: results, exit codes, errors, untouched files."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import parser

from onnx_fliqs.cli.main import main

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = EXAMPLES / "digits_cnn.onnx"
TRAIN = EXAMPLES / "digits_train.npz"
TEST = EXAMPLES / "digits_test.npz"
FAST = ("--steps", "12", "--batch-size", "16", "--threads", "2")

Files = Callable[[], dict[str, bytes]]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(code: int, *arguments: object) -> str:
    """The command fails with this code and one line, without a traceback."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    lines = [
        line
        for line in result.stderr.splitlines()
        if not line.startswith(("Usage:", "Try ", "warning:")) and line
    ]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    return lines[0]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(MODEL.read_bytes())
    return path


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """The folder's files, to show that a refusal leaves them alone."""
    return lambda: {
        str(p.relative_to(tmp_path)): p.read_bytes()
        for p in tmp_path.rglob("*")
        if p.is_file()
    }


# --- what works ----------------------------------------------------------------------------


def test_help_is_quick_and_loads_neither_onnx_nor_onnxruntime() -> None:
    code = (
        "import sys\n"
        "from onnx_fliqs.cli.main import main\n"
        "commands = ('search', 'inspect', 'profile', 'emit', 'evaluate', 'validate',\n"
        "            'targets')\n"
        "for command in ('', *commands):\n"
        "    main([*command.split(), '--help'], standalone_mode=False)\n"
        "heavy = {'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'onnxscript', 'rich', 'scipy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_search_with_labels_writes_a_verified_model_and_one_json_object(model: Path) -> None:
    result = run("search", model, "--data", TRAIN, "--bits", 5, *FAST, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    output, assignment = Path(found["output"]), Path(found["assignment"])
    assert output == model.with_name("model.fliqs.onnx")
    assert assignment == model.with_name("model.fliqs.assignment.json")
    onnx.checker.check_model(output, full_check=True)
    assert found["schema"] == 1
    assert found["quality"]["metric"] == "accuracy"
    assert 0.98 <= (found["cost"]["effective_bits"] / 5) ** 2 <= 1
    assert found["steps"] == 12
    assert found["seed"] == 0
    assert found["warnings"] == []
    assert {"name", "op", "format", "macs", "params", "trained"} <= set(found["layers"][0])
    assert json.loads(assignment.read_text())["layers"] == {
        layer["name"]: layer["format"] for layer in found["layers"]
    }
    assert not model.with_name("model.fliqs.checkpoint").exists()
    assert output.stat().st_size < model.stat().st_size / 2


def test_names_are_printed_as_they_are(tmp_path: Path) -> None:
    """Square brackets are no markup, not even such as would be wrong."""
    proto, path = onnx.load(MODEL), tmp_path / "model.onnx"
    renamed = iter(["stem[conv]/Conv", "a[/b]"])
    for node in proto.graph.node:
        if node.op_type == "Conv":
            node.name = next(renamed, node.name)
    onnx.save(proto, path)
    for result in (run("inspect", path), run("search", path, "--data", TRAIN, *FAST)):
        assert result.exit_code == 0, result.output
        assert all(name in result.stdout for name in ("stem[conv]/Conv", "a[/b]"))


def test_a_baseline_is_searched_by_its_name(model: Path) -> None:
    result = run(
        "search", model, "--data", TRAIN, "--bits", 5, "--strategy", "uniform", *FAST, "--json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["strategy"] == "uniform"
    assert {layer["format"] for layer in found["layers"]} == {"int5"}
    assert "nan" not in result.stderr


def test_a_given_assignment_is_trained_without_a_search(model: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    command = "search", model, "--data", TRAIN, *FAST
    assert run(*command, "--bits", 5, "-o", first).exit_code == 0
    assignment = tmp_path / "first.assignment.json"
    result = run(*command, "--assignment", assignment, "-o", second, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["strategy"] == "fixed"
    assert found["policy_entropy"] is None
    assert (tmp_path / "second.assignment.json").read_text() == assignment.read_text()
    for option in ("--bits 5", "--space int-l", "--strategy fliqs", "--size 0.9"):
        line = refused(2, *command, "--assignment", assignment, *option.split())
        assert line.endswith(f"fixes the format of every layer: leave out {option}")
    assert "is the input" in refused(
        2, *command, "--assignment", assignment, "-o", tmp_path / "first.onnx"
    )


def test_the_curves_are_drawn_and_told(model: Path) -> None:
    command = "search", model, "--data", TRAIN, "--bits", 5, *FAST
    result = run(*command)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith("curves   loss"))
    drawn = [line[9:].split()[0] for line in lines[start : start + 4]]
    assert drawn == ["loss", "held-out", "cost", "entropy"]
    assert all(set(line[18:30]) <= set(" ▁▂▃▄▅▆▇█") for line in lines[start : start + 4])
    assert lines[start].count("█") >= 1
    found = json.loads(run(*command, "--json").stdout)["convergence"]
    assert found["converged"] is True
    assert found["doubts"] == []
    assert {len(curve) for curve in found["curves"].values()} == {12}


def test_search_without_anything_but_a_model_warns_and_produces_a_valid_model(
    model: Path,
) -> None:
    result = run("search", model, *FAST)
    assert result.exit_code == 0, result.output
    assert "warning: no data was given" in result.stderr
    assert "left in float" not in result.stdout
    assert "effective bits" in result.stdout
    assert run("validate", model.with_name("model.fliqs.onnx")).exit_code == 0


def test_evaluate_emit_inspect_and_validate_agree_with_each_other(
    model: Path, tmp_path: Path
) -> None:
    inspected = json.loads(run("inspect", model, "--json").stdout)
    assignment = tmp_path / "a.json"
    layers = {layer["name"]: "int8" for layer in inspected["layers"]}
    assignment.write_text(json.dumps({"schema": 1, "target": "ort-cpu", "layers": layers}))
    output = tmp_path / "int8.onnx"
    emitted = run(
        "emit", model, "--assignment", assignment, "--data", TRAIN, "-o", output, "--json"
    )
    assert emitted.exit_code == 0, emitted.output
    shown = run("emit", model, "--assignment", assignment, "--data", TRAIN, "-o", output)
    assert "accuracy on 1197 given samples: float" in shown.stdout
    assert json.loads(emitted.stdout)["target"] == "ort-cpu"
    found = json.loads(run("evaluate", output, "--data", TEST, "--json").stdout)
    float_value = json.loads(run("evaluate", model, "--data", TEST, "--json").stdout)["value"]
    assert found["metric"] == "accuracy"
    assert found["samples"] == 600
    # int8 post-training costs this model at most a few of the 600 images.
    assert found["value"] >= float_value - 0.01
    against = run("evaluate", output, "--data", TEST, "--against", model, "--json")
    assert json.loads(against.stdout)["metric"] == "agreement"
    validated = run("validate", output, "--reference", model, "--json")
    assert json.loads(validated.stdout)["problems"] == []


def test_progress_goes_to_stderr_one_line_at_a_time(model: Path) -> None:
    result = run("search", model, "--data", TRAIN, *FAST)
    measured = [line for line in result.stderr.splitlines() if line.startswith("measure ")]
    assert measured
    for number, line in enumerate(measured, start=1):
        assert line.startswith(f"measure batch {number}/{len(measured)}")
        assert "  " not in line
    lines = [line for line in result.stderr.splitlines() if "step " in line]
    assert lines[-1].startswith("train   step 12/12")
    assert "x budget" in lines[-1]
    assert "step" not in result.stdout


# --- what is refused -----------------------------------------------------------------------


def broken_models(folder: Path) -> dict[str, Path]:
    weights = onnx.load(MODEL)
    paths = {name: folder / f"{name}.onnx" for name in ("cut", "text", "empty", "relu", "nan")}
    paths["cut"].write_bytes(MODEL.read_bytes()[:5000])
    paths["text"].write_text("this is not a model\n" * 50)
    paths["empty"].write_bytes(b"")
    relu = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 4] x) => (float[N, 4] y)'
        " { y = Relu(x) }"
    )
    onnx.save(relu, paths["relu"])
    tensor = next(t for t in weights.graph.initializer if len(t.dims) == 4)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[0] = np.nan
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(weights, paths["nan"])
    return paths


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cut", "cut short"),
        ("text", "not"),
        ("empty", "empty"),
        ("relu", "no quantizable layer"),
        ("nan", "NaN"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "search"])
def test_a_bad_model_is_refused_with_exit_code_3(
    name: str, words: str, command: str, tmp_path: Path, files: Files
) -> None:
    path = broken_models(tmp_path)[name]
    before = files()
    assert words in refused(3, command, path)
    assert files() == before


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


IMAGES = np.zeros((20, 1, 8, 8), np.uint8)
LABELS = np.arange(20) % 10


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pixels": IMAGES, "labels": LABELS}, "pixels"),
        ({"labels": LABELS}, "image"),
        ({"image": IMAGES[:, 0], "labels": LABELS}, "[20,8,8]"),
        ({"image": IMAGES.transpose(0, 2, 3, 1), "labels": LABELS}, "transpose"),
        ({"image": IMAGES, "labels": LABELS[:10]}, "10"),
        ({"image": IMAGES, "labels": LABELS + 5}, "10 classes"),
        ({"image": IMAGES, "labels": LABELS - 1}, "negative"),
        ({"image": IMAGES, "labels": LABELS / 3}, "integer"),
        ({"image": IMAGES + np.float32(np.nan), "labels": LABELS}, "NaN"),
    ],
)
def test_bad_data_is_refused_with_exit_code_1(
    arrays: dict[str, Any], words: str, model: Path, tmp_path: Path, files: Files
) -> None:
    data = save(tmp_path / "data.npz", **arrays)
    before = files()
    assert words in refused(1, "search", model, "--data", data, *FAST)
    assert files() == before


def test_a_folder_of_arrays_gives_what_a_file_of_them_does(
    model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "test"
    folder.mkdir()
    for name, array in np.load(TEST).items():
        np.save(folder / name, array)
    first, second = (
        run("evaluate", model, "--data", data, "--json") for data in (TEST, folder)
    )
    assert first.exit_code == 0
    assert first.stdout == second.stdout
    (folder / "image.npy").unlink()
    assert "has no array 'image'" in refused(1, "evaluate", model, "--data", folder)


def test_missing_files_are_refused_as_wrong_usage(model: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    for arguments in (
        ["inspect", nowhere],
        ["search", model, "--data", nowhere],
        ["evaluate", model, "--data", TEST, "--against", nowhere],
        ["validate", model, "--reference", tmp_path],
        ["emit", model, "--assignment", nowhere, "-o", tmp_path / "out.onnx"],
    ):
        assert "there is no file" in refused(2, *arguments)


def test_a_corrupt_data_file_is_refused(model: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.npz"
    cut.write_bytes(TRAIN.read_bytes()[:2000])
    assert "cut.npz" in refused(1, "search", model, "--data", cut)


def test_inputs_that_do_not_fit_each_other_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "two.onnx"
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N, A] a, float[N, B] b) =>'
        " (float[N, 3] y) <float[4, 3] w = {1,2,3,4,5,6,7,8,9,10,11,12}>"
        " { x = Add (a, b)  y = MatMul (x, w) }"
    )
    onnx.save(model, path)
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((20, size)).astype(np.float32) for size in (4, 3))
    data = save(tmp_path / "data.npz", a=a, b=b)
    assert "cannot run the model" in refused(1, "search", path, "--data", data, *FAST)


def test_a_model_that_made_up_inputs_do_not_fit_is_inspected(tmp_path: Path) -> None:
    path = tmp_path / "reshaped.onnx"
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N, L] x) => (float[N, 3] y)'
        " <float[4, 3] w = {1,2,3,4,5,6,7,8,9,10,11,12}> { y = MatMul (x, w) }"
    )
    onnx.save(model, path)
    assert "cannot run the model" in refused(1, "search", path, *FAST)
    found = run("inspect", path, "--json")
    assert found.exit_code == 0
    assert "not counted" in json.loads(found.stdout)["warnings"][0]


def test_text_as_a_model_input_needs_data(tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>'
        " g (string[N, 4] words, float[N, 4] x) => (float[N, 3] y, string[N, 4] same)"
        " <float[4, 3] w = {1,2,3,4,5,6,7,8,9,10,11,12}>"
        " { same = Identity (words)  y = MatMul (x, w) }"
    )
    onnx.save(model, path)
    assert "input 'words' is string" in refused(1, "search", path, *FAST)
    assert run("inspect", path).exit_code == 0


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--space", "int9"], 2, "int9"),
        (["--space", "int4", "--target", "ort-cpu"], 2, "ort-cpu cannot run int4"),
        (["--target", "tpu"], 2, "tpu"),
        (["--bits", "3"], 4, "--bits 4 to 8"),
        (["--bops", "0.1"], 4, "--bops 0.25 to 1"),
        (["--size", "0.4"], 4, "--size 0.5 to 1"),
        (["--bits", "-1"], 2, "positive"),
        (["--bits", "nan"], 2, "positive"),
        (["--loss", "cross-entropy"], 2, "labels"),
        (["--steps", "0"], 2, "--steps"),
        (["--seed", "-1"], 2, "--seed"),
    ],
)
def test_wrong_options_are_refused(
    options: Sequence[str], code: int, words: str, model: Path, files: Files
) -> None:
    before = files()
    assert words in refused(code, "search", model, *options)
    assert files() == before


def test_the_output_may_not_be_the_input(model: Path, files: Files) -> None:
    before = files()
    assert "is the input" in refused(2, "search", model, "-o", model)
    assert "is the input" in refused(2, "emit", model, "--assignment", TEST, "-o", model)
    assert files() == before


def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    model: Path, tmp_path: Path
) -> None:
    assert "no folder" in refused(1, "search", model, "-o", tmp_path / "nowhere" / "out.onnx")
    assert "is a folder" in refused(2, "search", model, "-o", tmp_path)
    if os.geteuid() != 0:  # root writes everywhere
        folder = tmp_path / "locked"
        folder.mkdir(mode=0o500)
        assert "cannot write" in refused(1, "search", model, "-o", folder / "out.onnx")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ('{"schema": 9, "layers": {}}', "schema"),
        ('{"schema": 1, "layers": {"a": "int99"}}', "int99"),
        ('{"schema": 1, "layers": {"a": "int8"}}', "no format for layer"),
    ],
)
def test_a_bad_assignment_is_refused(
    content: str, words: str, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    line = refused(2, "emit", model, "--assignment", path, "-o", tmp_path / "out.onnx")
    assert words in line
    assert not (tmp_path / "out.onnx").exists()


def test_evaluate_needs_labels_or_a_model_to_compare_with(model: Path, tmp_path: Path) -> None:
    data = save(tmp_path / "data.npz", image=IMAGES)
    assert "--against" in refused(2, "evaluate", model, "--data", data)


def test_validate_fails_loudly_where_the_default_session_is_wrong(tmp_path: Path) -> None:
    # A symmetric float8 QuantizeLinear with a zero point: the default session drops the Relu.
    path = tmp_path / "relu_fp8.onnx"
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[N, 64] x) => (float[N, 64] y)'
        " <float s = {0.01}> { r = Relu (x) z = Constant <value_float = 0.0> ()"
        " zp = Cast <to = 17> (z) q = QuantizeLinear (r, s, zp)"
        " y = DequantizeLinear (q, s, zp) }"
    )
    onnx.save(model, path)
    assert "default: differs" in refused(5, "validate", path)


# --- stopping and resuming -----------------------------------------------------------------


def started(arguments: Sequence[object]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", "from onnx_fliqs.cli.main import main; main()"]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        # A shell that runs the tests in the background makes its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for_line(process: "subprocess.Popen[str]", words: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return
    raise AssertionError(f"the search ended before it said {words!r}")


LONG = ("--steps", "160", "--batch-size", "16", "--threads", "2", "--bits", "4.5")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_search_resumes_to_the_same_bytes(
    how: signal.Signals, model: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.onnx"
    assert run("search", model, "--data", TRAIN, "-o", whole, *LONG).exit_code == 0
    output = tmp_path / "resumed.onnx"
    arguments = ("search", model, "--data", TRAIN, "-o", output, *LONG)
    process = started(arguments)
    wait_for_line(process, "step 48/160")
    process.send_signal(how)
    _, error = process.communicate(timeout=60)
    folder = output.with_suffix(".checkpoint")
    assert folder.is_dir()
    assert not output.exists()
    if how is not signal.SIGKILL:
        assert process.returncode == 1
        assert "--resume" in error
        assert "Traceback" not in error
    assert run(*arguments, "--resume").exit_code == 0
    assert output.read_bytes() == whole.read_bytes()
    assert (
        output.with_suffix(".assignment.json").read_bytes()
        == whole.with_suffix(".assignment.json").read_bytes()
    )
    assert not folder.exists()


def test_the_command_leaves_the_callers_signals_as_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run("targets").exit_code == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_checkpoint_that_is_not_resumed_is_kept(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out.checkpoint"
    folder.mkdir()
    (folder / "state.npz").write_bytes(b"precious")
    result = run("search", model, "--data", TRAIN, "-o", tmp_path / "out.onnx", *FAST)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out.checkpoint.old" / "state.npz").read_bytes() == b"precious"
    assert "out.checkpoint.old" in result.stderr


def test_a_refused_command_leaves_the_checkpoint_where_it_is(
    model: Path, tmp_path: Path
) -> None:
    state = tmp_path / "out.checkpoint" / "state.npz"
    state.parent.mkdir()
    state.write_bytes(b"precious")
    refused(4, "search", model, "--data", TRAIN, "-o", tmp_path / "out.onnx", "--bits", 1)
    assert state.read_bytes() == b"precious"


def test_resuming_without_a_checkpoint_says_so(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    result = run("search", model, "--data", TRAIN, "-o", output, *FAST, "--resume")
    assert result.exit_code == 0, result.output
    assert "there was no checkpoint in" in result.stderr


def test_a_file_in_the_place_of_the_checkpoint_is_noticed_first(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "out.checkpoint").touch()
    message = refused(1, "search", model, "--data", TRAIN, "-o", tmp_path / "out.onnx")
    assert "cannot make the checkpoint folder" in message


@pytest.mark.parametrize("output", [".", "/", ""])
def test_an_output_without_a_name_is_refused(model: Path, output: str) -> None:
    assert "is a folder" in refused(2, "search", model, "-o", output)


def test_resuming_with_other_settings_is_refused(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    process = started(("search", model, "--data", TRAIN, "-o", output, *LONG))
    wait_for_line(process, "step 48/160")
    process.kill()
    process.communicate(timeout=60)
    arguments = ("search", model, "--data", TRAIN, "-o", output, "--seed", 1, *LONG)
    assert "settings" in refused(1, *arguments, "--resume")


def test_the_same_seed_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / name for name in ("a.onnx", "b.onnx")]
    for output in outputs:
        assert run("search", model, "--data", TRAIN, "-o", output, *FAST).exit_code == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
