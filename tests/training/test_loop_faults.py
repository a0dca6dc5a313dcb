"""The training loop: several processes, switches, scoring, signals while it runs, and what goes wrong."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

import neco_bench
from neco_bench.core import log
from neco_bench.core.errors import BadInputError, MissingError, NecoBenchError, NumericalError, UsageError
from neco_bench.encoders import checkpoints, load_encoder
from neco_bench.training import loop
from neco_bench.training.loop import train
from neco_bench.training.options import Interrupted
from neco_bench.training.trainer import OBJECTIVES
from tests.processes import forking

from .test_loop import losses, options, recipe

EVALUATED: dict[str, Any] = {"evaluate": ("shapes_correspondence",), "save_every": 100}


def _one_of_two(rank: int, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK="0")
    join, run, save = dist.init_process_group, neco_bench.run, loop.TrainingRun._write_checkpoint
    dist.init_process_group = partial(join, timeout=timedelta(seconds=8))

    def late(work: Any) -> Any:
        times = iter([10 * (rank == 0)])  # the first time only

        def wait(*args: Any, **settings: Any) -> Any:
            time.sleep(next(times, 0))
            return work(*args, **settings)

        return wait

    neco_bench.run = late(run)
    loop.TrainingRun._write_checkpoint = late(save)  # type: ignore[method-assign]
    train(recipe(queue_length=60, steps=20), options(out, **EVALUATED))


@pytest.mark.slow
def test_two_processes_train_as_one_and_wait_for_what_one_does(tmp_path: Path) -> None:
    """Saving and scoring take longer than the time-out of the group. What is scored by two is what one finds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [forking().Process(target=_one_of_two, args=(rank, port, tmp_path / "two")) for rank in (0, 1)]
    for child in children:
        child.start()
    train(recipe(queue_length=60, steps=20), options(tmp_path / "one", **EVALUATED))
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    one, two, start = (load_file(path / "student.safetensors") for path in (
        tmp_path / "one/checkpoint-0000020", tmp_path / "two/checkpoint-0000020", tmp_path / "one/checkpoint-0000000",
    ))  # fmt: skip
    moved = torch.cat([(one[name] - start[name]).flatten() for name in one])
    apart = torch.cat([(one[name] - two[name]).flatten() for name in one])
    assert apart.norm() < 2e-4 * moved.norm()
    scored = [(tmp_path / name / "eval.csv").read_text().splitlines() for name in ("one", "two")]
    assert scored[0][:2] == scored[1][:2]  # of the same weights, at step 0
    assert [row.partition(",")[0] for row in scored[1]] == ["step", "0", "20"]
    stored = [json.loads(path.read_text()) for path in (tmp_path / "two/results").glob("**/*.json")]
    assert [result["provenance"]["processes"] for result in stored] == [2, 2]


@pytest.mark.slow
def test_accumulation_and_other_switches_train(tmp_path: Path) -> None:
    switches: tuple[dict[str, Any], ...] = (
        {"accumulate": 2},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"clip_norm": 0.1, "warmup_steps": 2},
        {"use_teacher": False},
        {"objective": "mim", "use_teacher": False, "head_layers": 1, "locals": 0},
        {"base": "timm:resnet18?pretrained=false", "global_size": 96},
        {"base": "timm:test_convnext?pretrained=false", "global_size": 96, "drop_path": 0.2},
    )
    for number, changes in enumerate(switches):
        run = train(recipe(steps=2, **changes), options(tmp_path / str(number), checkpointing=number == 0))
        assert all(math.isfinite(loss) for loss in losses(run))
        assert load_encoder(str(run)).embed_dim


