"""Sites stand where the search space says, and change nothing until formats are fed."""

import numpy as np
import onnx_ir as ir
import pytest

from onnx_fliqs.find_layers import find_layers
from onnx_fliqs.passes.canonicalise import canonicalise
from onnx_fliqs.passes.insert_search_sites import (
    CODES,
    SCALES,
    SITE_KEY,
    InsertSearchSitesPass,
)
from onnx_fliqs.passes.specialise_sites import SpecialiseSitesPass
from onnx_fliqs.precision import parse_space
from onnx_fliqs.signs import positive_sites
from onnx_fliqs.site_functions import (
    ANY_SITE,
    BYTE_SITE,
    DOMAIN,
    INTEGER_SITE,
    POSITIVE_SITE,
)
from onnx_fliqs.sites import SearchSpace
from onnx_fliqs.targets import TARGETS
from pass_models import LAYERED
from support import calibrated, calibrated_case, check_pass, on_targets, ops, random_feeds, run

CASES = pytest.mark.parametrize("case", LAYERED)
ON_TARGETS = pytest.mark.parametrize(("case", "target"), on_targets(LAYERED))


def found(case: str, target: str, formats: str | None = None) -> tuple[ir.Model, SearchSpace]:
    canonical = canonicalise(LAYERED[case].build())
    if formats is None:
        formats = "int8,float32" if target == "generic" else TARGETS[target].default_space
    return canonical, find_layers(canonical, TARGETS[target], parse_space(formats))


def site_nodes(model: ir.Model) -> dict[str, ir.Node]:
    return {
        node.metadata_props[SITE_KEY]: node
        for node in model.graph.all_nodes()
        if SITE_KEY in node.metadata_props
    }


@CASES
def test_a_layered_model_becomes_canonical(case: str) -> None:
    assert ops(canonicalise(LAYERED[case].build())) == list(LAYERED[case].ops)


@ON_TARGETS
def test_the_pass_keeps_its_contract(case: str, target: str) -> None:
    canonical, space = found(case, target)
    check_pass(InsertSearchSitesPass(space), canonical)


@CASES
def test_the_pass_keeps_its_contract_with_sites_that_round_to_a_mantissa(case: str) -> None:
    canonical, space = found(case, "generic", "e4m3,float32")
    # NumPy, too, adds up the products of a column in an order of its own.
    check_pass(InsertSearchSitesPass(space), canonical, rtol=1e-6 if case == "matmuls" else 0)


@ON_TARGETS
def test_at_float32_not_a_bit_of_the_outputs_changes(case: str, target: str) -> None:
    prepared = calibrated_case(case, target)
    # ONNX Runtime adds up the products of a constant column in another order than those of a
    # computed one.
    rtol = 1e-6 if case == "matmuls" else 0
    for seed in (0, 1):
        feeds = random_feeds(prepared.canonical, seed)
        expected, actual = run(prepared.canonical, feeds), run(prepared.searchable(), feeds)
        for want, got in zip(expected, actual, strict=True):
            np.testing.assert_allclose(got, want, rtol=rtol, atol=0)


@ON_TARGETS
def test_exactly_the_named_uses_read_a_site(case: str, target: str) -> None:
    canonical, space = found(case, target)
    InsertSearchSitesPass(space)(canonical)
    nodes = {str(node.name): node for node in canonical.graph.all_nodes()}
    sites = site_nodes(canonical)
    assert set(sites) == set(space.site)
    for site in space.sites:
        tensor = sites[site.name].inputs[0]
        assert tensor is not None
        result = sites[site.name].outputs[0]
        if site.after is not None:
            assert tensor is sites[site.after].outputs[0]
        elif site.is_output:
            assert (tensor.name, result.name) == (f"{site.tensor}@float", site.tensor)
        else:
            assert tensor.name == site.tensor
        assert result.is_graph_output() is site.is_output
        behind = {other.name for other in space.sites if other.after == site.name}
        reads = {(str(user.name), i) for user, i in result.uses()}
        assert reads == {*site.consumers, *((f"{name}.site", 0) for name in behind)}
        for name, index in site.consumers:
            assert nodes[name].inputs[index] is sites[site.name].outputs[0]


@ON_TARGETS
def test_other_formats_change_the_outputs(case: str, target: str) -> None:
    prepared = calibrated_case(case, target)
    feeds = random_feeds(prepared.canonical, 1)
    chosen = prepared.eight_bits()
    plain, quantized = run(prepared.canonical, feeds), run(prepared.searchable(chosen), feeds)
    changed = [not np.array_equal(a, b) for a, b in zip(plain, quantized, strict=True)]
    assert any(changed)
    for want, got in zip(plain, quantized, strict=True):
        # 8 bits are near the float model: half a step is 1/255 of a tensor's range, or up to
        # twice as much where it is a power of two.
        # Where every tensor is quantized, more such steps add up.
        coarse = prepared.space.power_of_two_scales or any(
            site.is_output for site in prepared.space.sites
        )
        share = 0.1 if coarse else 0.05
        np.testing.assert_allclose(got, want, atol=share * np.abs(want).max())


