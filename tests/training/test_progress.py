"""What a run says of itself: columns of log.csv and TensorBoard, lines for people, the measure of collapse, workers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from neco_bench.core.distributed import RankShard
from neco_bench.encoders import checkpoints
from neco_bench.training import limits, progress, trainer
from neco_bench.training.collapse import MOST, effective_rank
from neco_bench.training.loop import train
from neco_bench.training.options import TrainOptions
from tests.training.helpers import flat, make_trainer, recipe

SMALLER: dict[str, Any] = {"cells": 4, "references": 16, "steps": 4}


def options(out: Path, **changes: Any) -> TrainOptions:
    return TrainOptions(**{"out": out, "data": "shapes:24", "workers": 0, "save_every": 2, **changes})


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of four steps, its effective rank at every second one; what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "RANK_EVERY", 2)
        patch.setattr(progress, "EVERY", 1e9)
        printed: list[str] = []
        patch.setattr("builtins.print", lambda text, **_: printed.append(text))
        run = train(recipe(**SMALLER), options(tmp_path_factory.mktemp("logged") / "run", tensorboard=True))
    return run, "\n".join(printed)


@pytest.mark.slow
def test_a_row_has_what_a_person_follows(logged: tuple[Path, str]) -> None:
    rows = pd.read_csv(logged[0] / "log.csv")
    assert (rows.grad_norm > 0).all()
    assert (rows.data_seconds > 0).all()
    assert (rows.data_seconds < rows.seconds).all()
    assert (rows.skipped_steps == 0).all()
    assert rows.effective_rank.notna().tolist() == [True, False, True, False]
    assert rows.effective_rank.dropna().between(1.0, 64.0, inclusive="neither").all()


def test_tensorboard_has_the_columns_of_the_log(logged: tuple[Path, str]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(logged[0] / "tensorboard"))
    events.Reload()
    rows = pd.read_csv(logged[0] / "log.csv")
    assert set(events.Tags()["scalars"]) == set(rows.columns)
    assert [event.step for event in events.Scalars("effective_rank")] == [1, 3]
    stored = [event.value for event in events.Scalars("grad_norm")]
    np.testing.assert_allclose(stored, rows.grad_norm, rtol=1e-6)


def test_without_a_terminal_there_are_lines(logged: tuple[Path, str]) -> None:
    first, last = logged[1].splitlines()
    assert first.startswith("neco: step 1 of 4, 0:")
    assert last.startswith("neco: step 4 of 4, 0:00:00 left, loss ")
    for part in ("images/s", "% waiting for data", "gradient norm", "effective rank", "MB"):
        assert part in first
        assert part in last  # the rank of step 3 stands


def test_a_line_every_half_minute_and_what_it_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = progress.StepProgress("neco", 100, 1100)
    row = {"loss": 3.5, "images_per_second": 32.0, "data_seconds": 2.5, "seconds": 10.0, "grad_norm": 0.52,
           "skipped_steps": 2, "effective_rank": math.nan, "peak_memory_mb": 1800.4}  # fmt: skip
    for step in range(101, 108):
        now[0] += 10
        shown.update({**row, "step": step})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"neco: step {step} of 1100" for step in (101, 104, 107)]
    assert lines[-1].removeprefix("neco: step 107 of 1100, ") == (
        "2:45:30 left, loss 3.5000, 32.0 images/s, 25 % waiting for data, gradient norm 0.52, 2 steps skipped, 1800 MB"
    )


def _exact(text: str) -> float:
    """The number of a cell, as Python reads it: pandas' own parser may miss the last digit."""
    return float(text or "nan")


@pytest.mark.slow
def test_a_folder_whose_log_lacks_columns_is_resumed(logged: tuple[Path, str], tmp_path: Path) -> None:
    run = train(recipe(**SMALLER), options(tmp_path / "run", progress=False))
    rows = pd.read_csv(run / "log.csv", dtype=str)
    old = rows.drop(columns=["grad_norm", "data_seconds", "effective_rank", "skipped_steps"])
    old.to_csv(run / "log.csv", index=False)
    newest = checkpoints.checkpoints(run)[-1]
    state = torch.load(newest.with_name("checkpoint-0000002") / "training.pt", weights_only=True)
    del state["skipped_steps"]  # as older versions wrote it
    torch.save(state, newest.with_name("checkpoint-0000002") / "training.pt")
    (newest / "training.pt").unlink()
    train(recipe(**SMALLER), options(run, progress=False, resume=True))
    again = pd.read_csv(run / "log.csv", converters=dict.fromkeys(("loss", "grad_norm"), _exact))
    assert again.step.tolist() == [1, 2, 3, 4]
    assert again.grad_norm.isna().tolist() == [True, True, False, False]
    np.testing.assert_array_equal(again.loss, rows.loss.astype(float))
    np.testing.assert_array_equal(again.grad_norm[2:], rows.grad_norm[2:].astype(float))