@pytest.mark.slow
def test_evaluation_while_training(tmp_path: Path) -> None:
    run = train(
        recipe(steps=2, global_size=32), options(tmp_path / "run", evaluate=("shapes_correspondence",), eval_every=1)
    )
    with open(run / "eval.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert all(0 < float(row["low"]) <= float(row["value"]) <= float(row["high"]) < 1 for row in rows)
    assert len(list((run / "results").glob("**/*.json"))) == 3


@pytest.mark.slow
def test_what_an_interruption_left_out_is_made_up_for(tmp_path: Path) -> None:
    run_options = options(tmp_path / "run", evaluate=("shapes_correspondence",), eval_every=2, save_every=2)
    run = train(recipe(steps=2, global_size=32), run_options)
    plain = (run / "eval.csv").read_text()
    (run / "eval.csv").write_text("".join(plain.splitlines(keepends=True)[:2]))  # killed while step 2 was scored
    encoder = (run / "encoder.json").read_text()
    (run / "encoder.json").unlink()
    train(recipe(steps=2, global_size=32), dataclasses.replace(run_options, resume=True))
    assert (run / "eval.csv").read_text() == plain
    assert (run / "encoder.json").read_text() == encoder
    train(recipe(steps=2, global_size=32), dataclasses.replace(run_options, resume=True))
    assert (run / "eval.csv").read_text() == plain


def test_an_encoder_that_the_last_step_ruined_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match="after step 1 the features are not finite"):
        train(recipe(steps=1, lr_backbone=1e30), options(tmp_path / "run"))
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-0000000"]


@pytest.mark.slow
@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"recipe": 3}'])
def test_a_record_that_is_none(content: str, tmp_path: Path) -> None:
    run = train(recipe(steps=1), options(tmp_path / "run"))
    (run / "recipe.json").write_text(content)
    with pytest.raises(BadInputError, match="so the run cannot be resumed"):
        train(recipe(steps=1), options(run, resume=True))


@pytest.mark.parametrize(
    ("name", "task", "message"), [("a", "shapes_*", "several tasks"), ("a?b", "shapes_ic", "'\\?'")]
)
def test_what_cannot_be_scored_is_an_error_at_once(name: str, task: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        train(recipe(steps=1), options(tmp_path / name, evaluate=(task,)))
    assert not (tmp_path / name).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc] No space left on device"),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = checkpoints.save_file, []

    def full(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) > 4:  # two files at step 0, two at step 2
            Path(path).write_bytes(b"half")
            raise error
        plain(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(NecoBenchError, match=r"No space left.*checkpoint-0000002, is unchanged.*--resume"):
        train(recipe(), options(tmp_path / "run"))
    monkeypatch.undo()
    assert not list((tmp_path / "run").glob(".*"))
    assert load_encoder(str(tmp_path / "run")).embed_dim == 64
    train(recipe(), options(tmp_path / "run", resume=True))
    assert len(losses(tmp_path / "run")) == 6


@pytest.mark.slow
def test_a_run_folder_that_is_deleted_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written that the next run could take for a run."""
    plain = checkpoints.save

    def delete(run: Path, *arguments: Any) -> None:
        plain(run, *arguments)
        shutil.rmtree(run)

    monkeypatch.setattr(checkpoints, "save", delete)
    with pytest.raises(NecoBenchError, match=r"recipe\.json was deleted|log\.csv: could not be written"):
        train(recipe(), options(tmp_path / "run"))
    monkeypatch.undo()
    assert not checkpoints.checkpoints(tmp_path / "run")
    train(recipe(), options(tmp_path / "run", resume=True))
    assert len(losses(tmp_path / "run")) == 6


@pytest.mark.slow
def test_a_log_that_cannot_be_written_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(recipe(), options(tmp_path / "run", save_every=2))
    shutil.rmtree(run / "checkpoint-0000006")
    monkeypatch.setattr(log, "write_whole", lambda path, content: path.unlink() or path.mkdir())
    with pytest.raises(NecoBenchError, match=r"log\.csv: could not be written.*--resume continues"):
        train(recipe(), options(run, save_every=2, resume=True))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = OBJECTIVES["neco"].forward

    def forward(self: Any, batch: Any, student: Any, teacher: Any, attend: Any, shard: Any) -> torch.Tensor:
        value = plain(self, batch, student, teacher, attend, shard)
        return value * math.nan if shard.batch_number == 3 else value

    monkeypatch.setattr(OBJECTIVES["neco"], "forward", forward)
    with pytest.raises(NumericalError, match="loss of step 4 is nan") as caught:
        train(recipe(), options(tmp_path / "run"))
    assert "not-finite-step-4-rank-0.pt" in str(caught.value)
    stored = torch.load(tmp_path / "run/not-finite-step-4-rank-0.pt", weights_only=True)
    assert stored["global_views"].shape == (4, 2, 3, 64, 64)
    assert len(stored["ids"]) == 4
    assert len(losses(tmp_path / "run")) == 3


def test_memory_that_runs_out_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*args: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(loop.Trainer, "step", step)
    with pytest.raises(NecoBenchError, match=r"step 1 needs more memory .*--set accumulate"):
        train(recipe(), options(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("torchrun", "kinds"),
    [
        (False, [signal.SIGTERM, signal.SIGTERM]),
        (False, [signal.SIGINT, signal.SIGTERM]),
        (True, [signal.SIGINT, signal.SIGINT]),
    ],
)
@pytest.mark.usefixtures("_handlers")
def test_the_same_signal_twice_saves_too(
    torchrun: bool, kinds: list[signal.Signals], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun sends it: it passes on what its workers got already."""
    _signal_in_step(monkeypatch, kinds, torchrun)
    with pytest.raises(Interrupted, match="after step 2 of 6"):
        train(recipe(), options(tmp_path / "run", save_every=100))
    assert checkpoints.checkpoints(tmp_path / "run")[-1].name == "checkpoint-0000002"


@pytest.mark.parametrize(("torchrun", "count"), [(False, 2), (True, 3)])
@pytest.mark.usefixtures("_handlers")
def test_a_second_ctrl_c_ends_at_once(
    torchrun: bool, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _signal_in_step(monkeypatch, [signal.SIGINT] * count, torchrun)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(), options(tmp_path / "run", save_every=100))
    assert checkpoints.checkpoints(tmp_path / "run")[-1].name == "checkpoint-0000000"


@pytest.fixture
def _handlers() -> Iterator[None]:
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


def _signal_in_step(monkeypatch: pytest.MonkeyPatch, kinds: list[signal.Signals], torchrun: bool) -> None:
    """Signals in the second step; what they do where the run does not see to them is an AssertionError."""
    plain = loop.Trainer.step

    def step(self: Any, number: int, *rest: Any) -> float:
        for kind in kinds if number == 1 else ():
            os.kill(os.getpid(), kind)
        return plain(self, number, *rest)

    def unseen(number: int, frame: Any) -> None:
        raise AssertionError(f"signal {number} ended the run")

    monkeypatch.setattr(loop.Trainer, "step", step)
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, unseen)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    else:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


