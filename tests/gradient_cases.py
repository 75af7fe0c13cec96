"""Small graphs, one per operator and variant, whose gradients are compared with slopes."""

import enum
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnx_fliqs.passes.name_everything import NameEverythingPass
from support import model

__all__ = ["CASES", "Case", "Sizes"]

Floats = npt.NDArray[np.float32]
Shape = tuple[int, ...]


class Sizes(enum.Enum):
    """What a graph says about the sizes of its inputs."""

    KNOWN = enum.auto()
    FREE = enum.auto()
    """Dimensions have names."""
    UNKNOWN = enum.auto()
    """Not even their number is told."""


@dataclass(frozen=True, slots=True)
class Case:
    """Nodes that compute ``y`` from float inputs."""

    text: str
    inputs: Mapping[str, Floats]
    constants: Mapping[str, float | Sequence[int]] = field(default_factory=dict)
    known: Collection[str] = ()
    """Inputs of known sizes, where those of the others are free."""

    def build(self, *, sizes: Sizes = Sizes.KNOWN) -> ir.Model:
        """The model, with named nodes and inferred shapes."""
        declared = []
        for name, array in self.inputs.items():
            dims: Sequence[int | str] = array.shape
            if sizes is Sizes.FREE and name not in self.known:
                dims = [f"{name}{axis}" for axis in range(array.ndim)]
            elif sizes is Sizes.UNKNOWN:
                dims = [""]
            declared.append(
                f"float[{','.join(map(str, dims))}] {name}" if dims else f"float {name}"
            )
        text = f"g ({', '.join(declared)}) => (float[] y) {{ {self.text} }}"
        made = model(text, constants=self.constants)
        NameEverythingPass()(made)
        proto = onnx.shape_inference.infer_shapes(ir.to_proto(made), data_prop=True)
        return ir.from_proto(proto)


CASES: dict[str, Case] = {}


def add(
    name: str,
    text: str,
    *,
    constants: Mapping[str, float | Sequence[int]] | None = None,
    known: str = "",
    **inputs: Shape | Floats,
) -> None:
    """Add a case whose inputs are given by shape or by content."""
    assert name not in CASES
    arrays = {
        name: numbers(*value, seed=seed) if isinstance(value, tuple) else value
        for seed, (name, value) in enumerate(inputs.items())
    }
    CASES[name] = Case(text, arrays, constants or {}, known.split())


def numbers(
    *shape: int, low: float = 0.1, high: float = 2.0, signed: bool = True, seed: int = 0
) -> Floats:
    """Numbers in random order, no two alike, none near zero."""
    count = int(np.prod(shape))
    rng = np.random.default_rng([seed, count])
    sizes = rng.permutation(np.linspace(low, high, count))
    signs = rng.choice([-1, 1], count) if signed else 1
    return np.array(sizes * signs, np.float32).reshape(shape)


def ints(name: str, *values: int, shape: Shape = ()) -> str:
    """A node that gives integers, of any shape."""
    dims = f"[{','.join(map(str, shape))}]" if shape else ""
    return f"{name} = Constant <value = int64{dims} {{{', '.join(map(str, values))}}}> () "


def floats(name: str, *values: float, shape: Shape = ()) -> str:
    """A node that gives floats, of any shape."""
    dims = f"[{','.join(map(str, shape or (len(values),)))}]"
    return f"{name} = Constant <value = float{dims} {{{', '.join(map(str, values))}}}> () "


def attributes(text: str) -> str:
    """Attributes in brackets, if there are any."""
    return f"<{text}>" if text else ""


# -- element by element ---------------------------------------------------------------------


def _functions() -> None:
    positive = numbers(3, 4, low=0.5, signed=False)
    inside = numbers(3, 4, high=0.8)
    anywhere = """
        Abs Asinh Atan Celu Cos Cosh Elu Erf Exp Gelu HardSigmoid Identity LeakyRelu Mish Neg
        Relu Selu Shrink Sigmoid Sin Sinh Softplus Softsign Tanh ThresholdedRelu""".split()  # noqa: SIM905 - reads as a list
    for op in anywhere:
        add(op.lower(), f"y = {op} (x)", x=(3, 4))
    for op in ("Acos", "Asin", "Atanh", "Tan"):
        add(op.lower(), f"y = {op} (x)", x=inside)
    for op in ("Log", "Reciprocal", "Sqrt"):
        add(op.lower(), f"y = {op} (x)", x=positive)
    add("acosh", "y = Acosh (x)", x=numbers(3, 4, low=1.2, high=3, signed=False))
    add("hardswish", "y = HardSwish (x)", x=numbers(4, 5, low=0.3, high=4.2))
    for name, text in {
        "celu_sharp": "Celu <alpha = 0.6>",
        "elu_low": "Elu <alpha = 0.6>",
        "gelu_tanh": 'Gelu <approximate = "tanh">',
        "hardsigmoid_steep": "HardSigmoid <alpha = 0.5, beta = 0.3>",
        "leakyrelu_steep": "LeakyRelu <alpha = 0.3>",
        "leakyrelu_that_falls": "LeakyRelu <alpha = -0.3>",
        "selu_low": "Selu <alpha = 1.2, gamma = 0.7>",
        "shrink_biased": "Shrink <lambd = 0.9, bias = 0.4>",
        "thresholdedrelu_low": "ThresholdedRelu <alpha = 0.7>",
    }.items():
        add(name, f"y = {text} (x)", x=(3, 4))
    add("cast", "d = Cast <to = 11> (x) e = Exp (d) y = Cast <to = 1> (e)", x=(3, 4))
    add(
        "castlike",
        "d = Cast <to = 11> (w) e = CastLike (x, d) y = Cast <to = 1> (e)",
        x=(3, 4),
        w=(1,),
    )


