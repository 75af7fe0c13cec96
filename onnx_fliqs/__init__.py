"""One-shot mixed-precision quantization search for ONNX models.

The verbs of the command line, as functions::

    import onnx_fliqs

    config = onnx_fliqs.SearchConfig(space="int-l", steps=500)
    result = onnx_fliqs.search("model.onnx", "train.npz", config)
    result.save("model.fliqs.onnx")

Names are looked up when they are used, so that importing the package loads neither ONNX nor
ONNX Runtime.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

from onnx_fliqs._version import __version__

if TYPE_CHECKING:
    from onnx_fliqs.api import emit, evaluate, inspect, validate
    from onnx_fliqs.assignment import Assignment
    from onnx_fliqs.config import SearchConfig
    from onnx_fliqs.controller import ControllerConfig
    from onnx_fliqs.cost import Budget, BudgetKind
    from onnx_fliqs.data import Dataset
    from onnx_fliqs.errors import FliqsError
    from onnx_fliqs.latency import LatencyTable
    from onnx_fliqs.latency_profile import ProfileConfig, ProfileProgress, profile
    from onnx_fliqs.progress import Progress
    from onnx_fliqs.report import SearchResult
    from onnx_fliqs.rules import Rule
    from onnx_fliqs.schedule import Phase
    from onnx_fliqs.search_loop import search
    from onnx_fliqs.strategies import Strategy

__all__ = [
    "Assignment",
    "Budget",
    "BudgetKind",
    "ControllerConfig",
    "Dataset",
    "FliqsError",
    "LatencyTable",
    "Phase",
    "ProfileConfig",
    "ProfileProgress",
    "Progress",
    "Rule",
    "SearchConfig",
    "SearchResult",
    "Strategy",
    "__version__",
    "emit",
    "evaluate",
    "inspect",
    "profile",
    "search",
    "validate",
]

_MODULES: Final = {
    "Assignment": "assignment",
    "Budget": "cost",
    "BudgetKind": "cost",
    "ControllerConfig": "controller",
    "Dataset": "data",
    "FliqsError": "errors",
    "LatencyTable": "latency",
    "Phase": "schedule",
    "ProfileConfig": "latency_profile",
    "ProfileProgress": "latency_profile",
    "Progress": "progress",
    "Rule": "rules",
    "SearchConfig": "config",
    "SearchResult": "report",
    "Strategy": "strategies",
    "emit": "api",
    "evaluate": "api",
    "inspect": "api",
    "profile": "latency_profile",
    "search": "search_loop",
    "validate": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
