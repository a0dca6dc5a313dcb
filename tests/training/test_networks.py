"""Student and teacher: stochastic depth, what is trained, parameter groups, embeddings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from neco_bench.core.distributed import RankShard
from neco_bench.core.errors import UsageError
from neco_bench.encoders.trainable import StochasticDepth, add_stochastic_depth, blocks_of, set_training
from neco_bench.training.networks import (
    Network,
    make_trainable,
    parameter_groups,
)

from .helpers import recipe, small_encoder


@given(rate=st.floats(0.05, 0.6), views=st.integers(1, 4), number=st.integers(0, 9))
def test_stochastic_depth_keeps_or_drops_whole_images_and_the_mean(rate: float, views: int, number: int) -> None:
    drop = StochasticDepth(rate, 3, RankShard(0, images=500, batch_number=number))
    out = drop(torch.ones(views * 500, 2, 5)).flatten(1)
    assert torch.equal(out.min(1).values, out.max(1).values)
    torch.testing.assert_close(out[out > 0], torch.full_like(out[out > 0], 1 / (1 - rate)))
    spread = (rate / (1 - rate) / (views * 500)) ** 0.5
    assert abs(float(out.mean()) - 1) < 5 * spread
    drop.calls = 0
    assert torch.equal(drop(torch.ones(views * 500, 2, 5)).flatten(1), out)
    assert torch.equal(drop.eval()(torch.ones(4, 2)), torch.ones(4, 2))


def test_exact_depth_keeps_a_fixed_number_of_images() -> None:
    drop = StochasticDepth(0.1, 0, RankShard(0, images=8), exact=True)
    for number in range(5):
        drop.shard.batch_number = number
        out = drop(torch.ones(16, 3))  # protocols/neco.md 1.4: floor(16 * 0.9) = 14, scaled by 16 / 14
        assert (out[:, 0] > 0).sum() == 14
        assert float(out.max()) == pytest.approx(16 / 14)


@pytest.mark.parametrize("exact", [False, True])
def test_processes_drop_what_one_process_drops(exact: bool) -> None:
    whole = StochasticDepth(0.4, 1, RankShard(0, images=6), exact)(torch.ones(12, 2)).unflatten(0, (2, 6))
    parts = [
        StochasticDepth(0.4, 1, RankShard(0, images=3, start=start, total=6), exact)(torch.ones(6, 2)).unflatten(
            0, (2, 3)
        )
        for start in (0, 3)
    ]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_drop_path_grows_linearly_over_the_blocks_of_a_vit() -> None:
    encoder = small_encoder("timm:test_vit2?pretrained=false")
    make_trainable(encoder, recipe(drop_path=0.1), RankShard(0, 2), False)
    drops = [m for m in encoder.modules() if isinstance(m, StochasticDepth)]
    assert [round(d.rate, 6) for d in drops] == [round(0.1 * i / 7, 6) for i in range(1, 8) for _ in range(2)]
    assert [d.exact for d in drops] == [False] * 12 + [True] * 2  # the last block of a ViT with LayerScale
    assert len({d.number for d in drops}) == len(drops)


class OneForBoth(torch.nn.Module):
    """As transformers and torch.hub have blocks: one module drops both branches, and torch.hub's only if it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_path, self.sample_drop_ratio = torch.nn.Identity(), 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.sample_drop_ratio:
            return torch.cat([x, x], 1)
        return torch.cat([self.drop_path(x), self.drop_path(x)], 1)


def test_branches_that_share_a_module_are_dropped_apart() -> None:
    model: Any = torch.nn.Sequential(OneForBoth(), OneForBoth())
    add_stochastic_depth(model, 0.5, RankShard(0, 64))
    output = model[1](torch.ones(64, 1))
    assert {tuple(row) for row in output.tolist()} == {(0, 0), (0, 2), (2, 0), (2, 2)}
    assert torch.equal(model[1](torch.ones(64, 1)), output)
    torch.testing.assert_close(model[0](torch.ones(64, 1)), torch.ones(64, 2))


@pytest.mark.slow
def test_blocks_without_layer_scale() -> None:
    encoder = small_encoder("timm:vit_small_patch16_dinov3?pretrained=false")
    make_trainable(encoder, recipe(drop_path=0.1), RankShard(0, 2), False)
    assert any(isinstance(m, StochasticDepth) for m in encoder.modules())


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ("timm:test_vit?pretrained=false", 6),
        ("timm:resnet18?pretrained=false", 4),
        ("timm:test_convnext?pretrained=false", 4),
        ("timm:vit_tiny_patch16_224?pretrained=false", 12),
    ],
)
def test_blocks_are_found(spec: str, count: int) -> None:
    assert len(blocks_of(small_encoder(spec))) == count


