"""`show` of clips and views: what is drawn is what was scored; strips, animated pictures, lines of matches."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from neco_bench.core.protocol import find_tasks
from neco_bench.results.store import ResultStore
from neco_bench.runner.execute import run_job
from neco_bench.runner.job import plan_all
from neco_bench.runner.options import RunOptions
from neco_bench.viz.draw import RIGHT, WHITE, WRONG, draw_matches
from neco_bench.viz.draw_video import object_colours, overlaid, plot_scores
from tests.command import neco

CHANGES: dict[str, dict[str, Any]] = {"shapes_vos": {"input_size": 56}, "shapes_views": {"grid": 16, "matches": 40}}
TITLES = {
    "shapes_vos": {"truth above prediction", "J&amp;F by frame (grey: first mask)", "animated: truth, prediction"},
    "shapes_views": {"source and target"},
}


@pytest.mark.slow
@pytest.mark.parametrize("task", list(CHANGES))
def test_what_is_shown_is_what_was_scored(task: str, tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "results")
    jobs = plan_all(["baseline_rgb"], find_tasks([task], CHANGES[task]), RunOptions(workers=0, limit=3), store)
    assert run_job(jobs[0], store).status == "ok"
    places = ("--results", store.folder, "--out", tmp_path)
    code, out, err = neco("show", "baseline_rgb", "--task", task, *places, "--worst", 1, "--best", 1, "--json")
    assert code == 0, err
    assert "other counts" not in err
    (row,) = json.loads(out)
    page = Path(row["page"]).read_text(encoding="utf-8")
    assert "give the stored counts" in page
    assert set(re.findall(r"<figcaption>(.*?)</figcaption>", page)) == TITLES[task]
    frames = []
    for picture in re.findall(r'(?:src|href)="(pictures/[^"]+)"', page):
        with Image.open(Path(row["page"]).parent / picture) as opened:
            opened.load()
            frames.append(getattr(opened, "n_frames", 1))
    assert max(frames) == (12 if task == "shapes_vos" else 1)  # all frames of a clip move
    with Image.open(Path(row["page"]).with_name("grid.png")) as grid:
        assert len(np.unique(np.asarray(grid).reshape(-1, 3), axis=0)) > 50


def test_objects_are_in_their_colours() -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 10:30], mask[10:30, 40:50] = 1, 2
    drawn = overlaid(np.zeros((40, 60, 3), np.uint8), mask, (60, 40))
    colours = (0.55 * object_colours(2)).astype(np.uint8)
    assert drawn[20, 20].tolist() == colours[1].tolist()
    assert drawn[20, 45].tolist() == colours[2].tolist()
    assert not drawn[0, 0].any()
    assert tuple(drawn[20, 29]) == WHITE  # a border is white
    assert not overlaid(np.zeros((40, 60, 3), np.uint8), np.full((40, 60), 255, np.uint8), (60, 40)).any()


def test_scores_are_drawn_at_their_height() -> None:
    plot = plot_scores(np.stack([np.full((1, 5), 0.75), np.full((1, 5), 0.25)]))
    colour = object_colours(1)[1]
    rows = np.flatnonzero((plot[:, 300] == colour).all(1))
    grey = np.flatnonzero((plot[:, 300] == 150).all(1))
    assert len(rows)
    assert len(grey)
    assert rows.mean() < grey.mean()


def test_matches_are_drawn_by_whether_they_hit() -> None:
    blank = np.zeros((20, 20, 3), np.uint8)
    points = tuple(np.array([[2.0, y], [2.0, y + 8]]) for y in (4, 4, 6))
    drawn = draw_matches((blank, blank), points, np.array([True, False]), 2)  # type: ignore[arg-type]
    found = {tuple(colour) for colour in np.unique(drawn.reshape(-1, 3), axis=0).tolist()}
    assert {RIGHT, WRONG, WHITE} <= found
