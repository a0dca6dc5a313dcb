"""Constants of the dense regression protocols. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from neco_bench.core.protocol import Range, Share
from neco_bench.core.protocol import Settings as BaseSettings

Region = Literal["full", "eigen", "garg"]

Crop = tuple[PositiveInt, PositiveInt]


class Settings(BaseSettings):
    """Constants of a protocol and a card. input_size is the height of frames in pixels; frames of another height are
    resized to it, crops of training in proportion.

    target: the predicted quantity. frame: the used part of an image, see `inputs.crop_frame`. regions: regions of
    scored pixels, see `score.region_of`; the first gives the plain metrics; with several, each is also named
    ("rmse/full").

    Features: final_norm; class_token: concatenate it to every patch. mirror_test: average predictions with those of the
    mirrored image. keep_padding: the zero padding of an input that is not a multiple of the stride remains part of the
    prediction, which is stretched to the frame.

    Head: batch_norm, then a convolution with `kernel`, on features upsampled by `upsample`; initial: its initial
    weights, from N(0, 0.01²) with bias 0, or PyTorch's default. bins: number of bins whose expected value is the depth,
    between min_depth and max_depth. resize: rule for resizing predictions to the frame. confidence: the head of normals
    has a fourth output, see `losses.angular_loss`.

    Loss: loss_images per mean, loss_warmup calls without the variance term (see `losses.sig_loss`).
    train_max_depth: larger depths are not learned.

    Augmentation: train_region ("nyu": the crop of BTS), rotation_probability and degrees, flip_probability,
    crop (height, width), resized_crop_probability (a square of an area in resized_crop_area, resized back), colour:
    "bts" (gamma, brightness, channels: ranges of factors) or "jitter" (of strength jitter), with colour_probability.

    Optimiser: AdamW for iterations, or epochs. beta1: None uses that of the schedule (see `training.rates_at`). clip:
    maximum norm of the gradient. warmup: share of the iterations. evaluations: number of heads that are kept, including
    the last one; select: "best" is the head with the lowest abs_rel on the test split.
    """

    target: Literal["depth", "normals"]
    frame: Literal["whole", "kb", "centre_square"] = "whole"
    regions: Annotated[tuple[Region, ...], Field(min_length=1)] = ("full",)
    final_norm: bool
    class_token: bool = False
    mirror_test: bool = False
    keep_padding: bool = False
    batch_norm: bool = False
    kernel: Literal[1, 3] = 1
    upsample: Annotated[int, Field(ge=1, le=16)] = 1
    initial: Literal["normal", "default"] = "normal"
    bins: Annotated[int, Field(ge=2, le=4096)] = 256
    min_depth: PositiveFloat = 0.001
    max_depth: PositiveFloat = 10.0
    resize: Literal["bilinear", "bicubic_corners"] = "bilinear"
    confidence: bool = False
    loss_images: PositiveInt | None = None
    loss_warmup: NonNegativeInt = 0
    train_max_depth: PositiveFloat | None = None
    train_region: Literal["whole", "nyu"] = "whole"
    rotation_probability: Share = 0.0
    rotation_degrees: Annotated[float, Field(ge=0, le=45)] = 0.0
    flip_probability: Share = 0.0
    crop: Crop | None = None
    resized_crop_probability: Share = 0.0
    resized_crop_area: Range = (0.5, 1.0)
    colour: Literal["none", "bts", "jitter"] = "none"
    colour_probability: Share = 0.0
    gamma: Range = (0.9, 1.1)
    brightness: Range = (0.75, 1.25)
    channels: Range = (0.9, 1.1)
    jitter: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    iterations: PositiveInt | None = None
    epochs: PositiveInt | None = None
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    weight_decay: NonNegativeFloat
    beta1: Annotated[float, Field(ge=0, lt=1)] | None = None
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    clip: PositiveFloat | None = None
    schedule: Literal["dinov3", "dinov2", "probe3d", "cosine"]
    warmup: Annotated[float, Field(ge=0, lt=1)]
    evaluations: PositiveInt = 1
    select: Literal["best", "last"] = "last"

    @model_validator(mode="after")
    def _fit_together(self) -> Settings:
        if (self.iterations is None) == (self.epochs is None):
            raise ValueError("give iterations or epochs, and not both")
        if self.min_depth >= self.max_depth:
            raise ValueError("min_depth must be below max_depth")
        if self.target == "normals" and (self.rotation_probability or self.mirror_test or self.select == "best"):
            raise ValueError("normals are not rotated, predicted for mirrored images or selected")
        return self

    def iterations_used(self, count: int) -> int:
        """Number of iterations for `count` training images."""
        return self.iterations or (self.epochs or 1) * max(1, count // self.batch_size)

    def used_height(self, stride: int) -> int:
        """Height of frames in pixels: `input_size`, or `tokens_per_side` strides."""
        return stride * self.tokens_per_side if self.tokens_per_side else self.input_size
