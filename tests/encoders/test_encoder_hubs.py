"""torch.hub entries from a local folder, and transformers models from a saved folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neco_bench.core.errors import BadInputError, MissingError, UsageError
from neco_bench.encoders import check_encoder, content_id, load_encoder
from neco_bench.encoders.fetch import fetch_url

HUBCONF = '''
import timm, torch
from torch import nn

class Tiny(nn.Module):
    """A ViT with DINOv2's interface, or DINO's, or forward_features alone."""
    patch_size, embed_dim = 16, 192
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True)
        self.blocks = self.vit.blocks

def outputs(self, x, n, norm):
    return self.vit.forward_intermediates(x, indices=n, norm=norm, return_prefix_tokens=True, output_fmt="NLC",
                                          intermediates_only=True)

class V2(Tiny):
    def get_intermediate_layers(self, x, n=1, reshape=False, return_class_token=False, norm=True):
        return tuple((patches, prefix[:, 0]) for patches, prefix in outputs(self, x, n, norm))

class V1(Tiny):
    def get_intermediate_layers(self, x, n=1):
        return [torch.cat([prefix, patches], 1) for patches, prefix in outputs(self, x, n, True)]

class Original(V1):
    """DINO's own class does not say its patch size itself."""
    @property
    def patch_size(self): raise AttributeError("patch_size")
    def __init__(self):
        super().__init__()
        self.patch_embed = self.vit.patch_embed

class Features(Tiny):
    def forward_features(self, x):
        (patches, prefix), = outputs(self, x, 1, True)
        return {"x_norm_patchtokens": patches, "x_norm_clstoken": prefix[:, 0]}

class Capi(nn.Module):
    """CAPI's interface: registers first, any layer after the norm, no arguments to build it."""
    patch_size, embed_dim, n_blocks, num_prefix_tokens = 16, 192, 12, 1
    def __init__(self):
        super().__init__()
        self.inner = Tiny()
    def forward_features(self, x, visible_indices, predict_indices, enc_layer, dec_layer):
        (patches, prefix), = outputs(self.inner, x, [enc_layer - 1], True)
        return torch.cat([prefix, patches], 1), None

class Spare(nn.Module):
    pass

def v2(pretrained=True):
    if pretrained:
        raise OSError("no file")
    return V2()

