"""The linear heads of depth and normals against plain PyTorch, 50 steps; schedules, losses and regions by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from neco_bench.tasks.dense_regression.heads import DenseHead, predict
from neco_bench.tasks.dense_regression.inputs import InputGrid
from neco_bench.tasks.dense_regression.losses import angular_loss, cosine_loss, sig_loss
from neco_bench.tasks.dense_regression.score import region_of
from neco_bench.tasks.dense_regression.settings import Settings
from neco_bench.tasks.dense_regression.training import rates_at, train_head
from torch import Tensor, nn

from neco_bench.core.protocol import find_tasks

STEPS, CHANNELS, SIZE = 50, 6, (32, 40)
GRID = InputGrid(SIZE, SIZE)


def settings_of(task: str, **changes: object) -> Settings:
    (found,) = find_tasks([task], changes)
    settings = found.settings()
    assert isinstance(settings, Settings)
    return settings


def batches(kind: str, channels: int, images: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        features = torch.randn(images, channels, 4, 5, generator=rng)
        if kind == "depth":
            target = torch.rand(images, *SIZE, generator=rng) * 8 + 0.5
            target[torch.rand(images, *SIZE, generator=rng) < 0.3] = 0
        else:
            target = F.normalize(torch.randn(images, *SIZE, 3, generator=rng), dim=-1)
            target[torch.rand(images, *SIZE, generator=rng) < 0.3] = 0
        yield features, target


def plain_sig(prediction: Tensor, depth: Tensor, step: int, images: int, warmup: int) -> Tensor:
    losses = []
    for start in range(0, len(depth), images):
        p, d = prediction[start : start + images], depth[start : start + images]
        g = torch.log(p[d > 0] + 0.001) - torch.log(d[d > 0] + 0.001)
        variance = ((g - g.mean()) ** 2).sum() / (len(g) - 1)
        losses.append(torch.sqrt((variance if step >= warmup else 0) + 0.15 * g.mean() ** 2))
    return sum(losses) / len(losses)  # type: ignore[return-value]


def plain_depth(logits: Tensor) -> Tensor:
    weights = torch.relu(logits) + 0.1
    weights = weights / weights.sum(1, keepdim=True)
    depth = torch.einsum("bkhw,k->bhw", weights, torch.linspace(0.001, 10, 256))
    return F.interpolate(depth[:, None], SIZE, mode="bilinear", align_corners=False)[:, 0]


def plain_dinov3(norm: nn.Module, conv: nn.Conv2d, features: Tensor, depth: Tensor, step: int) -> Tensor:
    return plain_sig(plain_depth(conv(norm(features))), depth, step, 2, 100)


def plain_dinov2(norm: nn.Module, conv: nn.Conv2d, features: Tensor, depth: Tensor, step: int) -> Tensor:
    """The features are upsampled, as there; ours upsamples the logits."""
    large = F.interpolate(features, scale_factor=4, mode="bilinear", align_corners=False)
    return plain_sig(plain_depth(conv(large)), depth, step, 2, 100)


def plain_clean_depth(norm: nn.Module, conv: nn.Conv2d, features: Tensor, depth: Tensor, step: int) -> Tensor:
    return plain_sig(plain_depth(conv(norm(features))), depth, step, len(depth), 0)


def plain_clean_normals(norm: nn.Module, conv: nn.Conv2d, features: Tensor, normals: Tensor, step: int) -> Tensor:
    found = F.interpolate(conv(norm(features)), SIZE, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    known = normals.abs().sum(-1) > 0
    cosine = (F.normalize(found[known], dim=1) * normals[known]).sum(1)
    return (1 - cosine).mean()


def plain_probe3d(norm: nn.Module, conv: nn.Conv2d, features: Tensor, normals: Tensor, step: int) -> Tensor:
    large = F.interpolate(features, scale_factor=4, mode="bilinear", align_corners=False)
    found = F.interpolate(conv(large), SIZE, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    known = normals.abs().sum(-1) > 0
    cosine = (F.normalize(found[known][:, :3], dim=1) * normals[known]).sum(1)
    theta = torch.acos(torch.clip(cosine, -(1 - 1e-4), 1 - 1e-4))
    z = found[known][:, 3]
    kappa = torch.where(z > 0, z, torch.exp(z) - 1) + 1.01
    return (kappa * theta + torch.log(1 + torch.exp(-kappa * math.pi)) - torch.log(kappa**2 + 1)).mean()


def plain_rates(schedule: str, peak: float, step: int) -> tuple[float, float]:
    """Rate and beta1 of 50 steps, written out from the protocol facts."""
    total = STEPS
    if schedule == "dinov3":
        warmup = 17
        if step < warmup:
            return peak / 1000 + peak * (1 + math.cos(math.pi * step / total)) / 2 * step / warmup, 0.0
        least = peak / 25 / 1000
        rate = least + (peak - least) * (1 + math.cos(math.pi * (step + 1) / total)) / 2
        return rate, 0.95 - 0.05 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    if schedule == "dinov2":
        warmup, turn = 17, 0.3 * total - 1
        rate = 1e-8 * peak + (peak - 1e-8 * peak) * (1 + math.cos(math.pi * step / total)) / 2
        if step < warmup:
            rate *= 1 - (1 - step / warmup) * (1 - 0.001)
        if step <= turn:
            return rate, 0.85 + 0.05 * (1 + math.cos(math.pi * step / turn))
        return rate, 0.95 - 0.05 * (1 + math.cos(math.pi * (step - turn) / (total - 1 - turn)))
    if schedule == "probe3d":
        warmup = 8  # 0.15 of 50, rounded to even
        if step < warmup:
            return peak * (0.01 + 0.99 * step / warmup), 0.9
        return peak * (0.99 * math.cos(math.pi / 2 * (step - warmup) / (total - warmup)) + 0.01), 0.9
    warmup = 5
    if step < warmup:
        return peak * (step + 1) / warmup, 0.9
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2, 0.9


Plain = Callable[[nn.Module, nn.Conv2d, Tensor, Tensor, int], Tensor]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "plain"),
    [
        ("nyu_depth@dinov3-1", plain_dinov3),
        ("nyu_depth@dinov2-lin1", plain_dinov2),
        ("nyu_depth@clean-1", plain_clean_depth),
        ("nyu_normals@clean-1", plain_clean_normals),
        ("nyu_normals@probe3d-1", plain_probe3d),
    ],
)
def test_fifty_steps_equal_plain_pytorch(task: str, plain: Plain) -> None:
    """Weights after each constant of the protocol has acted: loss, groups, schedule, betas, decay, clipping."""
    settings = settings_of(task, loss_warmup=20) if task == "nyu_depth@dinov2-lin1" else settings_of(task)
    head = DenseHead(CHANNELS, settings, seed=3)
    norm = nn.BatchNorm2d(CHANNELS) if settings.batch_norm else nn.Identity()
    conv = nn.Conv2d(CHANNELS, head.conv.out_channels, settings.kernel, padding=settings.kernel // 2)
    conv.load_state_dict(head.conv.state_dict())
    initial = head.conv.weight.detach().clone()
    trained = train_head(head, batches(settings.target, CHANNELS), GRID, STEPS)
    assert list(trained)[-1] == STEPS
    assert (head.conv.weight - initial).abs().max() > 1e-3, "equal weights prove nothing where none has moved"

    optimizer = torch.optim.AdamW(
        [*norm.parameters(), *conv.parameters()],
        lr=1.0,
        betas=(0.9, settings.beta2),
        weight_decay={"dinov3": 1e-4, "dinov2": 0.01, "probe3d": 0.01, "cosine": 1e-4}[settings.schedule],
    )
    peak = {"dinov3": 3e-4, "dinov2": 1e-4, "probe3d": 5e-4, "cosine": 1e-3}[settings.schedule]
    for step, (features, target) in enumerate(batches(settings.target, CHANNELS)):
        rate, beta1 = plain_rates(settings.schedule, peak, step)
        optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"] = rate, (beta1, settings.beta2)
        if task == "nyu_depth@dinov2-lin1":  # with the variance from step 20 on, so that both forms are tested
            large = F.interpolate(features, scale_factor=4, mode="bilinear", align_corners=False)
            loss = plain_sig(plain_depth(conv(large)), target, step, 2, 20)
        else:
            loss = plain(norm, conv, features, target, step)
        optimizer.zero_grad()
        loss.backward()
        if settings.schedule != "probe3d":
            torch.nn.utils.clip_grad_norm_([*norm.parameters(), *conv.parameters()], 35)
        optimizer.step()
    assert torch.allclose(head.conv.weight, conv.weight, atol=1e-5, rtol=0)
    assert torch.allclose(head.conv.bias, conv.bias, atol=1e-5, rtol=0)  # type: ignore[arg-type]
    if settings.batch_norm:
        assert torch.allclose(head.norm.running_var, norm.running_var, atol=1e-5, rtol=0)  # type: ignore[arg-type]
    assert not torch.allclose(conv.weight, DenseHead(CHANNELS, settings, seed=3).conv.weight, atol=1e-4)


def test_the_schedule_of_dinov3_at_its_length() -> None:
    """Values of the protocol facts, evaluated from the reference's formula."""
    settings = settings_of("nyu_depth@dinov3-1")
    expected = {0: 3.0e-7, 6400: 1.40252e-4, 12799: 2.25293e-4, 12800: 2.24992e-4, 25600: 7.49984e-5, 38399: 1.2e-8}
    for step, rate in expected.items():
        assert rates_at(step, 38400, settings)[0] == pytest.approx(rate, rel=1e-5)
    assert [rates_at(step, 38400, settings)[1] for step in (0, 12799, 12800)] == [0, 0, 0.85]
    assert max(rates_at(step, 38400, settings)[0] for step in range(0, 38400, 100)) < 3e-4


