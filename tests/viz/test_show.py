"""`show`: what is drawn is what was scored, for every family; the page and the grid; wrong requests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from neco_bench.core.protocol import find_tasks
from neco_bench.features.transforms import to_tensor
from neco_bench.results.store import ResultStore
from neco_bench.runner.execute import load_job_encoder, record_predictions, run_job
from neco_bench.runner.job import job_of, plan_all
from neco_bench.runner.options import RunOptions
from neco_bench.viz.draw import (
    HATCH,
    PAPER,
    RIGHT,
    TEXT,
    VOID,
    WRONG,
    Tile,
    clear,
    distinct_colours,
    draw_matches,
    error_map,
    hatched,
    query_patches,
)
from neco_bench.viz.show import choose
from tests.command import neco

TASKS = ["shapes_ic", "shapes_linear", "shapes_overcluster_50", "shapes_knn", "shapes_correspondence"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ResultStore:
    folder = ResultStore(tmp_path_factory.mktemp("shown"))
    # The probe's shortest run, and no validation image dropped.
    changes: dict[str, Any] = {"shapes_linear": {"epochs": 2, "drop_last_val": False, "batch_size": 8}}
    for task in TASKS:
        jobs = plan_all(["baseline_rgb"], find_tasks([task], changes.get(task)), RunOptions(workers=0, limit=8), folder)
        assert run_job(jobs[0], folder).status == "ok"
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_family_shows_what_it_scored(task: str, store: ResultStore, tmp_path: Path) -> None:
    places = ("--results", store.folder, "--out", tmp_path)
    code, out, err = neco("show", "baseline_rgb", "--task", task, *places, "--worst", 2, "--best", 1, "--json")
    assert code == 0, err
    assert "other counts" not in err
    (row,) = json.loads(out)
    assert row["items"] == 3
    page = Path(row["page"]).read_text(encoding="utf-8")
    assert "give the stored counts" in page
    pictures = re.findall(r'(?:src|href)="(pictures/[^"]+)"', page)
    assert len(pictures) == page.count("<img") * 2
    for picture in pictures:
        with Image.open(Path(row["page"]).parent / picture) as opened:
            opened.load()
    titles = set(re.findall(r"<figcaption>(.*?)</figcaption>", page))
    if task == "shapes_correspondence":
        assert titles == {"source and target"}
    else:
        assert {"image", "ground truth", "prediction", "errors", "features (PCA)"} <= titles
    legend = re.findall(r"<i style=.*?</i>(.*?)</span>", page)
    assert ("void: not scored" in legend) == (task != "shapes_correspondence")
    assert ("clusters" in titles) == ("overcluster" in task)
    assert ("nearest patches in memory" in titles) == task.endswith("_ic")
    with Image.open(Path(row["page"]).with_name("grid.png")) as grid:
        assert len(np.unique(np.asarray(grid).reshape(-1, 3), axis=0)) > 50


@pytest.mark.slow
def test_features_of_windows_are_not_drawn(tmp_path: Path) -> None:
    changes = {"iterations": 3, "warmup": 1, "evaluate_every": 2, "batch_size": 2}
    folder = ResultStore(tmp_path / "results")
    (job,) = plan_all(["baseline_rgb"], find_tasks(["shapes_linear@dinov3-1"], changes), RunOptions(limit=4), folder)
    assert run_job(job, folder).status == "ok"
    code, out, err = neco("show", "baseline_rgb", "--results", folder.folder, "--out", tmp_path, "--json")
    assert (code, "other counts" in err) == (0, False), err
    page = Path(json.loads(out)[0]["page"]).read_text(encoding="utf-8")
    assert set(re.findall(r"<figcaption>(.*?)</figcaption>", page)) == {"image", "ground truth", "prediction", "errors"}


@pytest.mark.slow
def test_neighbours_are_the_patches_of_the_memory(store: ResultStore) -> None:
    """The middle of each view, encoded again, has the cosine that the search found: baseline_rgb sees 3 x 3 cells."""
    (result,) = (r for r in store.load_all() if r.task == "shapes_ic")
    job = job_of(result)
    name = job.data["val"].ids[3]
    predictions = record_predictions(job, [name])
    assert set(predictions) == {name}
    rows, columns = predictions[name]["features"].shape[1:]
    patch = rows // 2 * columns + columns // 2
    found = predictions[name]["neighbours"](patch)
    assert [n.cosine for n in found] == sorted((n.cosine for n in found), reverse=True)
    encoder = load_job_encoder(job)
    feature = predictions[name]["features"][:, rows // 2, columns // 2]
    settings = job.task.settings()
    whole = [n for n in found if not (n.view == 0).all(2).any()]  # none that the border of its image cuts
    assert len(whole) > 5
    for neighbour in whole:
        view = to_tensor(neighbour.view)[None]
        middle = encoder.encode(view, mean=settings.mean, std=settings.std).map[0, :, 1, 1]
        assert neighbour.cosine == pytest.approx(float(torch.cosine_similarity(feature, middle, 0)), abs=1e-3)


@pytest.mark.slow
def test_other_counts_are_said(store: ResultStore, tmp_path: Path) -> None:
    (result,) = (r for r in store.load_all() if r.task == "shapes_knn")
    arrays = store.statistics(result)
    changed = np.roll(arrays["confusion"], 1, axis=0)  # of other images, so that their sum is the same
    other = ResultStore(tmp_path / "changed")
    other.save(result, arrays | {"confusion": changed})
    code, _, err = neco("show", "baseline_rgb", "--results", other.folder, "--out", tmp_path, "--worst", 2, "--best", 0)
    assert code == 0
    assert "2 of 2 items have other counts" in err


def test_wrong_requests(store: ResultStore, tmp_path: Path) -> None:
    base = ("show", "baseline_rgb", "--results", store.folder, "--out", tmp_path, "--task", "shapes_ic")
    assert neco("show", "no_model", "--results", store.folder).code == 3
    code, _, err = neco(*base, "--image", "nowhere")
    assert (code, "'nowhere'" in err) == (2, True)
    code, _, err = neco(*base, "--worst", 0, "--best", 0)
    assert (code, "--worst" in err) == (2, True)
    assert neco("show", "baseline_rgb", "--results", tmp_path / "none").code == 3


def test_order_and_names() -> None:
    scores = {"a": 0.5, "b": 0.1, "c": 0.9, "d": 0.2}
    assert choose(scores, 2, 1, []) == ["b", "d", "c"]
    assert choose(scores, 3, 3, []) == ["b", "d", "a", "c"]
    assert choose(scores, 1, 1, ["d", "a", "d"]) == ["d", "a"]


def test_error_map_and_colours() -> None:
    image = np.full((2, 3, 3), 100, np.uint8)
    truth, prediction = np.array([[0, 1, 255]] * 2), np.array([[0, 0, 1]] * 2)
    drawn = error_map(image, truth, prediction)
    assert (drawn[0, 0] == drawn[0, 0, 0]).all()
    assert tuple(drawn[0, 2]) == VOID
    wide = hatched(np.full((16, 16, 3), 255, np.uint8), np.ones((16, 16), bool))
    assert {tuple(colour) for colour in np.unique(wide.reshape(-1, 3), axis=0).tolist()} == {VOID, HATCH}
    assert drawn[0, 1, 0] > 2 * drawn[0, 1, 1]
    assert len(np.unique(distinct_colours(60), axis=0)) == 60


def test_what_is_wrong_differs_in_more_than_colour() -> None:
    assert RIGHT[2] == max(RIGHT)  # blue
    assert WRONG[2] == 0  # and none of it
    blank = np.zeros((60, 60, 3), np.uint8)
    points = tuple(np.array([[5.0, y], [5.0, y + 30]]) for y in (10, 10, 10))
    drawn = draw_matches((blank, blank), points, np.array([True, False]), 2)  # type: ignore[arg-type]
    scale = drawn.shape[0] / 60
    gaps = []
    for y, colour in ((10, RIGHT), (40, WRONG)):
        line = (drawn[round(y * scale)] == colour).all(1)
        inside = line[np.flatnonzero(line)[0] : np.flatnonzero(line)[-1]]
        gaps.append(int((np.diff(inside.astype(int)) == -1).sum()))
    assert gaps[0] <= 2 < gaps[1]  # the outlines of dots interrupt each


def test_text_stands_on_a_clear_ground() -> None:
    tile = Tile("", np.array([[PAPER, TEXT]], np.uint8), "wide")
    assert clear(tile)[..., 3].tolist() == [[0, 255]]
    photo = Tile("", np.array([[PAPER, TEXT]], np.uint8), "photo")
    assert clear(photo).shape == (1, 2, 3)


def test_query_patches_are_the_worst_and_the_best() -> None:
    truth = np.zeros((64, 64), np.uint8)
    prediction = truth.copy()
    prediction[32:48, 16:32] = 1  # patch (2, 1) of 4 x 4
    truth[:16, :] = 255
    wrong, right = query_patches(truth, prediction, 4, 4)
    assert wrong == 2 * 4 + 1
    assert right in (5, 6, 10)
    assert len(query_patches(truth, truth, 4, 4)) == 1
    assert query_patches(np.full_like(truth, 255), prediction, 4, 4) == []
