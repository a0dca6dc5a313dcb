"""Three steps of training against a plain computation of the same in float64, written from the protocol alone.

The plain model keeps what the official one keeps: a class token and a position of its own, two parameters. Everything
else is spelled out too: attention, alignment, sorting by single comparators, AdamW, schedules, the moving average.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from neco_bench.core.errors import BadInputError
from neco_bench.core.rng import item_rng
from neco_bench.encoders import load_encoder
from neco_bench.encoders.adapters import timm_models
from neco_bench.training import loop
from neco_bench.training.batches import TrainBatch
from neco_bench.training.networks import folded_class_token
from neco_bench.training.options import TrainOptions
from neco_bench.training.recipe import Recipe
from neco_bench.training.sorting import comparators
from tests.typed import module, present

from .helpers import make_trainer, recipe

State = dict[str, Tensor]
STEPS, IMAGES = 3, 4
SIZES = {
    "global_size": 56,
    "local_size": 28,
    "cells": 3,
    "references": 9,
    "batch_size": IMAGES,
    "steps": STEPS,
    "drop_path": 0,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "queue": {"base": "dinov2_vits14?pretrained=false&pos_interp=scale_offset", "queue_length": 64},
    "registers": {"base": "dinov2_vits14_reg?pretrained=false&pos_interp=scale_offset"},
    "euclidean": {
        "base": "dinov2_vits14_reg?pretrained=false&pos_interp=scale_offset",
        "similarity": "euclidean",
        "network": "odd_even",
    },
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """DINOv2's architectures with two narrow blocks, and position embeddings of random values."""
    create = timm_models.create

    def small(name: str, seed: int, **options: Any) -> Any:
        model = create(name, seed, **options, depth=2, embed_dim=24, num_heads=2, img_size=98)
        generator = torch.Generator().manual_seed(seed)
        for key, value in model.state_dict().items():
            value += torch.randn(value.shape, generator=generator) * 0.05
            if key.endswith("gamma"):
                value.fill_(0.9)
        return model

    monkeypatch.setattr(timm_models, "create", small)


def plain_features(state: State, images: Tensor) -> Tensor:
    """Patch tokens (B, h, w, D) after the last norm, as DINOv2's own code has them, positions by scale and offset."""
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    side, places = x.shape[-1], state["pos_embed"][:, 1:]
    grid = round(places.shape[1] ** 0.5)
    if side != grid:
        image = places.float().unflatten(1, (grid, grid)).permute(0, 3, 1, 2)  # in float32, as there
        places = F.interpolate(image, scale_factor=((side + 0.1) / grid,) * 2, mode="bicubic").flatten(2).mT.to(x.dtype)
    token = (state["cls_token"] + state["pos_embed"][:, :1]).expand(len(x), -1, -1)
    registers = [state["register_tokens"].expand(len(x), -1, -1)] if "register_tokens" in state else []
    x = torch.cat([token, *registers, x.flatten(2).mT + places], 1)
    for i in range(2):
        part = {
            key.removeprefix(f"blocks.{i}."): value for key, value in state.items() if key.startswith(f"blocks.{i}.")
        }
        y = F.layer_norm(x, x.shape[-1:], part["norm1.weight"], part["norm1.bias"], 1e-6)
        q, k, v = (
            F.linear(y, part["attn.qkv.weight"], part["attn.qkv.bias"]).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        )
        y = ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + part["ls1.gamma"] * F.linear(y, part["attn.proj.weight"], part["attn.proj.bias"])
        y = F.layer_norm(x, x.shape[-1:], part["norm2.weight"], part["norm2.bias"], 1e-6)
        y = F.linear(
            F.gelu(F.linear(y, part["mlp.fc1.weight"], part["mlp.fc1.bias"])),
            part["mlp.fc2.weight"],
            part["mlp.fc2.bias"],
        )
        x = x + part["ls2.gamma"] * y
    x = F.layer_norm(x, x.shape[-1:], state["norm.weight"], state["norm.bias"], 1e-6)
    return x[:, -side * side :].unflatten(1, (side, side))


