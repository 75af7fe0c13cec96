"""Training steps in eager PyTorch with fake quantization: a worker process of ``speed.py``.

Runs in an environment with ``torch`` and ``onnx``. Whoever starts it names a folder with the
float graph, its sites and a batch, writes one JSON request a line, and reads one JSON reply
a line::

    {"do": "make", "contender": "fused, channels last"}
    {"do": "step", "contender": "fused, channels last"}
    {"do": "peak"}

The twin reads the graph once, into a list of calls of ``torch.nn.functional`` as a user would
write them; only those run in a step.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from peak_memory import peak_bytes
from torch.nn import functional

_RATE = 1e-5
"""So small that no weight leaves what it was made for during a benchmark."""
Values = dict[str, Any]
Call = Callable[[Values], None]


class _SearchedSite(torch.autograd.Function):
    """``SearchQDQ``: rounds to a step and to a mantissa, and takes one of the two."""

    @staticmethod
    def forward(ctx, x, scale, lo, hi, factor, least):  # type: ignore[no-untyped-def]
        _, clipped = _clip(ctx, x, scale, lo, hi)
        size = clipped.abs()
        anchor = torch.mul(size, factor).clamp_(min=least)
        rounded = torch.sub(anchor, size, out=size).sub_(anchor).neg_()
        return torch.copysign(rounded, clipped).mul_(scale)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        (inside,) = ctx.saved_tensors
        return gradient * inside, *[None] * 5


class _IntegerSite(torch.autograd.Function):
    """``SearchIntQDQ``: rounds to a step."""

    @staticmethod
    def forward(ctx, x, scale, lo, hi):  # type: ignore[no-untyped-def]
        _, clipped = _clip(ctx, x, scale, lo, hi)
        return clipped.round_().mul_(scale)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        (inside,) = ctx.saved_tensors
        return gradient * inside, *[None] * 3


def _clip(
    ctx: Any, x: torch.Tensor, scale: torch.Tensor, lo: float, hi: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """In units of the scale, before and behind the clip; keeps where they are equal."""
    t = x / scale
    clipped = t.clamp(lo, hi)
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(t == clipped)
    return t, clipped


def _searched(x: torch.Tensor, site: "_Site") -> torch.Tensor:
    code = (site.lo, site.hi, site.factor, site.least)
    result: torch.Tensor = _SearchedSite.apply(x, site.scale, *code)  # type: ignore[no-untyped-call]
    return result


def _integer(x: torch.Tensor, site: "_Site") -> torch.Tensor:
    result: torch.Tensor = _IntegerSite.apply(x, site.scale, site.lo, site.hi)  # type: ignore[no-untyped-call]
    return result


def _fused(x: torch.Tensor, site: "_Site") -> torch.Tensor:
    low, high = int(site.lo), int(site.hi)
    if site.axis is None:
        return torch.fake_quantize_per_tensor_affine(x, site.flat, site.zeros, low, high)
    return torch.fake_quantize_per_channel_affine(
        x, site.flat, site.zeros, site.axis, low, high
    )


_ARITHMETIC = {"any": _searched, "integer": _integer, "fused": _fused}


@dataclass(frozen=True)
class _Site:
    """A tensor that is quantized, and what its format feeds."""

    tensor: str
    consumers: tuple[tuple[str, int], ...]
    axis: int | None
    scale: torch.Tensor
    """In a shape that broadcasts."""
    lo: float
    hi: float
    factor: float
    least: float

    @property
    def name(self) -> str:
        """Of the quantized tensor."""
        return f"{self.tensor}@{self.consumers[0][0]}:{self.consumers[0][1]}"

    @cached_property
    def flat(self) -> torch.Tensor:
        """The scale as PyTorch's own fake quantization takes it."""
        return self.scale.reshape(() if self.axis is None else -1)

    @cached_property
    def zeros(self) -> torch.Tensor:
        """Zero points."""
        return torch.zeros(self.flat.shape, dtype=torch.int32)


# --- the graph as calls ----------------------------------------------------------------------


