"""Sharing: pushed and pulled results give the same leaderboard; what was edited is refused by name.

The way to Hugging Face is tested with a stand-in for its API: no network.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from neco_bench.results.share import check_folder
from tests.command import neco

ROOT = Path(__file__).parents[2]
CONTRIBUTED = ROOT / "leaderboards" / "contributed"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "results"
    shutil.copytree(ROOT / "leaderboards" / "tiny" / "results", folder)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def board(results: Path, out: Path) -> dict[str, bytes]:
    done = neco("leaderboard", "--results", results, "--out", out)
    assert done.code == 0, done.err
    return tree(out)


@pytest.mark.slow
def test_pushed_and_pulled_results_give_the_same_leaderboard(source: Path, tmp_path: Path) -> None:
    assert neco("results", "push", tmp_path / "shared", "--results", source).code == 0
    assert neco("results", "pull", tmp_path / "shared", "--results", tmp_path / "pulled").code == 0
    assert tree(tmp_path / "pulled") == tree(source)
    assert board(source, tmp_path / "one") == board(tmp_path / "pulled", tmp_path / "two")
    again = neco("results", "pull", tmp_path / "shared", "--results", tmp_path / "pulled")
    assert again.out.startswith("0 files copied")


@pytest.mark.parametrize("kind", ["metric", "text", "statistics"])
def test_one_edited_file_is_refused_by_name(kind: str, source: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    assert neco("results", "push", shared, "--results", source).code == 0
    path = sorted(shared.rglob("*.npz" if kind == "statistics" else "*.json"))[0]
    if kind == "statistics":
        path.write_bytes(path.read_bytes()[:-40])
    elif kind == "metric":
        document = json.loads(path.read_text())
        document["metrics"][document["primary_metric"]] += 0.01
        path.write_text(json.dumps(document))
        (shared / "digests.txt").unlink()  # the counts alone tell
    else:
        path.write_text(path.read_text().replace('"model": "', '"model": "better_', 1))
    done = neco("results", "pull", shared, "--results", tmp_path / "pulled")
    assert (done.code, str(path) in done.err) == (4, True), done.err
    assert not (tmp_path / "pulled").exists()
    assert neco("results", "check", shared).code == 4


def test_a_differing_file_is_overwritten_on_request_only(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "results"
    shutil.copytree(source, target)
    path = sorted(target.rglob("*.json"))[0]
    document = json.loads(path.read_text())
    document["timing"]["total"] += 1
    path.write_text(json.dumps(document))
    before = tree(target)
    done = neco("results", "pull", source, "--results", target)
    assert (done.code, path.name in done.err, tree(target) == before) == (4, True, True)
    assert neco("results", "pull", source, "--results", target, "--overwrite").code == 0
    assert tree(target) == tree(source)


class FakeApi:
    """A repository that is a folder."""

    repository: Path
    sent = 0

    def repo_exists(self, name: str, repo_type: str) -> bool:
        return self.repository.is_dir()

    def create_repo(self, name: str, repo_type: str, exist_ok: bool) -> None:
        self.repository.mkdir(exist_ok=True)

    def upload_folder(self, repo_id: str, repo_type: str, folder_path: Path, **_: Any) -> None:
        assert (repo_id, repo_type) == ("lab/dense", "dataset")
        type(self).sent += 1
        shutil.copytree(folder_path, self.repository, dirs_exist_ok=True)

    def snapshot_download(self, name: str, repo_type: str, local_dir: Path, **_: Any) -> None:
        if not self.repository.is_dir():
            raise RuntimeError("404")
        shutil.copytree(self.repository, local_dir, dirs_exist_ok=True)


def test_a_repository(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = "hf://datasets/lab/dense"
    offline = neco("results", "push", place, "--results", source, "--yes")
    assert (offline.code, "NECO_BENCH_OFFLINE" in offline.err) == (3, True)
    monkeypatch.delenv("NECO_BENCH_OFFLINE")
    monkeypatch.setattr(FakeApi, "repository", tmp_path / "repository", raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    unasked = neco("results", "push", place, "--results", source)
    assert (unasked.code, "--yes" in unasked.err, FakeApi.sent) == (2, True, 0)
    assert neco("results", "pull", place, "--results", tmp_path / "pulled").code == 3
    assert neco("results", "push", place, "--results", source, "--yes").code == 0
    assert neco("results", "push", place, "--results", source, "--yes").code == 0
    assert FakeApi.sent == 1  # nothing new the second time
    assert neco("results", "pull", place, "--results", tmp_path / "pulled").code == 0
    assert tree(tmp_path / "pulled") == tree(source)
    assert neco("results", "push", "s3://lab/dense", "--yes", "--results", source).code == 2


def test_contributed_results_can_be_used() -> None:
    """Everything under leaderboards/contributed, as on loading."""
    for folder in (path for path in CONTRIBUTED.iterdir() if path.is_dir()):
        assert check_folder(folder)
