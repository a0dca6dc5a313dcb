"""Masked image modelling, the objective of `tiny_base`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neco_bench.core.distributed import RankShard
from neco_bench.core.rng import item_rng
from neco_bench.encoders.adapters.baselines import orientations
from neco_bench.training.batches import Embed, TrainBatch, by_view
from neco_bench.training.networks import Network
from neco_bench.training.recipe import Recipe
from neco_bench.training.views import GLOBALS


class MaskedImages(nn.Module):
    """Masked image modelling, for training from random weights: the content of hidden patches is predicted from the
    surrounding patches by the head, without a decoder (SimMIM, Xie et al., CVPR 2022).

    The targets are the pixels, relative to the mean and deviation of their patch (He et al., "Masked autoencoders are
    scalable vision learners", CVPR 2022), or, for four cells of the patch, the orientation histograms of grey-value
    gradients, each of length 1 (after MaskFeat: Wei et al., CVPR 2022), and the mean colours.

    Hidden patches are replaced by the mean colour in the encoder's input, so that any encoder can be trained. Only
    global views are used.
    """

    def __init__(self, recipe: Recipe, student: Network) -> None:
        super().__init__()
        self.recipe, self.stride = recipe, student.encoder.stride

    def forward(
        self, batch: TrainBatch, student: Embed, teacher: Network | None, attend: Network, shard: RankShard
    ) -> Tensor:
        """Compute the loss, a scalar: mean squared error over the hidden patches, or over all."""
        images, side = by_view(batch.global_views), self.recipe.global_size // self.stride
        rng = item_rng(shard.seed, "hidden", shard.batch_number)
        chance = torch.from_numpy(rng.random((GLOBALS, shard.total, side * side)))
        chance = chance[:, shard.start : shard.start + shard.images].flatten(0, 1)
        hidden = chance.argsort(1).argsort(1) < max(1, round(self.recipe.hidden_share * side * side))
        hidden = hidden.view(-1, side, side).to(images.device)
        visible = images * ~hidden.repeat_interleave(self.stride, 1).repeat_interleave(self.stride, 2)[:, None]
        predict = torch.ones_like(hidden) if self.recipe.predict_all else hidden
        predicted = student([visible], [predict])[0].permute(0, 2, 3, 1)[predict]
        return F.mse_loss(predicted, self._target(images, side)[predict])

    def _target(self, images: Tensor, side: int) -> Tensor:
        """Return the target of each patch, (B, side, side, E)."""
        if self.recipe.hidden_target == "pixels":
            pixels = F.unfold(images, self.stride, stride=self.stride).transpose(1, 2).unflatten(1, (side, side))
            deviation, mean = torch.std_mean(pixels, 3, keepdim=True)
            return (pixels - mean) / (deviation + 1e-3)
        histograms = F.normalize(F.adaptive_avg_pool2d(orientations(images), 2 * side), dim=1, eps=1e-2)
        colours = 0.25 * F.adaptive_avg_pool2d(images, 2 * side)  # for a variance similar to that of histograms
        cells = torch.cat([histograms, colours], 1).unflatten(2, (side, 2)).unflatten(4, (side, 2))
        return cells.permute(0, 2, 4, 1, 3, 5).flatten(3)
