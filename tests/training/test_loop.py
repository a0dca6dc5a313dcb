"""The training loop: schedules, what a run leaves, and how it is resumed from its checkpoints."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import neco_bench
from neco_bench.core.errors import BadInputError, NumericalError, UsageError
from neco_bench.encoders import checkpoints, load_encoder
from neco_bench.training import loop
from neco_bench.training.loop import train
from neco_bench.training.options import Interrupted, TrainOptions
from neco_bench.training.recipe import Recipe
from neco_bench.training.trainer import OBJECTIVES, cosine
from tests.processes import forking
from tests.typed import module

from . import helpers
from .helpers import SMALL


def recipe(**changes: Any) -> Recipe:
    """With fewer cells and references than the paper has: sorting them would take half of a step."""
    return helpers.recipe(**{"cells": 4, "references": 16, **changes})


def options(out: Path, **changes: Any) -> TrainOptions:
    return TrainOptions(
        **{"out": out, "data": "shapes:24", "workers": 0, "progress": False, "save_every": 2, **changes}
    )


def weights(run: Path, role: str = "student") -> dict[str, torch.Tensor]:
    return load_file(checkpoints.checkpoints(run)[-1] / f"{role}.safetensors")


def losses(run: Path) -> list[float]:
    with open(run / "log.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [float(row["loss"]) for row in rows]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of six steps with a queue."""
    return train(recipe(queue_length=60), options(tmp_path_factory.mktemp("whole") / "run"))


