"""The Encoder interface: authors implement `_encode`, and callers use `encode`, which is not overridden.

`encode` checks shapes, normalises with the encoder's own statistics, sets eval and inference mode, autocast and
precision, and checks the output. Prefix tokens (class, registers) are never part of `map`. The capabilities of an
encoder are declared (`attentions`, `has_final_norm`), never guessed from tensor shapes.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from neco_bench.core.errors import BadInputError, NecoBenchError, NumericalError, UsageError
from neco_bench.encoders.options import PRECISIONS

IMAGENET_MEAN = (0.485, 0.456, 0.406)

IMAGENET_STD = (0.229, 0.224, 0.225)


@contextlib.contextmanager
def _convolutions_in_fp32() -> Iterator[None]:
    """Prevent GPUs from rounding convolutions to TF32, which PyTorch may do depending on the batch size."""
    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


@dataclass(frozen=True)
class DenseFeatures:
    """Features returned by an encoder, in float32.

    map: (B, D, h, w) patch features. stride: input pixels per cell. layer: the layers that were read, as text
    ("last", "blocks 5,8,11", "stage 3"). final_norm: whether the last norm was applied. prefix: (B, P, D) class and
    register tokens, or None. attention: (B, heads, h, w) class-token attention of the last block, or None.
    keys: (B, D, h, w) keys of the patches in the last block's attention, heads concatenated, or None.
    """

    map: Tensor
    stride: int
    layer: str = "last"
    final_norm: bool = True
    prefix: Tensor | None = None
    attention: Tensor | None = None
    keys: Tensor | None = None


@dataclass(frozen=True)
class WeightsReport:
    """Report of strict loading: file or address, and the keys that were renamed, dropped or resized."""

    source: str
    renamed: dict[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()


class Encoder(nn.Module, abc.ABC):
    """A frozen dense encoder.

    Attributes:
        name: the model spec, or any name.
        embed_dim: D, the channels of the features.
        stride: input pixels per cell.
        mean, std: RGB on [0, 1].
        weights_id: the sha256 of the weights in use (of the source file for code without weights).
        layer: the layers that are read, as text.
        pos_interp: the position-interpolation rule; "none" where there are no positions.
        weights_report: report of loading the weights.
        training_data: the training data of the weights ("imagenet, coco"; "none"), for contamination notes.
        overlap: overlap with data sets, as in `zoo.toml`; set by `load_encoder`; None: derived from `training_data`.
        official: whether the weights are the official ones of the zoo name; set by `load_encoder`; None if the name has
            no official weights.
        statistics: source of mean and std, as text.
        size_multiple: sides of inputs must be multiples of this, itself a multiple of the stride; None: of the stride.
        only_size: the side of the only square input that it accepts; None: any size.
        layer_count: the number of blocks or stages for `layers`; 0: layers cannot be selected.
        equal_layers: all blocks have features of the same shape, so that several can be read in one pass.
        attentions: it can return class-token attention.
        has_keys: it can return the keys of its last block; `_encode` then has the additional argument `keys`.
        has_final_norm: it can return features both before and after a final norm.
        final_norm: whether features are after that norm by default.
        precision: "fp32", or "bf16" or "fp16" as autocast.
    """

    name: str
    embed_dim: int
    stride: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    weights_id: str
    layer: str = "last"
    pos_interp: str = "none"
    weights_report: WeightsReport | None = None
    training_data: str = ""
    overlap: Mapping[str, str] | None = None
    official: bool | None = None
    statistics: str = "the encoder's own"
    size_multiple: int | None = None
    only_size: int | None = None
    layer_count: int = 0
    equal_layers: bool = False
    attentions: bool = False
    has_keys: bool = False
    has_final_norm: bool = False
    final_norm: bool = True
    precision: str = "fp32"
    _inner: str | None = None  # the attribute with the model into which weights are loaded; None: this module

    @abc.abstractmethod
    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        """Compute features of normalised images (B, 3, H, W), H and W multiples of the stride. For authors."""

    @property
    def device(self) -> torch.device:
        """Device of the parameters (the CPU for encoders without parameters)."""
        return next(
            (p.device for p in self.parameters()), next((b.device for b in self.buffers()), torch.device("cpu"))
        )

    @final
    def encode(
        self,
        images: Tensor,
        *,
        final_norm: bool | None = None,
        attention: bool = False,
        keys: bool = False,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ) -> DenseFeatures:
        """Compute dense features of RGB images in [0, 1].

        Args:
            images: (B, 3, H, W) float; H and W multiples of `stride`, or of `size_multiple`.
            final_norm: True reads after the final norm (if there is one; see the result), False before it, None uses
                the encoder's default.
            attention: also return the class token's attention.
            keys: also return the keys of the last block, directly after the projection.
            mean, std: replace the encoder's statistics, for protocols that fix them.

        Raises:
            UsageError: for a wrong shape, a size that is not a multiple, or an output that is not declared.
            BadInputError: if the encoder violates the interface.
            NumericalError: if features are NaN or infinite.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise UsageError(
                f"encode() takes float RGB images in [0, 1] of shape (B, 3, H, W), "
                f"got {tuple(images.shape)} {images.dtype}."
            )
        height, width = images.shape[-2:]
        multiple = self.size_multiple or self.stride
        if self.only_size and (height, width) != (self.only_size, self.only_size):
            raise UsageError(
                f"Model {self.name!r} takes inputs of {self.only_size}x{self.only_size} only, got {height}x{width}."
            )
        if height % multiple or width % multiple or not height or not width:
            down, up = (max(1, height // multiple + i) * multiple for i in (0, 1))
            raise UsageError(
                f"Input size {height}x{width} is not a multiple of {multiple}, which {self.name!r} needs "
                f"(its stride is {self.stride}). Use a size such as {down} or {up}."
            )
        if attention and not self.attentions:
            raise UsageError(f"Encoder {self.name!r} does not return class-token attention.")
        if keys and not self.has_keys:
            raise UsageError(f"Encoder {self.name!r} does not return the keys of its last block.")
        if self.training:
            self.eval()
        with torch.inference_mode(), _convolutions_in_fp32():
            images = images.to(self.device, torch.float32, non_blocking=True)
            shift = torch.tensor(mean or self.mean, device=images.device).view(3, 1, 1)
            scale = torch.tensor(std or self.std, device=images.device).view(3, 1, 1)
            images = (images - shift).div_(scale)
            with torch.autocast(
                images.device.type, getattr(torch, PRECISIONS[self.precision]), enabled=self.precision != "fp32"
            ):
                wanted = self.has_final_norm and (self.final_norm if final_norm is None else final_norm)
                features = self._run(images, final_norm=wanted, attention=attention, **({"keys": True} if keys else {}))
            return self._checked(features, len(images), height // self.stride, width // self.stride)

    def nearest_size(self, size: int) -> int:
        """Return the side in pixels nearest to `size` that this encoder accepts; the larger one in a tie."""
        multiple = self.size_multiple or self.stride
        return self.only_size or multiple * max(1, (2 * size + multiple) // (2 * multiple))

    def _run(self, images: Tensor, **options: bool) -> DenseFeatures:
        """Call `_encode`; errors get the name of the encoder, except when the device is out of memory."""
        try:
            return self._encode(images, **options)
        except (NecoBenchError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise BadInputError(
                f"Encoder {self.name!r} failed on a batch of shape {tuple(images.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _checked(self, features: DenseFeatures, batch: int, rows: int, columns: int) -> DenseFeatures:
        if not isinstance(features, DenseFeatures) or not isinstance(features.map, Tensor):
            raise BadInputError(
                f"Encoder {self.name!r} returned {type(features).__name__} from _encode(); it must return "
                f"DenseFeatures with a tensor as its map."
            )
        expected = (batch, self.embed_dim, rows, columns)
        if tuple(features.map.shape) != expected:
            raise BadInputError(
                f"Encoder {self.name!r} gave features of shape {tuple(features.map.shape)} where {expected} "
                f"(B, embed_dim, H/stride, W/stride) was expected. {_hint(tuple(features.map.shape), expected)}"
            )
        features = DenseFeatures(
            features.map.float(),
            features.stride,
            features.layer,
            features.final_norm,
            None if features.prefix is None else features.prefix.float(),
            None if features.attention is None else features.attention.float(),
            None if features.keys is None else features.keys.float(),
        )
        if not features.map.sum().isfinite() and not features.map.isfinite().all():  # the sum is faster
            raise NumericalError(
                f"Encoder {self.name!r} gave NaN or infinite features. Try --precision fp32; "
                f"if the error remains, the weights are broken."
            )
        return features


def _hint(shape: tuple[int, ...], expected: tuple[int, int, int, int]) -> str:
    """Return advice for features of a wrong shape; tokens are recognised by the number of channels."""
    _, channels, rows, columns = expected
    for kind, axis, make in (
        ("(B, D, N)", 1, "x"),
        ("(B, N, D)", 2, "x.transpose(1, 2)"),
    ):
        if len(shape) == 3 and shape[axis] == channels:
            tokens, patches = shape[3 - axis], rows * columns
            extra = tokens - patches
            if extra < 0:
                return f"These are {tokens} tokens {kind}, but there are {patches} cells. Check stride."
            cut = f"[..., {extra}:]" if extra else ""
            first = f" The first {extra} are class and register tokens, if the encoder has any." if extra else ""
            return f"These are tokens {kind}: return {make}{cut}.unflatten(2, (H // stride, W // stride)).{first}"
    return "Check embed_dim, stride, and that class and register tokens are removed; `neco-bench check` helps."
