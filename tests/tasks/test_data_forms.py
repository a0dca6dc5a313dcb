"""Protocols that read a data set in a form of their own, and fractions that are the mean of their draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import neco_bench
from neco_bench.core.errors import UsageError
from neco_bench.core.protocol import Task, find_tasks
from neco_bench.results.store import ResultStore
from neco_bench.runner import execute
from neco_bench.runner.job import plan
from neco_bench.runner.options import RunOptions
from tests.typed import present

SIDE = 64


@pytest.fixture
def ade20k(tmp_path: Path) -> Path:
    """ADE20K with 16 training and 3 val images: a square of one class on "other" (0), all of noise."""
    rng = np.random.default_rng(0)
    for split, count in (("training", 16), ("validation", 3)):
        for kind in ("images", "annotations"):
            (tmp_path / "ade20k" / kind / split).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((SIDE, SIDE), np.uint8)
            mask[8:56, 16:48] = 1 + i % 3
            image = rng.integers(0, 80, (SIDE, SIDE, 3), dtype=np.uint8) + 60 * (mask[..., None] % 3)
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / "ade20k" / "images" / split / f"{i:02d}.jpg")
            Image.fromarray(mask).save(tmp_path / "ade20k" / "annotations" / split / f"{i:02d}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("task", "changes", "scored_side"),
    [
        ("ade20k_ic@hbird-2", {}, 64),
        ("ade20k_linear@neco-1", {"epochs": 1}, 100),
        ("ade20k_cluster_gt@neco-1", {"clusters": 9, "seeds": 2, "redos": 1, "iterations": 3}, 100),
    ],
)
def test_other_is_a_row_that_is_never_scored(
    task: str, changes: dict[str, Any], scored_side: int, ade20k: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    changes = {"input_size": SIDE, **changes}
    result = neco_bench.run("baseline_rgb", task, data_root=ade20k, changes=changes, workers=0, out=out)
    confusion = ResultStore(out).statistics(result)["confusion"].reshape(-1, 151, 151)
    assert confusion[:, 0].sum() == 0
    share = 48 * 32 / SIDE**2
    assert confusion.sum() == len(confusion) * share * scored_side**2
    assert len(result.per_class["IoU"]) == 151
    assert result.provenance["dataset"]["val"]["name"] == "ade20k_151"


def test_clean_has_150_classes(ade20k: Path) -> None:
    result = neco_bench.run(
        "baseline_rgb", "ade20k_ic@clean-1", data_root=ade20k, changes={"input_size": SIDE}, workers=0
    )
    assert len(result.per_class["IoU"]) == 150
    assert result.provenance["dataset"]["val"]["name"] == "ade20k"


@pytest.mark.slow
def test_the_linear_head_never_learns_other(ade20k: Path, tmp_path: Path) -> None:
    """Were "other" a target, the head would predict it on most pixels: it has the most."""
    changes = {"input_size": SIDE, "epochs": 20, "batch_size": 16, "learning_rate": 1.0}
    result = neco_bench.run(
        "baseline_rgb", "ade20k_linear@neco-1", data_root=ade20k, changes=changes, workers=0, out=tmp_path / "out"
    )
    predicted = ResultStore(tmp_path / "out").statistics(result)["confusion"].sum((0, 1))
    assert predicted[0] == 0
    assert predicted[1:4].sum() == predicted.sum() > 0


@pytest.mark.slow
def test_upsampler_papers_learn_and_score_other(ade20k: Path, tmp_path: Path) -> None:
    changes = {"input_size": SIDE, "epochs": 5, "learning_rate": 0.1}
    result = neco_bench.run(
        "baseline_rgb", "ade20k_linear@naf-1", data_root=ade20k, changes=changes, workers=0, out=tmp_path / "out"
    )
    assert result.provenance["dataset"]["val"]["name"] == "ade20k_151_scored"
    confusion = ResultStore(tmp_path / "out").statistics(result)["confusion"]
    assert (confusion.shape, confusion.sum()) == ((3, 151, 151), 3 * SIDE**2)
    assert (confusion[:, 0].sum(1) == SIDE**2 - 48 * 32).all()
    assert confusion[:, :, 0].sum() > confusion.sum() / 2


def test_a_fraction_is_the_mean_of_its_five_draws(ade20k: Path, tmp_path: Path) -> None:
    changes = {"input_size": SIDE, "neighbours": 3}
    (task,) = find_tasks(["ade20k_ic_1of8@clean-1"], changes)
    options = RunOptions(data_root=ade20k, workers=0)
    single = []
    for draw in range(5):
        card = replace(task.card, splits={"train": f"train_1of8_{draw}", "val": "val"})
        single.append(execute.execute(plan("baseline_rgb", Task(card, task.protocol, changes), options), None))
    values = [result.metrics["mIoU"] for result, _ in single]
    assert len(set(values)) > 1

    out = tmp_path / "out"
    result = neco_bench.run(
        "baseline_rgb", "ade20k_ic_1of8@clean-1", data_root=ade20k, changes=changes, workers=0, out=out
    )
    assert result.metrics["mIoU"] == pytest.approx(np.mean(values), rel=1e-12)
    assert result.metrics["mIoU_std"] == pytest.approx(np.std(values, ddof=1), rel=1e-12)
    assert result.ci95["mIoU"][0] <= result.metrics["mIoU"] <= result.ci95["mIoU"][1]
    assert result.subset == {"train": {"found": 2, "expected": 2550}, "val": {"found": 3, "expected": 2000}}
    confusion = ResultStore(out).statistics(result)["confusion"]
    np.testing.assert_array_equal(confusion, np.stack([present(statistics)["confusion"] for _, statistics in single]))
    assert result.provenance["run"]["draws"] == [alone.provenance["run"] for alone, _ in single]
    lists = [result.provenance["dataset_fingerprint"][f"train/{draw}"] for draw in range(5)]
    assert len(set(lists)) > 1


def test_a_list_of_ids_takes_the_place_of_the_draws(ade20k: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("00\n05\n")
    (task,) = find_tasks(["ade20k_ic_1of8"])
    job = plan("baseline_rgb", task, RunOptions(data_root=ade20k, split_file=listed))
    assert {role: data.ids for role, data in job.data.items()} == {"train": ("00", "05"), "val": ("00", "01", "02")}


def test_equal_tokens_instead_of_equal_pixels() -> None:
    changes = {"tokens_per_side": 8}
    for model, stride in (("baseline_rgb", 8), ("timm:vit_tiny_patch16_224?pretrained=false", 16)):
        result = neco_bench.run(model, "shapes_ic", limit=2, workers=0, changes=changes)
        assert result.provenance["features"]["used_size"] == 8 * stride
        assert result.provenance["features"]["tokens"] == 64
    with pytest.raises(UsageError, match="tokens_per_side"):
        neco_bench.run("baseline_rgb", "shapes_ic", limit=2, changes={"tokens_per_side": 0})
