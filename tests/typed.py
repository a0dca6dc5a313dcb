"""What a test expects a value to be, asserted, so that mypy knows it too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from neco_bench.data.base import PairDataset, Sample, SegmentationDataset
from neco_bench.data.folder import SegmentationFolder
from neco_bench.data.load import load_dataset
from neco_bench.encoders import Encoder

Value = TypeVar("Value")


def load_segmentation(name: str, split: str, **options: Any) -> SegmentationDataset:
    dataset = load_dataset(name, split, **options)
    assert isinstance(dataset, SegmentationDataset)
    return dataset


def load_pairs(name: str, split: str, **options: Any) -> PairDataset:
    dataset = load_dataset(name, split, **options)
    assert isinstance(dataset, PairDataset)
    return dataset


def samples(dataset: SegmentationDataset) -> Iterator[Sample]:
    return (dataset[index] for index in range(len(dataset)))


def present(value: Value | None) -> Value:
    assert value is not None
    return value


def module(encoder: Encoder) -> nn.Module:
    """The network that an encoder of timm or transformers wraps."""
    assert isinstance(encoder.model, nn.Module)
    return encoder.model


def load_folder(name: str, split: str, **options: Any) -> SegmentationFolder:
    dataset = load_dataset(name, split, **options)
    assert isinstance(dataset, SegmentationFolder)
    return dataset