def _bounds() -> None:
    bounds = {"lo": -0.5, "hi": 0.7}
    add("clip", "y = Clip (x, lo, hi)", x=(3, 4), constants=bounds)
    add("clip_below", "y = Clip (x, lo)", x=(3, 4), constants={"lo": -0.5})
    add("clip_above", "y = Clip (x, , hi)", x=(3, 4), constants={"hi": 0.7})
    add("clip_nothing", "y = Clip (x)", x=(3, 4))
    add(
        "clip_at_computed_bounds",
        "b = Abs (w) a = Neg (b) y = Clip (x, a, b)",
        x=(3, 4),
        w=np.array(0.83, np.float32),
    )


def _broadcasting() -> None:
    shapes: dict[str, tuple[Shape, Shape]] = {
        "": ((3, 4), (3, 4)),
        "_of_a_row": ((2, 3, 4), (4,)),
        "_of_a_column_and_a_row": ((3, 1), (2, 1, 4)),
        "_of_a_scalar": ((), (2, 3)),
    }
    for op in ("Add", "Div", "Max", "Mean", "Min", "Mul", "Pow", "Sub", "Sum"):
        for name, pair in shapes.items():
            a, b = (
                numbers(*shape, low=0.5, high=2 + seed / 9, signed=False, seed=seed)
                for seed, shape in enumerate(pair)
            )
            add(f"{op.lower()}{name}", f"y = {op} (a, b)", a=a, b=b)
    for op in ("Add", "Max", "Mean", "Min", "Mul", "Sum"):
        add(f"{op.lower()}_of_itself", f"y = {op} (x, x)", x=(3, 4))
    three = {"a": (3, 4), "b": (2, 1, 4), "c": (3, 1)}
    given: dict[str, Any] = {
        name: numbers(*shape, high=2 + seed / 7, seed=seed)
        for seed, (name, shape) in enumerate(three.items())
    }
    for op in ("Max", "Mean", "Min", "Sum"):
        add(f"{op.lower()}_of_three", f"y = {op} (a, b, c)", **given)
        add(f"{op.lower()}_of_one", f"y = {op} (x)", x=(3, 4))


def _pairs() -> None:
    positive = numbers(3, 4, low=0.5, signed=False)
    powers = floats("e", 0.0, 1.0, 2.5, -1.0)
    bases = floats("b", 0.0, 1.0, 2.5, 0.5)
    integer = "e = Constant <value = int32 {3}> ()"
    add("pow_of_negative_bases", "y = Pow (x, e)", x=(3, 4), constants={"e": 3.0})
    add("pow_with_an_integer", f"{integer} y = Pow (x, e)", x=(3, 4))
    add("pow_with_several", f"{powers} y = Pow (x, e)", x=positive)
    add("pow_of_a_constant", f"{bases} y = Pow (b, x)", x=positive)
    add(
        "mod",
        "y = Mod <fmod = 1> (a, b)",
        a=numbers(3, 4, low=1.15, high=5.35),
        b=np.array([0.7, -0.9, 1.1, 2.0], np.float32),
    )
    add("prelu", "y = PRelu (x, s)", x=(2, 3, 4), s=(3, 1))
    add("prelu_with_one_slope", "y = PRelu (x, s)", x=(2, 3, 4), s=(1,))
    other = numbers(3, 4, high=2.2, seed=1)
    add("where", "c = Greater (a, b) y = Where (c, a, b)", a=(3, 4), b=other)
    choice = ints("c", 1, 0, 1, shape=(3, 1)) + "d = Cast <to = 9> (c)"
    add("where_broadcast", f"{choice} y = Where (d, a, b)", a=(4,), b=(2, 1, 1))


# -- products -------------------------------------------------------------------------------


def _products() -> None:
    for name, a, b in (
        ("matmul", (3, 4), (4, 5)),
        ("matmul_of_stacks", (2, 1, 3, 4), (1, 3, 4, 2)),
        ("matmul_of_a_stack_and_a_matrix", (2, 3, 4), (4, 2)),
        ("matmul_of_a_matrix_and_a_stack", (3, 4), (2, 4, 2)),
        ("matmul_of_a_vector", (4,), (2, 4, 3)),
        ("matmul_by_a_vector", (2, 3, 4), (4,)),
        ("matmul_of_vectors", (4,), (4,)),
    ):
        add(name, "y = MatMul (a, b)", a=a, b=b)
    add("matmul_of_itself", "y = MatMul (x, x)", x=(3, 3))
    for name, how, a, b, c in (
        ("gemm", "", (3, 4), (4, 2), (2,)),
        ("gemm_left_transposed", "transA = 1, beta = 0.5", (4, 3), (4, 2), (3, 1)),
        ("gemm_right_transposed", "transB = 1, alpha = 2.0", (3, 4), (2, 4), (1, 2)),
        ("gemm_transposed", "transA = 1, transB = 1", (4, 3), (2, 4), ()),
        ("gemm_plus_a_matrix", "alpha = 0.3", (3, 4), (4, 2), (3, 2)),
    ):
        add(name, f"y = Gemm {attributes(how)} (a, b, c)", a=a, b=b, c=c)
    add("gemm_without_addend", "y = Gemm <alpha = 0.5> (a, b)", a=(3, 4), b=(4, 2))


def _einsums() -> None:
    equations: dict[str, Sequence[Shape]] = {
        "ij,jk->ik": ((2, 3), (3, 4)),
        "ii->i": ((3, 3),),
        "ii": ((3, 3),),
        "iij,ij->ji": ((3, 3, 2), (3, 2)),
        "...ij,...jk": ((2, 2, 3), (2, 3, 2)),
        "i...,...->...": ((2, 3), (3,)),
        "ij,jk,kl->il": ((2, 3), (3, 2), (2, 2)),
        "ba,c->abc": ((2, 3), (2,)),
    }
    for equation, shapes in equations.items():
        given: dict[str, Any] = dict(zip("abc", shapes, strict=False))
        text = f'y = Einsum <equation = "{equation}"> ({", ".join(given)})'
        add(f"einsum {equation}", text, **given)


