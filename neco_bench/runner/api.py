"""`neco_bench.run`: the Python interface."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neco_bench.core.errors import BadInputError, UsageError, error_of_code
from neco_bench.core.protocol import find_tasks
from neco_bench.encoders.identity import object_id
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore
from neco_bench.runner.execute import run_job
from neco_bench.runner.job import identify, plan, stored
from neco_bench.runner.options import RunOptions

if TYPE_CHECKING:
    from neco_bench.encoders.base import Encoder


def run(
    model: str | os.PathLike[str] | Encoder,
    task: str | Sequence[str],
    *,
    data_root: str | Path | None = None,
    out: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
    **options: Any,
) -> Result:
    """Run one task ("camvid_ic", "ade20k_linear@clean-1") for one model spec or Encoder, and return its Result.

    task: its name, also as a list of one.
    out: results folder; with it, a stored result of the same content is returned instead of running again.
    changes: what `--set` gives on the command line. options: fields of `RunOptions` (device, precision, batch_size,
    workers, seed, limit, split_file, weights, layers, features, overwrite, progress).

    Raises the NecoBenchError that the command line would report, with its exit code.
    """
    unknown = set(options) - set(RunOptions.__dataclass_fields__)
    if unknown:
        raise UsageError(f"Unknown option {sorted(unknown)}. There are: {', '.join(RunOptions.__dataclass_fields__)}.")
    names = [task] if isinstance(task, str) else task
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"run() takes the name of a task such as 'shapes_ic', not {type(task).__name__}.")
    tasks = find_tasks(list(names), changes) if names else []
    if len(tasks) != 1:
        raise UsageError(f"run() takes one task, {task!r} names {len(tasks)}. Call it once for each.")
    run_options = RunOptions(data_root=Path(data_root) if data_root else None, **options)
    if isinstance(model, str | os.PathLike):
        name = os.fspath(model)
        identity = identify(name, run_options, ResultStore(out)) if out else None
        job, encoder = plan(name, tasks[0], run_options, identity=identity), None
    else:
        identity = _object_id(model, run_options)
        name = model.name + ("" if model.layer == "last" else f"[{model.layer}]")
        job, encoder = plan(name, tasks[0], run_options, identity=identity), model
    store = ResultStore(out) if out else None
    if store is None or stored(job, store) is None:
        job.task.settings()  # a wrong setting is an error now, not after the encoder is loaded
        if store:
            store.check_writable()
    result = run_job(job, store, encoder)
    if result.status == "failed":
        raise error_of_code(result.error_code, result.error or "")
    return result


def _object_id(encoder: Encoder, options: RunOptions) -> str:
    """What stands for an Encoder object in the content key. Raises `UsageError` and `BadInputError` for another."""
    from neco_bench.encoders.base import Encoder as Contract

    if not isinstance(encoder, Contract):
        raise UsageError(
            f"run() takes a model spec or an Encoder, not {type(encoder).__name__}. Subclass neco_bench.Encoder, or "
            f"name a function that returns the module: path/to/file.py:FACTORY."
        )
    absent = [fact for fact in ("name", "embed_dim", "stride", "weights_id") if not hasattr(encoder, fact)]
    if absent:
        raise BadInputError(f"The {type(encoder).__name__} given to run() lacks {', '.join(absent)}; set it.")
    ignored = [name for name in ("device", "precision", "layers", "weights") if getattr(options, name) is not None]
    if ignored:
        raise UsageError(f"An Encoder is run as it is: give {', '.join(ignored)} to load_encoder() instead.")
    return object_id(encoder)
