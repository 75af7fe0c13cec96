"""Rewrites the graphs of a search for the fast kernels of the machine that they run on."""

import functools

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from onnx_fliqs.passes.block_channels import BlockChannelsPass
from onnx_fliqs.passes.merge_masks import MergeMasksPass
from onnx_fliqs.passes.raise_scalars import RaiseScalarsPass
from onnx_fliqs.runtime import make_session
from onnx_fliqs.site_functions import INNER_PRODUCT

__all__ = ["block_of_channels", "for_fast_kernels"]

_REORDER = """<ir_version: 10, opset_import: ["com.microsoft.nchwc" : 1]>
probe (float[1, 4, 1, 1] x) => (float[n, c, h, w] y) {
    y = com.microsoft.nchwc.ReorderInput (x)
}"""


@functools.cache
def block_of_channels() -> int:
    """Channels of a block of ONNX Runtime's convolutions here; 1 where there are none.

    That is 16 with AVX-512, 8 with AVX, and 1 on other processors.
    """
    # The operators are registered only where the kernels exist.
    try:
        session = make_session(onnx.parser.parse_model(_REORDER))
    except Exception:
        return 1
    (result,) = session.run(None, {"x": np.zeros((1, 4, 1, 1), np.float32)})
    return int(result.shape[1])


def for_fast_kernels(model: ir.Model, samples: int) -> ir.Model:
    """Rewrite a graph in which weights are inputs; the outputs stay the same.

    Args:
        model: A searchable model with its loss, or its gradient. It is changed.
        samples: About how many samples it will run on.
    """
    for pass_ in (
        # It can be computed in blocked channels as a whole only.
        common.InlinePass(lambda function: function.name != INNER_PRODUCT),
        common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False),
        MergeMasksPass(),
        BlockChannelsPass(block_of_channels(), samples),
        RaiseScalarsPass(),
        common.InlinePass(),
    ):
        pass_(model)
    return model
