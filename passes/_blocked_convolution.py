"""Convolutions in blocked channels, forwards and backwards, as nodes of ONNX Runtime's.

In blocked channels ("NCHWc"), an image [N, C, H, W] lies in memory as [N, C/b, H, W, b] with b
the channels that one vector register holds, and a kernel [O, C, KH, KW] as
[O/b, C/b, KH, KW, b channels in, b channels out]. ONNX Runtime has fast kernels for it, which
it uses by itself only where weights are constants and nothing is differentiated. Shapes are
still declared as [N, C, H, W].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from onnx_fliqs.passes._ops import Ops, known_shape

__all__ = [
    "DOMAIN",
    "Convolution",
    "blocked_bias_gradient",
    "blocked_convolution",
    "blocked_input_gradient",
    "blocked_weight_gradient",
    "from_blocked",
    "to_blocked",
]

DOMAIN: Final = "com.microsoft.nchwc"
_SPATIAL: Final = 2
_REARRANGED: Final = 16
"""Numbers of images that are rearranged in the time in which one of a kernel is handled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Convolution:
    """The sizes of a convolution of images."""

    channels: int
    filters: int
    groups: int
    size: tuple[int, int]
    """Of the image that it reads."""
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int, int, int]
    """Begins, then ends."""

    @classmethod
    def of(cls, node: ir.Node, image: ir.Value, weight: ir.Value) -> "Convolution | None":
        """Read a Conv or ConvGrad; None if its sizes are unknown or it is not of images.

        Those of other numbers than float32 have no kernels either.
        """
        shape, kernel = known_shape(image), known_shape(weight)
        if (
            weight.dtype is not ir.DataType.FLOAT
            or shape is None
            or kernel is None
            or len(shape) != _SPATIAL + 2
        ):
            return None
        sizes = [size for size in (*shape[1:], *kernel) if isinstance(size, int)]
        if len(sizes) != len(shape) - 1 + len(kernel):
            return None
        if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return None
        channels, height, width, filters, _, rows, columns = sizes
        ones = [1] * _SPATIAL
        strides = node.attributes.get_ints("strides", ones)
        dilations = node.attributes.get_ints("dilations", ones)
        top, left, bottom, right = node.attributes.get_ints("pads", [0] * 2 * _SPATIAL)
        return cls(
            channels=channels,
            filters=filters,
            groups=node.attributes.get_int("group", 1),
            size=(height, width),
            kernel=(rows, columns),
            strides=(strides[0], strides[1]),
            dilations=(dilations[0], dilations[1]),
            pads=(top, left, bottom, right),
        )

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel has a kernel of its own."""
        return 1 < self.groups == self.channels == self.filters

    @property
    def area(self) -> int:
        """Places of a kernel."""
        return math.prod(self.kernel)

    @property
    def output_size(self) -> tuple[int, int]:
        """Of the image that it makes."""
        height, width = (
            (size + begin + end - dilation * (length - 1) - 1) // stride + 1
            for size, length, stride, dilation, begin, end in zip(
                self.size,
                self.kernel,
                self.strides,
                self.dilations,
                self.pads[:_SPATIAL],
                self.pads[_SPATIAL:],
                strict=True,
            )
        )
        return height, width

    def reads_plain(self, block: int) -> bool:
        """Whether the kernels take an image of so few channels as it is."""
        return self.channels < block

    def fits(self, block: int) -> bool:
        """Whether there is a kernel for it."""
        if self.filters % block or not (self.is_depthwise or self.groups == 1):
            return False
        return self.channels % block == 0 or (self.reads_plain(block) and self.groups == 1)

    def input_gradient_fits(self, block: int) -> bool:
        """Whether :func:`blocked_input_gradient` applies.

        With strides, zeros between the places of the output's gradient are multiplied as well:
        that pays for a kernel of one place, where they come after it, and for depthwise ones.
        """
        if self.reads_plain(block):
            return False
        if self.strides == (1, 1):
            return min(self.mirrored_pads) >= 0
        if self.area == 1:
            return not any(self.pads) and self.spread_size == self.size
        return self.is_depthwise and min(self.mirrored_pads) >= 0

    def weight_gradient_fits(self, batch: int) -> bool:
        """Whether :func:`blocked_weight_gradient` applies and pays.

        A kernel that is large beside the images costs more to rearrange than is gained. That
        of one place is a matrix product already: only rearranging the images is saved.
        """
        # ONNX Runtime's Pad, which crops as well, must leave something of the image.
        extents = (d * (k - 1) + 1 for d, k in zip(self.dilations, self.kernel, strict=True))
        if any(pad >= extent for pad, extent in zip(self.pads, extents, strict=False)):
            return False
        if self.is_depthwise:
            return True
        if self.groups > 1 or self.dilations != (1, 1):
            return False
        places = math.prod(self.output_size)
        if self.area == 1:
            numbers = (self.channels + self.filters) * places
            return _REARRANGED * self.channels * self.filters <= numbers
        return self.channels * self.area <= 2 * batch * places

    @property
    def correlated_pads(self) -> tuple[int, int, int, int]:
        """Those of the image where the output's gradient is the kernel; negative ones crop."""
        ends = []
        for axis in range(_SPATIAL):
            reach = self.dilations[axis] * (self.kernel[axis] - 1)
            last = self.strides[axis] * (self.output_size[axis] - 1)
            ends.append(last + reach + 1 - self.size[axis] - self.pads[axis])
        return self.pads[0], self.pads[1], ends[0], ends[1]

    @property
    def spread_size(self) -> tuple[int, int]:
        """Of the output with as many zeros behind each place as strides pass over."""
        height, width = self.output_size
        return height * self.strides[0], width * self.strides[1]

    @property
    def mirrored_pads(self) -> tuple[int, int, int, int]:
        """Those of the convolution of the spread output's gradient that gives the input's."""
        begins, ends = [], []
        for axis in range(_SPATIAL):
            reach = self.dilations[axis] * (self.kernel[axis] - 1)
            begins.append(reach - self.pads[axis])
            # Whatever the padding at the end was, the result has the size of the input.
            ends.append(self.size[axis] + self.pads[axis] - self.spread_size[axis])
        return begins[0], begins[1], ends[0], ends[1]