class _Program:
    """A graph as a list of calls on a dictionary of values."""

    def __init__(
        self, graph: onnx.GraphProto, sites: list[_Site], quantize: Callable[..., Any] | None
    ) -> None:
        self._constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self._uses = Counter(name for node in graph.node for name in node.input)
        self.output = graph.output[0].name
        readers = {name: node for node in graph.node for name in node.input}
        by_use = {use: site for site in sites for use in site.consumers} if quantize else {}
        self._calls: list[Call] = []
        done: set[str] = set()
        for node in graph.node:
            if node.name in done:
                continue
            inputs = list(node.input)
            for index in range(len(inputs)):
                site = by_use.get((node.name, index))
                if site is not None:
                    if site.name not in done:
                        done.add(site.name)
                        self._calls.append(_quantizing(site, quantize))
                    inputs[index] = site.name
            after = readers.get(node.output[0])
            if self._is_bias(node, after):
                assert after is not None
                done.add(after.name)
                bias = next(name for name in after.input if name in self._constants)
                self._calls.append(_linear(inputs[0], inputs[1], bias, after.output[0]))
            else:
                self._calls.append(self._call(node, inputs))

    def run(self, values: Values) -> torch.Tensor:
        """The output, from values for the input and all parameters."""
        for call in self._calls:
            call(values)
        result: torch.Tensor = values[self.output]
        return result

    def _is_bias(self, node: onnx.NodeProto, after: onnx.NodeProto | None) -> bool:
        """Whether a product and what follows it are one ``linear``."""
        if node.op_type != "MatMul" or after is None or after.op_type != "Add":
            return False
        vectors = [n for n in after.input if n in self._constants]
        return (
            self._uses[node.output[0]] == 1
            and len(vectors) == 1
            and self._constants[vectors[0]].ndim == 1
            and node.input[1] in self._constants
        )

    def _call(self, node: onnx.NodeProto, names: list[str]) -> Call:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        outputs = list(node.output)
        if node.op_type == "Split":
            count = len(outputs)

            def split(values: Values) -> None:
                parts = values[names[0]].chunk(count, attributes["axis"])
                values.update(zip(outputs, parts, strict=True))

            return split
        compute = self._function(node, names, attributes)

        def call(values: Values) -> None:
            values[outputs[0]] = compute(*[values[n] for n in names if n in values])

        return call

    def _function(
        self, node: onnx.NodeProto, names: list[str], attributes: dict[str, Any]
    ) -> Callable[..., torch.Tensor]:
        """What a node computes from its inputs that are tensors."""

        def whole(index: int) -> list[int]:
            return [int(x) for x in self._constants[node.input[index]].reshape(-1)]

        only = self._uses[node.input[0]] == 1
        match node.op_type:
            case "Conv":
                how: dict[str, Any] = {
                    "stride": tuple(attributes.get("strides", (1, 1))),
                    "padding": tuple(attributes.get("pads", (0, 0))[:2]),
                    "groups": attributes.get("group", 1),
                }
                return lambda x, w, b=None: functional.conv2d(x, w, b, **how)
            case "Gemm" if attributes.get("transB"):
                return functional.linear
            case "MatMul":
                return torch.matmul
            case "Relu":
                return lambda x: functional.relu(x, inplace=only)
            case "Clip":
                low, high = (float(self._constants[name]) for name in node.input[1:])
                return lambda x, *_: functional.hardtanh(x, low, high, inplace=only)
            case "Add":
                return torch.add
            case "Mul":
                return torch.mul
            case "Gelu":
                return functional.gelu
            case "Softmax":
                return lambda x: functional.softmax(x, attributes["axis"])
            case "LayerNormalization":
                epsilon = attributes.get("epsilon", 1e-5)
                return lambda x, s, b: functional.layer_norm(x, s.shape, s, b, epsilon)
            case "GlobalAveragePool":
                return lambda x: functional.adaptive_avg_pool2d(x, 1)
            case "MaxPool":
                size, stride = attributes["kernel_shape"], attributes["strides"]
                return lambda x: functional.max_pool2d(x, size, stride, attributes["pads"][:2])
            case "Flatten":
                return lambda x: x.flatten(1)
            case "Identity":
                return lambda x: x
            case "Transpose":
                return lambda x: x.permute(attributes["perm"])
            case "Reshape":
                shape = whole(1)
                return lambda x, *_: x.reshape(
                    [x.shape[i] if n == 0 else n for i, n in enumerate(shape)]
                )
            case "Gather":
                place = whole(1)[0]
                return lambda x, *_: x.select(attributes["axis"], place)
            case "Slice":
                starts, ends, axes, steps = (whole(index) for index in (1, 2, 3, 4))
                ranges = dict(zip(axes, map(slice, starts, ends, steps), strict=True))
                cut = tuple(ranges.get(axis, slice(None)) for axis in range(4))
                return lambda x, *_: x[cut]
            case "Pad":
                pads = whole(1)
                rank = len(pads) // 2
                pairs = [(pads[axis], pads[axis + rank]) for axis in reversed(range(rank))]
                flat = [amount for pair in pairs for amount in pair]
                return lambda x, *_: functional.pad(x, flat)
        raise ValueError(f"no PyTorch twin for {node.op_type}")


