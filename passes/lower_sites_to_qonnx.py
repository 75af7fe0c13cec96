"""Turns searchable sites into the quantizers of QONNX, in the formats that were chosen."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from onnx_fliqs.formats import (
    Format,
    IntFormat,
    Special,
    fake_quantize,
    grid_code,
)
from onnx_fliqs.passes._graph import changed_constant, constant_of, used_names
from onnx_fliqs.passes._site_lowering import (
    SiteBuilder,
    lower_every_site,
    require_no_site,
)
from onnx_fliqs.precision import PrecisionMap
from onnx_fliqs.qonnx_functions import FLOAT_QUANT, QONNX, QUANT, qonnx_function
from onnx_fliqs.signs import REARRANGING, padding
from onnx_fliqs.sites import ScaleTable, SearchSpace

__all__ = ["LowerSitesToQonnxPass"]


class LowerSitesToQonnxPass(ir.passes.InPlacePass):
    """Replace every site by one ``Quant`` or ``FloatQuant``.

    Before:  w_q = onnx_fliqs.SearchQDQ (w, scale, lo, hi, ...)
             x_q = onnx_fliqs.SearchQDQ (x, scale, lo, hi, ...)
    After:   w_q = qonnx.custom_op.general.Quant <signed = 1> (w, scale, 0.0, 4.0)
             x_q = qonnx.custom_op.general.Quant <signed = 0> (x, scale, 0.0, 8.0)

    Weights stay floats, as QONNX has them, but are those that their codes stand for: tools
    that round or divide another way then still find the same codes. What only moves quantized
    numbers about needs no second quantizer. The operators come with their definitions as
    model-local functions. float32 disappears.

    Requires: a model after ``InsertSearchSitesPass`` (otherwise there is nothing to do);
        weights in initializers.
    Ensures: no site and no ``onnx_fliqs`` function is left; signature unchanged; the outputs
        equal the searchable graph's with these formats.
    Idempotent: a model without sites is left alone.
    """

    def __init__(self, space: SearchSpace, chosen: PrecisionMap, scales: ScaleTable) -> None:
        super().__init__()
        self._space = space
        self._chosen = chosen
        self._scales = scales

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower the sites one by one, then define what is used."""
        taken = used_names(model)

        def lower(build: SiteBuilder, fmt: Format, scale: npt.NDArray[np.float32]) -> ir.Value:
            return _lower(build, fmt, scale, taken)

        if not lower_every_site(model, self._space, self._chosen, self._scales, lower):
            return ir.passes.PassResult(model, modified=False)
        common.RemoveUnusedNodesPass()(model)
        for name in sorted({node.op_type for node in model.graph if node.domain == QONNX}):
            function = qonnx_function(name, model.opset_imports[""])
            model.functions[function.identifier()] = function
            model.opset_imports[QONNX] = 1
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """No site is left."""
        require_no_site(model)


@dataclass(frozen=True, slots=True)
class _Quantizer:
    """A node, but for the tensor that it reads."""

    op_type: str
    parameters: Mapping[str, npt.NDArray[np.float32]]
    """Its further inputs, in order."""
    attributes: Mapping[str, int]

    @classmethod
    def of(cls, fmt: Format, scale: npt.NDArray[np.float32]) -> "_Quantizer":
        """The node of a format, with a scale that broadcasts against the tensor."""
        if isinstance(fmt, IntFormat):
            numbers = {"zeropt": float(fmt.zero_point), "bitwidth": float(fmt.bits)}
            attributes = {"signed": int(fmt.signed), "narrow": 0}
        else:
            numbers = {
                "exponent_bitwidth": float(fmt.exponent),
                "mantissa_bitwidth": float(fmt.mantissa),
                "exponent_bias": float(1 - fmt.min_exponent),
                "max_val": grid_code(fmt).hi,
            }
            attributes = {
                "has_inf": int(fmt.special is Special.IEEE),
                "has_nan": int(fmt.special is not Special.NONE),
                "has_subnormal": 1,
                "saturation": 1,
            }
        parameters = {name: np.array(number, np.float32) for name, number in numbers.items()}
        return cls(
            QUANT if isinstance(fmt, IntFormat) else FLOAT_QUANT,
            {"scale": scale, **parameters},
            attributes,
        )

    def equals(self, node: ir.Node) -> bool:
        """Whether a node of QONNX quantizes in the same way."""
        if node.op_type != self.op_type:
            return False
        constants = [constant_of(value) for value in node.inputs[1:]]
        return all(
            other is not None and np.array_equal(own, other)
            for own, other in zip(self.parameters.values(), constants, strict=True)
        ) and all(
            node.attributes.get_int(name) == value for name, value in self.attributes.items()
        )


def _lower(
    build: SiteBuilder, fmt: Format, scale: npt.NDArray[np.float32], taken: set[str]
) -> ir.Value:
    """What a site's readers read; a weight becomes the numbers that its codes stand for."""
    site, tensor = build.site, build.tensor
    spread = site.against(scale, fmt)
    quantizer = _Quantizer.of(fmt, spread)
    if site.is_weight:
        assert tensor.const_value is not None
        numbers = fake_quantize(tensor.const_value.numpy(), spread, fmt)
        tensor = changed_constant(build.node, tensor, numbers, "quantized", taken)
    elif _is_quantized(tensor, quantizer):
        return tensor
    parameters = [build.constant(name, x) for name, x in quantizer.parameters.items()]
    made = build(
        quantizer.op_type,
        [tensor, *parameters],
        {**quantizer.attributes, "rounding_mode": "ROUND"},
        domain=QONNX,
    )
    # Readers of the file that do not look into functions have no other hint.
    made.shape, made.type = tensor.shape, tensor.type
    return made


def _is_quantized(value: ir.Value | None, quantizer: _Quantizer) -> bool:
    """Whether all numbers of a value come from such quantizers, at most in other places."""
    maker = value.producer() if value is not None else None
    if maker is None or maker.domain:
        return maker is not None and maker.domain == QONNX and quantizer.equals(maker)
    if maker.op_type == "Concat":
        return all(_is_quantized(source, quantizer) for source in maker.inputs)
    if maker.op_type in REARRANGING or (maker.op_type == "Pad" and padding(maker) == 0):
        return _is_quantized(maker.inputs[0], quantizer)
    return False