# -- reductions -----------------------------------------------------------------------------


def _reductions() -> None:
    names = """
        ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
        ReduceProd ReduceSum ReduceSumSquare""".split()  # noqa: SIM905 - reads as a list
    for op in names:
        low, x = op.lower(), numbers(2, 3, 4, low=0.3, signed=op != "ReduceLogSum")
        flat, empty = "<keepdims = 0>", "<noop_with_empty_axes = 1>"
        add(f"{low}_of_all", f"y = {op} (x)", x=x)
        add(f"{low}_to_a_scalar", f"y = {op} {flat} (x)", x=x)
        add(low, f"y = {op} (x, i)", x=x, constants={"i": [1]})
        add(f"{low}_of_two_axes", f"y = {op} {flat} (x, i)", x=x, constants={"i": [-1, 0]})
        add(f"{low}_of_no_axes", f"y = {op} {empty} (x, i)", x=x, constants={"i": []})
    zeros = np.array([[0, 2, 3], [0, 0, 3], [1, 2, 3]], np.float32)
    add("reduceprod_with_zeros", "y = ReduceProd (x, i)", x=zeros, constants={"i": [1]})
    for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"):
        add(op.lower(), f"y = {op} (x)", x=(2, 3, 2, 2))
        add(f"{op.lower()}_of_a_line", f"y = {op} (x)", x=(2, 3, 4))
        add(f"{op.lower()}_of_a_volume", f"y = {op} (x)", x=(1, 2, 2, 2, 3))
    for power in (1, 3):
        add(f"globallppool_{power}", f"y = GlobalLpPool <p = {power}> (x)", x=(2, 3, 2, 2))
    for how in ("", "exclusive = 1", "reverse = 1", "exclusive = 1, reverse = 1"):
        text = ints("i", 1) + f"y = CumSum {attributes(how)} (x, i)"
        add(f"cumsum {how}", text, x=(2, 3, 4))
    add("det", "y = Det (x)", x=(2, 3, 3))
    add("det_of_one", "y = Det (x)", x=(3, 3))
    for op, axis in itertools.product(("Softmax", "LogSoftmax"), (0, 1, -1)):
        add(f"{op.lower()}_{axis}", f"y = {op} <axis = {axis}> (x)", x=(2, 3, 4))


# -- normalizations and losses --------------------------------------------------------------


def _normalizations() -> None:
    x = numbers(2, 3, 4)
    for name, how, size in (
        ("", "", (4,)),
        ("_of_two_axes", "axis = 1, epsilon = 0.1", (3, 4)),
        ("_of_all", "axis = -3", (2, 3, 4)),
    ):
        text = f"y = LayerNormalization {attributes(how)} (x, s, b)"
        add(f"layernormalization{name}", text, x=x, s=size, b=size)
    add("layernormalization_without_bias", "y = LayerNormalization (x, s)", x=x, s=(4,))
    add(
        "layernormalization_with_statistics",
        "a, m, v = LayerNormalization <axis = 1> (x, s, b) n = Add (a, m) y = Mul (n, v)",
        x=x,
        s=(3, 4),
        b=(3, 4),
    )
    add(
        "layernormalization_with_mean",
        "a, m = LayerNormalization (x, s) y = Mul (a, m)",
        x=x,
        s=(4,),
    )
    for name, text, shape in (
        ("", "InstanceNormalization <epsilon = 0.1>", (2, 3, 2, 3)),
        ("_of_a_line", "InstanceNormalization", (2, 3, 4)),
    ):
        add(f"instancenormalization{name}", f"y = {text} (x, s, b)", x=shape, s=(3,), b=(3,))
    for name, text, shape in (
        ("", "GroupNormalization <num_groups = 2>", (2, 4, 2, 2)),
        ("_of_one", "GroupNormalization <num_groups = 1, epsilon = 0.1>", (2, 4, 3)),
    ):
        add(f"groupnormalization{name}", f"y = {text} (x, s, b)", x=shape, s=(4,), b=(4,))
    for name, text, shape in (
        ("meanvariancenormalization", "MeanVarianceNormalization", (2, 3, 2, 2)),
        ("meanvariance_of_rows", "MeanVarianceNormalization <axes = [-1]>", (2, 3, 4)),
        ("lpnormalization", "LpNormalization", (2, 3, 4)),
        ("lpnormalization_1", "LpNormalization <axis = 1, p = 1>", (2, 3, 4)),
        ("lrn", "LRN <size = 3>", (2, 5, 2, 2)),
        ("lrn_strong", "LRN <size = 5, alpha = 0.9, beta = 0.6, bias = 1.5>", (2, 4, 1, 3)),
    ):
        add(name, f"y = {text} (x)", x=shape)


def _losses() -> None:
    labels, image = ints("t", 1, 0, 2, shape=(3,)), ints("t", 1, 0, 2, 0, 1, 1, shape=(2, 3))
    weights = floats("w", 0.5, 1.0, 2.0, 0.7)
    reductions = ('reduction = "sum"', 'reduction = "none"')
    for op in ("SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss"):
        for how in ("", *reductions, "ignore_index = 0"):
            text = f"{labels} y = {op} {attributes(how)} (x, t)"
            add(f"{op.lower()} {how}", text, x=(3, 4))
        add(f"{op.lower()}_weighted", f"{labels} {weights} y = {op} (x, t, w)", x=(3, 4))
        text = f"{image} y = {op} <ignore_index = 1> (x, t)"
        add(f"{op.lower()}_of_an_image", text, x=(2, 3, 3))
    add(
        "log_probabilities_of_a_loss",
        f"{labels} l, p = SoftmaxCrossEntropyLoss (x, t) y = Mul (l, p)",
        x=(3, 4),
    )


