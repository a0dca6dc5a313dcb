from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from pydantic import ValidationError

from neco_bench.core.errors import BadInputError, MissingError, NecoBenchError, NumericalError
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore

ARRAYS = {"confusions": np.arange(18).reshape(2, 3, 3), "ids": np.array(["a", "b"])}


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder).as_posix()) for p in folder.rglob("*") if p.is_file())


def test_round_trip(tmp_path: Path, make_result: Callable[..., Result]) -> None:
    store = ResultStore(tmp_path)
    result = make_result(per_class={"iou": {"sky": 0.9, "tunnel": None}}, subset={"train": {"found": 1, "expected": 2}})
    path = store.save(result, ARRAYS)
    assert store.find(result.key) == result
    assert store.load_all() == [result]
    assert store.problems == []
    loaded = store.statistics(result)
    assert sorted(loaded) == ["confusions", "ids"]
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(loaded[name], array)
    assert path == tmp_path / "in_context/camvid_ic/dino_vits16@hbird-2_seed0_01234567.json"


def test_numpy_and_paths_in_a_result_become_plain(tmp_path: Path, make_result: Callable[..., Result]) -> None:
    result = make_result(metrics={"miou": np.float32(0.5)}, provenance={"size": np.int64(3), "root": Path("x")})
    path = ResultStore(tmp_path).save(result)
    assert json.loads(path.read_text())["provenance"] == {"size": 3, "root": "x"}


def test_old_schema_versions_still_load() -> None:
    path = Path(__file__).parent / "fixtures"
    store = ResultStore(path)
    result, newer = store.load_all()
    assert store.problems == []
    assert newer.metric().legend == newer.metric("distance").legend == "m, lower is better"
    assert newer.drawn_text == "215 scenes"
    assert (result.limit, result.changed, result.ci95["miou"]) == (10, {"k": 50}, (0.5011, 0.5235))
    assert not result.rankable


def test_an_ok_result_needs_its_primary_metric(make_result: Callable[..., Result]) -> None:
    with pytest.raises(ValidationError, match="primary metric"):
        make_result(metrics={"accuracy": 0.5})


