"""Zoo facts against the architectures, the grammar of specs, and identities without torch."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from neco_bench.core.errors import MissingError, UsageError
from neco_bench.data.load import DATASETS
from neco_bench.encoders import content_id, describe_models, load_encoder, model_info
from neco_bench.encoders.adapters import franca, tiny
from neco_bench.encoders.spec import architecture, parse_spec, training_of
from neco_bench.encoders.zoo import ZooEntry, aliases, contamination, models, zoo


def test_what_the_zoo_holds() -> None:
    ids = set(zoo())
    neco = ["dinov2", "dinov2_vitb14", "dinov2r", "dinov2r_vitb14", "dinov2r_xr", "dinov2r_xr_vitb14"]
    neco += ["dino", "timet", "leopart"]
    assert ids >= {f"neco_{name}{end}" for name in neco for end in ("", "_teacher")}
    assert ids >= {"dino_vits16", "dino_vits8", "dino_vitb16", "dino_vitb8"}
    assert ids >= {f"dinov2_vit{size}14{end}" for size in "sblg" for end in ("", "_reg")}
    assert ids >= {"dinov2_vits14_reg_xr", "dinov2_vitb14_reg_xr"}
    assert ids >= {"dinov3_vits16", "dinov3_vitl16", "dinov3_convnext_tiny", "mae_vitb16", "clip_vitb16"}
    assert ids >= {"baseline_rgb", "baseline_hog", "random_vit_small"}
    assert ids >= {"ibot_vits16", "cribo_vits16", "leopart_vits16", "timet_vits16", "mae_vitb16", "franca_vitb14"}
    assert ids >= {"pe_spatial_vitg14", "c_radiov3_vitb16", "tipsv2_vitb14", "eupe_vits16", "capi_vitl14_lvd"}


@pytest.mark.slow
@pytest.mark.parametrize("entry", zoo().values(), ids=zoo())
def test_facts(entry: ZooEntry) -> None:
    for fact in ("source", "licence", "citation", "training_data"):
        assert getattr(entry, fact), fact
    assert entry.pos_interp in ("timm", "scale_offset", "size_antialias", "none")
    if entry.spec.startswith("hub:"):  # its code is not here
        assert entry.spec.endswith(f":{entry.id}")
        assert parse_spec(f"{entry.id}?trust=true").kind == "hub"
        return
    if not entry.spec.startswith("timm:"):
        encoder = load_encoder(entry.id)
        assert (encoder.embed_dim, encoder.stride) == (entry.embed_dim, entry.stride)
        return
    name = parse_spec(entry.spec).target
    assert franca  # imported, as is tiny, so that timm knows their models
    assert tiny
    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=0)
    assert model.feature_info[-1]["num_chs"] == entry.embed_dim
    assert model.feature_info[-1]["reduction"] == entry.stride
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(entry.params_m, rel=0.01)
    if "." in name:  # timm's own weights
        config = timm.get_pretrained_cfg(name)
        assert config is not None
        assert config.mean == (entry.mean or (0.485, 0.456, 0.406))
        assert config.std == (entry.std or (0.229, 0.224, 0.225))
    else:
        assert entry.weights or "pretrained=false" in entry.spec
    if ("_reg" in entry.id and "_xr" not in entry.id) or entry.id in ("neco_dinov2r", "neco_dinov2r_vitb14"):
        assert model.reg_token is not None


@pytest.mark.parametrize(("name", "width", "hidden"), [("base", 768, 2048), ("large", 1024, 2736)])
def test_the_blocks_of_franca_are_those_of_dinov2_with_swiglu(name: str, width: int, hidden: int) -> None:
    """As in dinov2/layers/swiglu_ffn.py: w3 (silu(first half of w12 x) * second half), two thirds of 4 D hidden."""
    mlp: Any = timm.create_model(f"vit_{name}_patch14_franca", depth=1).get_submodule("blocks.0.mlp")
    assert mlp.fc1.weight.shape == (2 * hidden, width)
    tokens = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))
    gates, values = mlp.fc1(tokens).split(hidden, -1)
    expected = (gates * torch.sigmoid(gates) * values) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(mlp(tokens), expected)


def test_addresses_with_queries_name_their_file() -> None:
    file = zoo()["timet_vits16"].weights_file
    assert file is not None
    assert file.name == "TimeT.pth"


@pytest.fixture
def own_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a zoo that has one entry more, `small`, whose weights are part of the package."""
    module = sys.modules[zoo.__module__]
    entry = """
        [model.small]
        family = "baseline"
        spec = "timm:test_vit3"
        weights = "weights/small.safetensors"
        teacher = "weights/teacher.safetensors"
        embed_dim = 96
        stride = 16
        params_m = 0.9
        pos_interp = "timm"
        citation = "none"
    """
    (tmp_path / "zoo.toml").write_text(module._FILE.read_text() + entry)
    monkeypatch.setattr(module, "_FILE", tmp_path / "zoo.toml")
    for cached in (zoo, aliases, models):
        cached.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    for cached in (zoo, aliases, models):
        cached.cache_clear()


