"""Checkpoints: all or nothing, only for the same search, deleting nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_fliqs import checkpoint as checkpoint_module
from onnx_fliqs.checkpoint import Checkpoint
from onnx_fliqs.errors import FliqsError

Arrays = dict[str, npt.NDArray[Any]]

IDENTITY = {"model": "abc", "settings": {"steps": 3, "sizes": (1, 2)}}


def arrays(value: float = 1.0) -> Arrays:
    return {
        "weights": np.full((2, 3), value, np.float32),
        "step": np.asarray(7),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.asarray(np.nan),
    }


def assert_equal(found: Arrays | None, expected: Arrays) -> None:
    assert found is not None
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
        assert found[name].shape == array.shape


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "c", IDENTITY).write(arrays())
    assert_equal(Checkpoint(tmp_path / "c", IDENTITY).read(), arrays())


def test_the_last_of_several_writes_counts(tmp_path: Path) -> None:
    store = Checkpoint(tmp_path / "c", IDENTITY)
    for value in (1.0, 2.0, 3.0):
        store.write(arrays(value))
    assert_equal(store.read(), arrays(3.0))
    assert len(list((tmp_path / "c").iterdir())) == 1


@settings(deadline=None, max_examples=50)
@given(names=st.lists(st.text(st.characters(codec="utf-8"), max_size=20), unique=True))
def test_names_may_hold_any_character(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    store = Checkpoint(tmp_path_factory.mktemp("c"), IDENTITY)
    content: Arrays = {name: np.asarray(i) for i, name in enumerate(names)}
    store.write(content)
    assert_equal(store.read(), content)


@pytest.mark.parametrize(
    "names",
    [
        ["w", "w.npy"],
        ["file", "allow_pickle", "identity", "header", "0"],
        ["../../outside", "/absolute", "a\\b", "c:d"],
        ["nul\0a", "nul\0b"],
        ["", " "],
        ["x" * 70_000],
    ],
    ids=lambda names: names[0][:20],
)
def test_names_that_an_archive_would_confuse_stay_apart(
    tmp_path: Path, names: list[str]
) -> None:
    store = Checkpoint(tmp_path / "c", IDENTITY)
    content: Arrays = {name: np.asarray(i) for i, name in enumerate(names)}
    store.write(content)
    assert_equal(store.read(), content)


@pytest.mark.parametrize("make", [True, False])
def test_without_a_checkpoint_there_is_none(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "c"
    if make:
        folder.mkdir()
    assert Checkpoint(folder, IDENTITY).read() is None


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({**IDENTITY, "model": "def"}, "model"),
        ({**IDENTITY, "settings": {"steps": 4, "sizes": [1, 2]}}, "settings"),
        ({**IDENTITY, "data": "x"}, "data"),
        ({"model": "abc"}, "settings"),
        ({"model": "def", "settings": None}, "model, settings"),
    ],
)
def test_a_checkpoint_of_another_search_is_refused(
    tmp_path: Path, other: dict[str, Any], named: str
) -> None:
    Checkpoint(tmp_path / "c", IDENTITY).write(arrays())
    with pytest.raises(FliqsError, match=f"of a search with another {named};") as error:
        Checkpoint(tmp_path / "c", other).read()
    assert "\n" not in str(error.value)


def damaged(data: bytes) -> dict[str, bytes]:
    middle = len(data) // 2
    return {
        "empty": b"",
        "text": b"not a checkpoint",
        "half": data[:middle],
        "without the last byte": data[:-1],
        "flipped": data[:200] + bytes([data[200] ^ 0xFF]) + data[201:],
        "zeros": bytes(len(data)),
        "no members": b"PK\x05\x06" + bytes(18),
    }


@pytest.mark.parametrize("kind", list(damaged(bytes(300))))
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, kind: str) -> None:
    store = Checkpoint(tmp_path / "c", IDENTITY)
    store.write({"a": np.zeros(500)})
    path = only_file(tmp_path / "c")
    path.write_bytes(damaged(path.read_bytes())[kind])
    with pytest.raises(FliqsError, match="cannot be read; delete") as error:
        store.read()
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_single_array_in_place_of_the_archive_is_damage(tmp_path: Path) -> None:
    store = Checkpoint(tmp_path / "c", IDENTITY)
    store.write(arrays())
    with only_file(tmp_path / "c").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(FliqsError, match="cannot be read"):
        store.read()


def test_an_archive_of_something_else_is_damage(tmp_path: Path) -> None:
    store = Checkpoint(tmp_path / "c", IDENTITY)
    store.write(arrays())
    np.savez(only_file(tmp_path / "c"), x=np.zeros(3))
    with pytest.raises(FliqsError, match="cannot be read"):
        store.read()


def test_a_folder_in_place_of_the_file_is_damage(tmp_path: Path) -> None:
    store = Checkpoint(tmp_path / "c", IDENTITY)
    store.write(arrays())
    path = only_file(tmp_path / "c")
    path.unlink()
    path.mkdir()
    with pytest.raises(FliqsError, match="cannot be read"):
        store.read()


def test_a_write_that_fails_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Checkpoint(tmp_path / "c", IDENTITY)
    store.write(arrays(1.0))

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(FliqsError, match=r"(?i)no space left"):
        store.write(arrays(2.0))
    monkeypatch.undo()
    assert_equal(store.read(), arrays(1.0))
    assert len(list((tmp_path / "c").iterdir())) == 1


def test_a_write_that_is_interrupted_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Checkpoint(tmp_path / "c", IDENTITY)
    store.write(arrays(1.0))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module, "atomic_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.write(arrays(2.0))
    monkeypatch.undo()
    assert_equal(store.read(), arrays(1.0))


@pytest.mark.parametrize("below", [".", "deeper"])
def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "c").write_text("precious")
    store = Checkpoint(tmp_path / "c" / below, IDENTITY)
    assert store.read() is None
    with pytest.raises(FliqsError, match="cannot make the checkpoint folder"):
        store.write(arrays())
    store.remove()
    assert (tmp_path / "c").read_text() == "precious"


def test_removing_takes_the_folder_away(tmp_path: Path) -> None:
    store = Checkpoint(tmp_path / "c", IDENTITY)
    store.remove()
    store.write(arrays())
    store.remove()
    assert not (tmp_path / "c").exists()
    assert tmp_path.exists()


def test_removing_spares_what_is_not_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    store = Checkpoint(tmp_path, IDENTITY)
    store.write(arrays())
    store.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_removing_takes_what_a_killed_write_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Checkpoint(tmp_path / "c", IDENTITY)
    store.write(arrays())
    with monkeypatch.context() as patch:
        # As if the process had died before it could rename the file or delete it.
        patch.setattr(Path, "replace", lambda *_: None)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        store.write(arrays())
    assert len(list((tmp_path / "c").iterdir())) == 2
    store.remove()
    assert not (tmp_path / "c").exists()
