"""Comparing stored results: pairs that belong together, values that are those of the results, errors for the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from neco_bench.core.errors import BadInputError, MissingError, UsageError
from neco_bench.core.protocol import find_tasks
from neco_bench.reports.compare import SIZES, compare_classes, compare_images, compare_sizes, compare_tasks, find_pairs
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore
from neco_bench.runner.execute import run_job
from neco_bench.runner.job import plan, plan_all
from neco_bench.runner.options import RunOptions
from tests.command import neco

pytestmark = pytest.mark.slow

TASKS = ["shapes_ic", "shapes_overcluster_50", "shapes_ic@clean-1", "shapes_correspondence"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ResultStore:
    folder = ResultStore(tmp_path_factory.mktemp("compared"))
    options = RunOptions(workers=0, limit=24)
    for job in plan_all(["baseline_rgb", "baseline_hog"], find_tasks(TASKS), options, folder):
        assert run_job(job, folder).status == "ok"
    return folder


def test_values_are_those_of_the_results(store: ResultStore) -> None:
    rows = compare_tasks(find_pairs([store], "baseline_rgb", "baseline_hog", []), draws=500)
    stored = {(r.model, f"{r.task}@{r.protocol} [limit 24]"): r.metrics[r.primary_metric] for r in store.load_all()}
    assert len(rows) == len(TASKS)
    for row in rows:
        first, second = stored["baseline_rgb", row.name], stored["baseline_hog", row.name]
        assert (row.first, row.second) == (first, second)
        assert row.difference.value == pytest.approx(second - first, abs=1e-9)
        assert row.difference.low <= row.difference.value <= row.difference.high
        assert row.p_holm >= row.difference.p


def test_the_other_way_round_is_the_negative(store: ResultStore) -> None:
    pairs = [find_pairs([store], a, b, ["shapes_ic"]) for a, b in (("baseline_rgb", "baseline_hog"),) * 2]
    back = find_pairs([store], "baseline_hog", "baseline_rgb", ["shapes_ic"])
    for there, here in zip(compare_tasks(pairs[0], draws=500), compare_tasks(back, draws=500), strict=True):
        assert there.difference.value == pytest.approx(-here.difference.value)
        assert (there.difference.low, there.difference.p) == pytest.approx((-here.difference.high, here.difference.p))


def test_a_model_with_itself_differs_in_nothing(store: ResultStore) -> None:
    for row in compare_tasks(find_pairs([store], "baseline_rgb", "baseline_rgb", []), draws=200):
        assert (row.difference.value, row.difference.low, row.difference.high, row.items) == (0, 0, 0, 0)
        assert np.isnan([row.difference.p, row.p_holm]).all()  # nothing that differs, nothing to test


def test_classes_and_images(store: ResultStore) -> None:
    (pair,) = (p for p in find_pairs([store], "baseline_rgb", "baseline_hog", ["shapes_ic"]) if "hbird" in p.name)
    rows = {row.name: row for row in compare_classes(pair, draws=200)}
    for name, value in pair.first.per_class["IoU"].items():
        assert rows[name].first == (None if value is None else pytest.approx(value))
    gains = [row.difference.value for row in rows.values() if not np.isnan(row.difference.value)]
    assert gains == sorted(gains, reverse=True)
    images = compare_images(pair)
    assert {name for name, _, _ in images} <= set(pair.first_arrays["image_id"])
    differences = [b - a for _, a, b in images]
    assert differences == sorted(differences, reverse=True)
    assert len(set(differences)) > 5
    (points,) = find_pairs([store], "baseline_rgb", "baseline_hog", ["shapes_correspondence"])
    assert len(compare_images(points)) == points.first.n_images
    rows = {row.name: row for row in compare_classes(points, draws=200)}
    stored = points.first.per_class[points.first.primary_metric]
    assert {name: row.first for name, row in rows.items()} == pytest.approx(
        {name: value for name, value in stored.items() if value is not None}
    )
    for row in rows.values():
        assert row.unit == "image"
        assert row.items <= len(np.unique(points.first_arrays["images"]))
    with pytest.raises(UsageError, match="no regions"):
        compare_sizes(points)


def test_sizes_part_the_regions(store: ResultStore) -> None:
    for pair in find_pairs([store], "baseline_rgb", "baseline_hog", ["shapes_ic", "shapes_overcluster_50"]):
        rows = compare_sizes(pair, draws=100)
        assert {row.name for row in rows} <= set(SIZES)
        assert len(rows) > 1
        counts = pair.first_arrays["confusion"]
        truth = (counts[0] if counts.ndim == 4 else counts).sum(2)
        shares = truth / truth.sum(1, keepdims=True)
        large = next(row for row in rows if row.name.startswith("large"))
        chosen = (shares >= 0.1)[..., None]
        assert 0 < large.items <= chosen.any((1, 2)).sum()
        mask, values = chosen[..., 0], []
        for one in counts if counts.ndim == 4 else counts[None]:
            hits = np.einsum("nii->ni", one)
            union = one.sum(2) + one.sum(1) - hits
            values.append(np.mean([hits[m, c].sum() / union[m, c].sum() for c, m in enumerate(mask.T) if m.any()]))
        assert large.first == pytest.approx(np.mean(values))


def test_errors_name_what_is_there(store: ResultStore, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"'dino'.*baseline_hog, baseline_rgb"):
        find_pairs([store], "dino", "baseline_hog", [])
    with pytest.raises(MissingError, match="for voc_"):
        find_pairs([store], "baseline_rgb", "baseline_hog", ["voc_*"])
    other = ResultStore(tmp_path)
    result = next(r for r in store.load_all() if (r.model, r.task) == ("baseline_rgb", "shapes_ic"))
    arrays = store.statistics(result)
    other.save(result.model_copy(update={"key": "f" * 16}), arrays)
    with pytest.raises(UsageError, match=r"several results.*start of its key"):
        find_pairs([store, other], "baseline_rgb", "baseline_hog", [])
    assert len(find_pairs([store, other], "ffffffff", "baseline_hog", [])) == 1
    provenance = {**result.provenance, "dataset_fingerprint": {"val": "other"}}
    other.save(result.model_copy(update={"key": "e" * 16, "provenance": provenance, "model": "moved"}), arrays)
    with pytest.raises(BadInputError, match="differ in dataset_fingerprint"):
        find_pairs([store, other], "moved", "baseline_hog", [])


def test_what_was_set_otherwise_is_not_compared(store: ResultStore, tmp_path: Path) -> None:
    other = ResultStore(tmp_path)
    for model, k in (("baseline_rgb", 3), ("baseline_hog", 5)):
        task = find_tasks(["shapes_ic"], {"neighbours": k})[0]
        assert run_job(plan(model, task, RunOptions(workers=0, limit=6)), other).status == "ok"
    told = r"'baseline_rgb' has shapes_ic@hbird-2\* \[neighbours=3, limit 6\]; 'baseline_hog' has .*neighbours=5"
    with pytest.raises(MissingError, match=told):
        find_pairs([other], "baseline_rgb", "baseline_hog", [])


def test_pairs_have_names_of_their_own(store: ResultStore, tmp_path: Path) -> None:
    for model in ("baseline_rgb", "baseline_hog"):
        for limit, seed in ((6, 0), (6, 1), (8, 0)):
            job = plan(model, find_tasks(["shapes_ic"])[0], RunOptions(workers=0, limit=limit, seed=seed))
            assert run_job(job, ResultStore(tmp_path)).status == "ok"
    folders = ("--results", str(store.folder), "--results", str(tmp_path))
    code, out, _ = neco("compare", "baseline_rgb", "baseline_hog", "--task", "shapes_ic", "--per-class", *folders)
    limits = ("6] (2 seeds)", "8]", "24]")
    assert code == 0
    assert all(f"shapes_ic@hbird-2 [limit {end} by class" in out for end in limits)


def test_what_cannot_be_read_is_told(store: ResultStore, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    shutil.copytree(store.folder, folder)
    for broken in folder.rglob("baseline_hog@*.json"):
        broken.write_text(broken.read_text()[:50])
    for command in (["compare", "baseline_rgb", "baseline_hog"], ["show", "baseline_hog"]):
        code, _, err = neco(*command, "--results", str(folder))
        assert code == 3
        assert err.count("is not a complete JSON document") == len(TASKS)


@pytest.mark.parametrize("command", [["compare", "a", "b", "--images", "-2"], ["show", "a", "--worst", "-1"]])
def test_negative_numbers(command: list[str]) -> None:
    code, _, err = neco(*command)
    assert code == 2
    assert f"{command[-2]} must be at least 0" in err


def test_command(store: ResultStore) -> None:
    arguments = ["compare", "baseline_rgb", "baseline_hog", "--results", str(store.folder)]
    code, out, _ = neco(*arguments, "--task", "shapes_ic", "--per-class", "--images", "2")
    assert code == 0
    assert "baseline_rgb -> baseline_hog" in out
    assert "p (Holm)" in out
    assert "shapes_ic@hbird-2 [limit 24] by class" in out
    code, out, _ = neco(*arguments, "--json", "--images", "2", "--per-class")
    tables = json.loads(out)
    assert len(tables["tasks"]) == len(TASKS)
    assert len(tables["shapes_ic@hbird-2 [limit 24] by image"]) == 4
    assert len(tables["shapes_ic@hbird-2 [limit 24] by class"]) == 9
    assert {"items", "unit", "test", "note", "better"} <= set(tables["tasks"][0])
    for row in tables["tasks"]:
        assert row["difference"] == pytest.approx(row["second"] - row["first"], abs=1e-9)
        assert row["low"] <= row["difference"] <= row["high"]
    code, _, err = neco("compare", "nothing", "baseline_hog", "--results", str(store.folder))
    assert code == 3
    assert "No result of 'nothing'" in err


def save(folder: Path, result: Result, arrays: dict[str, np.ndarray], **changes: object) -> None:
    provenance = {**result.provenance, **{k: v for k, v in changes.items() if k not in Result.model_fields}}
    fields = {k: v for k, v in changes.items() if k in Result.model_fields}
    ResultStore(folder).save(result.model_copy(update={**fields, "provenance": provenance}), arrays)


def test_conditions_that_differ_are_said(store: ResultStore, tmp_path: Path) -> None:
    result = next(r for r in store.load_all() if (r.model, r.task) == ("baseline_rgb", "shapes_ic"))
    arrays = store.statistics(result)
    features = {**result.provenance["features"], "used_size": 64}
    save(tmp_path, result, arrays, key="f" * 16, model="other", precision="bf16", features=features)
    (row,) = compare_tasks(find_pairs([store, ResultStore(tmp_path)], "baseline_rgb", "other", []), draws=100)
    assert row.note.startswith("precision fp32 / bf16; size as requested / 64 px")


def test_items_are_paired_by_id_and_not_by_position(store: ResultStore, tmp_path: Path) -> None:
    result = next(r for r in store.load_all() if (r.model, r.task) == ("baseline_hog", "shapes_ic"))
    arrays = store.statistics(result)
    order = np.random.default_rng(0).permutation(result.n_images)
    moved = {name: array[order] for name, array in arrays.items() if name in ("image_id", "confusion")}
    save(tmp_path, result, moved, key="f" * 16, model="moved")
    (row,) = compare_tasks(find_pairs([store, ResultStore(tmp_path)], "baseline_hog", "moved", []), draws=100)
    assert (row.difference.value, row.items) == (0, 0)
    others = {**arrays, "image_id": np.array([f"{name}x" for name in arrays["image_id"]])}
    save(tmp_path, result, others, key="e" * 16, model="others")
    with pytest.raises(BadInputError, match="measured on different items"):
        find_pairs([store, ResultStore(tmp_path)], "baseline_hog", "others", [])


def test_seeds_are_one_row_and_no_tasks(store: ResultStore, tmp_path: Path) -> None:
    for model in ("baseline_rgb", "baseline_hog"):
        result = next(r for r in store.load_all() if (r.model, r.task, r.protocol) == (model, "shapes_ic", "hbird-2"))
        for seed in (1, 2):
            save(tmp_path, result, store.statistics(result), key=f"{model}{seed}" + "0" * 8, seed=seed)
    rows = compare_tasks(
        find_pairs([store, ResultStore(tmp_path)], "baseline_rgb", "baseline_hog", ["shapes_ic"]), draws=500
    )
    assert sorted(row.name for row in rows) == [
        "shapes_ic@clean-1 [limit 24]",
        "shapes_ic@hbird-2 [limit 24] (3 seeds)",
    ]
    seeds = next(row for row in rows if "seeds" in row.name)
    assert seeds.difference.test == "t"
    assert seeds.p_holm <= 2 * seeds.difference.p  # Holm of two rows, not of four


def test_spaces_after_commas_lose_no_task(store: ResultStore) -> None:
    tasks = "shapes_ic, shapes_overcluster_50"
    code, out, _ = neco("compare", "baseline_rgb", "baseline_hog", "--task", tasks, "--results", store.folder, "--json")
    assert code == 0
    assert {"shapes_ic", "shapes_overcluster_50"} == {row["name"].partition("@")[0] for row in json.loads(out)["tasks"]}


def test_a_task_without_results_is_named_and_a_protocol_selects(store: ResultStore) -> None:
    tasks = "shapes_ic@hbird-2,nothing,shapes_overcluster_*@*"
    code, out, err = neco(
        "compare", "baseline_rgb", "baseline_hog", "--task", tasks, "--results", store.folder, "--json"
    )
    assert code == 0
    assert err.splitlines() == ["warning: No result of 'baseline_rgb' and 'baseline_hog' for nothing."]
    names = {row["name"].partition(" ")[0] for row in json.loads(out)["tasks"]}
    assert "shapes_ic@hbird-2" in names
    assert {name.partition("@")[0] for name in names} == {"shapes_ic", "shapes_overcluster_50"}
    assert {name for name in names if name.startswith("shapes_ic")} == {"shapes_ic@hbird-2"}
