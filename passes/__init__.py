"""Graph passes: one per file, each an ``onnx_ir.passes.InPlacePass``."""
