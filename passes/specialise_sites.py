"""Lets sites of which more is known use faster arithmetic."""

from collections.abc import Collection
from typing import Final

import onnx_ir as ir

from onnx_fliqs.passes.insert_search_sites import SITE_KEY
from onnx_fliqs.site_functions import (
    ANY_CODES,
    ANY_SITE,
    BYTE_CODES,
    BYTE_SITE,
    DOMAIN,
    POSITIVE_SITE,
    site_function,
)

__all__ = ["SpecialiseSitesPass"]

_CODES: Final = {BYTE_SITE: BYTE_CODES, POSITIVE_SITE: ANY_CODES}


class SpecialiseSitesPass(ir.passes.InPlacePass):
    """Replace sites of 8-bit integers, and floats that are never negative, by faster ones.

    Before:  x_q = onnx_fliqs.SearchIntQDQ (x, scale, lo, hi, least)
             y_q = onnx_fliqs.SearchQDQ (y, scale, lo, hi, factor, least)
    After:   x_q = onnx_fliqs.SearchByteQDQ (x, scale, lo, hi)
             y_q = onnx_fliqs.SearchPositiveQDQ (y, scale, lo, hi, factor, least)

    Requires: a model after ``InsertSearchSitesPass``; the named sites have one scale.
    Ensures: the same outputs while the codes of the sites of bytes are those of integers of at
        most 8 bits, and nothing negative reaches the positive ones; the same signature.
    Idempotent: sites that are special already are left alone.
    """

    def __init__(self, in_bytes: Collection[str], positive: Collection[str]) -> None:
        """Name the sites.

        Args:
            in_bytes: Those that only ever take integers of at most 8 bits
                (``SearchSpace.byte_sites``).
            positive: Those of values that are never negative.
        """
        super().__init__()
        self._wanted = dict.fromkeys(positive, POSITIVE_SITE) | dict.fromkeys(
            in_bytes, BYTE_SITE
        )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go through the sites."""
        modified = False
        for node in list(model.graph):
            wanted = self._wanted.get(node.metadata_props.get(SITE_KEY, ""))
            if wanted is None or node.domain != DOMAIN or node.op_type in _CODES:
                continue
            if wanted == POSITIVE_SITE and node.op_type != ANY_SITE:
                continue
            modified = True
            _replace(node, wanted)
            function = site_function(wanted)
            model.functions[function.identifier()] = function
        return ir.passes.PassResult(model, modified=modified)


def _replace(node: ir.Node, wanted: str) -> None:
    new = ir.node(
        wanted,
        node.inputs[: 2 + len(_CODES[wanted])],
        domain=DOMAIN,
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    old, made = node.outputs[0], new.outputs[0]
    made.name, made.shape, made.type = old.name, old.shape, old.type
    assert node.graph is not None
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], [new], [old], [made])
