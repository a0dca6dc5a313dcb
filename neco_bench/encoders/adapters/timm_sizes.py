"""Find the input sizes that a timm model accepts, and the properties of a feature level, with tensors without data.

timm's own properties (`fixed_input_size`, `reduction`) are not sufficient: some models that are marked as fixed accept
any size, some need multiples of their deepest stride or of an attention block, and some have a smaller grid than the
stride implies. A copy of the model on PyTorch's meta device shows all of this without computing values.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from neco_bench.core.errors import UsageError

_LARGEST_BLOCK = 8  # attention blocks of halonet and bat_resnext, in cells of the deepest stage


class _NeedsDataError(Exception):
    """The model reads values of its input, which a meta tensor does not have; timm's own properties are used then."""


class Level(NamedTuple):
    """One level of a timm model's features.

    embed_dim: channels. stride: pixels per cell. multiple: the sides of an input must be multiples of this.
    padding: pixels of zeros around the input of a network of unpadded convolutions, so that its grid is complete.
    rebuilt: the model accepts one size, and timm can build it for other sizes with the same weights.
    size: the side of the only input that the model accepts, or None. final_norm: this level is followed by a norm.
    final_conv: this level is followed by the model's `final_conv`, which timm leaves out of its feature levels.
    """

    embed_dim: int
    stride: int
    multiple: int
    padding: int = 0
    rebuilt: bool = False
    size: int | None = None
    final_norm: bool = False
    final_conv: bool = False


def create(name: str, seed: int, **options: Any) -> Any:
    """Create a timm model that accepts any input size if timm supports it; the same seed gives the same weights."""
    attempts: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
    for sizes in attempts:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                return timm.create_model(name, **options, **sizes)
            except TypeError as error:
                if not sizes or "unexpected keyword argument" not in str(error):
                    raise
    raise AssertionError("the last attempt returns or raises")


def build_for(model: Any, size: tuple[int, int]) -> Any:
    """Copy a one-size model for inputs of `size` (height, width), its positions resampled by timm.

    Raises the errors of timm if it cannot convert the weights.
    """
    if hasattr(model, "set_input_size"):
        copied = copy.deepcopy(model)
        copied.set_input_size(img_size=size)
        return copied
    device = next(model.parameters()).device
    with device:
        built = create(model.pretrained_cfg["architecture"], 0, num_classes=0, img_size=size)
    state = dict(model.state_dict())
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        state = convert(state, built) if len(inspect.signature(convert).parameters) > 1 else convert(state)
    own = built.state_dict()
    for name, _ in built.named_buffers():  # position indices depend on the size, not on the weights
        if name in own and name in state and own[name].shape != state[name].shape:
            state[name] = own[name]
    built.load_state_dict(state)
    return built.eval().requires_grad_(False)


def read_level(model: Any, images: Tensor, index: int, norm: bool) -> Tensor:
    """Return the map (B, D, h, w) of one level, by timm's `forward_intermediates`."""
    (level,) = model.forward_intermediates(images, indices=[index], intermediates_only=True, norm=norm)
    return level[0] if isinstance(level, tuple) else level


def measure(model: Any, index: int, name: str) -> Level:
    """Measure level `index` of a model on the meta device. name: for messages.

    Raises `UsageError` if a cell of the level is not a whole number of pixels.
    """
    try:
        return _measured(model.eval(), index, name)
    except _NeedsDataError:
        facts, norm = model.feature_info, getattr(model, "norm", None)
        normed = isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity)
        deepest = max(int(info["reduction"]) for info in facts)
        return Level(facts[index]["num_chs"], int(facts[index]["reduction"]), deepest, final_norm=normed)


