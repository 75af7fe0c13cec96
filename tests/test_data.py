"""Data sets: what is read, refused and made up, and in which order it is trained on."""

import io
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_fliqs.data import Dataset, TensorSpec, check_labels, input_specs
from onnx_fliqs.data_files import load_data, load_npz
from onnx_fliqs.errors import ConfigError, DataError, UnsupportedError
from onnx_fliqs.prepare import calibration_batches
from onnx_fliqs.sampling import batch_indices, split
from onnx_fliqs.synthetic_data import synthetic

Array = npt.NDArray[Any]
for_all = settings(deadline=None)


def spec(
    name: str = "image",
    dtype: npt.DTypeLike = np.float32,
    shape: tuple[int | None, ...] | None = (None, 3, 4, 4),
) -> TensorSpec:
    return TensorSpec(name, np.dtype(dtype), shape)


def save(folder: Path, **arrays: npt.ArrayLike) -> Path:
    path = folder / "data.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def load(folder: Path, specs: Sequence[TensorSpec], **arrays: npt.ArrayLike) -> Dataset:
    return load_npz(save(folder, **arrays), specs)


def refusal(path: Path, specs: Sequence[TensorSpec]) -> str:
    """What is said when the file is refused: one line."""
    with pytest.raises(DataError) as error:
        load_npz(path, specs)
    assert "\n" not in str(error.value)
    return str(error.value)


def labelled(labels: Sequence[int]) -> Dataset:
    """Samples that hold their own number."""
    inputs = {"x": np.arange(len(labels), dtype=np.float32)[:, None]}
    return Dataset(inputs, np.array(labels, np.int64), (spec("x", shape=(None, 1)),))


# -- what a model wants


