"""Run folders as models: every kind of architecture comes back as it was trained, and nothing is fetched for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neco_bench.core.errors import BadInputError, MissingError, UsageError
from neco_bench.encoders import Encoder, content_id, load_encoder, model_info
from neco_bench.encoders.run_folder import TrainedEncoder
from neco_bench.encoders.spec import architecture, parse_spec, training_of
from neco_bench.encoders.weights import inner_module
from neco_bench.encoders.zoo import contamination

from .test_encoder_hubs import HUBCONF, SMALL
from .test_encoder_weights import PLAIN, REG, official_registers

States = Callable[[str], dict[str, Tensor]]
TINY = "timm:vit_tiny_patch16_224"

FACTORIES = """
import torch
from torch import nn
from neco_bench.encoders.base import DenseFeatures, Encoder

class Cells(nn.Module):
    embed_dim, stride = 8, 16
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Conv2d(3, 8, 16, 16)
    def forward(self, x):
        return self.project(x)

def module(): return Cells()

class Own(Encoder):
    embed_dim, stride, mean = 8, 16, (0.5, 0.5, 0.5)
    def __init__(self):
        super().__init__()
        self.model, self.scale = Cells(), nn.Parameter(torch.ones(8, 1, 1))
    def _encode(self, images, *, final_norm, attention):
        return DenseFeatures(self.model(images) * self.scale, 16, final_norm=False)

