"""Hardware profiles, as data: what a target can run and how its graph has to look."""

import enum
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from onnx_fliqs.errors import ConfigError
from onnx_fliqs.precision import Precision, parse_precision, parse_space, separated

__all__ = [
    "TARGETS",
    "Activations",
    "Bias",
    "Dialect",
    "FixedRange",
    "Kernels",
    "OperandTypes",
    "Placement",
    "Target",
]


class Dialect(enum.Enum):
    """How a graph says that a tensor is quantized."""

    QDQ = "QDQ"
    """QuantizeLinear and DequantizeLinear of ONNX."""
    QONNX = "QONNX"
    """Quant and FloatQuant of QONNX: the exchange format of Brevitas, FINN and hls4ml."""


class Placement(enum.Enum):
    """Which activations get a site."""

    LAYER_INPUTS = "layer inputs"
    """Each layer quantizes its own inputs, in its own format."""
    TENSORS = "tensors"
    """Each tensor is quantized once, where it is made: what integer kernels need, which read
    and write integers."""
    EVERY_TENSOR = "every tensor"
    """Like that, but of the whole graph: its inputs and outputs, and whatever operators
    between layers read and write. Between operators of different formats are conversions."""


class Activations(enum.Enum):
    """Ranges of the integers that activations become."""

    SYMMETRIC = "symmetric"
    """Signed, zero point 0."""
    UNSIGNED = "unsigned"
    """Unsigned where no value is negative, else signed and symmetric."""
    ASYMMETRIC = "asymmetric"
    """Unsigned, with the zero point that the values ask for."""