def test_trainable_blocks_freeze_everything_else() -> None:
    encoder = small_encoder()
    make_trainable(encoder, recipe(trainable_blocks=4), RankShard(0, 2), False)
    trained = {name.split(".")[2] for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained == {"4", "5"}
    make_trainable(encoder, recipe(trainable_blocks=[0]), RankShard(0, 2), False)
    assert {name.split(".")[2] for name, p in encoder.named_parameters() if p.requires_grad} == {"0"}
    with pytest.raises(UsageError, match="has 6 blocks"):
        make_trainable(encoder, recipe(trainable_blocks=[7]), RankShard(0, 2), False)


def test_an_encoder_without_weights_is_refused() -> None:
    with pytest.raises(UsageError, match="no weights to train"):
        make_trainable(small_encoder("baseline_rgb"), recipe(), RankShard(0, 2), False)


def test_what_features_do_not_pass_through_is_frozen(caplog: pytest.LogCaptureFixture) -> None:
    encoder = small_encoder("timm:test_vit3?pretrained=false")  # has attention pooling
    make_trainable(encoder, recipe(), RankShard(0, 2), False)
    frozen = [name for name, p in encoder.named_parameters() if not p.requires_grad]
    assert frozen
    assert all("attn_pool" in name for name in frozen)
    assert "attn_pool" in caplog.text
    assert all(p.grad is None for p in encoder.parameters())


def test_batch_normalisation_keeps_its_statistics() -> None:
    encoder = small_encoder("timm:resnet18?pretrained=false")
    make_trainable(encoder, recipe(), RankShard(0, 2), False)
    network = Network(encoder, recipe(), 0)
    set_training(network)
    before = copy.deepcopy(dict(encoder.named_buffers()))
    network([torch.randn(2, 3, 64, 64)], [torch.ones(2, 2, 2, dtype=torch.bool)])
    assert before
    assert all(torch.equal(value, before[name]) for name, value in encoder.named_buffers())


def test_parameter_groups() -> None:
    encoder = small_encoder()
    make_trainable(encoder, recipe(), RankShard(0, 2), False)
    network = Network(encoder, recipe(), 0)
    groups = parameter_groups(network)
    assert [(g["part"], g["decays"]) for g in groups] == [
        ("backbone", True),
        ("backbone", False),
        ("head", True),
        ("head", False),
    ]
    assert all((p.dim() > 1) == g["decays"] for g in groups for p in g["params"])
    names = {id(p): name for name, p in network.named_parameters()}
    decaying = {names[id(p)] for p in groups[0]["params"]}
    assert {"encoder.model.pos_embed", "encoder.model.cls_token", "encoder.model.patch_embed.proj.weight"} <= decaying
    together = [id(p) for g in groups for p in g["params"]]
    assert len(together) == len(set(together)) == sum(p.requires_grad for p in network.parameters())


def test_head_as_the_official_one() -> None:
    head = Network(small_encoder(), recipe(head_hidden=2048, head_dim=256), 7).projection_head
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    assert shapes == {
        "0.weight": (2048, 64), "0.bias": (2048,),
        "2.weight": (2048, 2048), "2.bias": (2048,),
        "4.weight": (256, 2048), "4.bias": (256,),
    }  # fmt: skip
    middle = head.get_submodule("2")
    assert isinstance(middle, torch.nn.Linear)
    assert float(middle.weight.std()) == pytest.approx(0.02, rel=0.01)
    assert not middle.bias.any()


def test_embeddings_are_those_of_all_patches_where_needed_and_zero_elsewhere() -> None:
    network = Network(small_encoder(), recipe(), 0).eval()
    images = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(1)) > 0.5
    (some,) = network([images], [mask])
    features = network.encoder._encode(images, final_norm=True, attention=False).map
    whole = F.normalize(network.projection_head(features.permute(0, 2, 3, 1)), dim=-1).permute(0, 3, 1, 2)
    assert some.shape == (2, 16, 4, 3)
    torch.testing.assert_close(some, whole * mask[:, None], rtol=1e-5, atol=1e-6)


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        encoder = small_encoder()
        make_trainable(encoder, recipe(drop_path=0.3), RankShard(0, 2), checkpointing)
        network = Network(encoder, recipe(), 0)
        set_training(network)
        images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        network([images], [torch.ones(4, 4, 4, dtype=torch.bool)])[0].square().sum(1).pow(2).sum().backward()
        gradients.append([p.grad for p in network.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
