"""Throughput of a quantized model against its float model, in the installed ONNX Runtime.

Runs both in turn, pair by pair, and prints one JSON line with the ratios (float time /
quantized time; higher is better for the quantized model)::

    python benchmarks/throughput.py model.onnx model.fliqs.onnx --batch 64 --pairs 30
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import onnxruntime
from common import provenance


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _feeds(session: onnxruntime.InferenceSession, batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        value.name: rng.standard_normal(
            [batch, *(d if isinstance(d, int) else 32 for d in value.shape[1:])]
        ).astype(np.float32)
        for value in session.get_inputs()
    }


def _seconds(session: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]) -> float:
    start = time.perf_counter()
    session.run(None, feeds)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("float_model", type=Path)
    parser.add_argument("quantized_model", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=0, help="0: ONNX Runtime's choice")
    options = parser.parse_args()
    sessions = [
        _session(path, options.threads)
        for path in (options.float_model, options.quantized_model)
    ]
    feeds = _feeds(sessions[0], options.batch)
    for session in sessions * 3:
        _seconds(session, feeds)
    pairs = [[_seconds(session, feeds) for session in sessions] for _ in range(options.pairs)]
    ratios = sorted(slow / fast for slow, fast in pairs)
    result = {
        "benchmark": "throughput",
        "float_model": options.float_model.name,
        "quantized_model": options.quantized_model.name,
        "batch": options.batch,
        "float_ms": round(1e3 * statistics.median(p[0] for p in pairs), 2),
        "quantized_ms": round(1e3 * statistics.median(p[1] for p in pairs), 2),
        "speedup": round(statistics.median(ratios), 3),
        "speedup_quartiles": [
            round(ratios[len(ratios) // 4], 3),
            round(ratios[-1 - len(ratios) // 4], 3),
        ],
        "size_ratio": round(
            options.quantized_model.stat().st_size / options.float_model.stat().st_size, 3
        ),
        **provenance(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
