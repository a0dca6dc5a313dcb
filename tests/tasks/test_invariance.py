"""A number does not move with workers, batch size or a restart; what is done is not done again.

Floating point would allow features to differ between batch sizes. Measured on the CPU for both encoders here, all
families and batch sizes 1, 5 and 16: no pixel of 854,829 and no hit differs. So equality is asserted, not closeness.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import neco_bench
from neco_bench.core.errors import NumericalError
from neco_bench.encoders import Encoder
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore
from neco_bench.runner import execute
from tests import processes
from tests.command import neco

VIT = "timm:vit_tiny_patch16_224?pretrained=false&seed=0"
TASKS: dict[str, dict[str, Any]] = {
    "shapes_ic": {},
    "shapes_linear": {"epochs": 2, "batch_size": 4},
    "shapes_overcluster_50": {"iterations": 3, "redos": 1, "seeds": 2},
    "shapes_correspondence": {},
}
HOWS = ({"batch_size": 16, "workers": 0}, {"batch_size": 1, "workers": 0}, {"batch_size": 5, "workers": 2})


def _measure(folder: Path, model: str, task: str, **options: Any) -> tuple[Result, dict[str, np.ndarray]]:
    store = ResultStore(folder)
    result = neco_bench.run(model, task, out=folder, device="cpu", **options)
    return result, store.statistics(result)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "task", "size", "limit"),
    [
        *(("baseline_hog", task, 56, 10) for task in TASKS),
        (VIT, "shapes_ic", 112, 6),
        (VIT, "shapes_overcluster_50", 112, 6),
    ],
)
def test_workers_and_batch_size_move_nothing(model: str, task: str, size: int, limit: int, tmp_path: Path) -> None:
    """The ViT is not run with workers: they load, whatever the encoder."""
    changes = {"input_size": size, **TASKS[task]}
    hows = HOWS if model == "baseline_hog" else HOWS[:2]
    results, arrays = zip(
        *(_measure(tmp_path / str(i), model, task, limit=limit, changes=changes, **how) for i, how in enumerate(hows)),
        strict=True,
    )
    used = [{"batch_size": r.provenance["batch_size_used"], "workers": r.provenance["workers"]} for r in results]
    assert used == list(hows)
    for result, array in zip(results[1:], arrays[1:], strict=True):
        assert result.key == results[0].key
        assert result.metrics == results[0].metrics
        assert result.ci95 == results[0].ci95
        assert result.per_class == results[0].per_class
        assert array.keys() == arrays[0].keys()
        assert all(np.array_equal(array[name], arrays[0][name]) for name in array)


def test_another_seed_is_another_result(tmp_path: Path) -> None:
    """The seed moves the crops and the memory, so that the tests above are not about constants."""
    changes = {"input_size": 56}
    one, other = (
        _measure(tmp_path, "baseline_rgb", "shapes_ic", limit=10, workers=0, seed=seed, changes=changes)
        for seed in (0, 1)
    )
    assert one[0].key != other[0].key
    assert one[0].metrics != other[0].metrics


RUN = ("run", "--task", "shapes_ic", "--limit", 4, "--workers", 0, "--set", "input_size=56")


def test_a_second_run_loads_no_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = [*RUN, "--model", "baseline_rgb", "--out", tmp_path]
    first = neco(*run)
    stored = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert {path.suffix for path in stored} == {".json", ".npz"}
    monkeypatch.setattr(execute, "load_encoder", lambda *a, **k: pytest.fail("the encoder was loaded"))
    again = neco(*run, "--batch-size", 3)
    assert (first.code, again.code) == (0, 0)
    assert again.out == first.out
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == stored
    with pytest.raises(pytest.fail.Exception, match="was loaded"):
        neco(*run, "--overwrite")


def test_a_failure_is_stored_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = [*RUN, "--model", "baseline_rgb", "--out", tmp_path]

    def fail(*arguments: object, **options: object) -> None:
        raise NumericalError("no such luck")

    with monkeypatch.context() as patch:
        patch.setattr(execute, "load_encoder", fail)
        assert neco(*run).code == 5
    (failed,) = ResultStore(tmp_path).load_all()
    assert (failed.status, failed.error, failed.error_code) == ("failed", "no such luck", 5)
    assert neco(*run).code == 0
    (done,) = ResultStore(tmp_path).load_all()
    assert (done.status, done.key) == ("ok", failed.key)


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = [*RUN, "--model", "baseline_rgb,baseline_hog", "--out", tmp_path]
    load = execute.load_encoder

    def interrupted(model: str, **options: Any) -> Any:
        if model == "baseline_hog":
            raise KeyboardInterrupt
        return load(model, **options)

    with monkeypatch.context() as patch:
        patch.setattr(execute, "load_encoder", interrupted)
        answer = neco(*run)
    assert answer.code == 130
    assert "the same command continues from there" in answer.err
    assert [result.model for result in ResultStore(tmp_path).load_all()] == ["baseline_rgb"]
    loaded = []

    def noted(model: str, **options: Any) -> Encoder:
        loaded.append(model)
        return load(model, **options)

    monkeypatch.setattr(execute, "load_encoder", noted)
    assert neco(*run).code == 0
    assert loaded == ["baseline_hog"]


@pytest.mark.slow
def test_a_killed_process_keeps_what_is_finished(tmp_path: Path) -> None:
    """Killed with no chance to tidy up, while the second of two models is made."""
    (tmp_path / "killer.py").write_text("import os, signal\ndef make(): os.kill(os.getpid(), signal.SIGKILL)\n")
    out = tmp_path / "results"
    models = ["--model", "baseline_rgb", "--model", f"{tmp_path}/killer.py:make"]
    killed = processes.run([*RUN, *models, "--out", out], tmp_path)
    assert killed.poll() == -signal.SIGKILL, killed.err
    (stored,) = ResultStore(out).load_all()
    assert (stored.model, stored.status) == ("baseline_rgb", "ok")
    assert sorted(path.suffix for path in out.rglob("*.*")) == [".json", ".npz"]
