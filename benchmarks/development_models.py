"""Float models that do not know the data which judges them.

The models of ``tasks.py`` know all of their training data, so that what is held back of it
says how well they are kept, not how well they generalise. Here a MobileNetV2, a ViT and a
ResNet-20 are trained on 50,000 of the training images of Fashion-MNIST; the other 10,000
judge choices of the search. Test data is never read. In an environment with ``torch`` and
``onnx``::

    python benchmarks/development_models.py FOLDER                 # about half an hour
    python benchmarks/development_models.py FOLDER --models vit

The folder then holds ``train.npz``, ``judged.npz`` and a graph for each model, for
``ablations.py --development FOLDER``. Another machine trains slightly other models.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common import provenance
from tasks import TASKS, Arrays
from torch import nn
from torch.nn import functional

_JUDGED = 10_000
_BATCH = 128
_WIDTH = 64
"""Of a token of the ViT."""
_SEED = 7


def parts() -> tuple[Arrays, Arrays]:
    """What models and searches train on, and what judges them."""
    arrays = TASKS["vit"].arrays("train")
    order = np.random.default_rng(_SEED).permutation(len(arrays["labels"]))
    train, judged = order[:-_JUDGED], order[-_JUDGED:]
    return (
        {name: array[train] for name, array in arrays.items()},
        {name: array[judged] for name, array in arrays.items()},
    )


def _convolution(
    inner: int, outer: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    return [
        nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outer),
    ]


class _Residual(nn.Module):
    """A branch beside the identity, or a projection, or nothing."""

    def __init__(self, branch: nn.Module, beside: nn.Module | None, last: nn.Module) -> None:
        super().__init__()
        self.branch, self.beside, self.last = branch, beside, last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum."""
        y = self.branch(x)
        return self.last(y if self.beside is None else y + self.beside(x))


def _inverted(inner: int, middle: int, outer: int, stride: int) -> nn.Module:
    """Of MobileNetV2 (Sandler et al. 2018, section 3)."""
    expand = [] if middle == inner else [*_convolution(inner, middle, 1), nn.ReLU6()]
    branch = nn.Sequential(
        *expand,
        *_convolution(middle, middle, 3, stride, middle),
        nn.ReLU6(),
        *_convolution(middle, outer, 1),
    )
    keeps = stride == 1 and inner == outer
    return _Residual(branch, nn.Identity() if keeps else None, nn.Identity())


def _mobilenetv2() -> nn.Module:
    blocks = [
        *[(16, 16, 16, 1), (16, 64, 24, 2), (24, 96, 24, 1), (24, 96, 32, 2)],
        *[(32, 128, 32, 1), (32, 128, 48, 1), (48, 192, 48, 1)],
    ]
    return nn.Sequential(
        *_convolution(1, 16, 3),
        nn.ReLU6(),
        *(_inverted(*block) for block in blocks),
        *_convolution(48, 128, 1),
        nn.ReLU6(),
        *_classifier(128),
    )


def _classifier(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]


def _resnet20() -> nn.Module:
    layers: list[nn.Module] = [*_convolution(1, 16, 3), nn.ReLU()]
    inner = 16
    for outer in (16, 32, 64):
        for _ in range(3):
            stride = 1 if inner == outer else 2
            branch = nn.Sequential(
                *_convolution(inner, outer, 3, stride),
                nn.ReLU(),
                *_convolution(outer, outer, 3),
            )
            projection = nn.Sequential(*_convolution(inner, outer, 1, stride))
            beside = nn.Identity() if inner == outer else projection
            layers.append(_Residual(branch, beside, nn.ReLU()))
            inner = outer
    return nn.Sequential(*layers, *_classifier(inner))


class _Attention(nn.Module):
    """Of four heads, before it a normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(_WIDTH), 4
        self.inward, self.outward = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of shape [batch, tokens, width], like ``x``."""
        batch, tokens, width = x.shape
        size = width // self.heads
        cut = self.inward(self.norm(x)).reshape(batch, tokens, 3, self.heads, size)
        query, key, value = cut.permute(2, 0, 3, 1, 4).unbind(0)
        scores = torch.softmax(query @ key.transpose(-2, -1) / size**0.5, -1)
        return self.outward((scores @ value).transpose(1, 2).reshape(batch, tokens, width))


class _ViT(nn.Module):
    """Four blocks on patches of 4 by 4 (Dosovitskiy et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, _WIDTH, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, _WIDTH))
        self.places = nn.Parameter(torch.randn(1, 50, _WIDTH) * 0.02)
        blocks = []
        for _ in range(4):
            perceptron = nn.Sequential(
                *[nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU()],
                nn.Linear(4 * _WIDTH, _WIDTH),
            )
            blocks += [
                _Residual(branch, nn.Identity(), nn.Identity())
                for branch in (_Attention(), perceptron)
            ]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits of [batch, 1, 28, 28]."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        return self.head(self.blocks(x)[:, 0])


class _Recipe(NamedTuple):
    make: Callable[[], nn.Module]
    epochs: int
    rate: float


_RECIPES = {
    "resnet20": _Recipe(_resnet20, 4, 3e-3),
    "mobilenetv2": _Recipe(_mobilenetv2, 6, 3e-3),
    "vit": _Recipe(_ViT, 8, 1.5e-3),
}


def _trained(recipe: _Recipe, train: Arrays) -> nn.Module:
    """AdamW, one cycle of the learning rate, half of the images mirrored."""
    torch.manual_seed(0)
    network = recipe.make()
    x = torch.tensor(train["x"])
    labels = torch.tensor(train["labels"].astype(np.int64))
    count = len(x) // _BATCH
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.rate, recipe.epochs * count
    )
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(x))[: count * _BATCH].split(_BATCH):
            images = x[rows].flip(3) if torch.rand(()) < 0.5 else x[rows]
            loss = functional.cross_entropy(network(images), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def _accuracy(network: nn.Module, judged: Arrays) -> float:
    with torch.no_grad():
        found = [network(batch).argmax(1) for batch in torch.tensor(judged["x"]).split(1000)]
    return float((torch.cat(found).numpy() == judged["labels"]).mean())


def main() -> None:
    """Train, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", choices=_RECIPES, default=list(_RECIPES))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    train, judged = parts()
    np.savez(options.folder / "train.npz", **train)
    np.savez(options.folder / "judged.npz", **judged)
    for name in options.models:
        network = _trained(_RECIPES[name], train)
        torch.onnx.export(
            network,
            (torch.zeros(2, 1, 28, 28),),
            str(options.folder / f"{name}.onnx"),
            input_names=["input"],
            output_names=["output"],
            dynamic_axes={"input": {0: "N"}, "output": {0: "N"}},
            opset_version=17,
            dynamo=False,
        )
        print(f"{name}: {100 * _accuracy(network, judged):.2f} % of the judged images")
    print(json.dumps({"torch": torch.__version__, **provenance()}))


if __name__ == "__main__":
    main()
