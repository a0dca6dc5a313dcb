"""neco-bench: a benchmark for dense visual encoders with named protocols.

    import neco_bench
    result = neco_bench.run("baseline_hog", "shapes_ic")
    print(result.metrics["mIoU"], result.ci95["mIoU"])

Names are loaded when they are first used, so that `import neco_bench` is fast.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neco_bench.core.errors import NecoBenchError
    from neco_bench.core.protocol import find_tasks
    from neco_bench.data.load import list_datasets, load_dataset
    from neco_bench.encoders import DenseFeatures, Encoder, check_encoder, load_encoder
    from neco_bench.reports.comparison import compare
    from neco_bench.results.frame import load_results
    from neco_bench.results.listing import ResultList
    from neco_bench.results.schema import Result
    from neco_bench.results.store import ResultStore
    from neco_bench.runner.api import run
    from neco_bench.viz.api import show
    from neco_bench.viz.posttrain import posttrain_report

__version__ = "0.1.0"

if not Path(__file__).with_name("tasks").is_dir():
    # In a source checkout, `tasks/` is next to this package; in an installed package, it is inside.
    __path__.append(str(Path(__file__).parents[1]))

_MODULES = {
    "run": "neco_bench.runner.api",
    "load_encoder": "neco_bench.encoders",
    "check_encoder": "neco_bench.encoders",
    "Encoder": "neco_bench.encoders",
    "DenseFeatures": "neco_bench.encoders",
    "load_dataset": "neco_bench.data.load",
    "find_tasks": "neco_bench.core.protocol",
    "load_results": "neco_bench.results.frame",
    "list_datasets": "neco_bench.data.load",
    "compare": "neco_bench.reports.comparison",
    "show": "neco_bench.viz.api",
    "posttrain_report": "neco_bench.viz.posttrain",
    "ResultList": "neco_bench.results.listing",
    "Result": "neco_bench.results.schema",
    "ResultStore": "neco_bench.results.store",
    "NecoBenchError": "neco_bench.core.errors",
}


__all__ = [
    "DenseFeatures",
    "Encoder",
    "NecoBenchError",
    "Result",
    "ResultList",
    "ResultStore",
    "__version__",
    "check_encoder",
    "compare",
    "find_tasks",
    "list_datasets",
    "load_dataset",
    "load_encoder",
    "load_results",
    "posttrain_report",
    "run",
    "show",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'neco_bench' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