# -- moving elements ------------------------------------------------------------------------


def _shapes() -> None:
    x, one = (2, 3, 4), np.array(0.5, np.float32)
    add("concat", "y = Concat <axis = -1> (a, b)", a=(2, 3), b=(2, 1))
    add("concat_of_the_same", "y = Concat <axis = 0> (x, x, x)", x=(2, 3))
    add("expand", "y = Expand (x, s)", x=(3, 1), constants={"s": [2, 1, 4]})
    add("expand_a_scalar", "y = Expand (x, s)", x=one, constants={"s": [2, 4]})
    add("flatten", "y = Flatten <axis = 2> (x)", x=x)
    add("reshape", "y = Reshape (x, s)", x=x, constants={"s": [0, -1]})
    add("reshape_like_another", "s = Shape (b) y = Reshape (a, s)", a=(2, 6), b=(3, 4))
    add("squeeze", "y = Squeeze (x)", x=(1, 3, 1), known="x")
    add("squeeze_an_axis", "y = Squeeze (x, i)", x=(1, 3, 1), constants={"i": [-1]})
    add("unsqueeze", "y = Unsqueeze (x, i)", x=(3, 2), constants={"i": [0, -1]})
    add("transpose", "y = Transpose <perm = [2, 0, 1]> (x)", x=x)
    add("transpose_by_default", "y = Transpose (x)", x=x)
    add("tile", "y = Tile (x, r)", x=(3, 2), constants={"r": [2, 3]})
    for mode in ("DCR", "CRD"):
        how = f'blocksize = 2, mode = "{mode}"'
        add(f"depthtospace_{mode}", f"y = DepthToSpace <{how}> (x)", x=(2, 8, 2, 3))
    add("spacetodepth", "y = SpaceToDepth <blocksize = 2> (x)", x=(2, 3, 4, 2))


def _selections() -> None:
    x, high = (3, 4), (2, 3, 4)
    for axis in (0, 1):
        text = f"y = Gather <axis = {axis}> (x, i)"
        add(f"gather_{axis}", text, x=x, constants={"i": [0, -1, 1, 1]})
    add("gather_one", ints("i", -1) + "y = Gather <axis = 1> (x, i)", x=x)
    places = "i = ArgMax <axis = 0, keepdims = 0> (x)"
    add("gather_at_computed_places", f"{places} y = Gather (x, i)", x=x)
    places = ints("i", 0, -2, 1, 1, 1, -3, 0, 2, shape=(2, 4))
    add("gatherelements", f"{places} y = GatherElements (x, i)", x=x)
    places = ints("i", 0, -2, 1, 1, 1, -3, shape=(3, 2))
    add("gatherelements_of_rows", f"{places} y = GatherElements <axis = 1> (x, i)", x=x)
    places = ints("i", 0, -1, -1, 2, 1, 2, shape=(3, 2))
    add("gathernd", f"{places} y = GatherND (x, i)", x=high)
    places = ints("i", 1, 1, 2, 0, shape=(2, 2, 1))
    add("gathernd_in_batches", f"{places} y = GatherND <batch_dims = 1> (x, i)", x=high)
    add("topk", "y, i = TopK (x, k)", x=x, constants={"k": [2]})
    least = "y, i = TopK <axis = 0, largest = 0> (x, k)"
    add("topk_least", least, x=x, constants={"k": [2]})
    both = "v, i = TopK (x, k) j = Cast <to = 1> (i) y = Mul (v, j)"
    add("topk_with_places", both, x=x, constants={"k": [2]})
    add("trilu", "y = Trilu (x)", x=(2, 3, 3))
    add("trilu_lower", ints("k", -1) + "y = Trilu <upper = 0> (x, k)", x=high)
    rows = ints("b", 1, 0, 1, shape=(3,)) + "c = Cast <to = 9> (b)"
    add("compress", f"{rows} y = Compress <axis = 0> (x, c)", x=x)
    elements = ints("b", 1, 0, 1, 1, 0, shape=(5,)) + "c = Cast <to = 9> (b)"
    add("compress_flat", f"{elements} y = Compress (x, c)", x=x)
    add("unique", "y, i, j, k = Unique (x)", x=(2, 3))
    rows_of = np.array([[1, 2], [3, 4], [1.5, 2]], np.float32)
    add("unique_rows", "y, i = Unique <axis = 0> (x)", x=rows_of)
    places = ints("i", 0, 2, -1, shape=(3,)) + ints("d", 4)
    add("onehot", f"{places} y = OneHot <axis = 0> (i, d, x)", x=(2,))
    start, step = np.array(0.2, np.float32), np.array(0.7, np.float32)
    end = "n = Constant <value = float {3.1}> ()"
    add("range", f"{end} y = Range (a, n, b)", a=start, b=step)


def _scatters() -> None:
    updates = numbers(3, 4, high=2.2, seed=3)
    few = numbers(2, 3, high=2.2, seed=4)
    for reduction in ("none", "add", "mul", "max", "min"):
        once = reduction == "none"
        how = f'reduction = "{reduction}"'
        places = (
            ints("i", 0, 2, 1, shape=(3, 1)) if once else ints("i", 0, -1, 0, shape=(3, 1))
        )
        text = f"{places} y = ScatterND <{how}> (x, i, u)"
        add(f"scatternd_{reduction}", text, x=(3, 4), u=updates)
        last = (0, 2) if once else (1, 1)
        places = ints("i", 0, 3, 2, 1, *last, shape=(2, 3))
        text = f"{places} y = ScatterElements <axis = 1, {how}> (x, i, u)"
        add(f"scatterelements_{reduction}", text, x=(3, 4), u=few)
    places = ints("i", 0, 0, 1, 1, shape=(1, 4))
    add(
        "scatterelements_mul_with_zeros",
        f'{places} y = ScatterElements <axis = 1, reduction = "mul"> (x, i, u)',
        x=np.array([[2, 0, 3, 4]], np.float32),
        u=np.array([[0, 3, 0, 5]], np.float32),
    )