class Bias(enum.Enum):
    """What becomes of the bias of a layer that is computed in integers."""

    INT32 = "int32"
    """An int32 with the product of the operands' scales, beside operands of 5 to 8 bits."""
    INT32_ALWAYS = "int32 always"
    """The same beside integers of any width."""
    FLOAT = "float"
    """It stays float."""
    WEIGHT = "weight"
    """Quantized like the weights, with one scale of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Operators, and the precisions in which a target runs them."""

    ops: tuple[str, ...]
    precisions: tuple[str, ...]
    """Of embeddings and recurrent cells, whose activations stay float, the weights count."""
    least_channels: int = 1
    """Channels that go in and come out, of a Conv per group, at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedRange:
    """The range of what an operator writes."""

    op: str
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OperandTypes:
    """ONNX types of the operands of a product that a target multiplies."""

    activations: str
    weights: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A hardware profile."""

    name: str
    description: str
    kernels: tuple[Kernels, ...] | None = None
    """What it runs besides float32; None: everything."""
    default_space: str = "int-l"
    default_bits: float = 5.0
    """Budget in effective bits where the user names none."""
    dialect: Dialect = Dialect.QDQ
    placement: Placement = Placement.LAYER_INPUTS
    residual_adds: bool = False
    """With ``Placement.LAYER_INPUTS``: whether an Add behind a Conv, which runs in the same
    pass, reads its other operand in the format of that Conv."""
    between_ops: tuple[str, ...] = ()
    """With ``Placement.TENSORS``: operators between layers that run on integers if all that
    they read and write are integers."""
    float_output_ops: tuple[str, ...] = ()
    """With ``Placement.TENSORS``: layers whose integer kernels write floats as readily as
    integers, so that who reads them decides."""
    integer_output_ops: tuple[str, ...] = ()
    """With ``Placement.TENSORS``: layers whose integer kernels write integers only, so that
    their output is quantized where the graph ends as well."""
    shared_scale_ops: tuple[str, ...] = ()
    """Operators whose inputs and output share one scale, besides those that only rearrange."""
    fixed_ranges: tuple[FixedRange, ...] = ()
    """Operators whose output has a scale that does not depend on data."""
    activations: Activations = Activations.UNSIGNED
    activation_type: str | None = None
    """ONNX type (``UINT8`` or ``INT8``) in which all 8-bit activations travel, whatever their
    sign; None: that of the format."""
    zero_points: bool = False
    """Whether QuantizeLinear and DequantizeLinear spell out every zero point. Otherwise only
    those of 8 bits, and those that are not 0."""
    per_channel_ops: tuple[str, ...] | None = None
    """Operators whose weights have a scale per channel; None: all that can."""
    per_channel_types: tuple[str, ...] | None = None
    """ONNX types of weights that may have a scale per channel; None: all."""
    symmetric_weights: bool = False
    """Whether signed weights have zero point 0, whatever that of activations."""
    power_of_two_scales: bool = False
    bias: Bias = Bias.INT32
    qdq_types: tuple[str, ...] | None = None
    """ONNX types that its QuantizeLinear and DequantizeLinear take; None: all of them."""
    operand_types: tuple[OperandTypes, ...] | None = None
    """What the operands of a product that are both quantized may be; None: anything."""
    one_activation_type: bool = False
    """Whether all activations that an operator reads and writes have to be of one type. The
    second operand of a product counts as its weights."""
    static_shapes: bool = False
    """Whether it only runs graphs of fixed shapes."""
    runtimes: tuple[str, ...] = ()
    """Runtimes at hand (``onnxruntime``, ``openvino``) that have to compute the graph right as
    a user runs it. Without any, ONNX Runtime must, unoptimised."""

    @cached_property
    def precisions(self) -> tuple[str, ...] | None:
        """Names of all precisions that some operator runs in; None for every one."""
        if self.kernels is None:
            return None
        names = (name for kernels in self.kernels for name in kernels.precisions)
        return tuple(dict.fromkeys((*names, *(("float32",) if self.runs_float else ()))))

    @property
    def runs_float(self) -> bool:
        """Whether layers may stay float although they have a kernel for integers."""
        return self.placement is not Placement.EVERY_TENSOR

    def space(
        self, text: str | None, *, separate: bool | None = None
    ) -> tuple[Precision, ...]:
        """The precisions to search: those asked for, or the target's own.

        Args:
            text: A named space or a comma list; None: the target's own.
            separate: Add every pair of its formats that the target can run; None: every pair
                of formats that are quantized, unless it names pairs itself.

        Raises:
            ConfigError: The target cannot run one that was asked for.
        """
        found = parse_space(self.default_space if text is None else text)
        for precision in found:
            self._check(precision)
        apart = all(precision.tied for precision in found) if separate is None else separate
        if not apart:
            return found
        known = self.precisions
        pairs = separated(found, left=separate is True)
        return tuple(p for p in pairs if known is None or p.name in known)

    def check(self, name: str) -> Precision:
        """Look up one precision that the target must be able to run.

        Raises:
            ConfigError: The name is unknown, or the target cannot run it.
        """
        precision = parse_precision(name)
        self._check(precision)
        return precision

    def _check(self, precision: Precision) -> None:
        if self.precisions is not None and precision.name not in self.precisions:
            raise ConfigError(
                f"target {self.name} cannot run {precision.name};"
                f" it runs {', '.join(self.precisions)}"
            )

    def runs(
        self, op_type: str, precision: Precision, channels: int, *, weights_only: bool
    ) -> bool:
        """Whether it has a kernel.

        Args:
            op_type: The operator.
            precision: What its layer would take.
            channels: The fewer of those that go in and come out.
            weights_only: Whether only the weights would be quantized.
        """
        if precision.name == "float32":
            return self.runs_float
        if self.kernels is None:
            return True
        return any(
            op_type in kernels.ops
            and channels >= kernels.least_channels
            and any(
                _same(op_type, precision, name, weights_only) for name in kernels.precisions
            )
            for kernels in self.kernels
        )

    def range_of(self, op_type: str) -> tuple[float, float] | None:
        """The least and the largest number that an operator writes, where they are fixed."""
        return next(((r.low, r.high) for r in self.fixed_ranges if r.op == op_type), None)

    def has_kernel(self, op_type: str) -> bool:
        """Whether some precision besides float32 makes an operator better."""
        return self.kernels is None or any(op_type in k.ops for k in self.kernels)


def _same(op_type: str, precision: Precision, name: str, weights_only: bool) -> bool:
    if weights_only:
        # Inside a body, a product would dequantize its weights in every run.
        same = precision.weights == parse_precision(name).weights
        return same and op_type not in _PRODUCTS
    return precision.name == name


