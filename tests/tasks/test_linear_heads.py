"""The linear protocols of DINOv2, of one block and of several, and Leopart's FCN head: independent computations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from neco_bench.tasks.linear_segmentation import dinov2, fcn
from neco_bench.tasks.linear_segmentation.dinov2_settings import Settings
from neco_bench.tasks.linear_segmentation.dinov3_head import BnHead, learning_rate
from torch import Tensor, nn

import neco_bench
from neco_bench.core.errors import UsageError
from neco_bench.core.protocol import find_tasks, protocol
from neco_bench.core.task import Context
from neco_bench.data.base import IGNORE
from neco_bench.encoders import DenseFeatures, Encoder, load_encoder
from neco_bench.encoders.adapters.layers import read_last
from neco_bench.features.extract import FeatureExtractor

MODEL = "timm:test_vit?pretrained=false&seed=0"


def test_the_rate_of_dinov2_rises_and_falls_linearly() -> None:
    """protocols/linear_and_knn_others.md, section 2: warm-up of 1500 from 1e-6, times what is left of 40 000."""
    constants: dict[str, Any] = {**protocol("linear_segmentation", "dinov2-1").constants, "input_size": 512}
    options = Settings(**constants)
    assert learning_rate(0, options) == pytest.approx(1e-9, rel=1e-9)
    assert learning_rate(750, options) == pytest.approx(1e-3 * 0.5000005 * (1 - 750 / 40_000), rel=1e-9)
    assert learning_rate(1500, options) == pytest.approx(1e-3 * (1 - 1500 / 40_000), rel=1e-12)
    assert learning_rate(39_999, options) == pytest.approx(2.5e-8, rel=1e-9)


def test_the_last_blocks_are_read_together() -> None:
    encoder, image = load_encoder(MODEL, device="cpu"), torch.rand(1, 3, 64, 64)
    four = read_last(encoder, 4)
    levels = [load_encoder(MODEL, device="cpu", layers=i).encode(image).map for i in range(-4, 0)]
    torch.testing.assert_close(four.encode(image).map, torch.cat(levels, 1))
    assert four.embed_dim == 4 * encoder.embed_dim
    assert encoder.layer == "last"  # as before
    assert torch.equal(encoder.encode(image).map, levels[-1])
    assert read_last(encoder, 1) is encoder
    for other, count in (("baseline_rgb", 2), ("timm:resnet10t?pretrained=false", 2), (MODEL, 99)):
        with pytest.raises(UsageError, match="blocks"):
            read_last(load_encoder(other, device="cpu"), count)


class Colours(Encoder):
    """The mean colour of cells of 8 pixels."""

    name, weights_id, embed_dim, stride = "colours", "0", 3, 8

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        return DenseFeatures(F.avg_pool2d(images, 8), 8)


def test_several_views_are_averaged() -> None:
    """Windows of 32 every 16 pixels of an image whose short side is 32 and 48, as it is and flipped."""
    (found,) = find_tasks(["voc_linear@dinov2-ms-1"], {"input_size": 32, "test_scales": [1.0, 1.5]})
    settings: Any = found.settings()
    encoder, head = Colours(), BnHead(3, 4, 0).eval()
    nn.init.normal_(head.weight)
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    extractor = FeatureExtractor(encoder, Context(), mean=settings.mean, std=settings.std)
    classes = dinov2.classify(extractor, head, image, 32, settings)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.mean, settings.std))
    total = torch.zeros(4, 40, 60)
    for size in ((32, 48), (48, 72)):
        for flip in (False, True):
            view = F.interpolate(pixels.flip(-1) if flip else pixels, size, mode="bilinear").round() / 255
            scores, visits = torch.zeros(4, *size), torch.zeros(size)
            for top in range(0, size[0] - 31, 16):
                for left in [*range(0, size[1] - 32, 16), size[1] - 32]:
                    cells = F.avg_pool2d((view[0, :, top : top + 32, left : left + 32] - mean) / std, 8)
                    logits = F.interpolate(head(cells[None]), (32, 32), mode="bilinear")[0].detach()
                    scores[:, top : top + 32, left : left + 32] += logits
                    visits[top : top + 32, left : left + 32] += 1
            large = F.interpolate((scores / visits)[None], (40, 60), mode="bilinear")[0].softmax(0)
            total += large.flip(-1) if flip else large
    assert (classes == total.argmax(0).numpy()).mean() > 0.998  # the rest is ties up to rounding


def test_the_fcn_head_is_three_convolutions_and_a_classifier() -> None:
    head, features = fcn.new_fcn_head(6, 5, 3, 0), torch.randn(2, 6, 7, 9)

    def convolve(x: Tensor, layer: nn.Conv2d) -> Tensor:
        """A 3x3 convolution as a sum over its nine places."""
        assert layer.bias is not None
        padded, total = F.pad(x, (1, 1, 1, 1)), layer.bias[:, None, None].expand(len(x), -1, *x.shape[2:])
        for i in range(3):
            for j in range(3):
                part = padded[:, :, i : i + x.shape[2], j : j + x.shape[3]]
                total = total + torch.einsum("oc,bchw->bohw", layer.weight[:, :, i, j], part)
        return total.clamp(min=0)

    inner = convolve(convolve(features, head.first), head.second)
    hidden = convolve(torch.cat([features, inner], 1), head.joined)
    assert head.classify.bias is not None
    expected = torch.einsum("oc,bchw->bohw", head.classify.weight[:, :, 0, 0], hidden)
    torch.testing.assert_close(head(features), expected + head.classify.bias[:, None, None])
    wide = fcn.new_fcn_head(384, 512, 21, 0)
    assert float(wide.first.weight.detach().std()) == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    assert torch.equal(wide.first.weight, fcn.new_fcn_head(384, 512, 21, 0).first.weight)


def test_the_fcn_gradient_is_that_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    head, features = fcn.new_fcn_head(4, 6, 3, 0), torch.randn(5, 4, 4, 4)
    target = torch.randint(0, 3, (5, 10, 10))
    target[0] = IGNORE
    factors = torch.rand(5, 6, 1, 1)
    monkeypatch.setattr(fcn, "PART", 2)
    loss = fcn.add_gradient(head, features, target, factors)
    gradients = [parameter.grad for parameter in head.parameters()]
    large = F.interpolate(features, (10, 10), mode="bilinear", align_corners=False)
    whole = F.cross_entropy(head.classify(head.hidden(large) * factors), target, ignore_index=IGNORE)
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    for mine, expected in zip(gradients, torch.autograd.grad(whole, list(head.parameters())), strict=True):
        torch.testing.assert_close(mine, expected)


def test_a_new_head_and_several_blocks_are_measured_on_shapes(tmp_path: Path) -> None:
    small = {"input_size": 64, "iterations": 3, "batch_size": 2, "last_layers": 3}
    result = neco_bench.run(MODEL, "shapes_linear@dinov2-1", limit=3, workers=0, device="cpu", changes=small)
    assert result.provenance["run"]["layers"].startswith("blocks ")
    assert 0 <= result.metrics["mIoU"] <= 1
    with pytest.raises(UsageError, match="learning_rates"):
        neco_bench.run(MODEL, "shapes_linear@leopart-fcn-1", changes={"learning_rates": [0.1]})
