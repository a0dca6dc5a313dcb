"""When the position of the class token becomes part of the token: DINOv2's register files in timm's models alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from neco_bench.encoders.weights import to_timm

NARROW: dict[str, Any] = {"embed_dim": 24, "depth": 1, "num_heads": 2, "img_size": 32, "num_classes": 0}


def model(**options: Any) -> Any:
    return timm.create_model("vit_tiny_patch16_224", **NARROW, **options)


def official(registers: int = 2, positions: int = 5) -> dict[str, Tensor]:
    """What matters here of a file: tokens and positions, those of the class and of 2 x 2 patches."""
    rng = torch.Generator().manual_seed(0)
    sizes = {"cls_token": 1, "register_tokens": registers, "pos_embed": positions}
    return {key: torch.randn(1, count, 24, generator=rng) for key, count in sizes.items()}


def test_a_model_without_a_class_position_takes_it_into_the_token() -> None:
    file = official()
    tensors, renamed, _ = to_timm(file, model(reg_tokens=2, no_embed_class=True), Path("file"))
    assert torch.equal(tensors["cls_token"], file["cls_token"] + file["pos_embed"][:, :1])
    assert torch.equal(tensors["pos_embed"], file["pos_embed"][:, 1:])
    assert torch.equal(tensors["reg_token"], file["register_tokens"])
    assert renamed == {"register_tokens": "reg_token", "pos_embed[:, :1]": "cls_token (added)"}


def test_a_model_with_positions_for_all_tokens_keeps_both() -> None:
    file = official(positions=7)
    tensors, renamed, _ = to_timm(file, model(reg_tokens=2), Path("file"))
    assert torch.equal(tensors["cls_token"], file["cls_token"])
    assert torch.equal(tensors["pos_embed"], file["pos_embed"])
    assert renamed == {"register_tokens": "reg_token"}


@pytest.mark.parametrize("absent", ["cls_token", "pos_embed"])
def test_without_one_of_the_two_nothing_is_folded(absent: str) -> None:
    """What is absent is message when the tensors are loaded."""
    file = official()
    del file[absent]
    tensors, renamed, _ = to_timm(file, model(reg_tokens=2, no_embed_class=True), Path("file"))
    (other,) = {"cls_token", "pos_embed"} - {absent}
    assert torch.equal(tensors[other], file[other])
    assert renamed == {"register_tokens": "reg_token"}


def test_timms_own_names_are_folded_already() -> None:
    file = official(positions=4)
    file["reg_token"] = file.pop("register_tokens")
    tensors, renamed, _ = to_timm(file, model(reg_tokens=2, no_embed_class=True), Path("file"))
    assert all(torch.equal(tensors[key], file[key]) for key in file)
    assert not renamed


def test_dropped_registers_leave_the_position_where_it_is() -> None:
    file = official()
    tensors, _, dropped = to_timm(file, model(), Path("file"), drop_registers=True)
    assert dropped == ("register_tokens",)
    assert torch.equal(tensors["pos_embed"], file["pos_embed"])
    assert torch.equal(tensors["cls_token"], file["cls_token"])