def test_schedules_of_the_official_code() -> None:
    steps = 46_200  # protocols/neco.md 1.13 and 1.14
    momentum = [cosine(0.9995, 1.0, k, steps) for k in (0, steps // 4, steps // 2, 3 * steps // 4)]
    assert momentum == pytest.approx([0.9995, 0.99957322, 0.99975, 0.99992678], abs=5e-9)
    assert math.prod(cosine(0.9995, 1.0, k, steps) for k in range(steps)) == pytest.approx(9.6e-6, rel=0.01)
    assert cosine(0.04, 0.5, steps // 2, steps) == pytest.approx(0.27)
    assert [cosine(1e-5, 0, k, steps) for k in (0, steps)] == [1e-5, 0]


@pytest.mark.slow
def test_a_run_leaves_a_model_that_can_be_evaluated(whole: Path) -> None:
    encoder = load_encoder(str(whole))
    assert encoder.embed_dim == 64
    assert same(dict(module(encoder).state_dict()), weights(whole))
    start = module(load_encoder(SMALL)).state_dict()
    assert not torch.equal(start["blocks.0.attn.qkv.weight"], weights(whole)["blocks.0.attn.qkv.weight"])
    teacher = load_encoder(f"{whole}?branch=teacher")
    assert same(dict(module(teacher).state_dict()), weights(whole, "teacher"))
    assert neco_bench.run(str(whole), "shapes_ic", limit=4, workers=0).status == "ok"
    facts = json.loads((whole / "encoder.json").read_text())
    assert facts["step"] == 6
    assert (facts["overlap"], encoder.overlap) == ({"shapes": "seen"}, {"shapes": "seen"})  # from random weights
    assert [path.name for path in checkpoints.checkpoints(whole)] == ["checkpoint-0000004", "checkpoint-0000006"]


def test_the_teacher_is_a_moving_average_taken_before_the_step(tmp_path: Path) -> None:
    settings = recipe(steps=2, momentum=0.9, final_momentum=0.9)
    run = train(settings, options(tmp_path / "two", save_every=1))
    first, start = load_file(run / "checkpoint-0000001/student.safetensors"), module(load_encoder(SMALL)).state_dict()
    name = "blocks.3.mlp.fc1.weight"
    assert not torch.equal(first[name], start[name])
    torch.testing.assert_close(weights(run, "teacher")[name], 0.9 * start[name] + 0.1 * first[name], rtol=0, atol=1e-7)


def test_heads_are_drawn_apart_unless_told_otherwise(tmp_path: Path) -> None:
    for same_heads in (False, True):
        run = train(recipe(steps=1, lr_head=0, same_heads=same_heads), options(tmp_path / str(same_heads)))
        state = torch.load(checkpoints.checkpoints(run)[-1] / "training.pt", weights_only=True)
        assert same(state["student_head"], state["teacher_head"]) is same_heads


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_state_and_resume_gives_the_same_weights(
    kind: signal.Signals, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, handler = loop.Trainer.step, signal.getsignal(kind)

    def step(self: Any, number: int, *rest: Any) -> float:
        if number == 2:
            os.kill(os.getpid(), kind)
        return plain(self, number, *rest)

    monkeypatch.setattr(loop.Trainer, "step", step)
    with pytest.raises(Interrupted, match="after step 3 of 6"):
        train(recipe(queue_length=60), options(tmp_path / "run", save_every=100))
    monkeypatch.undo()
    assert signal.getsignal(kind) == handler
    train(recipe(queue_length=60), options(tmp_path / "run", resume=True))
    assert losses(tmp_path / "run") == losses(whole)
    for role in ("student", "teacher"):
        assert same(weights(tmp_path / "run", role), weights(whole, role))


def _train_in_child(out: Path, resume: bool) -> None:
    torch.set_num_threads(1)
    train(recipe(queue_length=60, steps=24), options(out, resume=resume, save_every=3))


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(recipe(queue_length=60, steps=24), options(tmp_path / "whole", save_every=3))
    finally:
        torch.set_num_threads(threads)
    out, moments = tmp_path / "killed", random.Random(0)
    log_file = out / "log.csv"
    for kill in range(3):
        child = forking().Process(target=_train_in_child, args=(out, kill > 0))
        child.start()
        until = 4 + 6 * kill + moments.randrange(3)  # lines, of which the first is the header
        while not log_file.is_file() or len(log_file.read_text().splitlines()) < until:
            assert child.is_alive()
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.05))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        done = until - 2  # steps before that of the last line, which may not be saved yet
        assert checkpoints.step_of(checkpoints.checkpoints(out)[-1]) >= done - done % 3
    train_again = forking().Process(target=_train_in_child, args=(out, True))
    train_again.start()
    train_again.join()
    assert train_again.exitcode == 0
    assert losses(out) == losses(tmp_path / "whole")
    for role in ("student", "teacher"):
        assert same(weights(out, role), weights(tmp_path / "whole", role))


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("last", [1, *(pytest.param(last, marks=pytest.mark.slow) for last in range(3, 12, 2))])
def test_a_run_that_ends_at_any_renaming_is_resumed(last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, renamed = os.replace, []

    def replace(source: Any, target: Any) -> None:
        renamed.append(target)
        if len(renamed) == last:
            raise Killed
        plain(source, target)

    settings, run_options = recipe(steps=3), options(tmp_path / "run", save_every=1)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Killed):
        train(settings, run_options)
    monkeypatch.undo()
    with open(tmp_path / "run/log.csv", "a", encoding="utf-8") as file:
        file.write("1,0.5")  # half a line
    run = train(settings, dataclasses.replace(run_options, resume=True))
    assert len(losses(run)) == 3
    assert {path.name for path in run.iterdir()} == {
        "checkpoint-0000002", "checkpoint-0000003", "encoder.json", "log.csv", "recipe.json", "lock",
    }  # fmt: skip
    assert json.loads((run / "encoder.json").read_text())["step"] == 3
    assert load_encoder(str(run)).embed_dim == 64


def test_a_folder_with_a_run_is_not_overwritten(whole: Path) -> None:
    before = weights(whole)
    with pytest.raises(UsageError, match="already contains a run"):
        train(recipe(queue_length=60), options(whole))
    with pytest.raises(UsageError, match=r"lr_backbone=0.001 \(now 0.1\).*To change lr_backbone .* give --set"):
        train(recipe(queue_length=60, lr_backbone=0.1), options(whole, resume=True))
    with pytest.raises(UsageError, match=r"queue_length=60 \(now 64\)\. Use the same settings, or another --out\.$"):
        train(recipe(queue_length=64), options(whole, resume=True, stated=("queue_length",)))
    with pytest.raises(UsageError, match=r"already has 6 steps, more than the 5 .* Use --set steps=6 or more"):
        train(recipe(queue_length=60, steps=5), options(whole, resume=True, stated=("steps",)))
    assert same(weights(whole), before)


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["training.pt", "student.safetensors", "all of it"])
def test_the_checkpoint_before_serves_where_the_last_is_corrupt(
    broken: str, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    last = run / "checkpoint-0000006"
    for file in last.iterdir() if broken == "all of it" else [last / broken]:
        file.write_bytes(file.read_bytes()[:-100]) if broken != "all of it" else file.unlink()
    train(recipe(queue_length=60), options(run, resume=True))
    assert "checkpoint-0000006 cannot be read" in caplog.text
    assert "now called unreadable-checkpoint-0000006" in caplog.text
    assert same(weights(run), weights(whole))
    assert losses(run) == losses(whole)


def test_where_no_checkpoint_can_be_read_nothing_is_lost(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for folder in checkpoints.checkpoints(run):
        (folder / "teacher.safetensors").write_bytes(b"")
    before = sorted(run.rglob("*"))
    with pytest.raises(BadInputError, match=r"checkpoint-0000004 cannot be read.*another --out, or delete .*run"):
        train(recipe(queue_length=60), options(run, resume=True))
    assert sorted(run.rglob("*")) == before


@pytest.mark.slow
def test_what_a_loss_that_is_not_finite_advises_goes_on_from_the_last_checkpoint(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = OBJECTIVES["neco"].forward

    def forward(self: Any, batch: Any, student: Any, teacher: Any, attend: Any, shard: Any) -> torch.Tensor:
        value = plain(self, batch, student, teacher, attend, shard)
        return value * math.nan if shard.batch_number == 4 and self.recipe.lr_backbone == 1e-3 else value

    monkeypatch.setattr(OBJECTIVES["neco"], "forward", forward)
    settings = recipe(queue_length=60, precision="fp16")
    with pytest.raises(NumericalError, match=r"with --resume and --set precision=fp32 or a smaller --set lr_backbone"):
        train(settings, options(tmp_path / "run"))
    smaller = {"lr_backbone": 1e-4, "precision": "fp32", "steps": 8}
    run = train(
        settings.model_copy(update=smaller), options(tmp_path / "run", resume=True, stated=("batch_size", *smaller))
    )
    assert "from step 4 on: precision=fp32 instead of 'fp16', steps=8 instead of 6, lr_backbone=0.0001" in caplog.text
    with open(run / "log.csv", encoding="utf-8") as file:
        rates = [float(row["lr_backbone"]) for row in csv.DictReader(file)]
    assert rates[:4] == [cosine(1e-3, 0, k, 6) for k in range(4)]
    assert rates[4:] == [cosine(1e-4, 0, k, 8) for k in range(4, 8)]
    record = json.loads((run / "recipe.json").read_text())
    assert record["recipe"] == {**settings.model_dump(mode="json"), **smaller}
    before = {"lr_backbone": 1e-3, "precision": "fp16", "steps": 6}
    assert record["changes"] == [{"step": 4, "from": before, "to": smaller}]
    trained = neco_bench.run(str(run), "shapes_ic", limit=2, workers=0).provenance["training"]["data"]
    assert (
        "8 steps, from step 4 on precision=fp32, from step 4 on steps=8, from step 4 on lr_backbone=0.0001" in trained
    )
    train(settings.model_copy(update=smaller), options(run, resume=True))  # with the settings of now, without a word
    assert json.loads((run / "recipe.json").read_text()) == record


@pytest.mark.slow
def test_a_longer_run_keeps_its_heads_and_its_place(tmp_path: Path) -> None:
    """Where no schedule depends on the length, it is the run that was longer from the beginning."""
    flat = {"final_lr": 1e-3, "final_momentum": 0.9995, "final_weight_decay": 0.04, "queue_length": 60}
    train(recipe(**flat, steps=4), options(tmp_path / "run"))
    train(recipe(**flat, steps=None, epochs=1), options(tmp_path / "run", resume=True, stated=("steps", "epochs")))
    train(recipe(**flat, steps=6), options(tmp_path / "whole"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_changed_settings_hold_from_the_checkpoint_that_serves(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    slower = recipe(queue_length=60, lr_head=1e-4)
    train(slower, options(run, resume=True, stated=("lr_head",)))
    (run / "checkpoint-0000006/training.pt").unlink()
    train(slower, options(run, resume=True))
    (change,) = json.loads((run / "recipe.json").read_text())["changes"]
    assert change == {"step": 4, "from": {"lr_head": 1e-3}, "to": {"lr_head": 1e-4}}
    with open(run / "log.csv", encoding="utf-8") as file:
        assert [float(row["lr_head"]) for row in csv.DictReader(file)][4:] == [cosine(1e-4, 0, k, 6) for k in (4, 5)]
