"""One, two and four processes compute the same loss and the same gradient, for each option of the objectives."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from neco_bench.core.distributed import RankShard
from neco_bench.core.reduce import mean_over_processes
from neco_bench.encoders import Encoder
from neco_bench.encoders.trainable import set_training
from neco_bench.training.batches import TENSORS, TrainBatch
from neco_bench.training.networks import Network, make_trainable
from neco_bench.training.trainer import OBJECTIVES
from tests.processes import forking

from .helpers import batch, recipe, small_encoder

TOTAL = 4
MIM = {"objective": "mim", "use_teacher": False, "locals": 0, "head_layers": 1}
MASKED = {"loss_mask": "fg", "global_size": 96}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "euclidean": {"similarity": "euclidean"},
    "odd_even": {"network": "odd_even"},
    "steepness": {"student_steepness": 10.0, "teacher_steepness": 1000.0},
    "references": {"references": 23},
    "no_teacher": {"use_teacher": False},
    "no_teacher_euclidean": {"use_teacher": False, "similarity": "euclidean", "locals": 0},
    "no_teacher_queue": {"use_teacher": False, "queue_length": 60},
    "shuffle": {"shuffle_teacher": True},
    "no_teacher_shuffle": {"shuffle_teacher": True, "use_teacher": False},
    "queue": {"queue_length": 60, "queue_per_image": 7},
    "fg": MASKED,
    "bg": {**MASKED, "loss_mask": "bg"},
    "fg_queue": {**MASKED, "queue_length": 60},
    "fg_no_teacher": {**MASKED, "use_teacher": False},
    "drop_path": {"drop_path": 0.5},
    "no_locals": {"locals": 0},
    "mim": MIM,
    "mim_gradients": {**MIM, "hidden_target": "gradients"},
    "mim_all": {**MIM, "predict_all": True},
}


@functools.cache
def untrained() -> Encoder:
    return small_encoder()


@functools.cache
def views(size: int, count: int) -> TrainBatch:
    return batch(TOTAL, settings=recipe(global_size=size, locals=count))


def gradients(changes: dict[str, Any], rank: int, world: int) -> tuple[list[float], torch.Tensor]:
    """The loss of a step, or of two where there is a queue, and their gradient, averaged as the training loop does."""
    settings = recipe(**{"cells": 3, "references": 9, "drop_path": 0, "head_hidden": 16, **changes})
    count = TOTAL // world
    shard, encoder = RankShard(0, count, rank * count, TOTAL), copy.deepcopy(untrained())
    make_trainable(encoder, settings, shard, False)
    student = Network(encoder, settings, 1)
    set_training(student)
    teacher = Network(copy.deepcopy(untrained()), settings, 2).eval() if settings.use_teacher else None
    objective = OBJECTIVES[settings.objective](settings, student)
    embed = DistributedDataParallel(student) if world > 1 else student
    made, losses = views(settings.global_size, settings.locals), []
    mine = {name: getattr(made, name)[shard.start : shard.start + count] for name in TENSORS}
    for shard.batch_number in range(1 + bool(settings.queue_length)):
        loss = objective(dataclasses.replace(made, **mine), embed, teacher, teacher or student, shard)
        loss.backward()
        losses.append(float(mean_over_processes(loss)))
    return losses, torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def _process(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    computed = {name: gradients(changes, rank, world) for name, changes in OPTIONS.items()}
    torch.save(computed, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two, or of four, processes found."""
    folder = tmp_path_factory.mktemp("processes")
    children = [forking().Process(target=_process, args=(rank, request.param, folder)) for rank in range(request.param)]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
        child.kill()
    assert [child.exitcode for child in children] == [0] * request.param
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: gradients(changes, 0, 1) for name, changes in OPTIONS.items()}
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_processes_learn_what_one_learns(name: str, shared: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    losses, gradient = alone[name]
    for of_one in shared:
        assert of_one[name][0] == pytest.approx(losses, rel=2e-6)
        assert float((of_one[name][1] - gradient).norm() / gradient.norm()) < 1e-5
