"""Threads load what worker processes load, to the digit, and leave the encoder its cores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from torch import Tensor

from neco_bench.features.loader import loading_threads


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def with_contrast(seed: int) -> tuple[int, Tensor]:
    """The threads that this one computes with, and an image in whose contrast the sum of all its pixels is."""
    image = torch.rand(3, 300 + seed, 500, generator=torch.Generator().manual_seed(seed))
    return torch.get_num_threads(), tvf.adjust_contrast(image, 0.7)


def test_an_image_does_not_depend_on_the_number_of_threads(four_threads: None) -> None:
    with loading_threads() as pool:
        loaded = list(pool.map(with_contrast, range(12)))
        assert torch.get_num_threads() == 4
    torch.set_num_threads(1)  # as in a worker process
    for seed, (threads, image) in enumerate(loaded):
        assert threads == 1
        assert torch.equal(image, with_contrast(seed)[1])