def _quantizing(site: _Site, quantize: Callable[..., Any] | None) -> Call:
    assert quantize is not None

    def call(values: Values) -> None:
        values[site.name] = quantize(values[site.tensor], site)

    return call


def _linear(x: str, weight: str, bias: str, output: str) -> Call:
    def call(values: Values) -> None:
        values[output] = functional.linear(values[x], values[weight].t(), values[bias])

    return call


# --- a step ----------------------------------------------------------------------------------


class _Contender:
    """A model, its teacher and its optimizer."""

    def __init__(self, folder: Path, name: str) -> None:
        arithmetic, _, layout = name.partition(", ")
        description = json.loads((folder / "twin.json").read_text(encoding="utf-8"))
        arrays = np.load(folder / "twin.npz")
        graph = onnx.load(folder / "model.onnx").graph
        last = layout == "channels last"
        sites = list(_sites(description, arrays, arithmetic))
        self._program = _Program(graph, sites, _ARITHMETIC.get(arithmetic))
        self._teacher = _Program(graph, [], None)
        floats = {
            tensor.name: _tensor(numpy_helper.to_array(tensor), last)
            for tensor in graph.initializer
            if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 0
        }
        scalars = {
            tensor.name: float(numpy_helper.to_array(tensor))
            for tensor in graph.initializer
            if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 0
        }
        trained = description["parameters"]
        self._known: Values = {**floats, **scalars}
        self._parameters = {
            key: torch.nn.Parameter(floats[key].clone(memory_format=torch.preserve_format))
            for key in trained
        }
        self._x = _tensor(arrays["x"], last)
        self._labels = torch.from_numpy(arrays["labels"])
        self._input = graph.input[0].name
        self._optimizer = torch.optim.Adam(self._parameters.values(), lr=_RATE, fused=True)

    def step(self) -> dict[str, float]:
        """One step, its duration, and its loss and length of the gradient."""
        start = time.perf_counter()
        with torch.no_grad():
            teacher = self._teacher.run({**self._known, self._input: self._x})
            expected = functional.softmax(teacher, 1)
        scores = self._program.run({**self._known, **self._parameters, self._input: self._x})
        loss = 0.5 * functional.cross_entropy(scores, self._labels)
        loss = loss + 0.5 * functional.kl_div(
            functional.log_softmax(scores, 1), expected, reduction="batchmean"
        )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        value = loss.item()
        seconds = time.perf_counter() - start
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        return {"seconds": seconds, "loss": value, "norm": norm}


def _sites(description: dict[str, Any], arrays: Any, arithmetic: str) -> Iterator[_Site]:
    for index, site in enumerate(description["sites"].get(arithmetic, ())):
        consumers = tuple((name, position) for name, position in site.pop("consumers"))
        scale = torch.from_numpy(arrays[f"{arithmetic}/{index}"])
        yield _Site(consumers=consumers, scale=scale, **site)


def _tensor(array: Any, channels_last: bool) -> torch.Tensor:
    tensor = torch.from_numpy(np.array(array))
    if channels_last and tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def main() -> None:
    """Answer requests until there are none."""
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    imported = peak_bytes()
    contenders: dict[str, _Contender] = {}
    for line in sys.stdin:
        request = json.loads(line)
        reply: dict[str, Any] = {}
        match request["do"]:
            case "make":
                contenders[request["contender"]] = _Contender(folder, request["contender"])
            case "step":
                reply = contenders[request["contender"]].step()
            case "peak":
                reply = {"imported": imported, "peak": peak_bytes()}
            case "version":
                reply = {"torch": torch.__version__}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
