"""`posttrain-report` on a short run of NeCo: numbers are those of `compare`, a second call computes nothing."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import neco_bench
from neco_bench.viz import posttrain
from tests.command import Answer, neco

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("posttrain")
    done = neco("train", "--data", "shapes:12", "--out", folder / "run", "--recipe", "tiny_neco", "--base", "tiny_base",
                "--workers", 0, "--set", "steps=6", "--set", "batch_size=2", "--set", "lr_backbone=1e-2",
                "--set", "lr_head=1e-2", "--set", "warmup_steps=0", "--keep-every", 3)  # fmt: skip
    assert done.code == 0, done.err
    return folder


def report(place: Path, *more: object) -> Answer:
    return neco("posttrain-report", "tiny_base", place / "run", "--task", "shapes_ic,shapes_correspondence",
                "--limit", 8, "--workers", 0, "--every", 3, "--layers", "1", "--images", 1, "--out", place / "out",
                "--results", place / "results", *more)  # fmt: skip


@pytest.fixture(scope="module")
def made(place: Path) -> Path:
    done = report(place)
    assert done.code == 0, done.err
    assert "shapes_ic@hbird-2" in done.out
    return place / "out"


def test_checkpoints_that_are_kept_are_models(place: Path) -> None:
    assert [path.name[-1] for path in sorted((place / "run").glob("checkpoint-*"))] == ["3", "6"]
    one, other, newest = (
        neco_bench.load_encoder(str(path), device="cpu").weights_id
        for path in (*sorted((place / "run").glob("checkpoint-*")), place / "run")
    )
    assert one != other == newest


def test_a_wrong_name_of_either_model_ends_before_anything_runs(tmp_path: Path) -> None:
    words = ("--task", "shapes_ic", "--limit", 2, "--out", tmp_path / "out", "--results", tmp_path / "results")
    for base, tuned in (("tiny_base", "runs/none"), ("runs/none", "tiny_base")):
        answer = neco("posttrain-report", base, tuned, *words)
        assert answer.code == 2
        assert "'runs/none' has none of the known forms" in answer.err
        assert not list(tmp_path.rglob("*.json"))


def test_numbers_are_those_of_compare(place: Path, made: Path) -> None:
    table = pd.read_csv(made / "tasks.csv").set_index("name")
    asked = (
        neco_bench.compare("tiny_base", str(place / "run"), results=place / "results").to_dataframe().set_index("name")
    )
    assert len(table) == 2
    for column in ("first", "second", "difference", "low", "high", "p", "p_holm"):
        pd.testing.assert_series_equal(table[column], asked[column].loc[table.index])


def test_every_part_is_there(made: Path) -> None:
    assert set(pd.read_csv(made / "layers.csv")["name"]) == {"block 1", "last"}
    assert {"better", "worse", "not significant"} >= set(pd.read_csv(made / "classes.csv")["verdict"])
    assert len(pd.read_csv(made / "sizes.csv")) >= 2
    steps = pd.read_csv(made / "checkpoints.csv")
    assert (steps.groupby("task")["standing"].apply(lambda s: (s == "best").sum()) == 1).all()
    assert set(steps["step"]) == {3, 6}
    training = pd.read_csv(made / "training.csv", index_col=0)["value"]
    assert (training["steps"], training["images"]) == ("6", "12 (12 with repetition, 1 passes)")
    assert "shapes" in (made / "data.csv").read_text()
    page = (made / "report.html").read_text()
    assert "data:image/" in page
    assert "<polyline" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "shapes" in (made / "report.md").read_text()
    assert r"\toprule" in (made / "report.tex").read_text()


def test_a_second_call_computes_nothing(place: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("neco_bench.runner.execute.execute", refuse)
    monkeypatch.setattr(posttrain, "show", refuse)
    assert report(place).code == 0
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before


def test_wrong_use(place: Path) -> None:
    done = neco("posttrain-report", "tiny_base", "tiny_neco", "--every", 2, "--out", place / "none")
    assert (done.code, "run folder" in done.err) == (2, True)
    assert neco("posttrain-report", "tiny_base", "tiny_neco", "--layers", "x").code == 2
