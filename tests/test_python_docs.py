"""The code in docs/python.md runs as it stands there."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).parents[1]


def test_the_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("digits_cnn.onnx", "digits_train.npz", "digits_test.npz"):
        shutil.copy(_ROOT / "examples" / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    text = (_ROOT / "docs/python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/python.md, block {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert "exit code 4" in printed
    assert names["result"].cost.effective_bits <= 4.5
    written = {path.name for path in tmp_path.glob("digits.*")}
    assert written >= {
        "digits.onnx",
        "digits.assignment.json",
        "digits.trained.onnx",
        "digits.qonnx.onnx",
        "digits.int8.onnx",
        "digits.checkpoint",
    }