def v2_free(pretrained=True): return V2()
def v1(pretrained=True): return V1()
def original(pretrained=True): return Original()
def features(pretrained=True): return Features()
def capi(): return Capi()
capi_vitl14_lvd = capi
def spare(pretrained=True): return Spare()
def broken(pretrained=True): raise ValueError("out of order")
'''


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / "hubconf.py").write_text(HUBCONF)
    return folder


@pytest.mark.slow
def test_hub_interfaces_agree(repository: Path) -> None:
    images = torch.rand(2, 3, 64, 96)
    encoders = {name: load_encoder(f"hub:{repository}:{name}?trust=true") for name in ("v2_free", "v1", "features")}
    assert load_encoder(f"hub:{repository}:original?trust=true").stride == 16
    maps = [encoder.encode(images).map for encoder in encoders.values()]
    torch.testing.assert_close(maps[0], maps[1])
    torch.testing.assert_close(maps[0], maps[2])
    assert len({encoder.weights_id for encoder in encoders.values()}) == 1
    assert encoders["v2_free"].encode(images).prefix.shape == (2, 1, 192)  # type: ignore[union-attr]
    assert all(line.passed for line in check_encoder(encoders["v2_free"]))
    two = [
        load_encoder(f"hub:{repository}:{name}?trust=true", layers=[3, 11]).encode(images).map
        for name in ("v2_free", "v1")
    ]
    torch.testing.assert_close(*two)
    read = encoders["v2_free"].encode(images, attention=True, keys=True)
    same = load_encoder("timm:vit_tiny_patch16_224?pretrained=false")
    state = {k.removeprefix("vit."): v for k, v in encoders["v2_free"].model.state_dict().items() if "vit." in k}  # type: ignore[union-attr]
    same.model.load_state_dict(state)  # type: ignore[union-attr]
    mean, std = encoders["v1"].mean, encoders["v1"].std
    expected = same.encode(images, attention=True, keys=True, mean=mean, std=std)
    torch.testing.assert_close(read.attention, expected.attention)
    torch.testing.assert_close(read.keys, expected.keys)
    torch.testing.assert_close(encoders["v1"].encode(images, keys=True).keys, expected.keys)
    raw = encoders["v2_free"].encode(images, final_norm=False)
    assert not raw.final_norm
    assert not torch.allclose(raw.map, maps[0])


@pytest.mark.slow
def test_models_of_capi(repository: Path) -> None:
    images = torch.rand(2, 3, 64, 96)
    capi, dinov2 = (load_encoder(f"hub:{repository}:{name}?trust=true") for name in ("capi", "v2_free"))
    read, expected = capi.encode(images), dinov2.encode(images)
    torch.testing.assert_close(read.map, expected.map)
    torch.testing.assert_close(read.prefix, expected.prefix)
    assert all(line.passed for line in check_encoder(capi))
    two = [load_encoder(f"hub:{repository}:{name}?trust=true", layers=[3, 11]) for name in ("capi", "v2_free")]
    torch.testing.assert_close(*(encoder.encode(images).map for encoder in two))


def test_zoo_names_of_hub_models(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repository is in torch.hub's cache; its weights are not known to be the official ones."""
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(repository.parent / "hub"))
    shutil.copytree(repository, repository.parent / "hub" / "facebookresearch_capi_main")
    with pytest.raises(UsageError, match="add \\?trust=true"):
        load_encoder("capi_vitl14_lvd")
    encoder = load_encoder("capi_vitl14_lvd?trust=true")
    assert encoder.weights_id == load_encoder(f"hub:{repository}:capi?trust=true").weights_id
    assert (encoder.name, encoder.official) == ("capi_vitl14_lvd?trust=true", False)
    assert encoder.training_data.startswith("LVD-142M")


def test_hub_faults(repository: Path, tmp_path: Path) -> None:
    for spec, kind, message in (
        (f"hub:{repository}:absent?trust=true", UsageError, "no entry 'absent'"),
        (f"hub:{repository}:v2?trust=true", MissingError, "no file"),
        (f"hub:{repository}:broken?trust=true", BadInputError, "out of order"),
        (f"hub:{repository}:spare?trust=true", BadInputError, "interface of DINO"),
        ("hub:nobody/nothing_at_all:x?trust=true", MissingError, "neither a local folder"),
        (f"hub:{tmp_path}:x?trust=true", MissingError, "hubconf"),
    ):
        with pytest.raises(kind, match=message):
            load_encoder(spec)
    with pytest.raises(UsageError, match="last block only"):
        load_encoder(f"hub:{repository}:features?trust=true", layers=3)


def test_hub_with_weights(repository: Path, tmp_path: Path) -> None:
    model = load_encoder(f"hub:{repository}:v2?trust=true&pretrained=false").model
    state = {k: v.clone() * 0.5 for k, v in model.state_dict().items()}  # type: ignore[union-attr]
    save_file(state, tmp_path / "w.safetensors")
    encoder = load_encoder(f"hub:{repository}:v2?trust=true", weights=tmp_path / "w.safetensors")
    assert torch.equal(encoder.model.state_dict()["vit.cls_token"], state["vit.cls_token"])  # type: ignore[union-attr]
    before = content_id(f"hub:{repository}:v2?trust=true")
    (repository / "hubconf.py").write_text(HUBCONF + "#")
    assert content_id(f"hub:{repository}:v2?trust=true") != before


SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "config", "prefix", "more"),
    [
        ("Dinov2Model", "Dinov2Config", 1, {}),
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", 5, {"num_register_tokens": 4}),
        ("DINOv3ViTModel", "DINOv3ViTConfig", 3, {"num_register_tokens": 2, "intermediate_size": 64}),
        ("ViTModel", "ViTConfig", 1, {"intermediate_size": 64}),
        ("CLIPVisionModel", "CLIPVisionConfig", 1, {"intermediate_size": 64}),
        ("SiglipVisionModel", "SiglipVisionConfig", 0, {"intermediate_size": 64}),
    ],
)
def test_transformers_models(tmp_path: Path, model: str, config: str, prefix: int, more: dict[str, int]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**SMALL, **more)).eval()
    made.save_pretrained(tmp_path / "saved")
    facts = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (tmp_path / "saved" / "preprocessor_config.json").write_text(json.dumps(facts))
    spec = f"hf:{tmp_path}/saved"
    encoder = load_encoder(spec)
    assert encoder.mean == (0.5, 0.5, 0.5)
    images = torch.rand(2, 3, 64, 96)
    features = encoder.encode(images)
    assert features.map.shape == (2, 32, 4, 6)
    count = 0 if features.prefix is None else features.prefix.shape[1]
    assert count == prefix
    with torch.inference_mode():
        options: Any = encoder.options
        last = made((images - 0.5) / 0.25, **options).last_hidden_state
        if model == "CLIPVisionModel":  # hands out tokens before its last norm
            last = dict(made.named_modules())[next(n for n in dict(made.named_modules()) if "post_layer" in n)](last)
    torch.testing.assert_close(features.map, last[:, prefix:].transpose(1, 2).unflatten(2, (4, 6)))
    assert not torch.allclose(encoder.encode(images, final_norm=False).map, features.map)
    assert load_encoder(spec, layers=[0, 2]).encode(images).map.shape == (2, 64, 4, 6)
    again = load_encoder(spec, weights=tmp_path / "saved" / "model.safetensors")
    assert again.weights_id == encoder.weights_id
    assert len(content_id(spec)) == 64


@pytest.mark.slow
def test_transformers_faults(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(MissingError, match="does not exist"):
        load_encoder(f"hf:{tmp_path}/absent")
    with pytest.raises(MissingError, match=r"huggingface\.co/nobody/nothing"):
        load_encoder("hf:nobody/nothing")
    transformers.BertConfig(hidden_size=32).save_pretrained(tmp_path / "bert")
    with pytest.raises(UsageError, match="'bert'"):
        load_encoder(f"hf:{tmp_path}/bert")
    made = transformers.ViTModel(transformers.ViTConfig(**SMALL, intermediate_size=64))
    made.save_pretrained(tmp_path / "vit")
    spec, path = f"hf:{tmp_path}/vit", tmp_path / "vit" / "model.safetensors"
    state = load_file(path)
    save_file({k: v for k, v in state.items() if "cls_token" not in k}, tmp_path / "w.safetensors")
    with pytest.raises(BadInputError, match=r"missing: embeddings\.cls_token"):
        load_encoder(spec, weights=tmp_path / "w.safetensors")
    save_file(state | {"embeddings.cls_token": torch.ones(1, 1, 33)}, tmp_path / "w.safetensors")
    with pytest.raises(BadInputError, match="do not fit"):
        load_encoder(spec, weights=tmp_path / "w.safetensors")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(BadInputError, match="do not fit"):
        load_encoder(spec)


@pytest.mark.slow
def test_transformers_models_without_a_processor_file_of_the_old_kind(tmp_path: Path) -> None:
    """transformers 5 writes processor_config.json; without any, a type's own mean and deviation are taken."""
    transformers = pytest.importorskip("transformers")
    made = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL, intermediate_size=64))
    made.save_pretrained(tmp_path / "m")
    spec = f"hf:{tmp_path}/m"
    assert load_encoder(spec).mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)
    facts: dict[str, Any] = {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}}
    (tmp_path / "m" / "processor_config.json").write_text(json.dumps(facts))
    encoder = load_encoder(spec)
    assert (encoder.mean, encoder.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    facts["image_processor"]["image_mean"] = [0.5]
    (tmp_path / "m" / "processor_config.json").write_text(json.dumps(facts))
    with pytest.raises(BadInputError, match="need three numbers"):
        load_encoder(spec)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_transformers_models_saved_in_half_precision_run_in_single(tmp_path: Path, half: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    made = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL)).to(half)
    made.save_pretrained(tmp_path / "m")
    encoder = load_encoder(f"hf:{tmp_path}/m")
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert torch.equal(encoder.model.state_dict()["layernorm.weight"], made.layernorm.weight.float())  # type: ignore[union-attr]
    load_encoder(f"hf:{tmp_path}/m", precision="bf16").encode(torch.rand(1, 3, 32, 32))


def test_transformers_files_of_another_architecture_are_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for layers in (3, 5):
        config = transformers.Dinov2Config(**{**SMALL, "num_hidden_layers": layers})
        transformers.Dinov2Model(config).save_pretrained(tmp_path / str(layers))
    with pytest.raises(BadInputError, match=r"unexpected: encoder\.layer\.3\."):
        load_encoder(f"hf:{tmp_path}/3", weights=tmp_path / "5" / "model.safetensors")
    state = load_file(tmp_path / "3" / "model.safetensors")
    save_file(state | {"embeddings.register_tokens": torch.ones(1, 4, 32)}, tmp_path / "w.safetensors")
    with pytest.raises(BadInputError, match=r"1 unexpected: embeddings\.register_tokens"):
        load_encoder(f"hf:{tmp_path}/3", weights=tmp_path / "w.safetensors")
    save_file({"blocks.0.attn.qkv.weight": torch.ones(96, 32)}, tmp_path / "w.safetensors")
    with pytest.raises(BadInputError, match=r"names of timm .* use it with timm:NAME"):
        load_encoder(f"hf:{tmp_path}/3", weights=tmp_path / "w.safetensors")
    (tmp_path / "3" / "config.json").write_text("{")
    with pytest.raises(BadInputError, match=r"Model folder .*/3 lacks a file, or has a damaged one"):
        load_encoder(f"hf:{tmp_path}/3")


def test_transformers_files_with_wrappers_copies_and_shards(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL))
    made.save_pretrained(tmp_path / "m")
    spec, state = f"hf:{tmp_path}/m", made.state_dict()
    other = {key: value + 1 for key, value in state.items()}
    content = {f"model.module.dinov2.{key}": value for key, value in state.items()} | {
        "model.module.head.bias": torch.ones(2)
    }
    torch.save(content | {f"model_ema.module.dinov2.{key}": value for key, value in other.items()}, tmp_path / "w.pth")
    expected = load_encoder(spec).weights_id
    encoder = load_encoder(f"{spec}?branch=model", weights=tmp_path / "w.pth")
    assert encoder.weights_id == expected
    assert encoder.weights_report.dropped == ("model.head.bias", f"model_ema.* ({len(state)} tensors)")  # type: ignore[union-attr]
    assert load_encoder(spec, weights=tmp_path / "w.pth").weights_id != expected  # the moving average, as timm takes
    made.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert load_encoder(spec, weights=tmp_path / "shards").weights_id == expected


def test_fetching_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NECO_BENCH_OFFLINE")
    source = tmp_path / "source.bin"
    source.write_bytes(b"weights")
    assert fetch_url(source.as_uri(), tmp_path / "a" / "w.bin").read_bytes() == b"weights"
    with pytest.raises(MissingError, match="could not be downloaded"):
        fetch_url((tmp_path / "absent.bin").as_uri(), tmp_path / "b" / "w.bin")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["w.bin"]


@pytest.mark.parametrize("spec", ["hub:owner/name:entry", "hub:{folder}:v1", "hub:{folder}:v1?trust=false"])
def test_hub_code_runs_only_when_it_is_trusted(repository: Path, spec: str) -> None:
    (repository / "hubconf.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UsageError, match=r"runs the code of .* add \?trust=true"):
        load_encoder(spec.format(folder=repository))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "resnet18", "mixer_s32_224"])
def test_hub_entries_that_return_timm_models(tmp_path: Path, name: str) -> None:
    (tmp_path / "hubconf.py").write_text(
        f"import timm, torch\ndef model(pretrained=True):\n    torch.manual_seed(0)\n"
        f"    return timm.create_model({name!r}, num_classes=0)\n"
    )
    images = torch.rand(1, 3, 224, 224)
    actual = load_encoder(f"hub:{tmp_path}:model?trust=true")
    plain = load_encoder(f"timm:{name}?pretrained=false&seed=0")
    torch.testing.assert_close(actual.encode(images).map, plain.encode(images).map, rtol=1e-4, atol=1e-4)
    assert (actual.mean, actual.std, actual.stride) == (plain.mean, plain.std, plain.stride)
    if plain.only_size is None:
        wide = torch.rand(1, 3, 128, 192)
        torch.testing.assert_close(actual.encode(wide).map, plain.encode(wide).map, rtol=1e-3, atol=1e-3)