def test_weights_that_are_part_of_the_package(own_zoo: Path) -> None:
    place = own_zoo / "weights" / "small.safetensors"
    assert model_info("small")["weights_file"] == str(place)
    assert {row["model"]: row["weights"] for row in describe_models()}["small"] == "missing"
    with pytest.raises(MissingError, match=r"weights/small\.safetensors, the weights of 'small', does not exist"):
        load_encoder("small")
    before = content_id("small")
    place.parent.mkdir()
    made = load_encoder("timm:test_vit3?pretrained=false&seed=4")
    save_file(made.model.state_dict(), place)  # type: ignore[union-attr]
    encoder = load_encoder("small")
    assert encoder.weights_id == made.weights_id
    assert encoder.mean == (0.485, 0.456, 0.406)
    assert content_id("small") != before
    assert {row["model"]: row["weights"] for row in describe_models()}["small"] == "here"
    assert zoo()["small_teacher"].weights_file == own_zoo / "weights" / "teacher.safetensors"
    assert load_encoder("small?pretrained=false").weights_id != made.weights_id
    assert architecture("small") == "timm:test_vit3"


def test_zoo_weights_use_the_statistics_of_their_training() -> None:
    encoder = load_encoder("dino_vits16?pretrained=false")
    assert encoder.mean == (0.485, 0.456, 0.406)


def test_specs() -> None:
    request = parse_spec("neco_dinov2_vits14?layers=3,11&final_norm=false")
    assert (request.name, request.target) == ("neco_dinov2?final_norm=false&layers=3,11", "vit_small_patch14_dinov2")
    assert (request.layers, request.final_norm, request.pos_interp) == ((3, 11), False, "scale_offset")
    assert parse_spec("random_vit_small").name == "random_vit_small"
    assert parse_spec("random_vit_small?seed=4").seed == 4
    assert parse_spec("dir/enc.py:make").kind == "file"
    assert parse_spec("hub:facebookresearch/dinov2:main:dinov2_vits14").target.endswith(":dinov2_vits14")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("neco_dinov3", "neco_dinov2"),
        ("timm:x?pretraind=false", "pretrained"),
        ("timm:x?pretrained=no", "true, false"),
        ("timm:x?seed=1", "pretrained=false"),
        ("timm:x?pretrained=false&seed=a", "whole number"),
        ("timm:x?pretrained=false&seed=9223372036854775808", "whole number"),
        ("timm:x?pos_interp=bilinear", "scale_offset"),
        ("timm:", "incomplete"),
        ("hub:owner/repo", "incomplete"),
        ("facebook/dinov2", "hf:ID"),
        ("enc.py", "FACTORY"),
        ("baseline_rgb?layers=3", "layers"),
    ],
)
def test_wrong_specs(spec: str, message: str) -> None:
    for function in (content_id, model_info):
        with pytest.raises(UsageError, match=message):
            function(spec)


ADDRESSES = {entry.id: entry.weights for entry in zoo().values() if (entry.weights or "").startswith("https:")}


@pytest.mark.network
@pytest.mark.parametrize("address", ADDRESSES.values(), ids=ADDRESSES)
def test_weights_are_where_the_zoo_says(address: str) -> None:
    request = urllib.request.Request(address, method="HEAD")  # noqa: S310 - an address of zoo.toml
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - as above
        assert answer.status == 200


def test_device_and_precision() -> None:
    for options in ({"device": "tpu"}, {"device": "nonsense"}, {"precision": "fp8"}, {"layers": 3}):
        with pytest.raises(UsageError):
            load_encoder("baseline_rgb", **options)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="not available"):
            load_encoder("baseline_rgb", device="cuda:0")
    assert load_encoder("baseline_rgb", device="cpu").device.type == "cpu"
    with pytest.raises(MissingError):
        load_encoder("neco_dinov2", weights="nowhere.pth")