def own(): return Own()
"""


def leave_run(folder: Path, encoder: Encoder, base: str, **facts: Any) -> Path:
    """What training `encoder` leaves: a teacher as it is, and a student changed in place. Returns the folder."""
    place = folder / "checkpoint-0000500"
    place.mkdir(parents=True)
    for role, factor in (("teacher", 1.0), ("student", 0.9)):
        with torch.no_grad():
            for parameter in inner_module(encoder).parameters():
                parameter.mul_(factor)
        save_file({k: v.clone() for k, v in inner_module(encoder).state_dict().items()}, place / f"{role}.safetensors")
    content = {
        "format": 1,
        "base": architecture(base),
        "student": f"{place.name}/student.safetensors",
        "teacher": f"{place.name}/teacher.safetensors",
        "mean": encoder.mean,
        "std": encoder.std,
        "layers": None,
        "embed_dim": encoder.embed_dim,
        "stride": encoder.stride,
        "step": 500,
        "training_data": "shapes",
        "overlap": {"shapes": "seen", "voc": "near"},
    }
    (folder / "encoder.json").write_text(json.dumps(content | facts))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return leave_run(tmp_path / "runs" / "vit", load_encoder(f"{TINY}?pretrained=false"), TINY)


def change(run: Path, **facts: Any) -> None:
    content = json.loads((run / "encoder.json").read_text())
    (run / "encoder.json").write_text(json.dumps(content | facts))


def _hub(folder: Path) -> str:
    (folder / "hubconf.py").write_text(HUBCONF)
    return f"hub:{folder}:v2?trust=true&pretrained=false"  # without the option its factory would fetch


def _file(folder: Path) -> str:
    (folder / "mine.py").write_text(FACTORIES)
    return f"{folder}/mine.py"


def _transformers(folder: Path) -> str:
    transformers = pytest.importorskip("transformers")
    transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**SMALL)).save_pretrained(folder)
    return f"hf:{folder}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec_in",
    [
        lambda folder: "timm:vit_tiny_patch16_224?pretrained=false&seed=3&layers=2,5&final_norm=false",
        lambda folder: "timm:test_vit3?pretrained=false",  # registers, no class token, attention pooling
        lambda folder: "timm:resnet18?pretrained=false",
        lambda folder: "timm:convnext_atto?pretrained=false&layers=2",
        lambda folder: "timm:mobilenetv3_small_050?pretrained=false",  # names like those of DINOv2's chunks
        lambda folder: "random_vit_small?pos_interp=scale_offset",
        _hub,
        _transformers,
        lambda folder: f"{_file(folder)}:module",
        lambda folder: f"{_file(folder)}:own",
    ],
    ids=["vit", "vit3", "resnet", "convnext", "mobilenet", "zoo", "hub", "hf", "module", "encoder"],
)
def test_every_kind_comes_back(tmp_path: Path, spec_in: Callable[[Path], str]) -> None:
    spec = spec_in(tmp_path)
    encoder = load_encoder(spec)
    images = torch.rand(1, 3, 64, 96)
    teacher = encoder.encode(images).map
    run = leave_run(tmp_path / "run", encoder, spec, mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.1))
    encoder.mean, encoder.std = (0.4, 0.5, 0.6), (0.3, 0.2, 0.1)
    trust = "trust=true" if spec.startswith("hub:") else ""  # asked for again: a run folder may be someone else's
    if trust:
        with pytest.raises(UsageError, match="trust=true"):
            load_encoder(str(run))
    again = load_encoder(f"{run}?{trust}")
    assert (again.name.partition("?")[0], again.mean, again.std) == (str(run), encoder.mean, encoder.std)
    assert (again.layer, again.pos_interp, again.final_norm) == (encoder.layer, encoder.pos_interp, encoder.final_norm)
    assert torch.equal(again.encode(images).map, encoder.encode(images).map)
    assert not torch.equal(again.encode(images).map, teacher)
    assert inner_module(again).state_dict().keys() == inner_module(encoder).state_dict().keys()
    from_teacher = load_encoder(f"{run}?branch=teacher&{trust}")
    assert from_teacher.name.startswith(f"{run}?branch=teacher")
    assert from_teacher.weights_id == load_encoder(spec).weights_id


@pytest.mark.slow
@pytest.mark.parametrize(("zoo_name", "name", "prefix"), [("dinov2_vits14", PLAIN, 1), ("dinov2_vits14_reg", REG, 0)])
def test_positions_of_any_grid(
    states: States, images: Tensor, tmp_path: Path, zoo_name: str, name: str, prefix: int
) -> None:
    for side in (37, 16):  # 518 and 224 pixels
        state = dict(states(name))
        state["pos_embed"] = state["pos_embed"][:, : prefix + side * side].contiguous()
        save_file(state, tmp_path / "w.safetensors")
        encoder = load_encoder(zoo_name, weights=tmp_path / "w.safetensors")
        run = leave_run(tmp_path / f"run{side}", encoder, zoo_name)
        again = load_encoder(str(run))
        assert again.model.patch_embed.grid_size == (side, side)  # type: ignore[union-attr]
        assert again.pos_interp == parse_spec(zoo_name).pos_interp
        assert torch.equal(again.encode(images).map, encoder.encode(images).map)


@pytest.mark.slow
def test_an_architecture_whose_registers_were_dropped(states: States, images: Tensor, tmp_path: Path) -> None:
    torch.save(states(PLAIN) | {"register_tokens": torch.zeros(1, 4, 384)}, tmp_path / "reg4.pth")
    encoder = load_encoder("dinov2_vits14_reg_xr", weights=tmp_path / "reg4.pth")
    run = leave_run(tmp_path / "run", encoder, "dinov2_vits14_reg_xr")
    assert json.loads((run / "encoder.json").read_text())["base"] == f"timm:{PLAIN}?pos_interp=scale_offset"
    assert torch.equal(load_encoder(str(run)).encode(images).map, encoder.encode(images).map)


def test_another_weights_file(run: Path, states: States, tmp_path: Path) -> None:
    state = load_file(run / "checkpoint-0000500" / "teacher.safetensors")
    both = {f"{p}{k}": v * f for p, f in (("model.", 2.0), ("teacher.", 3.0)) for k, v in state.items()}
    torch.save({"state_dict": both}, tmp_path / "lightning.ckpt")
    change(run, teacher=None)
    for branch, factor in (("", 2), ("?branch=teacher", 3)):
        encoder = load_encoder(f"{run}{branch}", weights=tmp_path / "lightning.ckpt")
        assert torch.equal(encoder.model.norm.weight, factor * state["norm.weight"])  # type: ignore[union-attr, arg-type]
    save_file(official_registers(states(REG)), tmp_path / "official.safetensors")
    with pytest.raises(BadInputError, match=r"official\.safetensors has register tokens"):
        load_encoder(str(run), weights=tmp_path / "official.safetensors")


@pytest.mark.slow
def test_options_and_names(run: Path) -> None:
    assert load_encoder(f"{run}/").name == str(run)
    assert parse_spec(f"{run}/?layers=3&branch=teacher").name == f"{run}?branch=teacher&layers=3"
    assert load_encoder(str(run)).layer == "last"
    change(run, layers=[3, 11])
    encoder = load_encoder(str(run))
    assert (encoder.layer, encoder.embed_dim) == ("blocks 3,11", 384)
    assert load_encoder(f"{run}?layers=5").layer == "block 5"
    assert load_encoder(f"{run}?layers=5", layers=7).layer == "block 7"
    assert not load_encoder(f"{run}?final_norm=false").final_norm
    change(run, base=f"{TINY}?layers=1&final_norm=false", layers=None)
    assert load_encoder(str(run)).layer == "block 1"
    assert not load_encoder(str(run)).final_norm
    assert load_encoder(f"{run}?final_norm=true").final_norm
    with pytest.raises(UsageError, match="branch, layers, final_norm"):
        parse_spec(f"{run}?pos_interp=timm")
    with pytest.raises(UsageError, match="branch='ema' must be student or teacher"):
        load_encoder(f"{run}?branch=ema")


def test_options_that_the_architecture_lacks(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FACTORIES)
    spec = f"{tmp_path}/mine.py:own"
    run = leave_run(tmp_path / "run", load_encoder(spec), spec)
    with pytest.raises(UsageError, match="it takes branch"):
        parse_spec(f"{run}?layers=3")
    with pytest.raises(UsageError, match="has a fixed layer; leave out layers"):
        load_encoder(str(run), layers=3)
    change(run, base="timm:resnet18")
    with pytest.raises(BadInputError, match=r"student\.safetensors does not fit"):
        load_encoder(str(run))


def test_identity_and_facts(run: Path, tmp_path: Path) -> None:
    spec, students = str(run), run / "checkpoint-0000500" / "student.safetensors"
    first = content_id(spec)
    shutil.copytree(run, tmp_path / "elsewhere")
    assert content_id(f"{tmp_path}/elsewhere/") == first
    (tmp_path / "w").write_bytes(b"1")
    ids = {
        first,
        content_id(f"{spec}?branch=teacher"),
        content_id(f"{spec}?layers=3"),
        content_id(spec, tmp_path / "w"),
    }
    change(run, step=1000)
    ids.add(content_id(spec))
    students.write_bytes(b"2")
    ids.add(content_id(spec))
    assert len(ids) == 6
    overlap = training_of(parse_spec(spec))[1]
    assert [contamination(overlap, [name]) for name in ("shapes", "voc", "coco")] == ["seen", "near", "none known"]
    assert load_encoder(TINY, weights=students.with_name("teacher.safetensors")).overlap == {"*": "unknown"}
    facts = model_info(f"{spec}?branch=teacher")
    assert (facts["name"], facts["kind"], facts["step"]) == (f"{spec}?branch=teacher", "run", 1000)
    assert (facts["base"], facts["training_data"]) == (TINY, "shapes")
    assert facts["weights_file"] == str(students.with_name("teacher.safetensors"))
    assert facts["weights_in_place"]
    students.unlink()
    assert not model_info(spec)["weights_in_place"]


def test_naming_a_run_imports_no_torch(run: Path) -> None:
    code = (
        "import sys, neco_bench.encoders as e\n"
        "from neco_bench.encoders.spec import architecture\n"
        "e.model_info(sys.argv[1]); e.content_id(sys.argv[1]); architecture(sys.argv[1])\n"
        "assert not {'torch', 'timm', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(run)], check=True, env=os.environ)


def test_a_run_comes_before_a_zoo_name_and_a_folder_after(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dinov2_vits14").mkdir()
    assert parse_spec("dinov2_vits14").kind == "timm"
    shutil.copy(run / "encoder.json", "dinov2_vits14")
    assert (parse_spec("dinov2_vits14").kind, parse_spec("dinov2_vits14").name) == ("run", "dinov2_vits14")
    assert training_of(parse_spec("dinov2_vits14"))[1] == {"shapes": "seen", "voc": "near"}
    monkeypatch.chdir(run)
    assert load_encoder(".").name == "."


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("dinov2_vits14", f"timm:{PLAIN}?pos_interp=scale_offset"),
        ("dinov2_vits14?pos_interp=timm", f"timm:{PLAIN}"),
        ("dinov2_vits14_reg", f"timm:{REG}?pos_interp=size_antialias"),
        ("dinov2_vits14_reg?pos_interp=scale_offset&layers=5,11", f"timm:{REG}?layers=5,11&pos_interp=scale_offset"),
        ("neco_dinov2r_xr_teacher?branch=teacher", f"timm:{PLAIN}?pos_interp=scale_offset"),
        ("random_vit_small?seed=4", "timm:vit_small_patch16_224"),
        ("mae_vitb16?final_norm=false", "timm:vit_base_patch16_224.mae?final_norm=false"),
        ("dinov3_convnext_tiny", "timm:convnext_tiny.dinov3_lvd1689m"),
        ("baseline_hog", "baseline_hog"),
        (f"{TINY}?pretrained=false&seed=3&layers=-1", f"{TINY}?layers=-1"),
        (
            "hub:facebookresearch/dinov2:main:dinov2_vits14?pretrained=false",
            "hub:facebookresearch/dinov2:main:dinov2_vits14",
        ),
        ("hf:facebook/dinov2-small?layers=3", "hf:facebook/dinov2-small?layers=3"),
        ("dir/enc.py:make?branch=student", "dir/enc.py:make"),
    ],
)
def test_architecture(spec: str, expected: str) -> None:
    assert architecture(spec) == expected
    assert architecture(expected) == expected


def test_architecture_of_a_run(run: Path) -> None:
    assert architecture(str(run)) == TINY
    change(run, base=f"{TINY}?pos_interp=scale_offset", layers=[3])
    assert architecture(f"{run}?branch=teacher") == f"{TINY}?layers=3&pos_interp=scale_offset"
    assert (
        architecture(f"{run}?layers=5&final_norm=false") == f"{TINY}?final_norm=false&layers=5&pos_interp=scale_offset"
    )


def test_a_folder_without_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "begun").mkdir()
    monkeypatch.chdir(tmp_path)
    for spec in ("begun", f"{tmp_path}/begun/", "begun?branch=teacher"):
        for function in (content_id, model_info, load_encoder, architecture):
            with pytest.raises(MissingError, match=r"begun.* contains no trained encoder .*not saved a checkpoint"):
                function(spec)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"format": 2}, "format 2; this neco-bench reads up to 1"),
        ({"format": "x"}, "format: Input should be 1"),
        ({"base": 3}, "base: Input should be a valid string"),
        ({"base": "dinov2_vits15"}, r"base: Unknown model.*dinov2_vits14"),
        ({"base": "."}, "is itself a run folder"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"std": [0.5, 0.5, 0]}, "std.2: Input should be greater than 0"),
        ({"std": [0.5, 0.5, float("nan")]}, "std.2: Input should be a finite number"),
        ({"layers": []}, "layers"),
        ({"stride": 0}, "stride"),
        ({"more": 1}, "more: Extra inputs"),
    ],
)
def test_wrong_descriptions(run: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], message: str) -> None:
    change(run, **facts)
    monkeypatch.chdir(run)
    for function in (content_id, load_encoder):
        with pytest.raises(BadInputError, match=message) as caught:
            function(str(run))
        assert str(run / "encoder.json") in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00", '{"format": 1}'])
def test_descriptions_that_are_not_whole(run: Path, content: str) -> None:
    (run / "encoder.json").write_text(content)
    with pytest.raises(BadInputError, match=r"encoder\.json .*Resume the training run"):
        content_id(str(run))


def test_a_description_is_written_as_it_is_read(run: Path) -> None:
    text = (run / "encoder.json").read_text()
    assert json.loads(TrainedEncoder.model_validate_json(text).model_dump_json()) == json.loads(text)


def test_files_that_are_not_there(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = run / "checkpoint-0000500" / "student.safetensors"
    student.write_bytes(student.read_bytes()[:900])
    with pytest.raises(BadInputError, match=r"student\.safetensors could not be read"):
        load_encoder(str(run))
    with pytest.raises(MissingError, match=r"absent\.pth"):
        load_encoder(str(run), weights=tmp_path / "absent.pth")
    student.unlink()
    for function in (content_id, load_encoder):
        with pytest.raises(
            MissingError, match=r"student\.safetensors, the weights that .*encoder\.json.*--weights FILE"
        ):
            function(str(run))
    change(run, teacher=None)
    for of_teacher in (content_id, model_info, load_encoder):
        with pytest.raises(UsageError, match="no teacher's weights"):
            of_teacher(f"{run}?branch=teacher")
    change(run, base="mine.py:own")
    with pytest.raises(MissingError, match=r"encoder\.json: base 'mine\.py:own' names a file that does not exist"):
        parse_spec(str(run))