def plain_embeddings(state: State, images: Tensor) -> Tensor:
    """(B, E, h, w), of length 1."""
    x = plain_features(state, images)
    for layer in (0, 2, 4):
        x = F.linear(x, state[f"head.{layer}.weight"], state[f"head.{layer}.bias"])
        x = F.gelu(x) if layer < 4 else x
    return (x / x.norm(dim=-1, keepdim=True)).permute(0, 3, 1, 2)


def plain_ranks(values: Tensor, network: str, steepness: float) -> Tensor:
    """(M, n, n): weight of input i at rank j, comparator by comparator."""
    wires, columns = list(values.unbind(1)), list(torch.eye(values.shape[1], dtype=values.dtype).unbind(1))
    columns = [column.expand(len(values), -1) for column in columns]
    for layer in comparators(network, values.shape[1]):
        for low, high in layer:
            alpha = 0.5 + torch.atan(steepness * (wires[high] - wires[low])) / math.pi
            for of, a in ((wires, alpha), (columns, alpha[:, None])):
                of[low], of[high] = a * of[low] + (1 - a) * of[high], (1 - a) * of[low] + a * of[high]
    return torch.stack(columns, 2)


class Plain:
    """The official training step by its protocol (protocols/neco.md 1.1 to 1.14), in the precision of its state."""

    def __init__(self, settings: Recipe, student: State, teacher: State) -> None:
        self.recipe = settings
        self.student = {key: value.clone().requires_grad_() for key, value in student.items()}
        self.teacher = {key: value.clone() for key, value in teacher.items()}
        self.first = {key: torch.zeros_like(value) for key, value in student.items()}
        self.second = {key: torch.zeros_like(value) for key, value in student.items()}
        self.queues: list[Tensor] = [torch.empty(0, settings.head_dim)] * 2

    def pool(self, maps: Tensor, boxes: Tensor) -> Tensor:
        """(B, cells², E) of a box (B, 4) per image."""
        scaled = [box[None].to(maps.dtype) / 14 for box in boxes]
        return torchvision.ops.roi_align(maps, scaled, self.recipe.cells, aligned=True).flatten(2).mT

    def similarity(self, vectors: Tensor, references: Tensor) -> Tensor:
        pairs = vectors[:, :, None], references[:, None]
        if self.recipe.similarity == "euclidean":
            return (pairs[0] - pairs[1]).square().sum(-1).sqrt().flatten(0, 1)
        return F.cosine_similarity(*pairs, dim=-1).flatten(0, 1)

    def loss(self, batch: TrainBatch, step: int) -> Tensor:
        """Draws (which teacher vectors are references, which tokens join the queue) are those of the run."""
        recipe, total = self.recipe, torch.zeros(())
        views = [*batch.global_views.unbind(1), *batch.local_views.unbind(1)]
        with torch.no_grad():
            targets = [plain_embeddings(self.teacher, view) for view in views[:2]]
        predicted = [plain_embeddings(self.student, view) for view in views]
        for c in range(2):
            if recipe.queue_length:
                tokens = targets[c].permute(0, 2, 3, 1).flatten(0, 2)
                order = item_rng(recipe.seed, "queue", step, c).permutation(len(tokens))[: 10 * IMAGES]
                self.queues[c] = torch.cat([tokens[order], self.queues[c].to(tokens.dtype)])[: recipe.queue_length]
        for c in range(2):
            for pair, v in enumerate(v for v in range(6) if v != c):
                aligned = self.pool(targets[c], batch.gc[:, c, v])
                pool = self.queues[c] if recipe.queue_length else aligned.flatten(0, 1)
                order = item_rng(recipe.seed, "references", step, c, pair).permutation(recipe.queue_length or len(pool))
                needed = IMAGES * recipe.references
                while len(order) < needed:
                    order = torch.cat([torch.from_numpy(order)] * 2).numpy()
                references = pool[order[:needed] % len(pool)].unflatten(0, (IMAGES, -1))
                mine = self.pool(predicted[v], batch.all[:, v, c])
                p, q = (
                    plain_ranks(self.similarity(vectors, references), recipe.network, steepness)
                    for vectors, steepness in ((mine, recipe.student_steepness), (aligned, recipe.teacher_steepness))
                )
                total = total - (q * p.log()).sum(2).mean() / 5 / 2
        return total

    def step(self, batch: TrainBatch, step: int) -> float:
        recipe, names = self.recipe, list(self.student)
        loss = self.loss(batch, step)
        gradients = torch.autograd.grad(loss, [self.student[name] for name in names], allow_unused=True)
        wave = 0.5 * (1 + math.cos(math.pi * step / STEPS))
        momentum = recipe.final_momentum + (recipe.momentum - recipe.final_momentum) * wave
        decay = recipe.final_weight_decay + (recipe.weight_decay - recipe.final_weight_decay) * wave
        with torch.no_grad():
            for name in names:
                self.teacher[name] = momentum * self.teacher[name] + (1 - momentum) * self.student[name]
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is None:
                    continue
                value, lr = (
                    self.student[name],
                    (recipe.lr_head if name.startswith("head.") else recipe.lr_backbone) * wave,
                )
                self.first[name] = 0.9 * self.first[name] + 0.1 * gradient
                self.second[name] = 0.999 * self.second[name] + 0.001 * gradient**2
                size = (self.second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                value -= lr * (decay if value.dim() > 1 else 0.0) * value
                value -= lr * self.first[name] / (1 - 0.9 ** (step + 1)) / size
        return float(loss.detach())


def official(network: Any, share: float = 0.3) -> State:
    """A network's weights under official names, the class position (a share of the folded sum) by itself."""
    state = {key: value.detach().double().clone() for key, value in network.encoder.model.state_dict().items()}
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([share * state["cls_token"], state["pos_embed"]], 1)
        state["cls_token"] = (1 - share) * state["cls_token"]
    head = network.projection_head.state_dict().items()
    return state | {f"head.{key}": value.detach().double().clone() for key, value in head}


def folded(state: State) -> State:
    """The class token with its position, as features depend on their sum alone."""
    state = {key: value.detach() for key, value in state.items()}
    if "register_tokens" in state:
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return state


def trained(
    settings: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> tuple[Any, Plain, State, list[tuple[float, float]]]:
    """Three steps of the run in a precision, and of the plain computation in float64 on the same batches: both, the
    weights they start from, and the losses of each step."""
    run = make_trainer(settings, out)
    for part in (run.student, run.teacher, run.objective):
        present(part).to(dtype)
    start, normalised = official(run.student), TrainBatch.normalised
    plain, batches = Plain(settings, start, official(run.teacher)), list[TrainBatch]()

    def keep(self: TrainBatch, *arguments: Any) -> TrainBatch:
        made = normalised(self, *arguments)
        batches.append(_as(made, torch.float64))
        return _as(made, dtype)

    monkeypatch.setattr(TrainBatch, "normalised", keep)
    losses, order = [], loop.Order(8, settings, 0, STEPS, 0, IMAGES)
    loaded = iter(loop.loader(run.images, settings, order, 0, False))
    for step in range(STEPS):
        values = run.schedule(step)
        losses.append((run.step(step, loaded, values["momentum"]), plain.step(batches[-1], step)))
    return run, plain, start, losses


def _as(batch: TrainBatch, dtype: torch.dtype) -> TrainBatch:
    views = {name: getattr(batch, name).to(dtype) for name in ("global_views", "local_views")}
    return dataclasses.replace(batch, **views)


def apart(ours: State, theirs: State, start: State) -> float:
    """How far two results of a run lie from each other, by how far it moved."""
    moved = torch.cat([(theirs[key] - start[key]).flatten() for key in theirs]).norm()
    return float(torch.cat([(ours[key] - theirs[key]).flatten() for key in theirs]).norm() / moved)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_in_float64_three_steps_are_those_of_the_protocol(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left comes from position embeddings, which both resize in float32."""
    run, plain, start, losses = trained(recipe(**SIZES, **SETTINGS[name]), tmp_path, monkeypatch, torch.float64)
    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=1e-10)
    assert apart(folded(official(run.student)), folded(plain.student), folded(start)) < 1e-7
    averages = folded(official(run.teacher)), folded(plain.teacher)
    assert apart(*averages, {key: value * 0 for key, value in averages[1].items()}) < 1e-12


def test_in_float32_the_rest_is_rounding_that_adamw_magnifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The biases of the keys, which a softmax ignores, have no gradient but rounding, and move by whole steps."""
    run, plain, start, losses = trained(recipe(**SIZES, **SETTINGS["registers"]), tmp_path, monkeypatch, torch.float32)
    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=1e-6)
    states = [folded(state) for state in (official(run.student), plain.student, start)]
    assert 2e-5 < apart(*states) < 1e-3
    keys = slice(24, 48)
    for i in range(2):
        name = f"blocks.{i}.attn.qkv.bias"
        assert plain.second[name][keys].max() < 1e-24 * plain.second[name].max()
        assert (states[0][name] - states[2][name])[keys].abs().max() > 1e-6
        for state in states:
            state[name][keys] = 0
    assert apart(*states) < 2e-5


def test_the_class_token_with_its_position_moves_twice_as_far(tmp_path: Path) -> None:
    """The first step of AdamW is one learning rate long, whatever the gradient, for each of the two parameters."""
    settings = recipe(**SIZES, **SETTINGS["registers"], weight_decay=0, final_weight_decay=0)
    run = make_trainer(settings, tmp_path)
    before = {key: value.clone() for key, value in module(run.student.encoder).state_dict().items()}
    values = run.schedule(0)
    run.step(
        0, iter(loop.loader(run.images, settings, loop.Order(8, settings, 0, 1, 0, 4), 0, False)), values["momentum"]
    )
    moved = {key: (value - before[key]).abs().max() for key, value in module(run.student.encoder).state_dict().items()}
    assert float(moved["cls_token"]) == pytest.approx(2e-3, rel=1e-2)
    assert float(moved["reg_token"]) == pytest.approx(1e-3, rel=1e-2)
    assert float(moved["pos_embed"]) == pytest.approx(1e-3, rel=1e-2)


def test_a_run_begun_with_one_group_less_is_told_and_not_resumed(tmp_path: Path) -> None:
    """As versions before the class token's own group left it."""
    settings, options = (
        recipe(**SIZES, **SETTINGS["registers"]),
        TrainOptions(tmp_path, "shapes:8", workers=0, progress=False),
    )
    loop.train(settings, options)
    for file in tmp_path.glob("checkpoint-*/training.pt"):
        state = torch.load(file, weights_only=True)
        state["optimizer"]["param_groups"].pop()
        torch.save(state, file)
    with pytest.raises(BadInputError, match=r"parameter groups.* No earlier one can be read"):
        loop.train(settings, dataclasses.replace(options, resume=True))


def test_that_parts_are_no_larger_batch_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for accumulate in (1, 2):
        caplog.clear()
        settings = recipe(**SIZES, **SETTINGS["registers"], accumulate=accumulate)
        with caplog.at_level(logging.WARNING, "neco_bench"):
            make_trainer(settings, tmp_path)
        assert ("each part of 2 images is a separate batch" in caplog.text) is (accumulate == 2)


@pytest.mark.parametrize(
    ("spec", "folds"),
    [
        ("timm:vit_small_patch14_reg4_dinov2?pretrained=false", True),
        ("timm:vit_small_patch14_dinov2?pretrained=false", False),
        ("timm:vit_base_patch16_radio_v3?pretrained=false", False),
        ("timm:vit_base_patch16_xp_224?pretrained=false", False),
        ("baseline_rgb", False),
    ],
)
def test_which_class_tokens_hold_a_position(spec: str, folds: bool) -> None:
    encoder = load_encoder(spec, device="cpu")
    token = folded_class_token(encoder)
    assert (token is module(encoder).cls_token) if folds else (token is None)
