"""Encoders that draw numbers of their own in training: exact resume, other draws per step and process, or a refusal."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from neco_bench.core.distributed import RankShard
from neco_bench.core.errors import UsageError
from neco_bench.encoders import Encoder, checkpoints, load_encoder
from neco_bench.encoders.trainable import seeded, set_training
from neco_bench.training import loop
from neco_bench.training.loop import train
from neco_bench.training.networks import Network, make_trainable
from neco_bench.training.options import TrainOptions

from . import helpers

CODE = """
import random
import numpy as np
import torch
from torch import nn
import torch.nn.functional as F


class Dropping(nn.Module):
    def __init__(self, drop):
        super().__init__()
        torch.manual_seed(0)
        self.embed_dim, self.stride, self.drop = 16, 16, drop
        self.patches = nn.Conv2d(3, 16, 16, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(16, 16, 1), Own(drop)) for _ in range(2))

    def forward(self, images):
        x = self.patches(images)
        for block in self.blocks:
            x = x + block(x)
        return x


class Own(nn.Module):
    def __init__(self, drop):
        super().__init__()
        self.drop = drop

    def forward(self, x):
        return self.drop(x) if self.training else x


def none():
    return Dropping(nn.Identity())


def module():
    return Dropping(nn.Dropout(0.2))


def functional():
    return Dropping(lambda x: F.dropout(x, 0.2))


def generator():
    own = torch.Generator().manual_seed(0)
    return Dropping(lambda x: x * (torch.rand(x.shape, generator=own) > 0.2))


def numpy():
    return Dropping(lambda x: x * float(np.random.random()))


def python():
    return Dropping(lambda x: x * random.random())
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("code") / "dropping.py"
    path.write_text(CODE)
    return path


def recipe(spec: str, **changes: Any) -> Any:
    return helpers.recipe(**{"base": spec, "cells": 3, "references": 9, "steps": 4, **changes})


def prepared(spec: str, checkpointing: bool = False) -> Encoder:
    encoder = load_encoder(spec, device="cpu")
    make_trainable(encoder, recipe(spec), RankShard(0, 2), checkpointing)
    return encoder


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["module", "functional"])
def test_a_resumed_run_ends_in_the_same_weights(
    file: Path, factory: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(out: str, resume: bool = False) -> TrainOptions:
        return TrainOptions(tmp_path / out, "shapes:8", workers=0, progress=False, save_every=2, resume=resume)

    settings = recipe(f"{file}:{factory}")
    with caplog.at_level(logging.WARNING, "neco_bench"):
        train(settings, options("whole"))
    assert "draws random numbers in training (dropout)" in caplog.text
    plain = loop.Trainer.step

    def step(self: Any, number: int, *rest: Any) -> float:
        if number == 2:
            raise KeyboardInterrupt
        return plain(self, number, *rest)

    torch.manual_seed(7)  # whatever was drawn before
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(settings, options("parts"))
    before = torch.get_rng_state()
    train(settings, options("parts", resume=True))
    whole, parts = (
        checkpoints.load_file(tmp_path / run / "checkpoint-0000004/student.safetensors") for run in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_differ_between_steps_and_processes_alone(file: Path) -> None:
    encoder = prepared(f"{file}:module")
    set_training(encoder)
    image = torch.randn(2, 3, 64, 64)

    def features(**where: int) -> torch.Tensor:
        with seeded(RankShard(**{"seed": 0, "images": 2, "start": 0, "total": 4, **where}), torch.device("cpu")):
            return encoder._encode(image, final_norm=False, attention=False).map

    first = features()
    assert torch.equal(features(), first)
    for other in ({"batch_number": 1}, {"start": 2}, {"seed": 1}):
        assert not torch.allclose(features(**other), first)


def test_checkpointing_repeats_the_draws(file: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        network = Network(prepared(f"{file}:module", checkpointing), recipe(f"{file}:module"), 0)
        set_training(network)
        images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with seeded(RankShard(0, 2), torch.device("cpu")):
            (embedded,) = network([images], [torch.ones(2, 4, 4, dtype=torch.bool)])
        embedded.square().sum(1).pow(2).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("factory", ["generator", "numpy", "python"])
def test_draws_that_no_seed_of_torch_repeats_are_refused(file: Path, factory: str) -> None:
    with pytest.raises(UsageError, match="torch's seed does not determine, so a run could not be resumed"):
        prepared(f"{file}:{factory}")


@pytest.mark.parametrize(
    "spec", [helpers.SMALL, "timm:test_convnext?pretrained=false", "timm:resnet18?pretrained=false", "none"]
)
def test_encoders_without_draws_say_nothing(file: Path, spec: str, caplog: pytest.LogCaptureFixture) -> None:
    spec = f"{file}:none" if spec == "none" else spec
    encoder = load_encoder(spec, device="cpu")
    buffers = {name: value.clone() for name, value in encoder.named_buffers()}
    with caplog.at_level(logging.WARNING, "neco_bench"):
        make_trainable(encoder, recipe(spec, drop_path=0.3, local_size=64), RankShard(0, 2), False)
    assert "random" not in caplog.text
    assert all(torch.equal(value, buffers[name]) for name, value in encoder.named_buffers())