def _slices() -> None:
    far = 1 << 60
    cases: dict[str, tuple[str, dict[str, Sequence[int]]]] = {
        "": ("s, e", {"s": [1, 0], "e": [3, 2]}),
        "_of_an_axis": ("s, e, a", {"s": [-3], "e": [-1], "a": [-1]}),
        "_in_steps": ("s, e, a, t", {"s": [0], "e": [far], "a": [1], "t": [2]}),
        "_backwards": ("s, e, a, t", {"s": [3], "e": [-9], "a": [1], "t": [-1]}),
        "_backwards_in_steps": (
            "s, e, a, t",
            {"s": [-1, 2], "e": [-far, -4], "a": [1, 0], "t": [-2, -1]},
        ),
        "_turned_around": (
            "s, e, a, t",
            {"s": [-1, -1], "e": [-far, -far], "a": [1, 0], "t": [-1, -1]},
        ),
    }
    for name, (arguments, constants) in cases.items():
        add(f"slice{name}", f"y = Slice (x, {arguments})", x=(3, 4), constants=constants)
    add(
        "slice_in_computed_steps",
        "b = Shape (x) o = Slice (b, z, t) n = Neg (o) y = Slice (x, f, e, z, n)",
        x=(2, 3),
        constants={"z": [0], "t": [1], "f": [-1], "e": [-9]},
    )


def _pads() -> None:
    pads = {"p": [1, 0, 1, 2]}
    for mode in ("constant", "reflect", "edge", "wrap"):
        how = f'mode = "{mode}"'
        add(f"pad_{mode}", f"y = Pad <{how}> (x, p)", x=(3, 4), constants=pads)
        of_axis = {"p": [1, 2], "a": [-1]}
        add(f"pad_{mode}_an_axis", f"y = Pad <{how}> (x, p, , a)", x=(3, 4), constants=of_axis)
    add("pad_with_a_number", "y = Pad (x, p, v)", x=(3, 4), constants={**pads, "v": 3.0})
    add("pad_cropping", "y = Pad (x, p)", x=(3, 4), constants={"p": [-1, 0, 1, -2]})
    number = "v = ReduceMax <keepdims = 0> (x)"
    crop = {"p": [1, 0, -1, 2]}
    add("pad_with_a_computed_number", f"{number} y = Pad (x, p, v)", x=(3, 4), constants=crop)
    add(
        "pad_an_axis_with_a_computed_number",
        "y = Pad (x, p, v, a)",
        x=(3, 4),
        v=np.array(0.7, np.float32),
        constants={"p": [1, 2], "a": [1]},
    )
    add("centercroppad", "y = CenterCropPad (x, s)", x=(3, 4), constants={"s": [2, 7]})
    along = "y = CenterCropPad <axes = [1]> (x, s)"
    add("centercroppad_an_axis", along, x=(3, 4), constants={"s": [2]})
    for name, axes, shape, lengths in (
        ("", "batch_axis = 1, time_axis = 0", (4, 3), [4, 1, 3]),
        ("_of_rows", "batch_axis = 0, time_axis = 1", (2, 3, 2), [2, 3]),
    ):
        text = f"y = ReverseSequence <{axes}> (x, l)"
        add(f"reversesequence{name}", text, x=shape, constants={"l": lengths})


def _splits() -> None:
    for name, text, shape in (
        (
            "",
            "p, q = Split <axis = 1> (x, s) r = Exp (q) y = Concat <axis = 1> (p, r)",
            (3, 4),
        ),
        ("_evenly", "p, q = Split <axis = 1, num_outputs = 2> (x) y = Mul (p, q)", (3, 4)),
        (
            "_unevenly",
            "p, q, r = Split <axis = 1, num_outputs = 3> (x) y = Concat <axis = 1> (r, q, p)",
            (3, 5),
        ),
        (
            "_with_unread_parts",
            "p, q, r = Split <axis = -1, num_outputs = 3> (x) y = Exp (q)",
            (3, 5),
        ),
        (
            "_with_a_part_read_in_vain",
            "p, q = Split <num_outputs = 2> (x) r = Ceil (p) y = Add (r, q)",
            (4, 3),
        ),
    ):
        constants = {"s": [1, 3]} if "x, s" in text else {}
        add(f"split{name}", text, x=shape, constants=constants)


# -- windows --------------------------------------------------------------------------------