def test_specs_are_the_inputs_without_defaults() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 17]>
        g (float[N,3,0] a, int64[2] ids, bool flag, float[3] w) => (y)
        <float[3] w = {1, 2, 3}> { y = Mul(a, w) }
    """)
    assert input_specs(model) == (
        spec("a", np.float32, (None, 3, None)),
        spec("ids", np.int64, (2,)),
        spec("flag", np.bool_, ()),
    )


def test_an_unknown_rank_is_no_shape() -> None:
    value = ir.Value(name="a", type=ir.TensorType(ir.DataType.BFLOAT16))
    model = ir.Model(ir.Graph([value], [], nodes=[]), ir_version=10)
    assert input_specs(model) == (spec("a", ml_dtypes.bfloat16, None),)


@pytest.mark.parametrize("kind", [None, ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))])
def test_an_input_that_is_no_tensor_is_refused(kind: ir.TypeProtocol | None) -> None:
    model = ir.Model(ir.Graph([ir.Value(name="a", type=kind)], [], nodes=[]), ir_version=10)
    with pytest.raises(UnsupportedError, match=r"^input 'a' is not a tensor of a known type$"):
        input_specs(model)


# -- files that are fine


def test_arrays_are_kept_as_stored_and_cast_in_batches(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 4, 4), dtype=np.uint8)
    data = load(tmp_path, [spec()], image=pixels, labels=np.arange(6, dtype=np.uint8))
    assert len(data) == 6
    assert not data.synthetic
    assert data.stored_inputs["image"].dtype == np.uint8
    assert data.labels is not None
    assert data.labels.dtype == np.int64
    batch = data.batch(np.array([5, 0, 5]))
    np.testing.assert_array_equal(batch["image"], pixels[[5, 0, 5]].astype(np.float32))
    assert batch["image"].dtype == np.float32


def test_batches_are_contiguous_whatever_the_order_in_the_file(tmp_path: Path) -> None:
    data = load(tmp_path, [spec()], image=np.asfortranarray(np.ones((6, 3, 4, 4), "f4")))
    assert data.batch(np.arange(4))["image"].flags.c_contiguous


def test_x_stands_for_the_only_input(tmp_path: Path) -> None:
    data = load(tmp_path, [spec("serving/image:0")], x=np.ones((2, 3, 4, 4)))
    assert list(data.stored_inputs) == ["serving/image:0"]
    assert data.labels is None


def test_names_that_are_no_python_names_are_found(tmp_path: Path) -> None:
    name = "gpu_0/data 0:1"
    data = load(tmp_path, [spec(name)], **{name: np.ones((2, 3, 4, 4))})
    assert list(data.stored_inputs) == [name]


def test_compressed_files_and_boolean_labels_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez_compressed(path, x=np.ones((2, 3, 4, 4)), labels=np.array([True, False]))
    data = load_npz(path, [spec()])
    np.testing.assert_array_equal(data.labels, np.array([1, 0]))


def test_an_input_may_be_called_labels(tmp_path: Path) -> None:
    specs = [spec(), spec("labels", np.int64, (None,))]
    data = load(tmp_path, specs, image=np.ones((2, 3, 4, 4)), labels=np.array([-1, 7]))
    assert data.labels is None
    np.testing.assert_array_equal(data.batch(np.array([1]))["labels"], [7])


def test_free_dimensions_and_ranks_take_any_size(tmp_path: Path) -> None:
    specs = [spec("a", shape=(None, None, 5)), spec("b", shape=None)]
    data = load(tmp_path, specs, a=np.ones((2, 9, 5)), b=np.ones((2, 1, 1, 1, 1)))
    assert len(data) == 2


def test_dense_labels_are_accepted(tmp_path: Path) -> None:
    labels = np.zeros((2, 4, 4), np.int32)
    data = load(tmp_path, [spec()], image=np.ones((2, 3, 4, 4)), labels=labels)
    assert data.labels is not None
    assert data.take(np.array([1])).labels is not None
    assert data.labels.shape == (2, 4, 4)


def test_strings_go_into_string_inputs_only(tmp_path: Path) -> None:
    words = np.array(["one", "two"])
    data = load(tmp_path, [spec("text", np.object_, (None,))], text=words)
    assert data.batch(np.array([1]))["text"].tolist() == ["two"]
    assert data.fingerprint() == data.take(np.array([0, 1])).fingerprint()
    assert "wants float32, not <U3" in refusal(
        save(tmp_path, text=words), [spec("text", shape=(None,))]
    )
    assert "wants strings, not float64" in refusal(
        save(tmp_path, text=np.ones(2)), [spec("text", np.object_, (None,))]
    )


# -- batches of a fixed size, and inputs without a batch axis


def test_a_fixed_first_dimension_is_the_batch_size(tmp_path: Path) -> None:
    data = load(tmp_path, [spec(shape=(2, 3, 4, 4))], image=np.ones((6, 3, 4, 4)))
    assert (len(data), data.fixed_batch) == (6, 2)


def test_a_free_first_dimension_fixes_no_batch_size(tmp_path: Path) -> None:
    specs = [spec("rate", np.int64, ()), spec()]
    data = load(tmp_path, specs, rate=np.int64(16000), image=np.ones((6, 3, 4, 4)))
    assert (len(data), data.fixed_batch) == (6, None)


@pytest.mark.parametrize("first", [None, 1])
def test_inputs_without_a_batch_axis_go_whole_into_each_batch(
    tmp_path: Path, first: int | None
) -> None:
    specs = [
        spec("frames", shape=(first, 5)),
        spec("state", np.float16, (2, None)),
        spec("rate", np.int64, ()),
    ]
    state = np.arange(6.0).reshape(2, 3)
    data = load(tmp_path, specs, frames=np.ones((4, 5)), state=state, rate=np.int32(8))
    assert len(data) == 4
    batch = data.take(np.array([3, 1])).batch(np.array([1]))
    assert batch["frames"].shape == (1, 5)
    np.testing.assert_array_equal(batch["state"], state.astype(np.float16))
    assert batch["rate"].shape == ()
    assert batch["rate"].dtype == np.int64
    wrong = save(tmp_path, frames=np.ones((4, 5)), state=np.ones((4, 2, 3)), rate=8)
    assert refusal(wrong, specs) == (
        "input 'state' has shape [4,2,3]; the model wants [2,?], the same for every sample"
    )


def test_a_model_of_constants_has_one_sample() -> None:
    data = Dataset({"rate": np.array(3.0)}, None, (spec("rate", shape=()),))
    assert (len(data), data.fixed_batch) == (1, None)


# -- files that are refused


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent.npz", [spec()]).endswith("absent.npz does not exist")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert "is not a readable .npz file" in refusal(tmp_path, [spec()])


@pytest.mark.parametrize(
    "content", [b"", b"label,pixel\n1,2\n", b"\x80\x04pickle", b"\x93NUMPY"]
)
def test_other_files_are_no_npz(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    assert refusal(path, [spec()]) == f"{path} is not an .npz file, or is cut off"


def test_a_single_array_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.ones(3))
    assert "is not an .npz file" in refusal(tmp_path / "data.npy", [spec()])


def test_a_file_cut_off_anywhere_is_refused_in_one_line(tmp_path: Path) -> None:
    content = save(tmp_path, image=np.ones((2, 3, 4, 4), np.float32)).read_bytes()
    path = tmp_path / "cut.npz"
    for length in range(0, len(content) - 1, 13):
        path.write_bytes(content[:length])
        refusal(path, [spec()])


def test_a_file_with_any_damaged_byte_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "damaged.npz"
    np.savez_compressed(path, image=np.ones((2, 3, 4, 4), np.float32))
    content = path.read_bytes()
    refusals = []
    for position in range(len(content)):
        path.write_bytes(content[:position] + b"\xa5" + content[position + 1 :])
        try:
            load_npz(path, [spec()])
        except DataError as error:
            refusals.append(str(error))
    assert len(refusals) > len(content) / 3  # dates, flags and the like do not matter
    assert not any("\n" in said for said in refusals)


def test_python_objects_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, image=np.array([{"a": 1}, None], dtype=object))
    assert refusal(path, [spec()]).endswith("'image' holds Python objects; save plain numbers")


def test_a_zip_of_other_things_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("image", b"\xff\xd8 a picture")
    assert refusal(path, [spec()]) == f"{path}: 'image' is not an array"


def test_a_header_that_numpy_cannot_parse_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.ones((2, 3, 4, 4), np.float32))
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("image.npy", buffer.getvalue().replace(b"'shape'", b"'sh\"pe'"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "is not a readable .npz file" in refusal(path, [spec()])


def test_a_missing_array_is_named_with_what_is_there(tmp_path: Path) -> None:
    path = save(tmp_path, image=np.ones(2), other=np.ones(2))
    assert refusal(path, [spec(), spec("mask"), spec("ids")]) == (
        f"{path} has no array 'mask', 'ids': the model needs 'image', 'mask', 'ids',"
        " and there is 'image', 'other'"
    )
    assert refusal(save(tmp_path), [spec()]).endswith("there is none")


def test_x_stands_for_nothing_where_there_are_two_inputs(tmp_path: Path) -> None:
    assert "has no array 'image', 'mask'" in refusal(
        save(tmp_path, x=np.ones(2)), [spec(), spec("mask")]
    )


@pytest.mark.parametrize("extra", ["label", "x"])
def test_an_array_that_nothing_uses_is_refused(tmp_path: Path, extra: str) -> None:
    path = save(tmp_path, image=np.ones((2, 3, 4, 4)), **{extra: np.ones(2)})
    assert refusal(path, [spec()]) == (
        f"{path} has arrays that nothing uses: {extra!r}; the model takes 'image' and 'labels'"
    )


@pytest.mark.parametrize(
    ("found", "wanted", "ending"),
    [
        ((5, 4, 4, 3), (None, 3, 4, 4), ", which looks like NHWC; the model wants [N,3,4,4]"),
        ((5, 8, 4, 3), (None, 3, None, None), "looks like NHWC; the model wants [N,3,?,?]"),
        ((5, 3, 4, 4), (1, 4, 4, 3), ", which looks like NCHW; the model wants [N,4,4,3]"),
    ],
)
def test_images_of_the_other_layout_are_recognised(
    tmp_path: Path, found: tuple[int, ...], wanted: tuple[int | None, ...], ending: str
) -> None:
    path = save(tmp_path, image=np.ones(found))
    said = refusal(path, [spec(shape=wanted)])
    assert said.startswith(f"input 'image' has shape [{','.join(map(str, found))}]")
    assert said.endswith(f"{ending}: transpose it first")


@pytest.mark.parametrize(
    ("found", "wanted", "said"),
    [
        ((5, 3, 5, 5), (None, 3, 4, 4), "has shape [5,3,5,5]; the model wants [N,3,4,4]"),
        ((5, 48), (None, 3, 4, 4), "has shape [5,48]; the model wants [N,3,4,4]"),
        ((), (None, 3), "has shape []; the model wants [N,3]"),
        ((5, 5, 1), (1, 5), "has shape [5,5,1]; the model wants [N,5]"),
        (
            (5, 4, 4),
            (None, 1, 4, 4),
            "has shape [5,4,4]; the model wants [N,1,4,4]: insert an axis of length 1 first",
        ),
        ((5,), (), "has shape [5]; the model wants [], the same for every sample"),
        ((), None, "needs a first axis that counts the samples"),
    ],
)
def test_a_wrong_shape_is_refused(
    tmp_path: Path,
    found: tuple[int, ...],
    wanted: tuple[int | None, ...] | None,
    said: str,
) -> None:
    path = save(tmp_path, image=np.ones(found))
    assert refusal(path, [spec(shape=wanted)]) == f"input 'image' {said}"


def test_different_lengths_are_refused(tmp_path: Path) -> None:
    specs = [spec("a", shape=(None, 1)), spec("b", shape=(None, 1))]
    path = save(tmp_path, a=np.ones((10, 1)), b=np.ones((9, 1)), labels=np.zeros(10, int))
    assert refusal(path, specs) == (
        "the arrays differ in their number of samples: 'a' has 10, 'b' has 9, 'labels' has 10"
    )


def test_no_samples_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, image=np.ones((0, 3, 4, 4)), labels=np.zeros(0, int))
    assert refusal(path, [spec()]) == "the data has no samples"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    image = np.ones((5, 3, 4, 4), np.float16)
    image[2, 1, 0, 3] = value
    assert refusal(save(tmp_path, image=image), [spec()]) == (
        "input 'image' holds NaN or infinity, first at index [2, 1, 0, 3]"
    )


@pytest.mark.parametrize(
    ("values", "dtype", "said"),
    [
        ([1.0, 2.5], np.int64, "is int64, but the data has fractions"),
        ([1.0, 300.0], np.uint8, "is uint8, which cannot hold 300"),
        ([1, -1], np.uint64, "is uint64, which cannot hold -1"),
        ([1, -200], np.int8, "is int8, which cannot hold -200"),
        ([1, 9], ml_dtypes.int4, "is int4, which cannot hold 9"),
        ([0, 2], np.bool_, "is bool, which cannot hold 2"),
        ([0.0, 7e4], np.float16, "is float16, which cannot hold 70000"),
        ([0.0, -1e39], np.float32, "is float32, which cannot hold -1e+39"),
        (["1", "2"], np.float32, "wants float32, not <U1"),
        ([1j, 2], np.float32, "wants float32, not complex128"),
    ],
)
def test_values_that_a_cast_would_change_are_refused(
    tmp_path: Path, values: list[Any], dtype: npt.DTypeLike, said: str
) -> None:
    path = save(tmp_path, a=np.array(values))
    assert refusal(path, [spec("a", dtype, (None,))]) == f"input 'a' {said}"


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.0, 200.0], np.uint8),
        ([1.0, 0.0], np.bool_),
        ([-8, 7], ml_dtypes.int4),
        ([0.1, 3e38], ml_dtypes.bfloat16),
        ([1j, 2], np.complex64),
        ([True, False], np.float32),
        ([1 << 63], np.uint64),
    ],
)
def test_values_that_a_cast_keeps_are_accepted(
    tmp_path: Path, values: list[Any], dtype: npt.DTypeLike
) -> None:
    data = load(tmp_path, [spec("a", dtype, (None,))], a=np.array(values))
    batch = data.batch(np.arange(len(values)))["a"]
    assert batch.dtype == dtype
    np.testing.assert_array_equal(batch, np.array(values).astype(dtype))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.array([1.0, np.nan]), "labels hold NaN or infinity, first at index [1]"),
        (np.array([1.0, 1e39]), "labels hold NaN or infinity, first at index [1]"),
        (
            np.array([1j, 2]),
            "labels are complex128; they must be integers or floats",
        ),
        (
            np.array(["cat", "dog"]),
            "labels are <U3; they must be integers or floats",
        ),
        (np.array(1), "labels need a first axis that counts the samples"),
        (np.array([0, -1]), "labels run from -1; they must not be negative"),
        (
            np.array([0, 1 << 63], np.uint64),
            f"labels run to {1 << 63}, which is no class number",
        ),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused(
    tmp_path: Path, labels: Array, said: str
) -> None:
    path = save(tmp_path, image=np.ones((2, 3, 4, 4)), labels=labels)
    assert refusal(path, [spec()]) == said


def test_numbers_to_regress_are_read(tmp_path: Path) -> None:
    data = load(tmp_path, [spec()], image=np.zeros((2, 3, 4, 4)), labels=[0.5, -2.0])
    assert data.labels is not None
    assert data.labels.dtype == np.float32
    train, held_out = split(data, 0.5, 0)
    assert {*train.labels, *held_out.labels} == {0.5, -2.0}  # type: ignore[misc]


def test_labels_beyond_the_classes_are_refused() -> None:
    check_labels(labelled([0, 9]), 10)
    check_labels(synthetic([spec()], 2, 0), 10)
    expected = r"^labels run from 0 to 12, but the model's output has 10 classes$"
    with pytest.raises(DataError, match=expected):
        check_labels(labelled([3, 12, 0]), 10)


# -- fingerprints


def test_a_fingerprint_tells_every_difference() -> None:
    specs = (spec("a", shape=(None, 2)), spec("b", shape=(None, 2)))
    a, b = np.arange(4, dtype=np.float32).reshape(2, 2), np.ones((2, 2), np.float32)
    labels = np.array([0, 1])
    variants = [
        Dataset({"a": a, "b": b}, labels, specs),
        Dataset({"a": a, "b": b}, None, specs),
        Dataset({"a": a, "b": b}, labels[::-1], specs),
        Dataset({"a": b, "b": a}, labels, specs),
        Dataset({"a": a.astype(np.float64), "b": b}, labels, specs),
        Dataset({"a": a.view(np.int32), "b": b}, labels, specs),
        Dataset({"a": a.reshape(4, 1), "b": b}, labels, specs),
        Dataset({"a": a, "c": b}, labels, specs),
        Dataset({"a": a + np.float32(1e-6), "b": b}, labels, specs),
    ]
    assert len({data.fingerprint() for data in variants}) == len(variants)


def test_a_fingerprint_is_of_the_contents_not_of_their_place() -> None:
    data = synthetic([spec(), spec("rate", shape=())], 5, 0)
    turned = {
        name: np.array(data.stored_inputs[name], order="F") for name in ("rate", "image")
    }
    assert Dataset(turned, None, data.specs).fingerprint() == data.fingerprint()


# -- folders of files, larger than the memory


def test_a_folder_is_what_an_archive_is(tmp_path: Path) -> None:
    specs = [spec("ids/tokens", np.int64, (None, 3)), spec("mask", np.float32, (2, 2))]
    arrays = {"ids/tokens": np.arange(12).reshape(4, 3), "mask": np.ones((2, 2))}
    (tmp_path / "ids").mkdir()
    for name, array in arrays.items():
        np.save(tmp_path / name, array)
    np.save(tmp_path / "labels", np.arange(4))
    (tmp_path / "notes.txt").write_text("not looked at")
    mapped = load_data(tmp_path, specs)
    assert isinstance(mapped.stored_inputs["ids/tokens"], np.memmap)
    path = tmp_path / "data.npz"
    np.savez(path, **arrays, labels=np.arange(4))  # type: ignore[arg-type]
    assert mapped.fingerprint() == load_data(path, specs).fingerprint()
    assert mapped.batch(np.array([3]))["ids/tokens"].tolist() == [[9, 10, 11]]


def test_a_folder_may_call_the_only_input_x(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((5, 3, 4, 4), np.uint8))
    assert len(load_data(tmp_path, [spec()])) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "image.npy is not a readable .npy file: "),
        (b"\x93NUMPY\x01\x00", "image.npy is not a readable .npy file: "),
        ("short", "image.npy is not a readable .npy file: "),
        (np.full((2, 3, 4, 4), None), "it holds Python objects; save plain numbers"),
        (np.zeros((0, 3, 4, 4)), "the data has no samples"),
        (np.zeros((2, 4, 4, 3)), "looks like NHWC"),
        (None, "has no array 'image': the model needs 'image', and there is none"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(
    tmp_path: Path, content: bytes | str | npt.NDArray[Any] | None, message: str
) -> None:
    file = tmp_path / "image.npy"
    if isinstance(content, np.ndarray):
        np.save(file, content)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.save(file, np.zeros((2, 3, 4, 4)))
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=re.escape(message)) as raised:
        load_data(tmp_path, [spec()])
    assert "\n" not in str(raised.value)


def test_parts_share_the_arrays_of_the_whole() -> None:
    whole = labelled(list(range(10)))
    parts = [whole.take(np.arange(4)), *split(whole, 0.3, 0)]
    assert all(part.stored_inputs["x"] is whole.stored_inputs["x"] for part in parts)
    again = parts[1].take(np.array([2, 0]))
    assert values(again).tolist() == values(parts[1])[[2, 0]].tolist()
    inputs = {"x": again.batch(np.arange(2))["x"]}
    copied = replace(again, stored_inputs=inputs, stored_labels=again.labels, rows=None)
    assert again.fingerprint() == copied.fingerprint() != whole.fingerprint()


@pytest.mark.parametrize(
    ("stored", "cast"), [(np.uint8, np.int64), (np.float64, np.float32), (bool, np.int64)]
)
def test_labels_of_parts_stay_in_their_file(
    tmp_path: Path, stored: npt.DTypeLike, cast: npt.DTypeLike
) -> None:
    numbers = np.arange(24).reshape(4, 2, 3).astype(stored)
    np.save(tmp_path / "x", np.zeros((4, 3)))
    np.save(tmp_path / "labels", numbers)
    part = load_data(tmp_path, [spec("x", shape=(None, 3))]).take(np.array([3, 1]))
    assert isinstance(part.stored_labels, np.memmap)
    found = part.labels_at(np.array([1]))
    assert found is not None
    assert found.dtype == cast
    np.testing.assert_array_equal(found, numbers[[1]])
    np.testing.assert_array_equal(part.labels, numbers[[3, 1]])


def test_a_label_counts_only_in_the_parts_that_have_it() -> None:
    whole = labelled([0, 1, 9])
    check_labels(whole.take(np.array([1, 0])), 2)
    with pytest.raises(DataError, match=r"labels run from 1 to 9, but .* 2 classes"):
        check_labels(whole.take(np.array([1, 2])), 2)
    yes_or_no = replace(whole, stored_labels=np.array([False, True, True]))
    with pytest.raises(DataError, match="labels run from 0 to 1, but"):
        check_labels(yes_or_no, 1)


def test_what_is_wrong_is_found_in_any_piece(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("onnx_fliqs.data._PIECE", 8)
    wanted = [spec("x", np.int8, (None, 5))]
    whole = np.zeros((7, 5))
    for value, message in (
        (np.nan, "first at index [6, 4]"),
        (200, "cannot hold 200"),
        (0.5, "has fractions"),
    ):
        array = whole.copy()
        array[6, 4] = value
        assert message in refusal(save(tmp_path, x=array), wanted)
    assert load_npz(save(tmp_path, x=whole), wanted).fingerprint()


def test_the_hash_does_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    data = labelled(list(range(30)))
    before = [d.fingerprint() for d in (data, data.take(np.array([5, 3, 29])))]
    monkeypatch.setattr("onnx_fliqs.data._PIECE", 4)
    assert before == [d.fingerprint() for d in (data, data.take(np.array([5, 3, 29])))]


# -- made-up data


def test_synthetic_inputs_follow_from_the_seed() -> None:
    specs = [spec(), spec("mask", np.bool_, (None, 7))]
    first, again, other = (synthetic(specs, 9, seed) for seed in (3, 3, 4))
    assert first.synthetic
    assert first.labels is None
    assert len(first) == 9
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    fewer = synthetic([spec(shape=(None, 5)), specs[1]], 9, 3)
    np.testing.assert_array_equal(fewer.stored_inputs["mask"], first.stored_inputs["mask"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_synthetic_floats_are_standard_normal_within_three(dtype: npt.DTypeLike) -> None:
    x = synthetic([spec("a", dtype, (None, 100))], 200, 0).stored_inputs["a"]
    assert x.dtype == dtype
    wide = x.astype(np.float64)
    assert np.abs(wide).max() == 3.0
    assert abs(wide.mean()) < 0.05
    assert abs(wide.std() - 1.0) < 0.05


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(np.bool_, 0, 1), (np.uint8, 0, 255), (np.int8, -128, 127), (ml_dtypes.uint4, 0, 15)],
)
def test_synthetic_narrow_integers_take_every_value(
    dtype: npt.DTypeLike, low: int, high: int
) -> None:
    x = synthetic([spec("a", dtype, (None, 100))], 100, 0).stored_inputs["a"]
    assert x.dtype == dtype
    assert set(x.astype(int).ravel()) == set(range(low, high + 1))


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8])
def test_synthetic_inputs_stay_in_a_given_range(dtype: npt.DTypeLike) -> None:
    data = synthetic([spec("a", dtype, (None, 50))], 50, 0, ranges={"a": (2, 6.5)})
    x = data.stored_inputs["a"]
    assert x.dtype == dtype
    assert x.min() >= 2
    assert x.max() <= 6.5
    if np.dtype(dtype).kind != "f":
        assert set(x.ravel()) == {2, 3, 4, 5, 6}


def test_free_dimensions_get_a_size_and_constants_keep_theirs() -> None:
    specs = [
        spec("a", shape=(1, None, 5)),
        spec("state", shape=(2, 3)),
        spec("flag", np.bool_, ()),
    ]
    data = synthetic(specs, 6, 0, dynamic=7)
    shapes = {name: array.shape for name, array in data.stored_inputs.items()}
    assert shapes == {"a": (6, 7, 5), "state": (2, 3), "flag": ()}
    assert synthetic(specs[:1], 1, 0).stored_inputs["a"].shape == (1, 32, 5)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (np.int64, "int64"),
        (np.int32, "int32"),
        (np.object_, "string"),
        (np.complex64, "complex64"),
    ],
)
def test_inputs_that_cannot_be_made_up_are_refused(dtype: npt.DTypeLike, name: str) -> None:
    with pytest.raises(DataError) as error:
        synthetic([spec("ids", dtype, (None, 4))], 2, 0)
    assert str(error.value) == (
        f"input 'ids' is {name}: synthetic inputs cannot be made for it; pass --data"
    )


def test_an_unknown_rank_cannot_be_made_up() -> None:
    with pytest.raises(DataError, match=r"unknown rank: .*; pass --data$"):
        synthetic([spec(shape=None)], 2, 0)


@pytest.mark.parametrize(
    "bounds", [(2, 1), (-1, 5), (0, 300), (np.nan, 1), (0, np.inf), (0.2, 0.8)]
)
def test_an_impossible_range_is_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match=r"of input 'a' is empty or goes beyond uint8$"):
        synthetic([spec("a", np.uint8, (None,))], 2, 0, ranges={"a": bounds})


def test_ranges_reach_the_ends_of_wide_integers() -> None:
    specs = [spec("a", np.uint64, (None,))]
    data = synthetic(specs, 2, 0, ranges={"a": ((1 << 64) - 1, (1 << 64) - 1)})
    np.testing.assert_array_equal(
        data.stored_inputs["a"], np.full(2, (1 << 64) - 1, np.uint64)
    )


def test_a_range_for_no_input_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^a range names 'b'; the model's inputs are 'image'$"
    ):
        synthetic([spec()], 2, 0, ranges={"b": (0, 1)})


@pytest.mark.parametrize(("samples", "dynamic"), [(0, 1), (1, 0)])
def test_synthetic_sizes_are_positive(samples: int, dynamic: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        synthetic([spec()], samples, 0, dynamic=dynamic)


# -- splitting


def values(part: Dataset) -> npt.NDArray[np.int64]:
    """The number that each sample has everywhere."""
    return part.batch(np.arange(len(part)))["x"][:, 0].astype(np.int64)


@for_all
@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.floats(0.01, 0.99))
def test_a_split_shares_every_sample_out_once(labels: list[int], fraction: float) -> None:
    data = labelled(labels)
    train, validation = split(data, fraction, 0)
    assert min(len(train), len(validation)) >= 1
    assert abs(len(validation) - fraction * len(labels)) <= 1
    numbers = np.concatenate([values(train), values(validation)])
    assert sorted(numbers) == list(range(len(labels)))
    for part in (train, validation):
        assert part.labels is not None
        np.testing.assert_array_equal(part.labels, np.array(labels)[values(part)])


@for_all
@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.floats(0.05, 0.95))
def test_a_split_has_each_class_in_proportion(labels: list[int], fraction: float) -> None:
    _, validation = split(labelled(labels), fraction, 1)
    assert validation.labels is not None
    part, whole = Counter(validation.labels.tolist()), Counter(labels)
    share = len(validation) / len(labels)
    for label, count in whole.items():
        # One more or less for the class's own rounding, one for the others'.
        assert abs(part[label] - share * count) <= 2


@pytest.mark.parametrize("known", [True, False])
def test_the_first_samples_of_both_parts_are_of_all_classes(known: bool) -> None:
    """Of a file that is sorted by class, too."""
    labels = np.arange(10).repeat(200)
    data = labelled(labels.tolist())
    for part in split(data if known else replace(data, stored_labels=None), 0.5, seed=0):
        assert set(labels[values(part)[:100]]) == set(range(10))


def test_calibration_sees_all_of_a_sorted_file() -> None:
    batches = calibration_batches(labelled([0] * 1000))
    numbers = np.concatenate([batch.inputs["x"] for batch in batches])
    assert len(np.unique(numbers)) == 256
    assert set((numbers // 100).astype(int).ravel()) == set(range(10))


def test_a_split_follows_from_the_seed() -> None:
    data = labelled([0, 1, 2, 3] * 25)
    parts = [split(data, 0.2, seed)[1].fingerprint() for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]


@pytest.mark.parametrize("labels", [None, np.zeros((10, 2), np.int64)])
def test_data_without_a_class_per_sample_is_split_too(labels: Array | None) -> None:
    made_up = synthetic([spec()], 10, 0)
    data = Dataset(made_up.stored_inputs, labels, made_up.specs, synthetic=True)
    train, validation = split(data, 0.3, 0)
    assert (len(train), len(validation)) == (7, 3)
    assert train.synthetic


def test_a_single_sample_is_both_sets() -> None:
    data = labelled([1])
    assert split(data, 0.5, 0) == (data, data)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_a_split_needs_a_fraction(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \(0, 1\)"):
        split(labelled([0, 1]), fraction, 0)


# -- the order of training


@for_all
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 5))
def test_every_epoch_visits_each_sample_once(samples: int, batch: int, seed: int) -> None:
    epochs = 3
    steps = -(-epochs * samples // batch)
    order = np.concatenate([batch_indices(samples, batch, s, seed) for s in range(steps)])
    assert order.dtype == np.int64
    assert len(order) == steps * batch
    for epoch in order[: epochs * samples].reshape(epochs, samples):
        assert sorted(epoch) == list(range(samples))


@for_all
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 10**9), st.integers(0, 2**40))
def test_a_batch_is_a_pure_function(samples: int, batch: int, step: int, seed: int) -> None:
    first = batch_indices(samples, batch, step, seed)
    first_again = first.copy()
    batch_indices(samples, batch, step + 3, seed + 1)
    first[:] = -1  # what a caller does to its batch touches no later one
    np.testing.assert_array_equal(batch_indices(samples, batch, step, seed), first_again)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [batch_indices(50, 50, step, seed).tolist() for step in (0, 1) for seed in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize(("samples", "batch", "step"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_impossible_batches_are_programming_mistakes(
    samples: int, batch: int, step: int
) -> None:
    with pytest.raises(ValueError, match=r"^no batch"):
        batch_indices(samples, batch, step, 0)


@pytest.mark.parametrize(("side", "size"), [(8, 32), (112, 31), (224, 8), (1000, 8)])
def test_big_images_are_observed_few_at_a_time(side: int, size: int) -> None:
    image = np.broadcast_to(np.float32(0), (100, 1, side, side))
    spec = TensorSpec("x", np.dtype(np.float32), (None, 1, side, side))
    dataset = Dataset({"x": image}, None, (spec,))
    assert dataset.batch_within(32) == size
    assert (
        replace(dataset, specs=(replace(spec, shape=(4, 1, side, side)),)).batch_within(32)
        == 4
    )
    assert dataset.take(np.arange(3)).batch_within(32) == 3