@pytest.mark.parametrize(
    ("formats", "function"), [("int8", INTEGER_SITE), ("e2m1,int8", ANY_SITE)]
)
def test_integers_do_with_the_shorter_function(formats: str, function: str) -> None:
    canonical, space = found("conv_relu_conv", "generic", formats)
    InsertSearchSitesPass(space)(canonical)
    assert {node.op_type for node in site_nodes(canonical).values()} == {function}
    assert [key[:2] for key in canonical.functions] == [(DOMAIN, function)]
    assert canonical.opset_imports[DOMAIN] == 1


def test_codes_and_scales_stand_flat_in_two_initializers() -> None:
    canonical, space = found("conv_relu_conv", "generic")
    InsertSearchSitesPass(space)(canonical)
    shapes = {
        name: canonical.graph.initializers[name].const_value.shape.numpy()  # type: ignore[union-attr]
        for name in (CODES, SCALES)
    }
    # Two activations, two weights and their biases, per channel.
    channels = {site.name: site.channels for site in space.sites}
    assert shapes == {CODES: (4 * len(channels),), SCALES: (sum(channels.values()),)}
    assert sorted(channels.values()) in ([1, 1, 2, 4], [1, 1, 2, 2, 4, 4])


@pytest.mark.parametrize(
    ("target", "layers"),
    [("generic", {"outside", "inside", "after"}), ("ort-cpu", {"outside", "after"})],
)
def test_a_layer_in_a_branch_reads_its_weight_from_outside(
    target: str, layers: set[str]
) -> None:
    canonical, space = found("layers_in_a_branch", target)
    assert set(space.layer) == layers
    InsertSearchSitesPass(space)(canonical)
    inside = next(n for n in canonical.graph.all_nodes() if n.name == "inside")
    quantized = site_nodes(canonical).get("w2@inside")
    if "inside" in layers:
        assert quantized is not None
        assert quantized.graph is canonical.graph
        assert inside.inputs[1] is quantized.outputs[0]
    else:
        assert quantized is None
        assert inside.inputs[1] is canonical.graph.initializers["w2"]


def test_a_site_for_a_node_that_is_not_there_is_refused() -> None:
    canonical, _ = found("gemms", "generic")
    _, space = found("conv_relu_conv", "generic")
    with pytest.raises(ir.passes.PreconditionError, match="'c1', which the graph lacks"):
        InsertSearchSitesPass(space)(canonical)


# -- special sites --------------------------------------------------------------------------


_SOME = ("conv_relu_conv", "depthwise_and_grouped", "gemms", "layers_in_a_branch")


@pytest.mark.parametrize("formats", ["int4,int8", "e4m3,int8,float32"])
@pytest.mark.parametrize("case", _SOME)
def test_special_sites_compute_the_same_bits(case: str, formats: str) -> None:
    prepared = calibrated(LAYERED[case].build(), "generic", parse_space(formats))
    space = prepared.space
    positive = positive_sites(prepared.canonical, space)
    pass_ = SpecialiseSitesPass(space.byte_sites, positive)
    for seed in range(2):
        searchable = prepared.searchable(prepared.random_mix(seed))
        plain = site_nodes(searchable)
        after = site_nodes(check_pass(pass_, searchable))
        assert set(after) == set(plain)
        for name, node in after.items():
            usual = plain[name].op_type
            special = {
                name in positive and usual == ANY_SITE: POSITIVE_SITE,
                name in space.byte_sites: BYTE_SITE,
            }
            inside = plain[name].graph is not searchable.graph
            assert node.op_type == (usual if inside else special.get(True, usual))


@pytest.mark.parametrize(
    ("case", "target"), on_targets({"conv_relu_conv": LAYERED["conv_relu_conv"]})
)
def test_special_sites_compute_the_same_bits_for_every_target(case: str, target: str) -> None:
    canonical, space = found(case, target)
    formats = ",".join(p.name for p in space.precisions if p.name != "float32")
    prepared = calibrated(LAYERED[case].build(), target, parse_space(formats))
    pass_ = SpecialiseSitesPass(
        prepared.space.byte_sites, positive_sites(canonical, prepared.space)
    )
    searchable = prepared.searchable(prepared.random_mix(1))
    check_pass(pass_, searchable)


def test_a_space_of_bytes_has_sites_of_bytes_and_others_have_positive_ones() -> None:
    canonical, space = found("conv_relu_conv", "generic", "int4,int8")
    assert {space.site[name].tensor for name in space.byte_sites} == {"x", "r"}
    for formats in ("int8,float32", "int16", "int8,e4m3"):
        assert not found("conv_relu_conv", "generic", formats)[1].byte_sites
    canonical, space = found("conv_relu_conv", "generic", "int8,e4m3")
    InsertSearchSitesPass(space)(canonical)
    SpecialiseSitesPass(space.byte_sites, positive_sites(canonical, space))(canonical)
    used = {node.inputs[0].name: node.op_type for node in site_nodes(canonical).values()}  # type: ignore[union-attr]
    assert {name for name, kind in used.items() if kind == POSITIVE_SITE} == {"r"}


def test_names_of_sites_that_are_not_there_change_nothing() -> None:
    canonical, space = found("conv_relu_conv", "generic", "int4,int8")
    InsertSearchSitesPass(space)(canonical)
    assert not SpecialiseSitesPass(["nothing"], ["r"])(canonical).modified