def to_blocked(ops: Ops, image: ir.Value) -> ir.Value:
    """Rearrange an image."""
    return ops.node("ReorderInput", [image], domain=DOMAIN)[0]


def from_blocked(ops: Ops, image: ir.Value, channels: int) -> ir.Value:
    """Rearrange an image back."""
    return ops.node("ReorderOutput", [image], {"channels": channels}, domain=DOMAIN)[0]


def blocked_convolution(
    ops: Ops,
    image: ir.Value,
    weight: ir.Value,
    bias: ir.Value | None,
    conv: Convolution,
    b: int,
) -> ir.Value:
    """The convolution itself.

    Args:
        ops: Where the nodes go.
        image: In blocked channels, unless the convolution ``reads_plain``.
        weight: As ONNX has it.
        bias: [O], if any.
        conv: The sizes.
        b: The block.
    """
    kernel = _kernel(ops, weight, conv, b)
    return _convolve(
        ops,
        image,
        kernel,
        bias,
        conv.kernel,
        conv.strides,
        conv.dilations,
        conv.pads,
        conv.groups,
    )


def blocked_input_gradient(
    ops: Ops, gradient: ir.Value, weight: ir.Value, conv: Convolution, b: int
) -> ir.Value:
    """The gradient of the image: the convolution of the output's with the mirrored kernel.

    Args:
        ops: Where the nodes go.
        gradient: Of the output, in blocked channels.
        weight: As ONNX has it.
        conv: The sizes.
        b: The block.
    """
    kernel = _mirrored_kernel(ops, weight, conv, b)
    after = conv.area == 1
    if not after:
        gradient = _spread(ops, gradient, conv, b)
    result = _convolve(
        ops,
        gradient,
        kernel,
        None,
        conv.kernel,
        (1, 1),
        conv.dilations,
        (0, 0, 0, 0) if after else conv.mirrored_pads,
        conv.groups,
    )
    return _spread(ops, result, conv, b) if after else result