_PRODUCTS: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_MATRICES: Final = ("Gemm", "MatMul")
_ORT_CPU: Final = Target(
    name="ort-cpu",
    description="int8 and float on ONNX Runtime's integer CPU kernels",
    kernels=(
        Kernels(ops=("Conv", "Gemm", "MatMul"), precisions=("int8",)),
        # MatMulNBits: the better the fewer rows are multiplied.
        Kernels(
            ops=_MATRICES,
            precisions=("int8:float32", "int4g32:float32", "int4g128:float32"),
        ),
        # An LSTM whose weights are dequantized in every run takes 1.05 to 2.8 times as
        # long as in float; of a table only the rows that are read are dequantized.
        Kernels(ops=("Gather",), precisions=("int8",)),
    ),
    default_space="int8,float32",
    default_bits=8.0,
    placement=Placement.TENSORS,
    between_ops=("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid"),
    float_output_ops=("Gemm", "MatMul"),
    integer_output_ops=("Conv",),
    shared_scale_ops=("Concat",),
    # ONNX Runtime turns int8 activations into uint8 itself; 1.31.1 then cannot load some of
    # those graphs.
    activation_type="UINT8",
    qdq_types=("UINT8", "INT8", "INT4", "INT32"),
    operand_types=(
        # Compressed weights are multiplied by floats, also by those that were dequantized.
        OperandTypes(activations="UINT8", weights=("UINT8", "INT8", "INT4")),
        OperandTypes(activations="INT8", weights=("INT8", "INT4")),
    ),
    one_activation_type=True,
    runtimes=("onnxruntime",),
)

