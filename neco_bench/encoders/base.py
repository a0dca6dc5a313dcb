"""The Encoder contract: authors write `_encode`; everyone else calls the sealed `encode`.

`encode` checks shapes, normalises with the encoder's own statistics, sets eval and inference mode, autocast and
precision, and checks what comes back. Prefix tokens (class, registers) never leak into `map`. What an encoder can do is
declared (`attentions`, `has_final_norm`), never guessed from tensor shapes.
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
    """Keep GPUs from rounding what convolutions multiply to TF32, which PyTorch lets depend on the batch size."""
    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


@dataclass(frozen=True)
class DenseFeatures:
    """The features that an encoder returns, in float32.

    map: (B, D, h, w) patch features. stride: input pixels per cell. layer: where they were read, as text
    ("last", "blocks 5,8,11", "stage 3"). final_norm: was the last norm applied. prefix: (B, P, D) class and register
    tokens, or None. attention: (B, heads, h, w) class-token attention of the last block, or None.
    keys: (B, D, h, w) keys of the patches in the last block's attention, heads side by side, or None.
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
    """What strict loading did: file or address, and the keys that were renamed, dropped or resized."""

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
        layer: where features are read, as text.
        pos_interp: the position-interpolation rule; "none" where there are no positions.
        weights_report: what loading the weights did.
        training_data: the data sets behind the weights ("imagenet, coco"; "none"), for contamination notes.
        overlap: with data sets, as in `zoo.toml`; set by `load_encoder`; None: as `training_data` says.
        official: whether the weights are those that the name of the zoo stands for; set by `load_encoder`; None where
            it stands for none.
        statistics: where mean and std are from, as text.
        size_multiple: sides of inputs must be multiples of this, itself a multiple of the stride; None: of the stride.
        only_size: the side of the one square input that it takes; None: it takes any.
        layer_count: the blocks or stages that `layers` chooses from; 0: there is no choice.
        equal_layers: these are blocks with features of one shape, so that several can be read in one pass.
        attentions: it can give class-token attention.
        has_keys: it can give the keys of its last block; its `_encode` then takes `keys` besides.
        has_final_norm: it can give features both before and after a final norm.
        final_norm: the default is after that norm.
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
    _inner: str | None = None  # the attribute with the model that weights files are of; None: this module itself

    @abc.abstractmethod
    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        """Compute features of normalised images (B, 3, H, W), H and W multiples of the stride. Authors write this."""

    @property
    def device(self) -> torch.device:
        """Where the parameters live (the CPU for encoders without any)."""
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
            final_norm: True reads after the final norm (where there is one; the result says), False before it, None
                takes the encoder's default.
            attention: also return the class token's attention.
            keys: also return the keys of the last block, as its projection gives them.
            mean, std: replace the encoder's statistics, for protocols that fix them.

        Raises:
            UsageError: shape, indivisible size, an output that this encoder does not declare.
            BadInputError: the encoder breaks its contract.
            NumericalError: NaN or infinite features.
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
            raise UsageError(f"Encoder {self.name!r} does not give class-token attention.")
        if keys and not self.has_keys:
            raise UsageError(f"Encoder {self.name!r} does not give the keys of its last block.")
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
        """Return the side in pixels nearest to `size` that this encoder takes; of two the larger."""
        multiple = self.size_multiple or self.stride
        return self.only_size or multiple * max(1, (2 * size + multiple) // (2 * multiple))

    def _run(self, images: Tensor, **options: bool) -> DenseFeatures:
        """Call `_encode`, whose errors name the encoder, except where the device is out of memory."""
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
                f"if it stays, the weights are broken."
            )
        return features


def _hint(shape: tuple[int, ...], expected: tuple[int, int, int, int]) -> str:
    """What to do about features of another shape: tokens are recognised by the number of channels."""
    _, channels, rows, columns = expected
    for kind, axis, make in (
        ("(B, D, N)", 1, "x"),
        ("(B, N, D)", 2, "x.transpose(1, 2)"),
    ):
        if len(shape) == 3 and shape[axis] == channels:
            tokens, patches = shape[3 - axis], rows * columns
            extra = tokens - patches
            if extra < 0:
                return f"These are {tokens} tokens {kind} where there are {patches} cells. Check stride."
            cut = f"[..., {extra}:]" if extra else ""
            first = f" The first {extra} are class and register tokens, if the encoder has any." if extra else ""
            return f"These are tokens {kind}: return {make}{cut}.unflatten(2, (H // stride, W // stride)).{first}"
    return "Check embed_dim, stride, and that class and register tokens are removed; `neco-bench check` shows which."