def test_gradient_norm_is_that_before_clipping_and_changes_nothing(tmp_path: Path) -> None:
    ends = []
    for clip in (None, 1e9, 1e-3):
        run = make_trainer(recipe(**SMALLER, clip_norm=clip), tmp_path)
        batches = iter([run_batch(run)])
        run.schedule(0)
        run.step(0, batches, 0.99)
        grads = torch.cat([p.grad.flatten() for p in run.student.parameters() if p.grad is not None])
        if clip is None:
            norm = float(grads.norm())
        assert run.facts.grad_norm == pytest.approx(norm, rel=1e-5)
        assert float(grads.norm()) == pytest.approx(min(norm, clip or norm), rel=1e-3)
        ends.append(flat(run.student))
    assert torch.equal(ends[0], ends[1])


def run_batch(run: trainer.Trainer) -> Any:
    from neco_bench.training.batches import Order, loader

    order = Order(len(run.images), run.recipe, 0, 1, 0, run.recipe.batch_size)
    return next(iter(loader(run.images, run.recipe, order, 0, False)))


def test_a_step_that_fp16_skips_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_trainer(recipe(**SMALLER, precision="fp16"), tmp_path)
    batch, plain = run_batch(run), run.objective.forward
    monkeypatch.setattr(run.objective, "forward", lambda *given: plain(*given) * 1e30)  # its gradient overflows
    before = flat(run.student)
    run.schedule(0)
    run.step(0, iter([batch]), 0.99)
    assert (run.skipped_steps, math.isfinite(run.facts.grad_norm)) == (1, False)
    assert torch.equal(flat(run.student), before)
    monkeypatch.undo()
    run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 16.0})  # the first one is too large by itself
    run.step(1, iter([batch]), 0.99)
    assert run.skipped_steps == 1
    assert not torch.equal(flat(run.student), before)


def test_bf16_computes_backbone_and_heads_in_bf16_and_trains_fp32_weights(tmp_path: Path) -> None:
    run = make_trainer(recipe(**SMALLER, precision="bf16"), tmp_path)
    assert run.teacher is not None
    kinds: dict[str, set[torch.dtype]] = {}
    for name, network in (("student", run.student), ("teacher", run.teacher)):
        for layer, module in network.named_modules():
            if isinstance(module, torch.nn.Linear):
                part = f"{name} {'head' if layer.startswith('projection_head') else 'backbone'}"
                module.register_forward_hook(lambda *a, part=part: kinds.setdefault(part, set()).add(a[2].dtype))
    run.schedule(0)
    run.step(0, iter([run_batch(run)]), 0.99)
    parts = [f"{name} {part}" for name in ("student", "teacher") for part in ("backbone", "head")]
    assert kinds == {part: {torch.bfloat16} for part in parts}
    assert {p.dtype for p in run.student.parameters()} == {torch.float32}
    assert {state["exp_avg"].dtype for state in run.optimizer.state.values()} == {torch.float32}


def test_effective_rank_by_hand() -> None:
    rng = np.random.default_rng(0)
    assert effective_rank(torch.eye(5).repeat(7, 1)) == pytest.approx(5.0, rel=1e-5)
    assert effective_rank(torch.ones(30, 6) * 0.3) == pytest.approx(1.0, abs=1e-3)
    features = rng.normal(size=(500, 1)) @ rng.normal(size=(1, 12))
    assert effective_rank(torch.from_numpy(features)) == pytest.approx(1.0, abs=1e-3)
    values = rng.normal(size=(3 * MOST, 8)) * np.arange(1, 9)
    singular = np.linalg.svd(values[::3], compute_uv=False)
    shares = singular / singular.sum()
    assert effective_rank(torch.from_numpy(values)) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    assert math.isnan(effective_rank(torch.zeros(4, 3)))
    assert math.isnan(effective_rank(torch.full((4, 3), math.inf)))


@pytest.mark.parametrize(
    ("cores", "processes", "gigabytes", "workers"),
    [(1, 1, 64, 0), (2, 1, 64, 1), (12, 1, 64, 11), (64, 1, 64, 16), (96, 8, 512, 11), (2, 2, 64, 1), (64, 1, 1, 1)],
)
def test_workers_are_sized_by_the_machine(
    cores: int, processes: int, gigabytes: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(limits, "usable_cores", lambda: cores)
    monkeypatch.setattr(limits, "process_memory", lambda: (gigabytes << 30) // processes)
    big = recipe(global_size=518, local_size=98, batch_size=64)
    assert limits.default_workers(big, RankShard(0, 64, 0, 64)) == workers