def _convolutions() -> None:
    cases: dict[str, tuple[str, str, dict[str, Any]]] = {
        "": ("Conv", "", {"x": (2, 2, 4, 4), "w": (3, 2, 3, 3), "b": (3,)}),
        "_strided": (
            "Conv",
            "pads = [1, 0, 2, 1], strides = [2, 1]",
            {"x": (1, 2, 5, 4), "w": (3, 2, 3, 2)},
        ),
        "_dilated_in_groups": (
            "Conv",
            "group = 2, dilations = [2, 1], pads = [1, 0, 1, 1]",
            {"x": (1, 4, 5, 4), "w": (6, 2, 2, 3), "b": (6,)},
        ),
        "_depthwise": (
            "Conv",
            "group = 3, pads = [1, 1, 1, 1]",
            {"x": (2, 3, 4, 4), "w": (3, 1, 3, 3)},
        ),
        "_depthwise_twice": (
            "Conv",
            "group = 3, strides = [2, 2]",
            {"x": (2, 3, 5, 5), "w": (6, 1, 3, 3)},
        ),
        "_of_a_line": (
            "Conv",
            "pads = [1, 2], strides = [2], dilations = [2]",
            {"x": (2, 3, 8), "w": (2, 3, 3), "b": (2,)},
        ),
        "_of_a_volume": (
            "Conv",
            "pads = [1, 0, 1, 1, 1, 0], strides = [1, 2, 1]",
            {"x": (1, 2, 3, 4, 3), "w": (2, 2, 2, 2, 2), "b": (2,)},
        ),
        "_to_the_same": (
            "Conv",
            'auto_pad = "SAME_UPPER", strides = [2, 1]',
            {"x": (1, 2, 4, 5), "w": (2, 2, 3, 2), "b": (2,)},
        ),
        "_to_the_same_below": (
            "Conv",
            'auto_pad = "SAME_LOWER", strides = [2, 3]',
            {"x": (1, 2, 5, 4), "w": (2, 2, 2, 3)},
        ),
        "_valid": ("Conv", 'auto_pad = "VALID"', {"x": (1, 2, 4, 5), "w": (2, 2, 3, 2)}),
        "_up": ("ConvTranspose", "", {"x": (2, 2, 3, 3), "w": (2, 3, 3, 2), "b": (3,)}),
        "_up_strided": (
            "ConvTranspose",
            "strides = [2, 3], pads = [1, 0, 0, 1], output_padding = [1, 2]",
            {"x": (1, 2, 3, 2), "w": (2, 2, 3, 3)},
        ),
        "_up_dilated_in_groups": (
            "ConvTranspose",
            "group = 2, dilations = [2, 1], pads = [1, 1, 1, 0]",
            {"x": (1, 4, 3, 3), "w": (4, 2, 2, 3), "b": (4,)},
        ),
        "_up_depthwise": (
            "ConvTranspose",
            "group = 3, strides = [2, 2]",
            {"x": (1, 3, 2, 3), "w": (3, 1, 3, 3)},
        ),
        "_up_a_line": (
            "ConvTranspose",
            "strides = [2], pads = [0, 1]",
            {"x": (2, 3, 4), "w": (3, 2, 3), "b": (2,)},
        ),
        "_up_a_volume": (
            "ConvTranspose",
            "strides = [1, 2, 1]",
            {"x": (1, 2, 2, 2, 2), "w": (2, 2, 2, 2, 2)},
        ),
        "_up_to_the_same": (
            "ConvTranspose",
            'auto_pad = "SAME_UPPER", strides = [2, 1]',
            {"x": (1, 2, 2, 3), "w": (2, 2, 3, 2)},
        ),
        "_up_to_the_same_below": (
            "ConvTranspose",
            'auto_pad = "SAME_LOWER", strides = [2, 1]',
            {"x": (1, 2, 2, 3), "w": (2, 2, 3, 4)},
        ),
        "_up_valid": (
            "ConvTranspose",
            'auto_pad = "VALID"',
            {"x": (1, 2, 2, 3), "w": (2, 2, 3, 2)},
        ),
        "_up_to_a_known_shape": (
            "ConvTranspose",
            "output_shape = [5, 4], strides = [2, 2]",
            {"x": (1, 2, 3, 2), "w": (2, 2, 3, 3)},
        ),
        "_up_to_a_known_shape_upper": (
            "ConvTranspose",
            'output_shape = [4, 4], strides = [2, 2], auto_pad = "SAME_UPPER"',
            {"x": (1, 2, 2, 2), "w": (2, 2, 3, 3)},
        ),
    }
    for name, (op, how, shapes) in cases.items():
        text = f"y = {op} {attributes(how)} ({', '.join(shapes)})"
        known = "x w b" if "known" in name else "w b"
        add(f"conv{name}", text, known=known, **shapes)


def _pools() -> None:
    image = (1, 2, 5, 6)
    for name, how, shape in (
        ("", "kernel_shape = [2, 2]", image),
        (
            "_padded",
            "kernel_shape = [3, 2], pads = [0, 1, 2, 0], strides = [2, 1]",
            image,
        ),
        ("_ceil", "kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1", image),
        ("_dilated", "kernel_shape = [2, 2], dilations = [2, 1], pads = [1, 0, 1, 0]", image),
        (
            "_dilated_ceil",
            "kernel_shape = [2, 2], dilations = [2, 2], strides = [2, 2], ceil_mode = 1",
            image,
        ),
        ("_of_a_line", "kernel_shape = [3], strides = [2], pads = [1, 1]", (2, 2, 8)),
        (
            "_of_a_volume",
            "kernel_shape = [2, 2, 2], strides = [1, 2, 1], pads = [0, 1, 0, 1, 0, 0]",
            (1, 1, 3, 4, 3),
        ),
        (
            "_to_the_same",
            'kernel_shape = [3, 2], strides = [2, 2], auto_pad = "SAME_UPPER"',
            image,
        ),
        (
            "_to_the_same_below",
            'kernel_shape = [3, 2], strides = [2, 2], auto_pad = "SAME_LOWER"',
            image,
        ),
        ("_valid", 'kernel_shape = [3, 2], auto_pad = "VALID"', image),
    ):
        for op, more in (
            ("MaxPool", ""),
            ("LpPool", ""),
            ("AveragePool", ""),
            ("AveragePool", ", count_include_pad = 1"),
        ):
            text = f"y = {op} <{how}{more}> (x)"
            add(f"{op.lower()}{name}{'_counting' if more else ''}", text, x=shape)