def blocked_weight_gradient(
    ops: Ops, image: ir.Value, gradient: ir.Value, conv: Convolution, b: int
) -> ir.Value:
    """The gradient of the kernel: of each image a convolution with its output's gradient.

    The strides become dilations. As a kernel, the output's gradient of one image lies in
    memory as it is. The channels of a block lie side by side in the rows of its image, so that
    they are places of the result: the dilation along the columns is also by the block.

    Args:
        ops: Where the nodes go.
        image: As the convolution read it.
        gradient: Of the output, in blocked channels.
        conv: The sizes.
        b: The block.

    Returns:
        [O, C / groups, KH, KW], as ONNX has it.
    """
    (rows, columns), (down, across) = conv.kernel, conv.strides
    # Channels that are places of the result, and what they are blocks of.
    c = 1 if conv.is_depthwise else conv.channels if conv.reads_plain(b) else b
    blocks = conv.channels // c
    if conv.reads_plain(b):
        image = ops.Reshape(image, [0, c, math.prod(conv.size)])
        image = ops.Transpose(image, perm=[0, 2, 1])
    height, width = conv.size
    pads = conv.correlated_pads
    # Places of the result that reach over an edge are computed one by one: with strides, few
    # are.
    if min(pads) < 0 or (any(pads) and not (conv.is_depthwise and min(conv.strides) > 1)):
        top, left, bottom, right = pads
        lanes = b if conv.is_depthwise else c
        places = ops.Reshape(image, [-1, height, width, lanes])
        image = ops.Pad(places, [0, top, left, 0, 0, bottom, right, 0])
        height, width = height + top + bottom, width + left + right
        pads = (0, 0, 0, 0)
    image = ops.Reshape(image, [-1, blocks, height, width * c])
    attributes = {
        "auto_pad": "NOTSET",
        "kernel_shape": list(conv.output_size),
        "strides": list(conv.dilations),
        "dilations": [down, across * c],
        "pads": list(pads),
        "group": conv.groups,
    }
    # A Scan over the images costs next to nothing, and the kernels take only one of them.
    body = ops.body()
    one = ir.val("image", ir.DataType.FLOAT, [blocks, height, width * c])
    slope = ir.val("slope", ir.DataType.FLOAT, [conv.filters, *conv.output_size])
    operands = [
        body.Unsqueeze(one, [0 if conv.is_depthwise else 1]),
        body.Unsqueeze(slope, [1]),
    ]
    (found,) = body.node("Conv", operands, attributes, domain=DOMAIN)
    for value in (one, slope):
        value.name = f"{found.name}/{value.name}"
    found.dtype = ir.DataType.FLOAT
    lead = 1 if conv.is_depthwise else blocks
    found.shape = ir.Shape([lead, conv.filters, rows, columns * c])
    graph = ir.Graph([one, slope], [found], nodes=body.nodes, name=f"{found.name}/body")
    products = ops.Scan(image, gradient, body=graph, num_scan_inputs=2)
    products = ops.ReduceSum(products, [0], keepdims=0)
    if conv.is_depthwise:
        products = ops.Reshape(products, [blocks // b, conv.area, b])
        products = ops.Transpose(products, perm=[0, 2, 1])
        return ops.Reshape(products, [conv.filters, 1, rows, columns])
    # [C/c, O/b, KH, KW, c, b] to [O/b, b, C/c, c, KH, KW], by transpositions of matrices.
    filters = conv.filters // b
    products = ops.Reshape(products, [blocks * filters, conv.area * c, b])
    products = ops.Transpose(products, perm=[0, 2, 1])
    if conv.area > 1:
        products = ops.Reshape(products, [blocks * conv.filters, conv.area, c])
        products = ops.Transpose(products, perm=[0, 2, 1])
    products = ops.Reshape(products, [blocks, conv.filters, c * conv.area])
    return ops.Reshape(
        _swapped(ops, products, blocks, 3), [conv.filters, conv.channels, rows, columns]
    )


def blocked_bias_gradient(ops: Ops, gradient: ir.Value, conv: Convolution, b: int) -> ir.Value:
    """The gradient of the bias, [O].

    Args:
        ops: Where the nodes go.
        gradient: Of the output, in blocked channels.
        conv: The sizes.
        b: The block.
    """
    places = math.prod(conv.output_size)
    rows = ops.Reshape(gradient, [-1, places, b])
    sums = ops.ReduceSum(rows, [1], keepdims=0)
    return ops.ReduceSum(ops.Reshape(sums, [-1, conv.filters]), [0], keepdims=0)


def _kernel(ops: Ops, weight: ir.Value, conv: Convolution, b: int) -> ir.Value:
    """[O, C, KH, KW] to [O/b, C/b, KH, KW, b, b], or [O/b, C, KH, KW, b] for few channels."""
    filters, channels = conv.filters // b, conv.channels // conv.groups
    # Transpositions of two axes take a tenth of the time of a general one.
    rows = ops.Reshape(weight, [filters, b, channels * conv.area])
    rows = ops.Transpose(rows, perm=[0, 2, 1])
    if channels % b == 0 and conv.area > 1:
        rows = ops.Reshape(rows, [conv.filters * channels // b**2, b, conv.area, b])
        rows = ops.Transpose(rows, perm=[0, 2, 1, 3])
    return ops.Reshape(rows, [conv.filters, channels, *conv.kernel])


def _mirrored_kernel(ops: Ops, weight: ir.Value, conv: Convolution, b: int) -> ir.Value:
    """[O, C, KH, KW] to [C/b, O/b, KH, KW, b, b], the places in opposite order."""
    filters, channels = conv.filters // b, conv.channels // b
    rows = ops.Reshape(weight, [-1, b, conv.area])
    rows = ops.Transpose(rows, perm=[0, 2, 1])
    if conv.groups == 1:
        rows = ops.Reshape(rows, [filters, b, channels, conv.area, b])
        rows = ops.Transpose(rows, perm=[2, 0, 3, 1, 4])
        rows = ops.Reshape(rows, [channels * filters, conv.area, b * b])
    if conv.area > 1:
        rows = ops.Gather(rows, list(reversed(range(conv.area))), axis=1)
    shape = [conv.channels, conv.filters // conv.groups, *conv.kernel]
    return ops.Reshape(rows, shape)


def _spread(ops: Ops, image: ir.Value, conv: Convolution, b: int) -> ir.Value:
    """An image of the output's size with zeros where the strides pass over."""
    if conv.strides == (1, 1):
        return image
    height, width = conv.output_size
    channels = conv.channels if conv.area == 1 else conv.filters
    down, across = (stride - 1 for stride in conv.strides)
    places = ops.Reshape(image, [-1, height, 1, width, 1, b])
    places = ops.Pad(places, [0] * 8 + [down, 0, across, 0])
    return ops.Reshape(places, [-1, channels, *conv.spread_size])


def _swapped(ops: Ops, value: ir.Value, count: int, rank: int) -> ir.Value:
    """Its first two axes exchanged; nothing is to be done where one has a ``count`` of 1."""
    return value if count == 1 else ops.Transpose(value, perm=[1, 0, *range(2, rank)])


def _convolve(
    ops: Ops,
    image: ir.Value,
    kernel: ir.Value,
    bias: ir.Value | None,
    size: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
    groups: int,
) -> ir.Value:
    attributes = {
        "auto_pad": "NOTSET",
        "kernel_shape": list(size),
        "strides": list(strides),
        "dilations": list(dilations),
        "pads": list(pads),
        "group": groups,
    }
    return ops.node("Conv", [image, kernel, bias], attributes, domain=DOMAIN)[0]
