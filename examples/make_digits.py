"""Train the example network on scikit-learn's digits and export it to ONNX.

Run from anywhere; the files are written beside this script::

    pip install torch scikit-learn onnx onnxruntime
    python make_digits.py

It writes ``digits_cnn.onnx`` (batch normalization kept as nodes of its own),
``digits_train.npz`` and ``digits_test.npz``. Pixels are stored as they come, 0 to 16, and the
network's first operation divides them by 16. It takes under a minute on one core; the seed
fixes the split and the training.
"""

import argparse
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import onnxruntime
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

TEST_IMAGES: Final = 600
EPOCHS: Final = 60
BATCH: Final = 64
PEAK_LEARNING_RATE: Final = 1e-2
OPSET: Final = 17
NAMES: Final = ("digits_cnn.onnx", "digits_train.npz", "digits_test.npz")


class ConvNorm(nn.Sequential):
    """A convolution without bias, then batch normalization."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(
            inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        self.add_module("conv", conv)
        self.add_module("norm", nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut, a 1x1 one if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, outputs, stride=stride)
        self.second = ConvNorm(outputs, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        y = self.second(functional.relu(self.first(x)))
        return functional.relu(y + self.shortcut(x))


class DigitsNet(nn.Module):
    """Raw 8x8 images, 0 to 16, to ten logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, 16)
        self.block1 = Residual(16, 16)
        self.block2 = Residual(16, 32, stride=2)
        self.depthwise = ConvNorm(32, 32, groups=32)
        self.pointwise = ConvNorm(32, 40, kernel=1)
        self.block3 = Residual(40, 40)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(40, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the logits, [N, 10], of raw images, [N, 1, 8, 8]."""
        x = functional.relu(self.stem(image / 16))
        x = self.block2(self.block1(x))
        x = functional.relu(self.depthwise(x))
        x = functional.relu(self.pointwise(x))
        x = self.block3(x)
        return self.head(torch.flatten(self.pool(x), 1))


def split_digits(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return train images, test images, train labels and test labels, stratified."""
    digits = load_digits()
    images = digits.images.astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=TEST_IMAGES, stratify=labels, random_state=seed
    )
    return train_images, test_images, train_labels, test_labels


def shift(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move each image by up to one pixel each way, filling with zeros."""
    windows = functional.pad(images, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)
    rows, columns = torch.randint(3, (2, len(images)), generator=generator)
    return windows[torch.arange(len(images)), :, rows, columns]


def train(images: torch.Tensor, labels: torch.Tensor, seed: int) -> DigitsNet:
    """Return a network trained on shifted copies of the images, in evaluation mode."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = DigitsNet()
    steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=EPOCHS * steps
    )
    for _ in range(EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        for step in range(steps):
            batch = order[step * BATCH : (step + 1) * BATCH]
            logits = net(shift(images[batch], generator))
            loss = functional.cross_entropy(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def export(net: DigitsNet, path: Path) -> None:
    """Write the network as one ONNX file with a free batch size, and check it."""
    torch.onnx.export(
        net,
        (torch.zeros(1, 1, 8, 8),),
        str(path),
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
        opset_version=OPSET,
        # TrainingMode.EVAL, the default, would merge batch normalization into convolutions;
        # the network is in evaluation mode already, so PRESERVE exports that behaviour.
        dynamo=False,
        do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,
    )
    onnx.checker.check_model(str(path), full_check=True)


def count_macs(net: DigitsNet) -> int:
    """Return the multiply-accumulates for one image, convolutions and linear layer."""
    macs = 0

    def add(layer: nn.Module, _: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal macs
        macs += output.numel() * layer.get_parameter("weight")[0].numel()

    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(add) for layer in layers]
    with torch.no_grad():
        net(torch.zeros(1, 1, 8, 8))
    for handle in handles:
        handle.remove()
    return macs


def check_runtime(path: Path, images: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return ONNX Runtime's logits after comparing them with PyTorch's."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": images.astype(np.float32)})
    # Both compute in float32 and sum in their own order.
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    return logits


def main() -> None:
    """Write the three files and print what they hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the split and the training")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    model_path, train_path, test_path = (options.output / name for name in NAMES)

    train_images, test_images, train_labels, test_labels = split_digits(options.seed)
    np.savez_compressed(train_path, image=train_images, labels=train_labels)
    np.savez_compressed(test_path, image=test_images, labels=test_labels)
    net = train(
        torch.from_numpy(train_images).float(), torch.from_numpy(train_labels), options.seed
    )
    export(net, model_path)

    with torch.no_grad():
        expected = net(torch.from_numpy(test_images).float()).numpy()
    logits = check_runtime(model_path, test_images, expected)
    for name, values in (("PyTorch", expected), ("ONNX Runtime", logits)):
        right = int((values.argmax(1) == test_labels).sum())
        print(f"{name}: {right} of {TEST_IMAGES} right, {right / TEST_IMAGES:.2%}")
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {count_macs(net):,} MACs")
    for path in (model_path, train_path, test_path):
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