def test_zero_logits_predict_the_middle() -> None:
    head = DenseHead(2, settings_of("nyu_depth@dinov3-1"), 0).eval()
    nn.init.zeros_(head.conv.weight)
    assert predict(head, torch.ones(1, 2, 3, 4), GRID, SIZE).mean().item() == pytest.approx(5.0005, abs=1e-4)


def test_losses_by_hand() -> None:
    depth, found = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([2.0, 2.0, 9.0])
    g = [math.log(2.001 / 1.001), 0.0]
    mean = sum(g) / 2
    variance = sum((value - mean) ** 2 for value in g)  # unbiased: divided by 1
    loss = sig_loss(found, depth, depth > 0)
    assert loss.item() == pytest.approx(math.sqrt(variance + 0.15 * mean**2), rel=1e-6)
    start = sig_loss(found, depth, depth > 0, with_variance=False)
    assert start.item() == pytest.approx(math.sqrt(0.15) * mean, rel=1e-6)
    normals = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 0]])
    directions = torch.tensor([[2.0, 0, 0], [3, 0, 0], [1, 1, 1]])
    assert cosine_loss(directions, normals, normals.any(-1)).item() == pytest.approx(0.5)
    theta, kappa = math.pi / 2, 1.01
    loss = angular_loss(torch.tensor([[3.0, 0, 0, 0]]), normals[1:2], torch.tensor([True]))
    expected = kappa * theta + math.log(1 + math.exp(-kappa * math.pi)) - math.log(kappa**2 + 1)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_regions() -> None:
    """Rows and columns of the facts: Eigen's of 480 x 640, Garg's of what is left of KITTI frames."""
    rows, columns = region_of("eigen", (480, 640))
    assert (rows.start, rows.stop - 1, columns.start, columns.stop - 1) == (45, 470, 41, 600)
    rows, columns = region_of("garg", (352, 1216))
    assert (rows.start, rows.stop, columns.start, columns.stop) == (143, 349, 43, 1172)
    assert np.ones((5, 6))[region_of("full", (5, 6))].size == 30
    rows, columns = region_of("eigen", (240, 320))
    assert (rows.start, columns.stop) == (22, 300)


