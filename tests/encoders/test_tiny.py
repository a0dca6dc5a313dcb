"""The small ViT that the tiny recipes train."""

from __future__ import annotations

import torch

from neco_bench.encoders import load_encoder
from neco_bench.encoders.check import check_encoder
from neco_bench.training.recipe import load_recipe


def test_it_is_an_encoder_like_others() -> None:
    encoder = load_encoder(load_recipe("tiny_base").base)
    assert load_recipe("tiny_neco").base == load_recipe("tiny_base").base
    assert (encoder.embed_dim, encoder.stride, encoder.has_final_norm) == (128, 8, True)
    assert sum(p.numel() for p in encoder.parameters()) == 843_136
    assert encoder.encode(torch.rand(1, 3, 32, 48)).map.shape == (1, 128, 4, 6)
    assert all(row.passed for row in check_encoder(encoder))
