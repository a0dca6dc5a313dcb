"""Recipes: those that ship against the official configuration table, overrides, and wrong files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from neco_bench.core.errors import BadInputError, MissingError, UsageError
from neco_bench.encoders.spec import parse_spec
from neco_bench.training.recipe import Recipe, load_recipe, parse_changes, shipped

COCO, IN100, VOC = 118_287, 126_689, 10_582  # images, protocols/neco.md 1.15

# protocols/neco.md 1.18: crops, base, batch, epochs, lr_backbone, steepness of student and teacher, network, mask,
# teacher, queue; then images of its data and total steps (1.15).
V2 = "dinov2_vits14"
XR = "dinov2_vits14_reg_xr"
LEOPART, TIMET = "leopart_vits16", "timet_vits16"
REG = "dinov2_vits14_reg?pos_interp=scale_offset"
TABLE: dict[str, tuple[Any, ...]] = {
    "neco_224": (224, 98, REG, 6, 50, 1e-6, 100, 100, "bitonic", "all", True, 0, COCO, 985_700),
    "neco_518": (518, 98, REG, 6, 50, 1e-6, 100, 100, "bitonic", "all", True, 0, COCO, 985_700),
    "neco_dev": (224, 98, V2, 55, 50, 1e-6, 100, 100, "bitonic", "all", True, 0, COCO, 107_500),
    "neco_dinov2_vits14": (518, 98, V2, 64, 25, 1e-5, 100, 100, "bitonic", "all", True, 8192, COCO, 46_200),
    "neco_vits14_518": (518, 98, REG, 64, 25, 1e-5, 100, 100, "bitonic", "all", True, 8192, COCO, 46_200),
    "neco_dinov2r_xr_vits14": (518, 98, XR, 64, 25, 1e-5, 100, 100, "bitonic", "all", True, 8192, COCO, 46_200),
    "neco_dinov2_vitb14": (
        518, 98, V2.replace("vits", "vitb"), 16, 25, 5e-6, 100, 100, "bitonic", "all", True, 8192, COCO, 184_800,
    ),
    "neco_dinov2r_vitb14": (
        518, 98, REG.replace("vits", "vitb"), 16, 25, 1e-6, 100, 100, "bitonic", "all", True, 8192, COCO, 184_800,
    ),
    "neco_dinov2r_xr_vitb14": (
        518, 98, XR.replace("vits", "vitb"), 16, 25, 1e-6, 100, 100, "bitonic", "all", True, 8192, COCO, 184_800,
    ),
    "neco_dino_vits16": (224, 96, "dino_vits16", 45, 50, 1e-5, 100, 100, "bitonic", "all", True, 0, COCO, 131_400),
    "neco_leopart_vits16": (224, 96, LEOPART, 45, 50, 1e-5, 100, 100, "bitonic", "all", True, 0, COCO, 131_400),
    "neco_timetuning_vits16": (224, 96, TIMET, 45, 50, 1e-5, 100, 100, "bitonic", "all", True, 0, COCO, 131_400),
    "ablation_steepness_100_100": (224, 98, XR, 55, 50, 1e-6, 100, 100, "bitonic", "all", True, 0, COCO, 107_500),
    "ablation_steepness_1000_1000": (224, 98, XR, 55, 50, 1e-6, 1000, 1000, "bitonic", "all", True, 0, COCO, 107_500),
    "ablation_steepness_100_1000": (224, 98, XR, 55, 50, 1e-6, 100, 1000, "bitonic", "all", True, 0, COCO, 107_500),
    "ablation_steepness_10_100": (224, 98, XR, 55, 50, 1e-6, 10, 100, "bitonic", "all", True, 0, COCO, 107_500),
    "ablation_steepness_10_1000": (224, 98, XR, 55, 50, 1e-6, 10, 1000, "bitonic", "all", True, 0, COCO, 107_500),
    "ablation_odd_even": (224, 98, XR, 55, 50, 1e-6, 100, 100, "odd_even", "all", True, 0, COCO, 107_500),
    "ablation_in100": (224, 98, XR, 55, 50, 1e-6, 100, 100, "odd_even", "all", True, 0, IN100, 115_150),
    "ablation_voc": (224, 98, XR, 55, 50, 1e-6, 100, 100, "odd_even", "all", True, 0, VOC, 9_600),
    "ablation_fg": (224, 98, XR, 55, 50, 1e-6, 100, 100, "odd_even", "fg", True, 0, VOC, 9_600),
    "ablation_bg": (224, 98, XR, 55, 50, 1e-6, 100, 100, "odd_even", "bg", True, 0, VOC, 9_600),
    "ablation_no_teacher": (224, 98, XR, 55, 50, 1e-6, 100, 100, "odd_even", "all", False, 0, VOC, 9_600),
}  # fmt: skip
KEYS = (
    "global_size", "local_size", "base", "batch_size", "epochs", "lr_backbone", "student_steepness",
    "teacher_steepness", "network", "loss_mask", "use_teacher", "queue_length",
)  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_official_configuration(name: str) -> None:
    *values, images, steps = TABLE[name]
    recipe = load_recipe(name)
    assert recipe.model_dump(include=set(KEYS)) == dict(zip(KEYS, values, strict=True))
    assert recipe.total_steps(images) == steps
    varied = {*KEYS}
    assert {k: v for k, v in recipe if k not in varied} == {k: v for k, v in Recipe() if k not in varied}
    parse_spec(recipe.base)


def test_what_all_configurations_share() -> None:
    """protocols/neco.md 1.2, 1.5, 1.13, 1.14 and the line above the table of 1.18."""
    assert Recipe().model_dump() == Recipe().model_dump() | {
        "objective": "neco", "locals": 4, "global_scale": (0.25, 1.0), "local_scale": (0.05, 0.25),
        "min_overlap": 0.01, "jitter_probability": 0.8, "jitter_strength": 1.0, "gray_probability": 0.2,
        "blur_probability": 0.5, "blur_strength": 1.0, "head_hidden": 2048, "head_dim": 256, "head_layers": 3,
        "cells": 7, "references": 49, "similarity": "cosine", "momentum": 0.9995, "final_momentum": 1.0,
        "drop_path": 0.1, "trainable_blocks": None, "lr_head": 1e-4, "final_lr": 0.0, "warmup_steps": 0,
        "weight_decay": 0.04, "final_weight_decay": 0.5, "clip_norm": None, "precision": "fp32", "seed": 400,
        "queue_per_image": 10,
    }  # fmt: skip


def test_every_shipped_recipe_is_in_the_table_or_is_ours() -> None:
    assert set(shipped()) - set(TABLE) == {"neco_ibot_vits16", "neco_cribo_vits16", "tiny_base", "tiny_neco"}


def test_recipes_of_ours_for_further_starts_are_that_of_dino() -> None:
    for start in ("ibot", "cribo"):
        assert load_recipe(f"neco_{start}_vits16") == load_recipe("neco_dino_vits16", {"base": f"{start}_vits16"})


def test_changes_on_top(tmp_path: Path) -> None:
    changes = parse_changes(["lr_backbone=1e-6", "trainable_blocks=[8, 9]", "clip_norm=null", "network=odd_even"])
    recipe = load_recipe("neco_vits14_518", changes)
    assert (recipe.lr_backbone, recipe.trainable_blocks, recipe.clip_norm) == (1e-6, [8, 9], None)
    assert recipe.network == "odd_even"
    file = tmp_path / "mine.toml"
    file.write_text('extends = "neco_vits14_518"\nbatch_size = 8\n')
    assert load_recipe(str(file), {"epochs": 2}).total_steps(80) == 20
    assert load_recipe(str(file), {"steps": 7}).total_steps(80) == 7


def test_ranges_are_lists_or_tuples_of_numbers() -> None:
    right: tuple[Any, ...] = ([0.5, 2], (0.5, 2))
    assert [Recipe(aspect=value).aspect for value in right] == [(0.5, 2)] * 2
    wrongs: tuple[Any, ...] = ({0.5, 2.0}, ["0.5", 2.0], [0.5], [0.5, 1.0, 2.0], [True, 2.0], "ab")
    for wrong in wrongs:
        with pytest.raises(ValidationError):
            Recipe(aspect=wrong)


def test_a_file_extends_one_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "base.toml").write_text('extends = "tiny_neco"\nepochs = 3\n')
    (tmp_path / "mine/longer.toml").write_text('extends = "../base.toml"\nbatch_size = 2\n')
    recipe = load_recipe(str(tmp_path / "mine/longer.toml"))
    assert (recipe.epochs, recipe.batch_size, recipe.global_size) == (3, 2, 112)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["lr_bakbone=1"], "no such key.*Did you mean 'lr_backbone'"),
        (["batch_size=0"], "batch_size: .*greater than or equal to 1"),
        (["batch_size='8'"], "batch_size: .*valid integer"),
        (["batch_size=8.5"], "batch_size: .*valid integer"),
        (["use_teacher=1"], "use_teacher: .*valid boolean"),
        (["lr_head=true"], "lr_head: .*valid number"),
        (["network=bubble"], "network: .*'bitonic' or 'odd_even'"),
        (["global_scale=[0.9, 0.1]"], "global_scale must be two numbers, the smaller first"),
        (["batch_size"], "takes KEY=VALUE"),
        (["objective=mim"], "needs use_teacher=false"),
        (["local_size=600"], "must not be smaller than local_size"),
    ],
)
def test_wrong_changes(changes: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe("neco_vits14_518", parse_changes(changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr_bakbone = 1", "unknown key 'lr_bakbone'. Did you mean 'lr_backbone'"),
        ("batch_size = 'many'", "batch_size: .*integer"),
        ("batch_size =", "not valid TOML"),
        ('extends = "SELF"', "circle"),
        ("extends = 3", "extends must be a text.*got 3"),
        ('extends = "neco_vits14_51"', "extends = 'neco_vits14_51': unknown recipe.*Did you mean 'neco_vits14_518'"),
        ('extends = "nowhere.toml"', "Recipe file .*nowhere.toml does not exist"),
        (f"epochs = {2**31}", "epochs: .*less than or equal to 2147483647"),
    ],
)
def test_wrong_files(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text.replace("SELF", str(file)))
    with pytest.raises(BadInputError, match=message) as error:
        load_recipe(str(file))
    assert str(file) in str(error.value)


def test_unknown_recipes() -> None:
    with pytest.raises(UsageError, match="Did you mean 'neco_vits14_518'"):
        load_recipe("neco_vits14_517")
    with pytest.raises(MissingError, match=r"nowhere\.toml does not exist"):
        load_recipe("nowhere.toml")


@pytest.mark.parametrize(("steps", "fits"), [({"steps": 10}, True), ({"steps": 9}, False), ({"epochs": 2}, False)])
def test_a_warm_up_longer_than_the_run_is_refused(steps: dict[str, Any], fits: bool) -> None:
    recipe = Recipe(warmup_steps=10, batch_size=4, **steps)
    if fits:
        assert recipe.total_steps(16) == 10
    else:
        with pytest.raises(UsageError, match=r"warmup_steps=10 is more than the (9|8) steps of the run"):
            recipe.total_steps(16)
