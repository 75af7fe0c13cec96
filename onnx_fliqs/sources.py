"""What the verbs are called with: the path of a file, or what was read from it."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnx_fliqs.data import Dataset, input_specs
from onnx_fliqs.data_arrays import dataset_from_arrays
from onnx_fliqs.data_files import load_data
from onnx_fliqs.model import load_model, read_proto

__all__ = ["DataSource", "ModelSource", "dataset_of", "model_of"]

ModelSource: TypeAlias = str | PathLike[str] | onnx.ModelProto | ir.Model
DataSource: TypeAlias = str | PathLike[str] | Mapping[str, npt.ArrayLike] | Dataset


def model_of(source: ModelSource) -> ir.Model:
    """Read a model, unless it is one.

    Raises:
        ModelError: As for :func:`~onnx_fliqs.model.load_model`.
    """
    if isinstance(source, ir.Model):
        return source
    if isinstance(source, onnx.ModelProto):
        return read_proto(source)
    return load_model(Path(source))


def dataset_of(source: DataSource, model: ir.Model) -> Dataset:
    """Read the samples of a model, unless they are a data set.

    Raises:
        DataError: As for :func:`~onnx_fliqs.data_files.load_data`.
    """
    if isinstance(source, Dataset):
        return source
    if isinstance(source, Mapping):
        return dataset_from_arrays(source, input_specs(model))
    return load_data(Path(source), input_specs(model))
