"""The probe against a plain loop that upsamples features before the head, as the reference does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from neco_bench.tasks.linear_segmentation.heads import classify, logits_at, new_head, train_probe
from neco_bench.tasks.linear_segmentation.settings import Settings
from torch import nn

from neco_bench.core.errors import NumericalError
from neco_bench.core.protocol import protocol
from tests.typed import present

CONSTANTS: dict[str, Any] = dict(protocol("linear_segmentation", "neco-1").constants)
CHANGES = {"input_size": 448, "momentum": 0.9, "weight_decay": 1e-4, "decay": 0.1, "decay_epochs": 3}
OPTIONS = Settings(**CONSTANTS | CHANGES)


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 5, (count, 4, 20, 20), generator=generator)
    target[:, :, 0] = 255
    return list(zip(torch.randn(count, 4, 16, 7, 7, generator=generator), target, strict=True))


def test_fifty_steps_equal_a_plain_loop() -> None:
    data = [batches(10) for _ in range(5)]
    head = new_head(16, 5, 1, torch.device("cpu"))
    plain = nn.Conv2d(16, 5, 1)
    plain.load_state_dict(head.state_dict())
    snapshots = train_probe([head], [0.01], data, OPTIONS)

    rate, momentum = 0.01, [torch.zeros_like(p) for p in plain.parameters()]
    up = nn.Upsample(size=(20, 20), mode="bilinear", align_corners=False)
    for number, epoch in enumerate(data, 1):
        for features, target in epoch:
            loss = nn.functional.cross_entropy(plain(up(features)), target, ignore_index=255)
            gradients = torch.autograd.grad(loss, list(plain.parameters()))
            with torch.no_grad():
                for p, g, m in zip(plain.parameters(), gradients, momentum, strict=True):
                    m.mul_(0.9).add_(g + 1e-4 * p)
                    p.sub_(rate * m)
        rate = 0.01 * 0.1 ** (number // 3)
    assert len(snapshots) == 5
    for ours, theirs in zip(snapshots[-1][0].parameters(), plain.parameters(), strict=True):
        np.testing.assert_allclose(ours.detach(), theirs.detach(), atol=1e-5)


def test_heads_trained_together_are_those_trained_alone() -> None:
    data, device = [batches(4) for _ in range(4)], torch.device("cpu")
    places = [(rate, seed) for rate in (0.01, 0.1) for seed in (0, 1)]
    together = train_probe([new_head(16, 5, seed, device) for _, seed in places], [r for r, _ in places], data, OPTIONS)
    for number, (rate, seed) in enumerate(places):
        alone = train_probe([new_head(16, 5, seed, device)], [rate], data, OPTIONS)
        for joint, single in zip(together, alone, strict=True):
            assert torch.allclose(joint[number].weight, single[0].weight, atol=1e-6)
            assert torch.allclose(present(joint[number].bias), present(single[0].bias), atol=1e-6)


def test_many_heads_classify_as_each_alone() -> None:
    features = batches(1)[0][0]
    heads = [new_head(16, 5, seed, torch.device("cpu")) for seed in range(3)]
    together = classify(heads, features[0], 20, 30)
    for head, ids in zip(heads, together, strict=True):
        assert torch.equal(ids, logits_at([head], features[:1], 20, 30)[0, 0].argmax(0))


def test_a_seed_gives_the_same_head_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = (new_head(4, 3, 7, torch.device("cpu")) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(torch.rand(1), expected)


def test_a_batch_without_labels_teaches_nothing() -> None:
    features, target = batches(1)[0]
    steps = [(features, target), (features, torch.full_like(target, 255))]
    first, second = (
        train_probe([new_head(16, 5, 0, torch.device("cpu"))], [0.01], [part], OPTIONS)[0][0]
        for part in (steps, steps[:1])
    )
    assert torch.equal(first.weight, second.weight)


def test_a_loss_that_is_not_finite() -> None:
    features, target = batches(1)[0]
    with pytest.raises(NumericalError, match="learning_rate"):
        train_probe([new_head(16, 5, 0, torch.device("cpu"))], [0.01], [[(features * torch.inf, target)]], OPTIONS)