@pytest.mark.parametrize("keep", [True, False])
def test_padding_stretches_a_prediction_only_where_the_protocol_says_so(keep: bool) -> None:
    """An input of 28 x 28 with an image of 20 x 20 in it, whose depth falls from left to right."""
    changes = {"keep_padding": keep, "batch_norm": False, "bins": 2, "min_depth": 1.0, "max_depth": 9.0}
    settings = settings_of("nyu_depth@dinov3-1", **changes)
    head = DenseHead(1, settings, 0).eval()
    nn.init.zeros_(head.conv.bias)  # type: ignore[arg-type]
    with torch.no_grad():
        head.conv.weight[:, 0, 0, 0] = torch.tensor([0.0, 1.0])
    grid = InputGrid((20, 20), (28, 28))
    assert grid.corner == (4, 4)
    features = torch.arange(28).float().expand(1, 1, 28, 28)
    found = predict(head, features, grid, (20, 20))[0, 10]
    depth = 9 - 8 * 0.1 / (torch.arange(28.0) + 0.2)  # of the cells: weights 0.1 and x + 0.1
    stretched = F.interpolate(depth[None, None], 20, mode="linear", align_corners=False)[0, 0]
    assert torch.allclose(found, stretched if keep else depth[4:24], atol=1e-4)
