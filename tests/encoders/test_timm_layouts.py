"""Files in their authors' layouts give the weights that timm's own loading gives, and nothing is lost without a word.

Each layout is written here from random weights, in the names of the official code, at two blocks of width 64.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from neco_bench.core.errors import BadInputError
from neco_bench.encoders.adapters import timm_layouts
from neco_bench.encoders.base import WeightsReport

from .conftest import random_state

State = dict[str, Tensor]
SMALL: dict[str, Any] = {"num_classes": 0, "depth": 2, "embed_dim": 64, "num_heads": 2}
V3, V3B = "vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb"
CLIP, QUICK = "vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224"
PE, RADIO, AIM = "vit_pe_core_tiny_patch16_384", "vit_base_patch16_radio_v3", "aimv2_large_patch14_224"
BEIT3 = "beit3_base_patch16_224"
VIT, V2, GIANT = "vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_giant_patch14_dinov2"
OWN = {GIANT: {"mlp_ratio": 4}}  # an even width of its gated MLPs


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def renamed(state: State, *rules: tuple[str, str]) -> State:
    result = {}
    for key, value in state.items():
        for old, new in rules:
            key = re.sub(old, new, key)
        result[key] = value
    return result


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def dinov3(state: State) -> State:
    """Meta's names: LayerScale, storage tokens, biases with a mask, periods of the rotary positions."""
    result = renamed(state, (r"gamma_(\d)$", r"ls\1.gamma"), ("reg_token", "storage_tokens"))
    for i in range(2):
        q, v = (result.pop(f"blocks.{i}.attn.{k}_bias", torch.zeros(64)) for k in "qv")
        result[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, random(64), v])
        result[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat([torch.ones(64), torch.zeros(64), torch.ones(64)])
    periods = dict(small(V3).named_buffers())["rope.periods"]
    return result | {
        "mask_token": random(1, 64),
        "rope_embed.periods": periods.bfloat16(),
        "local_cls_norm.bias": random(64),
    }


def clip(state: State) -> State:
    """OpenAI's names, with the text side and the projection."""
    visual = renamed(
        state,
        (r"patch_embed\.proj", "conv1"),
        ("pos_embed", "positional_embedding"),
        ("cls_token", "class_embedding"),
        (r"^blocks", "transformer.resblocks"),
        (r"\.norm(\d)\.", r".ln_\1."),
        ("norm_pre", "ln_pre"),
        (r"^norm\.", "ln_post."),
        (r"qkv\.", "in_proj_"),
        (r"attn\.proj", "attn.out_proj"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
        (r"gamma_(\d)$", r"ls_\1.gamma"),
    )
    visual["positional_embedding"] = visual["positional_embedding"][0]
    if "class_embedding" in visual:
        visual["class_embedding"] = visual["class_embedding"][0, 0]
    text = {"transformer.resblocks.0.ln_1.weight": random(8), "token_embedding.weight": random(9, 8)}
    text |= {"ln_final.weight": random(8), "positional_embedding": random(7, 8), "logit_scale": random()}
    return under("visual.", visual | {"proj": random(64, 16)}) | text | {"text_projection": random(8, 16)}


def openai(state: State) -> State:
    facts = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
    return clip(state) | {key: torch.tensor(value) for key, value in facts.items()}


def aim(state: State) -> State:
    return renamed(
        state,
        (r"^patch_embed\.", "preprocessor.patchifier."),
        (r"^pos_embed", "preprocessor.pos_embed"),
        (r"^blocks", "trunk.blocks"),
        (r"\.norm(\d)\.", r".norm_\1."),
        (r"^norm\.", "trunk.post_trunk_norm."),
        (r"fc1_g", "fc1"),
        (r"fc1_x", "fc3"),
    )


def radio(state: State) -> State:
    """NVIDIA's names: positions of 128x128, a linear patch embedding without bias, class and register tokens in one."""
    result = under("", {k: v for k, v in state.items() if k.startswith("blocks.")})
    result["patch_generator.embedder.weight"] = state["patch_embed.proj.weight"].flatten(1)
    result["patch_generator.pos_embed"] = random(1, 128 * 128, 64)
    result["patch_generator.cls_token.token"] = torch.cat([state["cls_token"], state["reg_token"]], 1)[0]
    return under("radio_model.model.", result) | {
        "radio_model.input_conditioner.norm_mean": random(3, 1, 1),
        "radio_model.summary_idxs": torch.tensor([0, 2]),
        "feature_projections.0.weight": random(4),
    }


def mae(state: State) -> State:
    decoder = {
        "decoder_pos_embed": random(1, 197, 8),
        "decoder_embed.weight": random(8, 64),
        "mask_token": random(1, 1, 8),
    }
    decoder |= under("decoder_blocks.0.", {"norm1.weight": random(8), "attn.qkv.weight": random(24, 8)})
    return under("model.", state | decoder | {"decoder_norm.weight": random(8), "decoder_pred.bias": random(768)})


def ibot(state: State) -> State:
    teacher = under("backbone.", state | {"masked_embed": random(1, 64)})
    student = under(
        "module.backbone.", {key: value + 1 for key, value in state.items()} | {"masked_embed": random(1, 64)}
    )
    return under("teacher.", teacher | {"head.mlp.0.weight": random(4)}) | under("student.", student)


def franca(state: State) -> State:
    """DINOv2's names and chunks of blocks, below the teacher."""
    chunks = renamed(state, (r"^blocks\.", "blocks.0."), (r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3"))
    heads = {"dino_head.last_layer.weight": random(4), "rasa_head.pos_pred.weight": random(2, 64)}
    return under(
        "teacher.", under("module.backbone.", chunks | {"mask_token": random(1, 64)}) | under("module.", heads)
    )


def open_clip_trunk(state: State) -> State:
    text = {"text.token_embedding.weight": random(9, 8), "text.ln_final.weight": random(8)}
    return under("state_dict.module.", under("visual.trunk.", state) | text | {"logit_scale": random()})


def ijepa(state: State) -> State:
    other = {key: value + 1 for key, value in state.items()}
    predictor = {"predictor.module.predictor_norm.weight": random(8)}
    return under("encoder.module.", state) | under("target_encoder.module.", other) | predictor


def beit3(state: State) -> State:
    """Microsoft's names: branch A for images, B for text, q, k and v apart, two rows before the positions."""
    result = renamed(
        state,
        (r"^(cls_token|patch_embed\.)", r"beit3.vision_embed.\1"),
        (r"vision_embed\.patch_embed\.", "vision_embed."),
        (r"^pos_embed$", "beit3.encoder.embed_positions.A.weight"),
        (r"^blocks\.", "beit3.encoder.layers."),
        (r"\.norm1\.", ".self_attn_layer_norm.A."),
        (r"\.norm2\.", ".final_layer_norm.A."),
        (r"\.attn\.norm\.", ".self_attn.inner_attn_ln.A."),
        (r"\.attn\.proj\.", ".self_attn.out_proj.A."),
        (r"\.mlp\.norm\.", ".ffn.A.ffn_layernorm."),
        (r"\.mlp\.(fc\d)\.", r".ffn.A.\1."),
    )
    for name in [name for name in result if ".attn.qkv." in name]:
        for letter, part in zip("qkv", result.pop(name).chunk(3), strict=True):
            result[name.replace(".attn.qkv.", f".self_attn.{letter}_proj.A.")] = part
    positions = "beit3.encoder.embed_positions.A.weight"
    result[positions] = torch.cat([random(2, 64), result[positions][0]])
    text = {key.replace(".A.", ".B."): value + 1 for key, value in result.items() if ".A." in key}
    return result | text | {"beit3.text_embed.weight": random(9, 64)}


def small(name: str, **options: Any) -> Any:
    return timm.create_model(name, **{**SMALL, **OWN.get(name, {}), **options})


def state_of(name: str) -> State:
    options = {**SMALL, **OWN.get(name, {})}
    del options["num_classes"]
    return random_state(name, **options)


def load(name: str, path: Path, branch: str | None = None) -> tuple[Any, WeightsReport]:
    return timm_layouts.load(partial(small, name), path, branch)


def nested(state: State) -> dict[str, Any]:
    """The state as files hold it: groups such as `teacher` are dictionaries of their own."""
    result: dict[str, Any] = {}
    for key, value in state.items():
        group, _, rest = key.partition(".")
        if group in ("teacher", "student", "state_dict", "model", "encoder", "target_encoder", "predictor"):
            result.setdefault(group, {})[rest] = value
        else:
            result[key] = value
    return result


@pytest.mark.parametrize(
    ("name", "layout", "dropped"),
    [
        pytest.param(V3, dinov3, ["rope_embed.periods", "mask_token"], id="dinov3"),
        pytest.param(V3B, dinov3, ["rope_embed.periods", "mask_token"], id="dinov3_qkvb"),
        pytest.param(CLIP, clip, ["token_embedding.weight", "head.weight"], id="open_clip"),
        pytest.param(QUICK, openai, ["vocab_size"], id="openai"),
        pytest.param(PE, clip, ["token_embedding.weight"], id="perception_encoder"),
        pytest.param(CLIP, open_clip_trunk, ["state_dict.text.* (2 tensors)"], id="open_clip_trunk"),
        pytest.param(AIM, aim, [], id="aimv2"),
        pytest.param(RADIO, radio, ["radio_model.input_conditioner.norm_mean"], id="radio"),
        pytest.param(VIT, mae, ["decoder_blocks.0.norm1.weight", "mask_token"], id="mae"),
        pytest.param(VIT, ibot, ["masked_embed", "student.* (31 tensors)"], id="ibot"),
        pytest.param(GIANT, franca, ["mask_token"], id="franca"),
        pytest.param(BEIT3, beit3, ["beit3.text_embed.weight"], id="beit3"),
        pytest.param(VIT, ijepa, ["target_encoder.* (30 tensors)"], id="ijepa"),
    ],
)
def test_official_layouts(
    name: str, layout: Callable[[State], State], dropped: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_of(name)
    official = layout(state)
    if name == V3:  # timm's model has no biases, which is right where they are zero
        official = {k: torch.zeros_like(v) if k.endswith("qkv.bias") else v for k, v in official.items()}
    torch.save(nested(official), tmp_path / "official.pth")
    with caplog.at_level(logging.WARNING, "neco_bench"):
        model, report = load(name, tmp_path / "official.pth")
    own = model.state_dict()
    expected = dict(state)
    if layout in (dinov3, clip, openai, aim, radio, beit3):  # timm's own loading of these very tensors
        timms = small(name, pretrained=True, pretrained_cfg_overlay={"state_dict": official})
        expected = timms.state_dict()
        size = timms.pretrained_cfg["input_size"]
        images = torch.rand(1, *size, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            assert torch.equal(model.eval().forward_features(images), timms.eval().forward_features(images))
    assert own.keys() == expected.keys()
    parts = [key for key in own if not key.startswith(("attn_pool", "head"))]
    assert [key for key in parts if not torch.equal(own[key], expected[key])] == []
    same = [key for key in parts if key not in ("pos_embed", "patch_embed.proj.bias") or name != RADIO]
    assert [key for key in same if not torch.equal(own[key], state[key])] == []
    assert set(dropped) <= set(report.dropped)
    assert "dropped: " in caplog.text or not report.dropped
    assert [text.partition(" ")[0] for text in report.resized] == (
        ["radio_model.model.patch_generator.pos_embed"] if name == RADIO else []
    )
    assert ("resized" in caplog.text) == bool(report.resized)


def test_radio_as_torch_hub_has_it(tmp_path: Path) -> None:
    state = radio(state_of(RADIO))
    hub = renamed(state, (r"^radio_model\.model\.", "state_dict.base_model."), (r"^radio_model\.", "state_dict."))
    for name, official in (("a", state), ("b", nested(hub))):
        torch.save(official, tmp_path / name)
    first, second = (load(RADIO, tmp_path / name)[0].state_dict() for name in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first)


class Node(nn.Module):
    """A module with the parameters of a state dict at their dotted names."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for name in {key.partition(".")[0] for key in state}:
            if name in state:
                self.register_buffer(name, state[name])
            else:
                self.add_module(
                    name, Node({k.partition(".")[2]: v for k, v in state.items() if k.startswith(f"{name}.")})
                )

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_torchscript_archive_is_read_without_its_code(tmp_path: Path) -> None:
    state = openai(state_of(QUICK))
    half = {key: value.half() if value.ndim > 1 else value for key, value in state.items()}
    torch.jit.script(Node(half)).save(str(tmp_path / "ViT-B-16.pt"))
    torch.save(half, tmp_path / "state.pt")
    models = [load(QUICK, tmp_path / name)[0].state_dict() for name in ("ViT-B-16.pt", "state.pt")]
    assert all(torch.equal(models[0][key], value) for key, value in models[1].items())


def test_openai_weights_need_their_activation(tmp_path: Path) -> None:
    torch.save(openai(state_of(CLIP)), tmp_path / "clip.pt")
    with pytest.raises(BadInputError, match=rf"QuickGELU; '{CLIP}' has another activation\. Use timm:{QUICK}\."):
        load(CLIP, tmp_path / "clip.pt")


def test_the_grid_of_a_converted_file_is_kept(tmp_path: Path) -> None:
    state = clip(state_of(CLIP))
    state["visual.positional_embedding"] = random(1 + 10 * 10, 64)
    torch.save(state, tmp_path / "clip.pt")
    model, report = load(CLIP, tmp_path / "clip.pt")
    assert model.patch_embed.grid_size == (10, 10)
    assert torch.equal(model.pos_embed[0], state["visual.positional_embedding"])
    assert report.resized == ()


def change_bias(state: State) -> None:
    state["blocks.1.attn.qkv.bias"][5] = 0.5


def change_mask(state: State) -> None:
    state["blocks.0.attn.qkv.bias"][70] = 0.5
    state["blocks.0.attn.qkv.bias_mask"] = torch.ones(192)


@pytest.mark.parametrize(
    ("name", "layout", "change", "message"),
    [
        (V3, dinov3, change_bias, rf"no place for: blocks\.1\.attn\.qkv\.bias\. Use timm:{V3B}"),
        (V3B, dinov3, change_mask, r"1 with numbers that it has no place for: blocks\.0\.attn\.qkv\.bias"),
        (
            V3B,
            dinov3,
            lambda s: s.update({"rope_embed.periods": s["rope_embed.periods"] * 2}),
            "of another value here: rope",
        ),
        (V3, dinov3, lambda s: s.pop("blocks.1.ls1.gamma"), r"1 missing: blocks\.1\.gamma_1"),
        (V3, dinov3, lambda s: s.update({"blocks.2.ls1.gamma": random(64)}), r"1 left over: blocks\.2\.gamma_1"),
        (VIT, dinov3, lambda s: None, r"It is a DINOv3 of Meta: use timm:vit_\*_dinov3"),
        (CLIP, clip, lambda s: s.update({"visual.conv1.weight": random(64, 3, 32, 32)}), "to be resized: visual.conv1"),
        (
            CLIP,
            clip,
            lambda s: s.pop("visual.transformer.resblocks.1.mlp.c_fc.bias"),
            r"1 missing: blocks\.1\.mlp\.fc1\.bias",
        ),
        (V2, clip, lambda s: None, r"It is a CLIP: use timm:vit_\*_clip_\*"),
        (VIT, radio, lambda s: None, r"It is a RADIO"),
        (
            V2,
            franca,
            lambda s: s.update({"teacher.module.backbone.blocks.0.0.mlp.w12.weight": random(344, 64)}),
            "SwiGLU",
        ),
        (VIT, mae, lambda s: s.update({"model.blocks.0.norm3.weight": random(64)}), r"left over: blocks\.0\.norm3"),
    ],
)
def test_what_a_conversion_loses_is_an_error(
    name: str, layout: Callable[[State], State], change: Callable[[State], object], message: str, tmp_path: Path
) -> None:
    architectures: dict[Any, str] = {dinov3: V3, clip: CLIP, radio: RADIO}
    own = architectures.get(layout, name)
    official = layout(state_of(own))
    if own == V3:
        official = {k: torch.zeros_like(v) if k.endswith("qkv.bias") else v for k, v in official.items()}
    change(official)
    torch.save(nested(official), tmp_path / "official.pth")
    with pytest.raises(BadInputError, match=message):
        load(name, tmp_path / "official.pth")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("encoder.layer.0.attention.attention.query.weight", "load it as hf:FOLDER"),
        ("encoder.blocks.0.residual1.fn.q_proj.weight", "names of CAPI"),
    ],
)
def test_layouts_of_other_kinds_of_models_are_pointed_there(key: str, message: str, tmp_path: Path) -> None:
    torch.save(
        {key: random(64, 64), "embeddings.cls_token" if "layer" in key else "registers": random(1, 1, 64)},
        tmp_path / "w",
    )
    with pytest.raises(BadInputError, match=message):
        load(VIT, tmp_path / "w")


def test_a_conversion_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    official = {k: torch.zeros_like(v) if k.endswith("qkv.bias") else v for k, v in dinov3(state_of(V3)).items()}
    torch.save(official, tmp_path / "w.pth")
    load(V3, tmp_path / "w.pth")
    assert capsys.readouterr().out == ""