def test_a_signal_ends_an_evaluation_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = []

    def run(*args: Any, **settings: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        finished.append(True)

    run_options = options(tmp_path / "run", evaluate=("shapes_correspondence",))
    monkeypatch.setattr(neco_bench, "run", run)
    with pytest.raises(Interrupted, match="after step 0 of 6"):
        train(recipe(), run_options)
    assert not finished
    assert not (tmp_path / "run/eval.csv").exists()


def test_too_many_unusable_images_end_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (80, 80), (i, 2 * i, 3 * i)).save(folder / f"{i}.png")
    (folder / "0.png").write_bytes(b"broken")
    train(recipe(max_unreadable=0.1), options(tmp_path / "ok", data=str(folder)))
    with pytest.raises(BadInputError, match=r"1 of 12 training images cannot be used.*0\.png") as caught:
        train(recipe(max_unreadable=0.05), options(tmp_path / "run", data=str(folder)))
    assert "--set max_unreadable" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"global_size": 60}, UsageError, r"global_size=60 is not a multiple of the patch size 16 of .*=48 or 64"),
        ({"local_size": 20}, UsageError, r"local_size=20 .* Use --set local_size=16 or 32"),
        ({"batch_size": 25}, UsageError, "more than the 24 images"),
        ({"accumulate": 3}, UsageError, "cannot be divided among 1 processes in 3 parts"),
        ({"base": "no_such_model"}, UsageError, "no_such_model"),
        ({"base": "baseline_rgb"}, UsageError, "no weights to train"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        train(recipe(**changes), options(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_missing_images_and_missing_tensorboard(tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        train(recipe(), options(tmp_path / "run", data=str(tmp_path)))
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(MissingError, match=r"neco-bench\[tensorboard\]"):
            train(recipe(), options(tmp_path / "run", tensorboard=True))


def test_energy_is_logged_where_a_gpu_reports_its_power(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loop._energy(torch.device("cpu"), 2.0) == {}
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 250_000)  # mW
    assert loop._energy(torch.device("cuda"), 2.0) == {"joules": 500.0}

    def refuse(device: torch.device) -> int:
        raise RuntimeError("no NVML")

    monkeypatch.setattr(torch.cuda, "power_draw", refuse)
    assert loop._energy(torch.device("cuda"), 2.0) == {}
