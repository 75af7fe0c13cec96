"""What is never negative, beside the cases of ``test_find_layers``."""

from dataclasses import replace

import pytest

from onnx_fliqs.find_layers import find_layers
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.signs import mark_unsigned, positive_sites
from onnx_fliqs.targets import TARGETS
from support import PRECISIONS, model

TEXT = """g (float[N,2,4,4] x, float[N,2,4,4] z) => (float[N,4,4,4] y) {{
    {text}
    t = Concat <axis = 1> (a, z)
    [conv] y = Conv (t, w) }}"""
ALWAYS = ["a = Mul (x, x)", "a = Mul (z, z)", "e = Exp (x) a = Mul (e, e)"]
OF_A_POSITIVE_INPUT = [
    "a = Identity (x)",
    "a = AveragePool <kernel_shape = [1, 1]> (x)",
    "f = Transpose (x) g = Transpose (f) a = Add (g, x)",
]
NEVER = ["a = Neg (x)", "a = Mul (x, z)", "a = Tanh (x)", "a = Sub (x, x)"]


def unsigned(text: str, *inputs: str) -> bool:
    built = model(TEXT.format(text=text), weights={"w": (4, 4, 1, 1)})
    plain = canonicalise(built)
    space = find_layers(plain, TARGETS["generic"], [PRECISIONS["int8"]])
    (site,) = [s for s in mark_unsigned(plain, space, inputs).sites if not s.is_weight]
    return site.negative == 0


@pytest.mark.parametrize("text", ALWAYS)
def test_some_values_are_never_negative(text: str) -> None:
    assert unsigned(text, "z")
    assert not unsigned(text)


@pytest.mark.parametrize("text", OF_A_POSITIVE_INPUT)
def test_others_are_not_if_an_input_is_not(text: str) -> None:
    assert unsigned(text, "x", "z")
    assert not unsigned(text, "z")
    assert not unsigned(text, "x")


@pytest.mark.parametrize("text", NEVER)
def test_others_may_be_negative_whatever_the_inputs_are(text: str) -> None:
    assert not unsigned(text, "z")
    assert (text == "a = Mul (x, z)") == unsigned(text, "x", "z")


def test_a_long_chain_of_squares_takes_no_time() -> None:
    # Each doubles the paths to the first.
    steps = "".join(f"v{i + 1} = Mul (v{i}, v{i})\n" for i in range(200))
    assert unsigned(f"v0 = Sigmoid (x)\n{steps} a = Mul (v200, v200)", "z")


def test_sites_of_one_scale_are_all_unsigned_or_none() -> None:
    plain = canonicalise(
        model(
            """g (float[N,2,4,4] x) => (float[N,2,4,4] y, float[N,2,4,4] z) {
                [c1] a = Conv (x, w1)
                [c0] b = Conv (x, w1)
                r = Relu (b)
                p = MaxPool <kernel_shape = [1, 1]> (x)
                t = Concat <axis = 1> (a, p)
                u = Concat <axis = 1> (r, p)
                [c2] y = Conv (t, w2)
                [c3] z = Conv (u, w2) }""",
            weights={"w1": (2, 2, 1, 1), "w2": (2, 4, 1, 1)},
        )
    )
    space = find_layers(plain, TARGETS["ort-cpu"], [PRECISIONS["int8"]])
    # x and p share their scale with a, which may be negative whatever x is.
    for inputs, unsigned in (((), {"r"}), (("x",), {"r", "u"})):
        marked = mark_unsigned(plain, space, inputs)
        signs = {s.tensor: s.negative == 0 for s in marked.sites if not s.is_weight}
        assert signs == {t: t in unsigned for t in ("x", "a", "r", "p", "t", "u", "y", "z")}


def test_what_was_not_negative_in_a_sample_may_be_so_later() -> None:
    built = model(
        """g (float[N,4] x) => (float[N,4] y) {
            [a] h = MatMul (x, w)
            r = Relu (h)
            [b] y = MatMul (r, v) }""",
        weights={"w": (4, 4), "v": (4, 4)},
    )
    plain = canonicalise(built)
    space = find_layers(plain, TARGETS["generic"], [PRECISIONS["e4m3"]])
    space = replace(space, sites=tuple(replace(site, negative=0.0) for site in space.sites))
    assert {space.site[name].tensor for name in positive_sites(plain, space)} == {"r"}