def _more_windows() -> None:
    image, two, four = (1, 2, 5, 6), "kernel_shape = [2, 2]", (1, 2, 4, 4)
    for power in (1, 3):
        add(f"lppool_{power}", f"y = LpPool <{two}, p = {power}> (x)", x=image)
    by_columns = f"MaxPool <{two}, storage_order = 1> (x)"
    add("maxpool_by_columns", f"y = {by_columns}", x=image)
    read = f"a, i = {by_columns} j = Cast <to = 1> (i) y = Mul (a, j)"
    add("maxpool_with_places_by_columns", read, x=image)
    apart = f"{two}, strides = [2, 2]"
    pooled = f"p, i = MaxPool <{apart}> (x)"
    add("maxunpool", f"{pooled} y = MaxUnpool <{apart}> (p, i)", x=four)
    add(
        "maxunpool_to_a_shape",
        f"{pooled} y = MaxUnpool <{apart}> (p, i, s)",
        x=four,
        constants={"s": [1, 2, 5, 5]},
    )
    add(
        "col2im",
        "y = Col2Im <pads = [0, 1, 0, 1], strides = [1, 2]> (x, i, k)",
        x=(2, 4, 9),
        constants={"i": [3, 5], "k": [1, 2]},
    )
    add(
        "col2im_dilated",
        "y = Col2Im <dilations = [2, 1]> (x, i, k)",
        x=(1, 8, 6),
        constants={"i": [4, 4], "k": [2, 2]},
    )


# -- sampling -------------------------------------------------------------------------------


def _resizes() -> None:
    modes = {
        "nearest": 'mode = "nearest"',
        "nearest_floor": (
            'nearest_mode = "floor", coordinate_transformation_mode = "asymmetric"'
        ),
        "nearest_corners": 'coordinate_transformation_mode = "align_corners"',
        "nearest_ceil": 'nearest_mode = "ceil"',
        "linear": 'mode = "linear"',
        "linear_corners": (
            'mode = "linear", coordinate_transformation_mode = "align_corners"'
        ),
        "linear_pytorch": (
            'mode = "linear", coordinate_transformation_mode = "pytorch_half_pixel"'
        ),
        "linear_symmetric": (
            'mode = "linear", coordinate_transformation_mode = "half_pixel_symmetric"'
        ),
        "linear_antialias": 'mode = "linear", antialias = 1',
        "cubic": 'mode = "cubic", cubic_coeff_a = -0.5',
        "cubic_inside": (
            'mode = "cubic", exclude_outside = 1,'
            ' coordinate_transformation_mode = "asymmetric"'
        ),
    }
    for name, how in modes.items():
        for way, arguments, constant in (
            ("twice", "x, , f", floats("f", 1.0, 1.0, 2.0, 2.0)),
            ("by_scales", "x, , f", floats("f", 1.0, 1.0, 1.4, 0.6)),
            ("to_sizes", "x, , , f", ints("f", 1, 2, 7, 3, shape=(4,))),
        ):
            text = f"{constant} y = Resize <{how}> ({arguments})"
            add(f"resize_{name}_{way}", text, x=(1, 2, 3, 4))
    linear, x = 'mode = "linear"', (2, 2, 3, 4)
    sizes = ints("f", 5, 7, shape=(2,))
    add("resize_axes", f"{sizes} y = Resize <{linear}, axes = [2, 3]> (x, , , f)", x=x)
    scales = floats("f", 1.7, 2.0)
    add(
        "resize_axes_by_scales", f"{scales} y = Resize <{linear}, axes = [3, 2]> (x, , f)", x=x
    )
    for name, shape, factors, how in (
        ("a_matrix", (3, 4), (1.7, 0.7), linear),
        ("every_axis", (2, 3, 2), (2.0, 1.5, 2.0), ""),
        ("a_volume", (1, 2, 2, 3, 2), (1.0, 1.0, 2.0, 1.5, 1.0), linear),
        ("a_volume_to_the_nearest", (1, 2, 2, 3, 2), (1.0, 1.0, 2.0, 3.0, 1.0), ""),
        ("a_line", (1, 2, 4), (1.0, 1.0, 3.0), ""),
    ):
        text = f"{floats('f', *factors)} y = Resize {attributes(how)} (x, , f)"
        add(f"resize_{name}", text, x=shape)
    region = floats("r", 0.0, 0.0, 0.2, 0.1, 1.0, 1.0, 0.9, 1.3)
    sizes = ints("f", 1, 2, 3, 4, shape=(4,))
    how = (
        'mode = "linear", coordinate_transformation_mode = "tf_crop_and_resize",'
        " extrapolation_value = 2.0"
    )
    add("resize_a_crop", f"{region} {sizes} y = Resize <{how}> (x, r, , f)", x=(1, 2, 3, 4))
    computed = f"s = Shape (b) y = Resize <{linear}> (a, , , s)"
    add("resize_to_a_computed_size", computed, a=(1, 2, 3, 3), b=(1, 2, 5, 4))


def _grids() -> None:
    # Far enough from the pixels and from the middles between them.
    points = [0.1, -0.7, 1.2, 0.3, -1.3, 0.9, -0.4, 1.1, 0.55, -0.9, -0.2, 0.65]
    grid = np.array(points, np.float32).reshape(1, 3, 2, 2)
    for mode, padding, align in itertools.product(
        ("linear", "nearest", "cubic"), ("zeros", "border", "reflection"), (0, 1)
    ):
        how = f'mode = "{mode}", padding_mode = "{padding}", align_corners = {align}'
        name = f"gridsample_{mode}_{padding}{'_aligned' if align else ''}"
        add(name, f"y = GridSample <{how}> (x, g)", x=(1, 2, 3, 4), g=grid)
    volume = numbers(1, 1, 2, 2, 3, low=0.07, high=0.93, seed=1)
    add("gridsample_of_a_volume", "y = GridSample (x, g)", x=(1, 2, 2, 3, 2), g=volume)
    far = numbers(1, 3, 2, 2, low=2.05, high=5.3, seed=1)
    reflected = 'y = GridSample <padding_mode = "reflection"> (x, g)'
    add("gridsample_far_outside", reflected, x=(1, 1, 3, 4), g=far)
    for align in (0, 1):
        text = f"y = AffineGrid <align_corners = {align}> (x, s)"
        sizes = {"s": [2, 1, 3, 2]}
        add(f"affinegrid_{align}", text, x=(2, 2, 3), constants=sizes, known="x")
    sizes = {"s": [1, 1, 2, 3, 2]}
    text = "y = AffineGrid (x, s)"
    add("affinegrid_of_a_volume", text, x=(1, 3, 4), constants=sizes, known="x")


