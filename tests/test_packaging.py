"""The packages that get installed are those that the source tree holds."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

import onnx_fliqs

ROOT = Path(__file__).resolve().parents[1]
LINKS = {"passes": "../passes", "cli": "../cli"}


def test_every_folder_with_modules_is_a_listed_package() -> None:
    """A package that is not listed is missing from the wheel without a word."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r"^packages = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    assert match is not None
    listed = set(re.findall(r'"([\w.]+)"', match[1]))
    assert listed == {"onnx_fliqs", *(f"onnx_fliqs.{name}" for name in LINKS)}
    for package in listed - {"onnx_fliqs"}:
        folder = package.removeprefix("onnx_fliqs.")
        assert re.search(rf'^"{re.escape(package)}" = "{folder}"$', text, re.MULTILINE)


def test_packages_are_flat() -> None:
    for folder in ("onnx_fliqs", *LINKS):
        inner = [
            path.name
            for path in (ROOT / folder).iterdir()
            if path.is_dir() and not path.is_symlink() and path.name != "__pycache__"
        ]
        assert inner == [], f"{folder} has folders that no package list names"


@pytest.mark.parametrize("folder", ["onnx_fliqs", *LINKS])
def test_a_package_has_an_init_file(folder: str) -> None:
    assert (ROOT / folder / "__init__.py").is_file()


@pytest.mark.parametrize(("name", "target"), LINKS.items())
@pytest.mark.skipif(sys.platform == "win32", reason="checkouts there may hold no links")
def test_the_links_of_the_checkout_are_relative(name: str, target: str) -> None:
    link = ROOT / "onnx_fliqs" / name
    assert link.is_symlink()
    assert str(link.readlink()) == target
    assert link.resolve() == ROOT / name


def test_no_function_has_the_name_of_a_module() -> None:
    # Importing a module puts it into the package, in place of a function of that name.
    for name in onnx_fliqs.__all__:
        assert importlib.util.find_spec(f"onnx_fliqs.{name}") is None, name