def _measured(model: Any, index: int, name: str) -> Level:
    facts = [int(info["reduction"]) for info in model.feature_info]
    stride, deepest = facts[index], max(facts)
    own = int(model.pretrained_cfg["input_size"][-1])
    reads: dict[int, tuple[Tensor, set[nn.Module]]] = {}

    @functools.cache
    def grid(side: int, padding: int = 0, *, rebuilt: bool = False) -> int:
        """Return the cells per side for an input with this side; 0 if the model does not accept it."""
        padded = side + padding
        try:
            with torch.inference_mode():
                if rebuilt:
                    features = read_level(build_for(model, (padded, padded)).eval(), _images(padded), index, False)
                else:
                    reads[padded] = _called(model, _images(padded), index, norm=False)
                    features = reads[padded][0]
        except Exception as error:  # models raise various errors; in all cases, they do not accept this size
            if "meta tensor" in str(error):
                raise _NeedsDataError from error
            return 0
        return int(features.shape[-1]) if features.shape[-1] == features.shape[-2] else 0

    def level(stride: int, multiple: int, side: int, **how: Any) -> Level:
        with torch.inference_mode():
            read = reads.get(side) or _called(model, _images(side), index, norm=False)
            channels, norm, final = _end_of_level(model, index, side, *read)
        return Level(channels, stride, multiple, **how, final_norm=norm, final_conv=final)

    attempts = [(stride, False), (deepest, False), (deepest, True)]
    attempts += [(deepest * 2**i, False) for i in range(1, _LARGEST_BLOCK.bit_length())]
    for multiple, rebuilt in dict.fromkeys(attempts):
        if multiple % stride:
            continue
        side = _odd_multiple(multiple, own)
        cells = grid(side, rebuilt=rebuilt)
        if not cells or (cells < side / stride and cells == grid(side + multiple, rebuilt=rebuilt)):
            continue  # the model does not accept this size, or resizes all inputs to one size
        for factor in (1, 2, 4):  # a stem may be coarser than timm states
            whole = cells * stride * factor == side and multiple % (stride * factor) == 0
            if whole and (multiple <= deepest or grid(side + multiple) == cells + multiple // stride):
                return level(stride * factor, multiple, own if rebuilt else side, rebuilt=rebuilt)
        if cells < side // stride and not rebuilt:
            padding = _least(lambda p, s=side: grid(s, p) >= s // stride, 6 * stride)  # type: ignore[misc]
            if padding and grid(side, padding) == side // stride:
                return level(stride, multiple, side + padding, padding=padding)
    cells = grid(own)
    for side in (own, cells * stride):  # CrossViT resizes any input to the sizes of its branches
        if cells and side % cells == 0 and grid(side) == cells:
            return level(side // cells, side // cells, side, size=side)
    raise UsageError(
        f"Model {name!r} has a grid of {cells}x{cells} cells for {own}x{own} pixels at this level, which is no whole "
        f"number of pixels per cell. Select another level with layers."
        if cells
        else f"Model {name!r} does not accept its own input size, {own}x{own}; timm {timm.__version__} cannot run it."
    )


def _images(side: int) -> Tensor:
    return torch.empty(1, 3, side, side, device="meta")


def _odd_multiple(multiple: int, own: int) -> int:
    """Return an odd multiple near, but not equal to, the model's own size, to detect models that need even grids."""
    count = own // (2 * multiple) * 2 + 1
    return multiple * (count + 2 if multiple * count == own else count)


def _least(holds: Callable[[int], bool], most: int) -> int:
    """Return the least number in [0, most] for which a monotone condition holds; 0 if it never holds."""
    if not holds(most):
        return 0
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _end_of_level(
    model: Any, index: int, side: int, features: Tensor, called: set[nn.Module]
) -> tuple[int, bool, bool]:
    """Return the channels of a level, and whether a norm and a final convolution follow. called: modules before it."""
    try:
        normed, with_norm = _called(model, _images(side), index, norm=True)
        norm = bool(with_norm - called) and normed.shape == features.shape  # SAM's neck changes the channels
    except AssertionError:  # "normalization of features not supported"
        norm = False
    last = getattr(model, "final_conv", nn.Identity())
    final = index == len(model.feature_info) - 1 and any(True for _ in last.parameters()) and last not in called
    return int((last(features) if final else features).shape[1]), norm, final


def _called(model: nn.Module, images: Tensor, index: int, *, norm: bool) -> tuple[Tensor, set[nn.Module]]:
    """Return a level, and the modules that were called for it."""
    called: set[nn.Module] = set()
    hooks = [m.register_forward_hook(lambda m, _inputs, _output: called.add(m)) for m in model.modules()]
    try:
        return read_level(model, images, index, norm), called
    finally:
        for hook in hooks:
            hook.remove()