@pytest.mark.parametrize("model", ["../../evil.py:factory", "timm:a/b?seed=0", "x" * 300, "*", 'CON|<>:"', "..", "é"])
def test_file_names_are_safe(tmp_path: Path, make_result: Callable[..., Result], model: str) -> None:
    store = ResultStore(tmp_path / "results")
    result = make_result(model=model, protocol="hbird-2*", key="*/" * 20)
    path = store.save(result, ARRAYS)
    assert path.parent == tmp_path / "results/in_context/camvid_ic"
    assert set(path.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._=-@")
    assert not path.name.startswith(".")
    assert len(path.name) < 200
    assert store.find(result.key) == result


def test_find_is_by_key_not_by_name(tmp_path: Path, make_result: Callable[..., Result]) -> None:
    store = ResultStore(tmp_path)
    result = make_result()
    path = store.save(result, ARRAYS)
    renamed = tmp_path / "elsewhere" / "mine.json"
    renamed.parent.mkdir()
    path.rename(renamed)
    path.with_suffix(".npz").rename(renamed.with_suffix(".npz"))
    assert store.find(result.key) == result
    assert store.find(result.key[:-1]) is None
    assert len(store.statistics(result)["ids"]) == 2
    assert store.save(make_result(0.7), ARRAYS) == renamed
    assert store.load_all() == [make_result(0.7)]


def test_another_key_in_the_text_is_no_hit(tmp_path: Path, make_result: Callable[..., Result]) -> None:
    store = ResultStore(tmp_path)
    store.save(make_result(key="aaaa", provenance={"teacher": "ffff"}))
    assert store.find("ffff") is None


def test_failed_is_no_hit_and_is_replaced(tmp_path: Path, make_result: Callable[..., Result]) -> None:
    store = ResultStore(tmp_path)
    failed = make_result(status="failed")
    store.save(failed)
    assert store.find(failed.key) is None
    assert store.load_all() == [failed]
    with pytest.raises(MissingError, match="--overwrite"):
        store.statistics(failed)
    store.save(make_result(), ARRAYS)
    assert store.load_all() == [make_result()]
    store.save(failed)
    assert len(files(tmp_path)) == 1, "the arrays of the replaced result went with it"


def test_duplicates_give_one_result_and_a_problem(tmp_path: Path, make_result: Callable[..., Result]) -> None:
    store = ResultStore(tmp_path)
    path = store.save(make_result(), ARRAYS)
    (tmp_path / "a.json").write_text(make_result(status="failed").model_dump_json())
    assert store.load_all() == [make_result()]
    (problem,) = store.problems
    assert problem.startswith(str(tmp_path / "a.json"))
    assert str(path) in problem


def test_bad_files_are_reported_and_lose_nothing(tmp_path: Path, make_result: Callable[..., Result]) -> None:
    store = ResultStore(tmp_path)
    result = make_result()
    text = store.save(result, ARRAYS).read_text()
    bad = {
        "half.json": text[: len(text) // 2],
        "empty.json": "",
        "binary.json": "\udcff\udcfe",
        "list.json": "[1, 2]",
        "foreign.json": '{"name": "package"}',
        "newer.json": json.dumps(json.loads(text) | {"schema_version": 99, "unknown": 1}),
        "unknown_field.json": json.dumps(json.loads(text) | {"surprise": 1}),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    assert store.load_all() == [result]
    assert sorted(Path(problem.partition(": ")[0]).name for problem in store.problems) == sorted(bad)
    assert any("99" in problem and "Upgrade" in problem for problem in store.problems)
    assert store.find(result.key) == result
    store.load_all()
    assert len(store.problems) == len(bad), "problems are those of the last call"


@pytest.mark.parametrize("crash", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_crash_before_the_rename_leaves_the_old_files(
    tmp_path: Path, make_result: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, crash: BaseException
) -> None:
    store = ResultStore(tmp_path)
    store.save(make_result(), ARRAYS)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    def fail(*_: Any) -> NoReturn:
        raise crash

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((NecoBenchError, KeyboardInterrupt)):
        store.save(make_result(0.9), {"confusions": np.zeros((1, 3, 3))})
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_a_crash_between_arrays_and_document_leaves_no_document(
    tmp_path: Path, make_result: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ResultStore(tmp_path)
    replace = os.replace

    def fail_on_json(source: Path, target: Path) -> None:
        if str(target).endswith(".json"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_on_json)
    with pytest.raises(NecoBenchError, match=r"seed0.*No space left.*--out"):
        store.save(make_result(), ARRAYS)
    assert store.load_all() == []
    assert all(name.endswith(".npz") for name in files(tmp_path))


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, make_result: Callable[..., Result]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NecoBenchError, match="could not be written"):
        ResultStore(tmp_path / "file").save(make_result(), ARRAYS)


def test_missing_folder(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "none")
    assert store.find("abc") is None
    with pytest.raises(MissingError, match="none"):
        store.load_all()


def test_nan_is_never_stored(tmp_path: Path, make_result: Callable[..., Result]) -> None:
    with pytest.raises(NumericalError, match="dino_vits16 on camvid_ic@hbird-2"):
        ResultStore(tmp_path).save(make_result(provenance={"run": {"loss": float("nan")}}), ARRAYS)
    assert files(tmp_path) == []


def test_damaged_arrays(tmp_path: Path, make_result: Callable[..., Result]) -> None:
    store = ResultStore(tmp_path)
    arrays = store.save(make_result(), ARRAYS).with_suffix(".npz")
    content = arrays.read_bytes()
    for damaged in (b"", b"no zip", content[: len(content) // 2], content[:60] + b"\xff" * 20 + content[80:]):
        arrays.write_bytes(damaged)
        with pytest.raises(BadInputError, match="npz"):
            store.statistics(make_result())


def test_import_is_light() -> None:
    code = (
        "import sys, neco_bench.results.store, neco_bench.cli.app; "
        "print([m for m in ('torch', 'pandas', 'numpy', 'jinja2') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_result_is_frozen(make_result: Callable[..., Result]) -> None:
    result: Result = make_result()
    with pytest.raises(ValidationError):
        result.seed = 1


def test_a_run_clears_what_killed_processes_left(tmp_path: Path, make_result: Callable[..., Result]) -> None:
    """Also in folders that it does not write to itself."""
    left = tmp_path / "linear" / "old_task" / f".{'a' * 32}.tmp"
    left.parent.mkdir(parents=True)
    left.touch()
    store = ResultStore(tmp_path)
    store.save(make_result())
    assert left.exists()
    store.check_writable()
    assert not left.exists()
