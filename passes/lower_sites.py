"""Turns searchable sites into standard QDQ nodes in the formats that were chosen."""

from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from onnx_fliqs.containers import Container, activation_container_of, container_of
from onnx_fliqs.formats import (
    Format,
    IntFormat,
    grid_code,
    is_passthrough,
    quantize,
)
from onnx_fliqs.passes._graph import constant_of
from onnx_fliqs.passes._site_lowering import (
    SiteBuilder,
    lower_every_site,
    require_no_site,
)
from onnx_fliqs.precision import Precision, PrecisionMap
from onnx_fliqs.site_functions import ANY_CODES, ANY_SITE, INTEGER_CODES, site_function
from onnx_fliqs.sites import ScaleTable, SearchSpace
from onnx_fliqs.targets import Bias, Target

__all__ = ["LowerSitesPass"]

_EIGHT_BITS: Final = (ir.DataType.INT8, ir.DataType.UINT8)


class LowerSitesPass(ir.passes.InPlacePass):
    """Replace every site by the nodes of its format; store weights as codes.

    Before:  w_q = onnx_fliqs.SearchQDQ (w, scale, lo, hi, ...)
             x_q = onnx_fliqs.SearchQDQ (x, scale, lo, hi, ...)
    After:   w_q = DequantizeLinear (w_codes, scale)
             x_codes = QuantizeLinear (x, scale)
             x_q = DequantizeLinear (x_codes, scale)

    A bias that the site left in float32 is stored as int32 with a fine scale of its own.
    Activations of fewer than 8 bits get a Clip in front and travel as 8-bit integers.
    Minifloats without one keep the site's own arithmetic and only their weights are
    stored narrow. bf16 and fp16 become Casts; float32 disappears.

    Requires: a model after ``InsertSearchSitesPass`` (otherwise there is nothing to do);
        weights in initializers.
    Ensures: no site and no ``onnx_fliqs`` function is left; signature unchanged; the outputs
        equal the searchable graph's with these formats to within float rounding.
    Idempotent: a model without sites is left alone.
    """

    def __init__(
        self, space: SearchSpace, chosen: PrecisionMap, scales: ScaleTable, target: Target
    ) -> None:
        super().__init__()
        self._space = space
        self._chosen = chosen
        self._scales = scales
        self._target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower the sites one by one."""
        if not lower_every_site(model, self._space, self._chosen, self._scales, self._lower):
            return ir.passes.PassResult(model, modified=False)
        for node in list(model.graph):
            layer = self._space.layer.get(str(node.name))
            if layer is None or layer.weight_only is not None:
                continue
            if self._target.bias is not Bias.INT32:
                continue
            if _endangers_bias(self._chosen[layer.name]):
                _protect_bias(model.graph, node)
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """No site is left."""
        require_no_site(model)

    def _lower(
        self, build: SiteBuilder, fmt: Format, scale: npt.NDArray[np.float32]
    ) -> ir.Value:
        site, tensor = build.site, build.tensor
        container = container_of(fmt) if site.is_weight else activation_container_of(fmt)
        if site.is_weight:
            return _weight(build, tensor, scale, fmt, container)
        if is_passthrough(fmt):
            return _cast(build, tensor, fmt, container)
        if container.native or isinstance(fmt, IntFormat):
            return self._activation(build, tensor, scale, fmt, container)
        return _arithmetic(build, scale, fmt)

    def _activation(
        self,
        build: SiteBuilder,
        tensor: ir.Value,
        scale: npt.NDArray[np.float32],
        fmt: Format,
        container: Container,
    ) -> ir.Value:
        if not container.native:
            ends = [np.float32(end) * scale[0] for end in (fmt.min, fmt.max)]
            tensor = build(
                "Clip",
                [tensor, build.constant("lo", ends[0]), build.constant("hi", ends[1])],
            )
        dtype, zero = container.dtype, fmt.zero_point if isinstance(fmt, IntFormat) else 0
        wanted = self._target.activation_type
        if wanted is not None and {wanted, dtype.name} == {"UINT8", "INT8"}:
            zero += 128 if dtype is ir.DataType.INT8 else -128
            dtype = ir.DataType[wanted]
        operands = [build.constant("scale", scale[0])]
        attributes: dict[str, int] = {}
        if zero or self._target.zero_points or dtype in _EIGHT_BITS:
            # ONNX Runtime fuses 8-bit groups only when the zero point is spelled out.
            point = ir.Tensor(np.array(zero, dtype.numpy()), dtype=dtype)
            operands.append(build.constant("zero_point", point))
        else:
            # With a zero point, ONNX Runtime (up to 1.31 at least) would drop a Relu in
            # front of QuantizeLinear for every type but the 8- and 16-bit integers.
            attributes["output_dtype"] = int(dtype)
        codes = build("QuantizeLinear", [tensor, *operands], attributes)
        return build("DequantizeLinear", [codes, *operands])


def _weight(
    build: SiteBuilder,
    tensor: ir.Value,
    scale: npt.NDArray[np.float32],
    fmt: Format,
    container: Container,
) -> ir.Value:
    """Codes in an initializer, and the node that reads them."""
    assert tensor.const_value is not None
    site = build.site
    spread = site.against(scale, fmt)
    numbers = quantize(tensor.const_value.numpy() / spread, fmt)
    if is_passthrough(fmt):
        numbers = np.clip(tensor.const_value.numpy(), *grid_code(fmt)[:2]).astype(np.float32)
    zero = fmt.zero_point if isinstance(fmt, IntFormat) else 0
    codes = build.constant("codes", container.encode(numbers + zero, f"{site.name}.codes"))
    multiplier = np.float32(container.multiplier)
    if container.dequantizes:
        step, attributes = scale[0], {}
        if fmt.group is not None:
            assert site.group_axis is not None
            sizes = list(tensor.const_value.shape.numpy())
            sizes[site.group_axis] //= fmt.group
            step = np.broadcast_to(scale.reshape(site.scale_shape(fmt)), sizes)
            attributes = {"axis": site.group_axis, "block_size": fmt.group}
        elif site.axis is not None:
            step, attributes = scale, {"axis": site.axis}
        step = np.asarray(step / multiplier, np.float32)
        operands = [codes, build.constant("scale", step)]
        if zero or container.dtype is ir.DataType.INT8:
            points = np.full(step.shape, zero, container.dtype.numpy())
            operands.append(build.constant("zero_point", points))
        return build("DequantizeLinear", operands, attributes)
    value = build("Cast", [codes], {"to": int(ir.DataType.FLOAT)})
    if is_passthrough(fmt):
        return value
    return build("Mul", [value, build.constant("scale", spread / multiplier)])


def _cast(build: SiteBuilder, tensor: ir.Value, fmt: Format, container: Container) -> ir.Value:
    """To the narrow float and back, saturating."""
    code = grid_code(fmt)
    clipped = build(
        "Clip",
        [
            tensor,
            build.constant("lo", np.float32(code.lo)),
            build.constant("hi", np.float32(code.hi)),
        ],
    )
    narrow = build("Cast", [clipped], {"to": int(container.dtype)})
    wide = ir.node(
        "Cast", [narrow], {"to": int(ir.DataType.FLOAT)}, name=f"{build.site.name}.Cast_back"
    )
    return build.insert(wide)


def _arithmetic(build: SiteBuilder, scale: npt.NDArray[np.float32], fmt: Format) -> ir.Value:
    """The site's own arithmetic, with constants in place of the search's inputs."""
    node = build.node
    assert node.inputs[0] is not None
    code = grid_code(fmt)._asdict()
    fields = ANY_CODES if node.op_type == ANY_SITE else INTEGER_CODES
    operands = [
        node.inputs[0],
        build.constant("scale", scale[0]),
        *(build.constant(f"{field}.code", np.float32(code[field])) for field in fields),
    ]
    function = site_function(node.op_type)
    values: dict[ir.Value | None, ir.Value] = dict(zip(function.inputs, operands, strict=True))
    for inner in function:
        (result,) = inner.outputs
        number = constant_of(result)
        if number is not None:
            values[result] = build.constant(str(result.name), number)
            continue
        name = f"{build.site.name}.{result.name}"
        copy = ir.node(inner.op_type, [values[v] for v in inner.inputs], name=name)
        values[result] = build.insert(copy)
    return values[function.outputs[0]]


def _endangers_bias(precision: Precision) -> bool:
    """Whether both operands are dequantized, but never multiplied as 8-bit integers."""

    def dequantized(fmt: Format) -> bool:
        native = container_of(fmt).native and not is_passthrough(fmt)
        return isinstance(fmt, IntFormat) or native

    formats = (precision.weights, precision.activations)
    return all(map(dequantized, formats)) and not precision.in_integers


def _protect_bias(graph: ir.Graph, node: ir.Node) -> None:
    """Store a float bias as int32 codes, so finely that nothing is lost.

    ONNX Runtime 1.31 rounds float biases between quantized operands to the product of their
    scales, from its basic level on, whatever the types: coarse for 4 bits, and beyond int32
    for 16 bits and float8. What is dequantized already, it leaves alone.
    """
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or not bias.is_initializer() or bias.dtype is not ir.DataType.FLOAT:
        return
    assert bias.const_value is not None
    values = bias.const_value.numpy()
    # Codes of at most 2^30; the scale is a power of two, so that products are exact, and a
    # normal number, or runtimes would take it for zero.
    exponent = max(int(np.frexp(np.abs(values).max(initial=0.0))[1]) - 30, -126)
    name = f"{node.name}.bias"
    operands = []
    for suffix, array in (
        ("codes", np.rint(np.ldexp(values.astype(np.float64), -exponent)).astype(np.int32)),
        ("scale", np.ldexp(np.float32(1), exponent)),
    ):
        value = ir.val(
            f"{name}.{suffix}", const_value=ir.tensor(array, name=f"{name}.{suffix}")
        )
        graph.register_initializer(value)
        operands.append(value)
    read = ir.node("DequantizeLinear", operands, name=f"{name}.DequantizeLinear")
    read.outputs[0].name = f"{name}.dequantized"
    graph.insert_before(node, read)
    node.replace_input_with(2, read.outputs[0])
