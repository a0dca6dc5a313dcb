"""`run --suite` and `train --suite`: end to end on generated images, what is missing, what is done before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import neco_bench
from neco_bench.core.errors import MissingError
from tests.command import neco

SUITE = """
[suite.small]
models = ["baseline_rgb", { name = "printed", published = "iBOT" }]
tasks = { "in context" = "shapes_ic@clean-1", "VOC" = "voc_cluster_gt@neco-1" }

[suite.start]
models = ["dino_vits16"]
tasks = ["shapes_ic"]

[suite.ablation]
tasks = ["shapes_ic@clean-1"]
runs = [
  { name = "few", recipe = "tiny_neco", data = "shapes:8", set = { references = 4 } },
  { recipe = "tiny_neco", data = "shapes:8" },
]
"""


@pytest.fixture
def suites(tmp_path: Path) -> Path:
    (tmp_path / "my.toml").write_text(SUITE)
    return tmp_path / "my.toml"


@pytest.mark.slow
def test_a_suite_runs_what_is_here_and_names_what_is_not(suites: Path, tmp_path: Path) -> None:
    run = ["run", "--suite", f"{suites}:small", "--limit", 4, "--workers", 0, "--out", tmp_path / "r"]
    run += ["--data-root", tmp_path]
    code, out, err = neco(*run, "--dry-run", "--json")
    rows = json.loads(out)
    assert code == 3
    assert [(row["model"], row["task"], row["exit_code"]) for row in rows] == [
        ("baseline_rgb", "shapes_ic", None),
        ("baseline_rgb", "voc_cluster_gt", 3),
    ]
    assert rows[0]["hours"] >= 0
    assert "voc2012" in rows[1]["problem"]
    assert "2 results: 0 stored, 1 to run, 1 cannot run (data" in err
    code, out, err = neco(*run)
    assert code == 3
    assert "missing: voc_cluster_gt (1 model): " in err
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["baseline_rgb", "shapes_ic"]]
    code, _, err = neco(*run, "--dry-run")
    assert "2 results: 1 stored, 0 to run, 1 cannot run (data" in err
    code, out, err = neco(
        "leaderboard", "--suite", f"{suites}:small", "--results", tmp_path / "r", "--out", tmp_path / "l"
    )
    assert code == 0, err
    assert "limit 4: baseline_rgb" in out
    assert (tmp_path / "l" / "small.html").is_file()


@pytest.mark.slow
def test_other_models_and_further_tasks(suites: Path, tmp_path: Path) -> None:
    code, out, _ = neco("run", "--suite", f"{suites}:start", "--model", "baseline_hog,baseline_rgb", "--task",
                        "shapes_cluster_gt,shapes_ic", "--out", tmp_path, "--dry-run", "--json")  # fmt: skip
    assert code == 0
    assert [(row["model"], row["task"]) for row in json.loads(out)] == [
        ("baseline_hog", "shapes_ic"),
        ("baseline_rgb", "shapes_ic"),
        ("baseline_hog", "shapes_cluster_gt"),
        ("baseline_rgb", "shapes_cluster_gt"),
    ]


@pytest.mark.slow
def test_a_dry_run_says_what_missing_weights_would_cost(
    suites: Path, tmp_path: Path, new_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("a dry run fetches nothing"))
    run = ["run", "--suite", f"{suites}:start", "--set", "input_size=32", "--set", "neighbours=2", "--limit", 2]
    code, out, err = neco(*run, "--batch-size", 1, "--out", tmp_path, "--dry-run", "--json")
    (row,) = json.loads(out)
    assert code == 3, err
    assert "dino_deitsmall16_pretrain.pth" in row["problem"]
    assert row["hours"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--model", "baseline_rgb"], "Name what to run"),
        (["run", "--task", "shapes_ic"], "--task needs --model"),
        (["run", "--suite", "neco_tabel1"], "Did you mean 'neco_table1'"),
        (["run", "--suite", "neco_ablation_data"], "Train them: neco-bench train --suite neco_ablation_data"),
        (["train", "--suite", "neco_table1"], "has no training runs"),
        (["train", "--data", "coco"], "Give either --recipe for one run, or --suite"),
        (
            ["train", "--suite", "neco_ablation_data", "--recipe", "tiny_neco"],
            "Give either --recipe for one run, or --suite",
        ),
        (["train", "--recipe", "tiny_neco"], "--recipe needs --data"),
        (["train", "--recipe", "tiny_neco", "--data", "coco", "--launcher", "local"], "for the runs of a --suite"),
        (["train", "--suite", "neco_ablation_data", "--launcher-set", "a=1"], "--launcher-set needs --launcher"),
        (["train", "--suite", "neco_ablation_data", "--set", "lr=1"], "recipes have no such key"),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path) -> None:
    code, _, err = neco(*arguments, "--out", tmp_path / "out")
    assert code == 2, err
    assert message in err
    assert not (tmp_path / "out").exists()


def test_nothing_of_a_suite_can_be_run(tmp_path: Path) -> None:
    code, _, err = neco("run", "--suite", "neco_table1", "--data-root", tmp_path, "--out", tmp_path / "r")
    assert code == 3
    assert "missing: voc_cluster_gt, voc_overcluster_300, voc_overcluster_500, voc_unsup" in err
    assert "Nothing in the suite can be run" in err


def test_in_python(suites: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quick: dict[str, Any] = {"limit": 2, "workers": 0, "data_root": tmp_path, "changes": None}
    results = neco_bench.run("baseline_rgb", suite=f"{suites}:small", **quick)
    assert [(result.task, result.protocol) for result in results] == [("shapes_ic", "clean-1")]
    assert "voc_cluster_gt of suite" in caplog.text
    with pytest.raises(MissingError, match="Nothing in suite 'neco_table1'"):
        neco_bench.run("baseline_rgb", suite="neco_table1", **quick)


TRAIN = (
    "--base", "timm:test_vit?pretrained=false", "--set", "global_size=64", "--set", "local_size=32", "--set",
    "head_hidden=8", "--set", "head_dim=8", "--set", "batch_size=2", "--set", "steps=1", "--workers", 0,
)  # fmt: skip


@pytest.mark.slow
def test_runs_of_a_suite_are_trained_once_and_resumed(suites: Path, tmp_path: Path) -> None:
    train = ["train", "--suite", f"{suites}:ablation", "--out", tmp_path / "runs", *TRAIN]
    code, out, err = neco(*train)
    assert code == 0, err
    assert [line.split()[-1] for line in out.splitlines()[1:]] == ["trained", "trained"]
    recipes = [json.loads((tmp_path / "runs" / name / "recipe.json").read_text()) for name in ("few", "tiny_neco")]
    assert [recipe["recipe"]["references"] for recipe in recipes] == [4, 49]
    made = [(tmp_path / "runs" / name / "log.csv").stat().st_mtime_ns for name in ("few", "tiny_neco")]
    code, out, err = neco(*train)
    assert code == 0, err
    assert out.count("done before") == 2
    assert [(tmp_path / "runs" / name / "log.csv").stat().st_mtime_ns for name in ("few", "tiny_neco")] == made
    code, out, err = neco(*train, "--set", "steps=2")  # goes on
    assert code == 0, err
    assert out.count("trained") == 2
    assert len((tmp_path / "runs" / "few" / "log.csv").read_text().splitlines()) == 3
    models = f"{tmp_path}/runs/few,{tmp_path}/runs/tiny_neco"
    run = ["run", "--suite", f"{suites}:ablation", "--limit", 2, "--workers", 0, "--out", tmp_path / "r"]
    code, _, err = neco(*run, "--model", models)
    assert code == 0, err
    code, out, _ = neco(
        "leaderboard", "--suite", f"{suites}:ablation", "--results", tmp_path / "r", "--out", tmp_path / "l"
    )
    assert [line.split()[0] for line in out.splitlines() if "‡" in line][:2] == ["few", "tiny_neco"]


def test_a_run_that_fails_does_not_end_the_others(suites: Path, tmp_path: Path) -> None:
    train = ["train", "--suite", f"{suites}:ablation", "--out", tmp_path / "runs", *TRAIN]
    (tmp_path / "runs" / "few").mkdir(parents=True)
    (tmp_path / "runs" / "few" / "recipe.json").mkdir()
    code, out, err = neco(*train)
    assert code != 0
    assert "Traceback" not in err
    assert [line.split()[-1] == "trained" for line in out.splitlines()[1:]] == [False, True]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_runs_of_a_suite_as_jobs(suites: Path, tmp_path: Path) -> None:
    train = ["train", "--suite", f"{suites}:ablation", "--out", tmp_path / "runs", *TRAIN, "--launcher", "local"]
    code, out, err = neco(*train)
    assert code == 0, err
    assert out.count("trained") == 2
    jobs = sorted((tmp_path / "runs" / "jobs").iterdir())
    code, out, err = neco(*train)
    assert (code, out.count("done before")) == (0, 2), err
    assert sorted((tmp_path / "runs" / "jobs").iterdir()) == jobs