_ALL: Final = (
    Target(
        name="generic",
        activations=Activations.ASYMMETRIC,
        description="standard ONNX QDQ; formats without a type of their own are simulated",
        activation_type="UINT8",
        runtimes=("onnxruntime",),
    ),
    _ORT_CPU,
    replace(
        _ORT_CPU,
        name="ort-cpu-avx2",
        description="ort-cpu without VNNI: 7-bit weights, so that 16-bit sums cannot overflow",
        kernels=(
            Kernels(ops=("Conv", "Gemm", "MatMul"), precisions=("int7:int8",)),
            Kernels(ops=("Gather",), precisions=("int8",)),
        ),
        default_space="int7:int8,int8,float32",
    ),
    Target(
        name="tensorrt",
        description="explicit quantization of TensorRT: int8, FP8 and int4 weights, symmetric",
        kernels=(
            Kernels(ops=("Conv", "ConvTranspose"), precisions=("int8",)),
            # No FP8 convolutions: TensorRT 10 refuses those with a scale per channel
            # (Model-Optimizer issue 118).
            Kernels(ops=_MATRICES, precisions=("int8", "e4m3"), least_channels=16),
            Kernels(ops=_MATRICES, precisions=("int4g64:float32", "int4g128:float32")),
        ),
        default_space="int8,e4m3,int4g128:float32",
        default_bits=8.0,
        residual_adds=True,
        shared_scale_ops=("Concat",),
        activations=Activations.SYMMETRIC,
        zero_points=True,
        bias=Bias.FLOAT,
        qdq_types=("INT8", "FLOAT8E4M3FN", "INT4"),
        # Weights of 4 bits are for activations in float.
        operand_types=(
            OperandTypes(activations="INT8", weights=("INT8",)),
            OperandTypes(activations="FLOAT8E4M3FN", weights=("FLOAT8E4M3FN",)),
        ),
    ),
    Target(
        name="openvino",
        description="int8 and compressed weights on OpenVINO's CPU plugin",
        kernels=(
            Kernels(ops=("Conv", *_MATRICES), precisions=("int8",)),
            Kernels(
                ops=_MATRICES,
                precisions=(
                    "int8:float32",
                    "int4:float32",
                    "int4g32:float32",
                    "int4g128:float32",
                ),
            ),
        ),
        default_space="int8,float32",
        default_bits=8.0,
        placement=Placement.TENSORS,
        between_ops=("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool"),
        float_output_ops=_MATRICES,
        shared_scale_ops=("Concat",),
        qdq_types=("UINT8", "INT8", "INT4", "INT32"),
        operand_types=(
            OperandTypes(activations="UINT8", weights=("UINT8", "INT8", "INT4")),
            OperandTypes(activations="INT8", weights=("UINT8", "INT8", "INT4")),
        ),
        runtimes=("openvino",),
    ),
    Target(
        name="qonnx",
        description="any width for FINN and hls4ml, as QONNX (Quant and FloatQuant)",
        dialect=Dialect.QONNX,
        # Hardware without floats between the layers: each tensor is quantized once, where it
        # is made, residual additions included.
        placement=Placement.TENSORS,
        between_ops=("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool"),
        shared_scale_ops=("Concat",),
        # Tools of QONNX fold biases into thresholds, or choose their widths themselves.
        bias=Bias.FLOAT,
        qdq_types=(),
        runtimes=("onnxruntime",),
    ),
    Target(
        name="xnnpack",
        description="XNNPACK in ONNX Runtime: signed int8 convolutions",
        kernels=(Kernels(ops=("Conv", "ConvTranspose"), precisions=("int8",)),),
        default_space="int8,float32",
        default_bits=8.0,
        placement=Placement.TENSORS,
        between_ops=("AveragePool", "GlobalAveragePool", "Softmax", "Resize"),
        activations=Activations.ASYMMETRIC,
        activation_type="INT8",
        zero_points=True,
        per_channel_ops=("Conv",),
        per_channel_types=("INT8",),
        symmetric_weights=True,
        # Activations and weights are signed alike; what is emitted is signed.
        qdq_types=("INT8", "UINT8", "INT32"),
        operand_types=(
            OperandTypes(activations="INT8", weights=("INT8",)),
            OperandTypes(activations="UINT8", weights=("UINT8",)),
        ),
        one_activation_type=True,
    ),
    Target(
        name="qnn",
        description="HTP through QNN: fully quantized, 8- or 16-bit activations, fixed shapes",
        kernels=(
            Kernels(
                ops=_PRODUCTS, precisions=("int8", "int4:int8", "int8:int16", "int4:int16")
            ),
        ),
        default_space="int4:int8,int8,int4:int16,int8:int16",
        default_bits=8.0,
        placement=Placement.EVERY_TENSOR,
        fixed_ranges=(
            FixedRange(op="Sigmoid", low=0.0, high=1.0),
            FixedRange(op="Softmax", low=0.0, high=1.0),
            FixedRange(op="Tanh", low=-1.0, high=1.0),
        ),
        activations=Activations.ASYMMETRIC,
        activation_type="UINT8",
        zero_points=True,
        per_channel_ops=("Conv", "ConvTranspose"),
        bias=Bias.INT32_ALWAYS,
        qdq_types=("UINT8", "UINT16", "INT8", "INT4", "INT32"),
        per_channel_types=("INT8", "INT4"),
        symmetric_weights=True,
        operand_types=(
            OperandTypes(activations="UINT8", weights=("UINT8", "INT8", "INT4", "UINT16")),
            OperandTypes(activations="UINT16", weights=("UINT8", "INT8", "INT4", "UINT16")),
        ),
        one_activation_type=True,
        static_shapes=True,
    ),
    Target(
        name="vitis-ai",
        description="XINT8 of AMD's Vitis AI: int8 throughout, scales are powers of two",
        kernels=(Kernels(ops=_PRODUCTS, precisions=("int8",)),),
        default_space="int8,float32",
        default_bits=8.0,
        placement=Placement.TENSORS,
        between_ops=("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool"),
        shared_scale_ops=("Concat",),
        activations=Activations.SYMMETRIC,
        activation_type="INT8",
        zero_points=True,
        per_channel_ops=(),
        power_of_two_scales=True,
        bias=Bias.WEIGHT,
        qdq_types=("INT8",),
        one_activation_type=True,
    ),
)

TARGETS: Final[dict[str, Target]] = {target.name: target for target in _ALL}
"""The profiles that come with the project, by name."""