def test_content_id_follows_content(tmp_path: Path) -> None:
    file = tmp_path / "enc.py"
    file.write_text("def make(): ...")
    first = content_id(f"{file}:make")
    file.write_text("def make(): return 1")
    second = content_id(f"{file}:make")
    (tmp_path / "helper.py").write_text("SCALE = 1")  # which it may import
    third = content_id(f"{file}:make")
    package = tmp_path / "package" / "inner"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    fourth = content_id(f"{file}:make")
    (package / "layers.py").write_text("SCALE = 2")
    assert len({first, second, third, fourth, content_id(f"{file}:make")}) == 5
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"1")
    ids = {content_id("neco_dinov2"), content_id("neco_dinov2", weights), content_id("neco_dinov2?layers=3")}
    ids |= {content_id("dinov2_vits14"), content_id("baseline_rgb"), content_id("baseline_hog")}
    place = tmp_path / "cache" / "weights" / "neco_dinov2"
    place.mkdir(parents=True)
    (place / "neco_on_dinov2_vit14_model.ckpt").write_bytes(b"2")
    ids.add(content_id("neco_dinov2"))
    assert len(ids) == 7
    own = [content_id(f"timm:{name}") for name in ("vit_x", "vit_x.tag")]
    (tmp_path / "cache" / "weights" / "vit_x.tag").mkdir()
    (tmp_path / "cache" / "weights" / "vit_x.tag" / "model.safetensors").write_bytes(b"3")
    assert not {content_id(f"timm:{name}") for name in ("vit_x", "vit_x.tag")} & set(own)
    assert content_id("timm:x?seed=1&pretrained=false") == content_id("timm:x?pretrained=false&seed=1")
    given = content_id("neco_dinov2", weights)
    assert content_id(parse_spec("neco_dinov2", weights)) == content_id(parse_spec("neco_dinov2"), weights) == given
    with pytest.raises(MissingError):
        content_id("neco_dinov2", tmp_path / "absent.pth")
    with pytest.raises(MissingError):
        content_id(f"{tmp_path}/absent.py:make")


def test_naming_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, neco_bench.encoders as e, neco_bench.encoders.load\n"
        "e.describe_models(); e.model_info('neco_dinov2'); e.content_id('neco_dinov2'); e.content_id('baseline_hog')\n"
        "assert not {'torch', 'timm', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"NECO_BENCH_CACHE": str(tmp_path)})


def test_listing() -> None:
    rows = {row["model"]: row for row in describe_models()}
    assert rows["neco_dino"]["weights"] == "to fetch"
    assert rows["neco_dino"]["stride"] == 16
    assert "neco_dinov2_vits14" not in rows
    assert "neco_dinov2_vits14" in models()
    assert model_info("neco_dinov2_vits14")["weights_in_place"] is False


@pytest.mark.parametrize(
    ("spec", "weights", "images_from", "known"),
    [
        ("neco_dinov2", None, "coco", "seen"),
        ("neco_dinov2_teacher", None, "voc", "near"),
        ("neco_dino", None, "voc", "none known"),
        ("dinov2_vits14", None, "camvid", "possible"),
        ("clip_vitb16", None, "ade20k", "possible"),
        ("baseline_hog", None, "coco", "none known"),
        ("dinov2_vits14?layers=3", None, "ade20k", "near"),
        ("dinov2_vits14?pretrained=false", None, "ade20k", "none known"),
        ("dinov2_vits14", "mine.pth", "coco", "unknown"),
        ("timm:resnet18", None, "coco", "unknown"),
        ("timm:resnet18?pretrained=false", None, "coco", "none known"),
        ("hub:owner/repo:v2", None, "coco", "unknown"),
        ("mine.py:make", None, "coco", "unknown"),
    ],
)
def test_contamination(spec: str, weights: str | None, images_from: str, known: str) -> None:
    _, overlap = training_of(parse_spec(spec, weights))
    assert contamination(overlap, [images_from]) == known


def test_overlaps_are_of_the_known_kinds() -> None:
    kinds = {kind for entry in zoo().values() for kind in entry.overlap.values()}
    assert kinds == {"seen", "near", "possible"}
    sources = {cls.images_from or cls.folder_name or cls.name for cls in map(DATASETS.load, DATASETS)}
    assert {name for entry in zoo().values() for name in entry.overlap} - {"*"} <= sources
