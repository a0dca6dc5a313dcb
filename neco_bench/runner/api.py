"""`neco_bench.run`: the Python interface."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from neco_bench.core.errors import BadInputError, MissingError, UsageError, error_of_code
from neco_bench.core.protocol import find_tasks
from neco_bench.core.suites import find_suite
from neco_bench.encoders.identity import object_id
from neco_bench.results.listing import ResultList
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore
from neco_bench.runner.execute import run_job
from neco_bench.runner.job import each_of, for_each_layer, identify, stored
from neco_bench.runner.options import RunOptions

if TYPE_CHECKING:
    from torch import nn

    from neco_bench.encoders.base import Encoder

    Model = str | os.PathLike[str] | Encoder | nn.Module


log = logging.getLogger("neco_bench")


@overload
def run(
    model: Model,
    task: str,
    *,
    data_root: str | Path | None = None,
    out: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
    seeds: None = None,
    **options: Any,
) -> Any: ...  # a Result, or a ResultList for a glob


@overload
def run(
    model: Model,
    task: Sequence[str] = (),
    *,
    suite: str | None = None,
    data_root: str | Path | None = None,
    out: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
    seeds: int | None = None,
    **options: Any,
) -> ResultList: ...


def run(
    model: Model,
    task: str | Sequence[str] = (),
    *,
    suite: str | None = None,
    data_root: str | Path | None = None,
    out: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
    seeds: int | None = None,
    **options: Any,
) -> Result | ResultList:
    """Run tasks for a model, and return the Result of one task or the list of results of several.

    Args:
        model: a spec, an Encoder, or any torch.nn.Module that maps normalised images (B, 3, H, W) to features
            (B, D, H/stride, W/stride) and has the attributes `embed_dim` and `stride`.
        task: the name of one task ("camvid_ic", "ade20k_linear@clean-1") returns its Result; a glob ("shapes_*"),
            comma-separated names or a list return a ResultList, in which failed results have `status` "failed".
        suite: the name of a suite ("neco_table1", "mine.toml:NAME"), whose tasks run before those of `task`;
            returns a ResultList. Tasks whose data are missing are left out, with a warning.
        data_root: folder of data sets; None: NECO_BENCH_DATA.
        out: results folder; if given, results are stored there, and stored results are returned instead of run again.
        changes: changes of constants, as by `--set` on the command line.
        seeds: number of seeds to run, starting at `seed`; returns a ResultList.
        options: fields of `RunOptions` (device, precision, batch_size, workers, seed, limit, split_file, weights,
            layers, features, overwrite, progress). layers="all" returns a ResultList with one result per block or
            stage; for a ViT, they share one forward pass per image if features are stored.

    Returns:
        A Result, or a ResultList for several tasks or seeds.

    Raises:
        NecoBenchError: the error that the command line would report, with its exit code. The error of a failed task is
            raised only if a single task is named.
    """
    unknown = set(options) - set(RunOptions.__dataclass_fields__)
    if unknown:
        raise UsageError(f"Unknown option {sorted(unknown)}. Options: {', '.join(RunOptions.__dataclass_fields__)}.")
    names = [task] if isinstance(task, str) else task
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"run() takes the name of a task such as 'shapes_ic', not {type(task).__name__}.")
    of_suite = [c.task for c in find_suite(suite).columns(changes, data_root)] if suite is not None else []
    tasks = [*of_suite, *(find_tasks(list(names), changes, data_root=data_root) if names or suite is None else ())]
    run_options = RunOptions(data_root=Path(data_root) if data_root else None, **options)
    store = ResultStore(out) if out else None
    with _as_encoder(model) as (name, encoder):
        if encoder is None:
            each = for_each_layer(name, run_options)
            layered = [(own, identify(name, own, store) if store else None) for own in each]
        else:
            layered = [(run_options, _object_id(encoder, run_options))]
        jobs = []
        for entry in tasks:
            try:
                jobs += each_of(name, entry, layered, seeds or 1, store)
            except MissingError as error:
                if entry not in of_suite:
                    raise
                log.warning("%s of suite %s is left out: %s", entry.card.name, suite, error)
        if not jobs:
            raise MissingError(f"Nothing in suite {suite!r} can be run: its data are missing. Give data_root.")
        for job in jobs:
            if store is None or stored(job, store) is None:
                job.task.settings()  # raise errors of settings before the encoder is loaded
                if store:
                    store.check_writable()
        results = ResultList(run_job(job, store, encoder) for job in jobs)
    several = suite is not None or seeds is not None or run_options.layers == "all"
    if several or not isinstance(task, str) or any(sign in task for sign in ",*?["):
        return results
    (result,) = results
    if result.status == "failed":
        raise error_of_code(result.error_code, result.error or "")
    return result


@contextlib.contextmanager
def _as_encoder(model: Model) -> Iterator[tuple[str, Encoder | None]]:
    """Yield the name of a model and, for an object, its Encoder; afterwards, restore the training mode of its parts."""
    if isinstance(model, str | os.PathLike):
        yield os.fspath(model), None
        return
    from torch import nn  # a caller who has an encoder or a module has already imported torch

    from neco_bench.encoders.adapters.user_code import encoder_of_module

    if not isinstance(model, nn.Module):
        raise UsageError(
            f"run() takes a model spec, an Encoder or a torch.nn.Module, not {type(model).__name__}. Subclass "
            f"neco_bench.Encoder, or give a function that returns the module: path/to/file.py:FACTORY."
        )
    modes = {module: module.training for module in model.modules()}
    encoder = encoder_of_module(model)
    try:
        layer = "" if encoder.layer == "last" else f"[{encoder.layer}]"
        yield f"{getattr(encoder, 'name', type(model).__name__)}{layer}", encoder
    finally:
        for module, mode in modes.items():
            module.training = mode


def _object_id(encoder: Encoder, options: RunOptions) -> str:
    """Return the id of an Encoder object for the content key. Raises `UsageError` and `BadInputError` if unusable."""
    absent = [fact for fact in ("name", "embed_dim", "stride", "weights_id") if not hasattr(encoder, fact)]
    if absent:
        raise BadInputError(f"The {type(encoder).__name__} given to run() has no {', '.join(absent)}; set it.")
    ignored = [name for name in ("device", "precision", "layers", "weights") if getattr(options, name) is not None]
    if ignored:
        raise UsageError(
            f"An Encoder object is not changed by run(): give {', '.join(ignored)} to load_encoder() instead."
        )
    return object_id(encoder)
