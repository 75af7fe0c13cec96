"""Untrained float models with the sizes of well-known ones, batch normalization folded.

Written with ``onnx`` alone, so that a benchmark needs no framework and no download::

    python benchmarks/architectures.py resnet18 resnet18.onnx
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["ARCHITECTURES", "Architecture"]

_OPSET = 20
_IR_VERSION = 10
_TOKEN_WIDTH = 64
_HEADS = 4


@dataclass(frozen=True)
class Architecture:
    """A model, and the batch that one step trains on."""

    title: str
    write: Callable[[str, int, int], onnx.ModelProto]
    """From a name, the number of classes and a seed."""
    shape: tuple[int, int, int]
    """Of one sample."""
    batch: int
    classes: int

    def model(self, seed: int) -> onnx.ModelProto:
        """The model, input ``input`` [N, ...], output ``logits`` [N, classes]."""
        return self.write(self.title, self.classes, seed)


class _Writer:
    """Appends nodes to a graph; a value is its name."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output."""
        return self.ops(op_type, *inputs, outputs=1, **attributes)[0]

    def ops(self, op_type: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """A node with several outputs."""
        name = f"{op_type}_{len(self._nodes)}"
        found = [f"{name}.{index}" for index in range(outputs)]
        self._nodes.append(helper.make_node(op_type, inputs, found, name=name, **attributes))
        return found

    def constant(self, values: Any, dtype: type = np.int64) -> str:
        """An initializer with these values."""
        name = f"constant_{len(self._initializers)}"
        self._initializers.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def normal(self, deviation: float, *shape: int) -> str:
        """An initializer of normally distributed values."""
        return self.constant(self._rng.normal(0, deviation, shape), np.float32)

    def conv(
        self, x: str, channels: int, filters: int, size: int, *, stride: int = 1, **how: Any
    ) -> str:
        """A convolution with a bias, padded to keep the size.

        Args:
            x: What it reads.
            channels: How many it reads.
            filters: How many it writes.
            size: Of the window.
            stride: Of the window.
            how: ``group``; ``gain`` of the weights' deviation over that which keeps the
                variance behind a Relu (He et al. 2015).
        """
        group = how.get("group", 1)
        fan = channels // group * size * size
        deviation = how.get("gain", 1.0) * math.sqrt(2 / fan)
        weight = self.normal(deviation, filters, channels // group, size, size)
        return self.op(
            "Conv",
            x,
            weight,
            self.normal(0.05, filters),
            kernel_shape=[size, size],
            strides=[stride, stride],
            pads=[size // 2] * 4,
            group=group,
        )

    def classify(self, x: str, channels: int, classes: int) -> str:
        """Mean over the image, and a fully connected layer."""
        return self.gemm(
            self.op("Flatten", self.op("GlobalAveragePool", x)), channels, classes
        )

    def gemm(self, x: str, width: int, classes: int) -> str:
        """A fully connected layer for matrices."""
        weight = self.normal(math.sqrt(1 / width), classes, width)
        return self.op("Gemm", x, weight, self.normal(0.05, classes), transB=1)

    def linear(self, x: str, width: int, outputs: int) -> str:
        """A fully connected layer along the last axis."""
        weight = self.normal(math.sqrt(1 / width), width, outputs)
        product = self.op("MatMul", x, weight)
        return self.op("Add", product, self.normal(0.05, outputs))

    def norm(self, x: str, width: int) -> str:
        """Layer normalization along the last axis."""
        scale = self.constant(np.ones(width), np.float32)
        return self.op("LayerNormalization", x, scale, self.normal(0.05, width), axis=-1)

    def model(
        self, name: str, shape: tuple[int, ...], logits: str, classes: int
    ) -> onnx.ModelProto:
        """The finished model."""
        self._nodes.append(helper.make_node("Identity", [logits], ["logits"], name="logits"))
        graph = helper.make_graph(
            self._nodes,
            name,
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", *shape])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])],
            self._initializers,
        )
        opsets = [helper.make_opsetid("", _OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
        onnx.checker.check_model(model, full_check=True)
        return model


def _resnet20(name: str, classes: int, seed: int) -> onnx.ModelProto:
    """For CIFAR-10 (He et al. 2016, section 4.2): shortcuts are cut and padded with zeros."""
    write = _Writer(seed)
    x = write.op("Relu", write.conv("input", 3, 16, 3))
    channels = 16
    for filters in (16, 32, 64):
        for _ in range(3):
            stride = 1 if filters == channels else 2
            y = write.op("Relu", write.conv(x, channels, filters, 3, stride=stride))
            y = write.conv(y, filters, filters, 3, gain=0.3)
            if stride == 2:
                ends = np.iinfo(np.int64).max
                bounds = ([0, 0], [ends, ends], [2, 3], [2, 2])
                x = write.op("Slice", x, *map(write.constant, bounds))
                each = (filters - channels) // 2
                x = write.op("Pad", x, write.constant([0, each, 0, 0, 0, each, 0, 0]))
            x = write.op("Relu", write.op("Add", y, x))
            channels = filters
    return write.model(name, (3, 32, 32), write.classify(x, channels, classes), classes)


def _resnet18(name: str, classes: int, seed: int) -> onnx.ModelProto:
    """For ImageNet (He et al. 2016, table 1), with 1x1 convolutions as shortcuts."""
    write = _Writer(seed)
    x = write.op("Relu", write.conv("input", 3, 64, 7, stride=2))
    x = write.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    channels = 64
    for filters in (64, 128, 256, 512):
        for _ in range(2):
            stride = 1 if filters == channels else 2
            y = write.op("Relu", write.conv(x, channels, filters, 3, stride=stride))
            y = write.conv(y, filters, filters, 3, gain=0.3)
            if stride == 2:
                x = write.conv(x, channels, filters, 1, stride=2, gain=0.7)
            x = write.op("Relu", write.op("Add", y, x))
            channels = filters
    return write.model(name, (3, 224, 224), write.classify(x, channels, classes), classes)


def _mobilenetv2(name: str, classes: int, seed: int) -> onnx.ModelProto:
    """For ImageNet (Sandler et al. 2018, table 2)."""
    write = _Writer(seed)
    limits = (write.constant(0.0, np.float32), write.constant(6.0, np.float32))

    def relu6(x: str) -> str:
        return write.op("Clip", x, *limits)

    x, channels = relu6(write.conv("input", 3, 32, 3, stride=2)), 32
    for factor, filters, count, first in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for stride in (first, *[1] * (count - 1)):
            width, y = channels * factor, x
            if factor > 1:
                y = relu6(write.conv(y, channels, width, 1))
            y = relu6(write.conv(y, width, width, 3, stride=stride, group=width))
            y = write.conv(y, width, filters, 1, gain=0.7)
            x = write.op("Add", x, y) if stride == 1 and channels == filters else y
            channels = filters
    x = relu6(write.conv(x, channels, 1280, 1))
    return write.model(name, (3, 224, 224), write.classify(x, 1280, classes), classes)


def _vit(name: str, classes: int, seed: int) -> onnx.ModelProto:
    """For Fashion-MNIST (Dosovitskiy et al. 2021, in small): patches of 4, four blocks.

    The class token is the first row of what is added for the positions.
    """
    write, width, tokens = _Writer(seed), _TOKEN_WIDTH, 50
    patches = write.op(
        "Conv",
        "input",
        write.normal(0.25, width, 1, 4, 4),
        write.normal(0.05, width),
        kernel_shape=[4, 4],
        strides=[4, 4],
    )
    x = write.op("Reshape", patches, write.constant([0, width, tokens - 1]))
    x = write.op("Transpose", x, perm=[0, 2, 1])
    x = write.op("Pad", x, write.constant([0, 1, 0, 0, 0, 0]))
    x = write.op("Add", x, write.normal(0.2, 1, tokens, width))
    for _ in range(4):
        x = write.op("Add", x, _attention(write, write.norm(x, width), width, tokens))
        y = write.linear(write.norm(x, width), width, 4 * width)
        x = write.op("Add", x, write.linear(write.op("Gelu", y), 4 * width, width))
    first = write.op("Gather", write.norm(x, width), write.constant(0), axis=1)
    return write.model(name, (1, 28, 28), write.gemm(first, width, classes), classes)


def _attention(write: _Writer, x: str, width: int, tokens: int) -> str:
    head = width // _HEADS
    qkv = write.linear(x, width, 3 * width)
    heads = write.constant([0, tokens, _HEADS, head])
    query, key, value = (
        write.op("Reshape", part, heads)
        for part in write.ops("Split", qkv, outputs=3, axis=2, num_outputs=3)
    )
    query = write.op("Transpose", query, perm=[0, 2, 1, 3])
    key = write.op("Transpose", key, perm=[0, 2, 3, 1])
    value = write.op("Transpose", value, perm=[0, 2, 1, 3])
    factor = write.constant(1 / math.sqrt(head), np.float32)
    scores = write.op("Mul", write.op("MatMul", query, key), factor)
    mixed = write.op("MatMul", write.op("Softmax", scores, axis=-1), value)
    mixed = write.op("Transpose", mixed, perm=[0, 2, 1, 3])
    mixed = write.op("Reshape", mixed, write.constant([0, tokens, width]))
    return write.linear(mixed, width, width)


ARCHITECTURES = {
    "resnet20": Architecture("ResNet-20", _resnet20, (3, 32, 32), 128, 10),
    "resnet18": Architecture("ResNet-18", _resnet18, (3, 224, 224), 8, 1000),
    "mobilenetv2": Architecture("MobileNetV2", _mobilenetv2, (3, 224, 224), 8, 1000),
    "vit": Architecture("ViT", _vit, (1, 28, 28), 128, 10),
}


def main() -> None:
    """Write one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=ARCHITECTURES)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    onnx.save(ARCHITECTURES[options.name].model(options.seed), options.file)


if __name__ == "__main__":
    main()