def _regions() -> None:
    corners = (0.3, 0.4, 3.1, 2.7, 1.0, 0.0, 2.5, 3.0, 0.0, 0.0, 1.0, 1.0)
    regions = floats("r", *corners, shape=(3, 4)) + ints("b", 0, 1, 0, shape=(3,))
    for name, how in {
        "": "output_height = 2, output_width = 2",
        "_in_samples": (
            "output_height = 2, output_width = 1, sampling_ratio = 2, spatial_scale = 0.8"
        ),
        "_between_pixels": (
            "output_height = 1, output_width = 2,"
            ' coordinate_transformation_mode = "output_half_pixel"'
        ),
    }.items():
        add(f"roialign{name}", f"{regions} y = RoiAlign <{how}> (x, r, b)", x=(2, 2, 4, 4))
    regions = floats("r", 0, 0, 0, 3, 2, 1, 1, 1, 3, 3, shape=(2, 5))
    text = f"{regions} y = MaxRoiPool <pooled_shape = [2, 2]> (x, r)"
    add("maxroipool", text, x=(2, 2, 4, 4))


# -- signals --------------------------------------------------------------------------------


def _signals() -> None:
    for name, text, shape in (
        ("", "y = DFT (x)", (2, 5, 1)),
        ("_complex", "y = DFT (x)", (2, 4, 2)),
        ("_inverse", "y = DFT <inverse = 1> (x)", (2, 5, 2)),
        ("_onesided", "y = DFT <onesided = 1> (x)", (2, 5, 1)),
        ("_onesided_even", "y = DFT <onesided = 1> (x)", (2, 4, 1)),
        ("_longer", ints("l", 7) + "y = DFT (x, l)", (2, 4, 1)),
        ("_shorter", ints("l", 3) + "y = DFT <inverse = 1> (x, l)", (2, 4, 2)),
        ("_of_columns", ints("a", 1) + "y = DFT (x, , a)", (2, 3, 4, 1)),
    ):
        add(f"dft{name}", text, x=shape, known="x")
    steps, size = ints("s", 2), ints("l", 4)
    add("stft", f"{steps} {size} y = STFT <onesided = 1> (x, s, , l)", x=(2, 9, 1), known="x")
    add(
        "stft_windowed",
        f"{steps} y = STFT <onesided = 1> (x, s, w)",
        x=(2, 10, 1),
        w=(4,),
        known="x w",
    )
    both = f"{steps} {size} y = STFT <onesided = 0> (x, s, w, l)"
    add("stft_twosided", both, x=(1, 8, 1), w=(4,), known="x w")


# -- recurrent cells ------------------------------------------------------------------------

_GATES = {"GRU": 3, "LSTM": 4}
_HIDDEN = 2


def _operands(
    op_type: str, *, directions: int = 1, states: bool = False, bias: bool = True
) -> dict[str, Any]:
    time, batch, size, gates = 3, 2, 2, _GATES[op_type]
    found = {
        "x": numbers(time, batch, size),
        "w": numbers(directions, gates * _HIDDEN, size, high=0.8, seed=1),
        "r": numbers(directions, gates * _HIDDEN, _HIDDEN, high=0.8, seed=2),
    }
    if bias:
        found["b"] = numbers(directions, 2 * gates * _HIDDEN, high=0.5, seed=3)
    for seed, name in enumerate("hc"):
        if states and (name == "h" or op_type == "LSTM"):
            found[name] = numbers(directions, batch, _HIDDEN, seed=seed)
    return found


def _cells() -> None:
    given, size = {"GRU": "h", "LSTM": "h, c"}, f"hidden_size = {_HIDDEN}"
    results = {"GRU": "a, h1", "LSTM": "a, h1, c1"}
    flat = "f = Flatten <axis = 0> (a) g = Flatten <axis = 0> (h1)"
    both = f"{flat} y = Concat <axis = 1> (f, g)"
    ends = "l = Constant <value = int32[2] {3, 1}> ()"
    for op in _GATES:
        low, states = op.lower(), given[op]
        for direction, count in (("forward", 1), ("reverse", 1), ("bidirectional", 2)):
            how = f'{size}, direction = "{direction}"'
            values = _operands(op, directions=count, states=True)
            text = f"{results[op]} = {op} <{how}> (x, w, r, b, , {states}) {both}"
            add(f"{low}_{direction}", text, known="w r b", **values)
            text = f"{ends} a, h1 = {op} <{how}> (x, w, r, b, l, {states}) {both}"
            add(f"{low}_{direction}_with_ends", text, known="w r b", **values)
        alone = _operands(op, bias=False)
        add(f"{low}_alone", f"y = {op} <{size}> (x, w, r)", known="w r", **alone)
        text = f", y = {op} <{size}> (x, w, r, b)"
        add(f"{low}_end", text, known="w r b", **_operands(op))
    text = f", , y = LSTM <{size}> (x, w, r, b)"
    add("lstm_cell_state", text, known="w r b", **_operands("LSTM"))
    text = f"y = GRU <{size}, linear_before_reset = 1> (x, w, r, b)"
    add("gru_linear_before_reset", text, known="w r b", **_operands("GRU"))


for _group in (
    *(_functions, _bounds, _broadcasting, _pairs, _products, _einsums, _reductions),
    *(_normalizations, _losses, _shapes, _selections, _scatters, _slices, _pads, _splits),
    *(_convolutions, _pools, _more_windows, _resizes, _grids, _regions, _signals, _cells),
):
    _group()
