"""The network: any encoder, and one of Segmenter's decoders."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from neco_bench.tasks.finetuning.decoders import LinearDecoder, MaskTransformer
from neco_bench.tasks.finetuning.settings import Settings
from neco_bench.tasks.linear_segmentation.dinov3_head import add_gradient
from torch import Tensor, nn

from neco_bench.core.distributed import RankShard
from neco_bench.core.task import Context
from neco_bench.encoders.base import Encoder
from neco_bench.encoders.options import PRECISIONS
from neco_bench.encoders.trainable import Regularisation, prepare, set_training
from neco_bench.features.extract import FeatureExtractor


class Segmenter(nn.Module):
    """Map images in [0, 1] to scores of K classes for each patch.

    shard: the images of the current forward pass, on which random numbers in training depend. fixed: whether the
    encoder has no weights, so that only the decoder is trained.
    """

    def __init__(self, encoder: Encoder, classes: int, settings: Settings, seed: int) -> None:
        super().__init__()
        self.encoder, self.settings = encoder, settings
        self.fixed = not any(True for _ in encoder.parameters())
        self.shard = RankShard(seed, settings.batch_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.decoder: nn.Module = LinearDecoder(encoder.embed_dim, classes)
            if settings.decoder == "mask":
                layers, dropout = settings.decoder_layers, settings.decoder_dropout
                self.decoder = MaskTransformer(encoder.embed_dim, classes, layers, dropout, self.shard)
        self.decoder.to(encoder.device)

    def prepare(self, size: int, checkpointing: bool) -> None:
        """Prepare the network for training on crops of `size` pixels. Raises as `trainable.prepare`."""
        if not self.fixed:
            self.encoder.requires_grad_()
            options = Regularisation(self.settings.drop_path, exact_last=False, checkpointing=checkpointing)
            prepare(self.encoder, size, self.shard, options)
        set_training(self)

    @property
    def trained(self) -> list[nn.Parameter]:
        """Parameters that are trained."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return the context for computing in the encoder's precision."""
        encoder = self.encoder
        dtype = getattr(torch, PRECISIONS[encoder.precision])
        return torch.autocast(encoder.device.type, dtype, enabled=encoder.precision != "fp32")

    def forward(self, images: Tensor) -> Tensor:
        """Compute scores (B, K, h, w) float32 of images (B, 3, H, W) in [0, 1], with gradient."""
        settings, encoder = self.settings, self.encoder
        if self.fixed:
            features = encoder.encode(images, mean=settings.mean, std=settings.std).map.clone()
        else:
            shift, scale = (
                torch.tensor(values, device=images.device).view(3, 1, 1)
                for values in (settings.mean or encoder.mean, settings.std or encoder.std)
            )
            with self.autocast():
                norm = encoder.has_final_norm
                features = encoder._run((images - shift) / scale, final_norm=norm, attention=False).map
        with self.autocast():
            return self.decoder(features).float()

    @torch.inference_mode()
    def scores(self, images: Tensor, context: Context) -> Tensor:
        """Compute scores (B, K, h, w) of images (B, 3, H, W) in [0, 1] for testing, in parts that fit in memory."""
        mean, std = self.settings.mean, self.settings.std
        features = FeatureExtractor(self.encoder, context, final_norm=True, mean=mean, std=std).encode(images)
        with self.autocast():
            return torch.cat([self.decoder(part).float() for part in features.split(context.batch_size_used)])

    def backward(self, images: Tensor, masks: Tensor, labelled: float, scale: Callable[[Tensor], Tensor]) -> float:
        """Back-propagate the loss of images (B, 3, H, W) with masks (B, H, W) int64, and return it, see `add_gradient`.

        labelled: divisor of the loss, the number of labelled pixels of the whole batch.
        """
        return add_gradient(self(images), masks, labelled, scale)
