"""The command line: instant listings, one JSON document, exit codes, examples that work."""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from neco_bench.cli.common import app
from tests.command import neco
from tests.data.data_helpers import CAMVID_SIZE, image_of, save

TASKS = Path(__file__).resolve().parents[2] / "tasks"
RUN = ("run", "--model", "baseline_rgb", "--task", "shapes_ic", "--limit", 4, "--workers", 0, "--set", "input_size=56")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one stored result."""
    folder = tmp_path_factory.mktemp("results")
    assert neco(*RUN, "--out", folder).code == 0
    return folder


def _modules(code: str, *arguments: object) -> set[str]:
    """The modules that Python code has imported when it ends, in a process of its own."""
    command = [sys.executable, "-c", f"{code}\nprint(*sys.modules, file=sys.stderr)", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


def _imported(*arguments: object) -> set[str]:
    """The modules that a command imports. It must succeed."""
    code = (
        "import sys\nfrom neco_bench.cli.app import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert not stop.code"
    )
    return _modules(code, *arguments)


@pytest.mark.parametrize(
    ("command", "most", "avoided"),
    [
        ("--help", 1.4, {"pydantic", "numpy"}),
        ("run --help", 1.4, {"pydantic", "numpy"}),
        ("models", 2, {"pydantic", "numpy"}),
        ("data list", 5, set()),  # typer itself imports pydantic to read the path of --data-root
        ("tasks", 5, set()),
    ],
)
def test_listings_import_little(command: str, most: float, avoided: set[str]) -> None:
    """Modules in multiples of those of `import typer`; measured 1.2, 1.2, 1.6, 3.2 and 3.3.

    Their seconds are in tests/benchmarks/bench_start.py: as a test, they fail on busy machines.
    """
    modules = _imported(*command.split())
    assert not modules & ({"torch", "pandas", "jinja2", "rich"} | avoided)
    assert len(modules) < most * len(_modules("import sys, typer"))


def test_annotations_of_commands_are_no_text() -> None:
    """Typer evaluates text at each start, for all commands: 0.015 s of 0.15."""
    apps = [app, *(group.typer_instance for group in app.registered_groups if group.typer_instance)]
    commands = [command for one in apps for command in one.registered_commands]
    functions = [command.callback for command in commands if command.callback is not None]
    assert len(functions) > 20
    for function in functions:
        assert not any(isinstance(kind, str) for kind in function.__annotations__.values()), function.__name__


@pytest.mark.slow
def test_a_stored_result_is_back_without_torch(results: Path) -> None:
    assert not _imported(*RUN, "--out", results) & {"torch", "torchvision", "timm"}


@pytest.mark.slow
def test_runs_that_need_neither_import_no_torchvision_and_no_compiler(tmp_path: Path) -> None:
    """torchvision brings PyTorch's compiler: 1.3 s."""
    tasks = "shapes_ic,shapes_cluster_gt,shapes_knn,shapes_correspondence"
    run = ["run", "--model", "baseline_rgb", "--task", tasks, "--limit", 4, "--workers", 0]
    modules = _imported(*run, "--out", tmp_path)
    assert "torch" in modules
    assert not modules & {"torchvision", "torch._dynamo", "timm"}


@pytest.mark.slow
def test_no_family_imports_torchvision_before_it_is_needed() -> None:
    families = ", ".join(f"neco_bench.tasks.{path.parent.name}.task" for path in TASKS.glob("*/task.py"))
    assert not _modules(f"import sys, {families}") & {"torchvision", "torch._dynamo", "timm"}


@pytest.mark.slow
def test_json_is_one_document_and_nothing_else(results: Path, tmp_path: Path) -> None:
    def document(*arguments: object) -> Any:
        answer = neco(*arguments, "--json")
        assert answer.code == 0, answer.err
        return json.loads(answer.out)

    (result,) = document(*RUN, "--out", results)
    assert (result["status"], result["protocol"], result["limit"]) == ("ok", "hbird-2*", 4)
    assert "baseline_hog" in {row["model"] for row in document("models")}
    tasks = {row["task"]: row for row in document("tasks")}
    assert tasks["shapes_ic"] == {
        "task": "shapes_ic",
        "family": "in_context",
        "dataset": "shapes",
        "protocols": ["hbird-2", "clean-1"],
        "metric": "mIoU",
        "data": True,
        "citation": tasks["shapes_ic"]["citation"],
    }
    assert not tasks["voc_ic"]["data"]
    assert {row["name"] for row in document("data", "list")} >= {"shapes", "voc2012", "spair71k"}
    assert {finding["level"] for finding in document("data", "check", "shapes")} == {"ok"}
    assert {"git_commit", "packages", "device", "search_seconds", "cache", "data"} <= document("doctor").keys()
    written = document("leaderboard", "--results", results, "--out", tmp_path / "tables")
    assert written["results"] == 1
    assert all(Path(path).is_file() for path in written["files"])
    (planned,) = document(*RUN, "--out", results, "--dry-run")
    assert (planned["items"], planned["stored"]) == ({"train": 4, "val": 4}, True)


def test_a_failing_run_is_told_in_json_too(tmp_path: Path) -> None:
    answer = neco(*RUN, "--set", "neighbours=5000", "--out", tmp_path, "--json")
    (result,) = json.loads(answer.out)
    assert (answer.code, result["status"], result["error_code"]) == (2, "failed", 2)
    answer = neco(*RUN, "--set", "neighbors=5", "--out", tmp_path, "--json")
    assert (answer.code, answer.out) == (2, "")


@pytest.mark.slow
def test_a_dry_run_checks_all_and_runs_nothing(tmp_path: Path, real_data: Path) -> None:
    out = tmp_path / "results"
    run = [
        "run",
        "--model",
        "baseline_rgb,baseline_hog",
        "--task",
        "shapes_ic@clean-1,camvid_ic",
        "--dry-run",
        "--json",
    ]
    answer = neco(*run, "--data-root", real_data, "--out", out)
    rows = json.loads(answer.out)
    assert [(row["model"], row["task"], row["protocol"]) for row in rows] == [
        ("baseline_rgb", "shapes_ic", "clean-1"),
        ("baseline_rgb", "camvid_ic", "hbird-2"),
        ("baseline_hog", "shapes_ic", "clean-1"),
        ("baseline_hog", "camvid_ic", "hbird-2"),
    ]
    assert rows[0]["items"] == {"train": 160, "val": 80}
    for row in rows:
        assert 0 < row["hours"] < 1
        assert 0.1 < row["memory_gb"] < 8
    assert rows[1]["hours"] > rows[0]["hours"]  # more and larger images, a larger memory
    assert rows[1]["subset"]["train"]["expected"] == 367
    assert not any(row["stored"] for row in rows)
    assert not out.exists()
    assert neco(*run, "--out", out).code == 3  # no data root
    assert neco(*run, "--data-root", real_data, "--set", "neighbors=3").code == 2


def test_any_split_can_be_scored(tmp_path: Path) -> None:
    """A miniature CamVid: other images under another task, whose result is stored beside the first's."""
    base = tmp_path / "camvid"
    for split, count in (("train", 3), ("val", 2), ("test", 4)):
        for i in range(count):
            save(base / split / f"a{i}.png", image_of(i, CAMVID_SIZE))
            mask = np.full(CAMVID_SIZE, i, np.uint8)
            mask[:, ::3] = 5
            save(base / f"{split}annot" / f"a{i}.png", mask)
        (base / f"{split}.txt").write_text("".join(f"{split}/a{i}.png {split}annot/a{i}.png\n" for i in range(count)))
    out = tmp_path / "results"
    run = ["run", "--model", "baseline_rgb", "--workers", 0, "--set", "input_size=56", "--set", "memory_size=200"]
    run += ["--data-root", tmp_path, "--out", out, "--json", "--task"]
    answer = neco(*run, "camvid_ic,camvid_ic[test]@clean-1,camvid_ic[test]")
    assert answer.code == 0, answer.err
    val, clean, test = json.loads(answer.out)
    assert [row["task"] for row in (val, clean, test)] == ["camvid_ic", "camvid_ic[test]", "camvid_ic[test]"]
    assert val["key"] != test["key"]
    assert len(list(out.glob("in_context/camvid_ic-test/*.json"))) == 2
    (again,) = json.loads(neco(*run, "camvid_ic[test]", "--dry-run").out)
    assert (again["stored"], again["items"]) == (True, {"train": 3, "val": 4})
    for split, told in (("tset", "no split 'tset'; it has train, val, test"), ("train", "is trained on the split")):
        answer = neco(*run, f"camvid_ic[{split}]")
        assert answer.code == 2
        assert told in " ".join(answer.err.split())


def test_a_dry_run_names_what_would_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NECO_BENCH_OFFLINE", "1")
    run = ["run", "--model", "dinov2_vits14,baseline_rgb", "--task", "shapes_cluster_gt", "--dry-run", "--json"]
    answer = neco(*run, "--out", tmp_path)
    absent, there = json.loads(answer.out)
    assert (answer.code, absent["exit_code"], absent["hours"]) == (3, 3, None)
    assert "dinov2_vits14_pretrain.pth" in absent["problem"]
    assert (there["problem"], there["exit_code"]) == (None, None)
    assert there["disk_gb"] > 0  # clustering keeps its features in a file
    answer = neco(*run[:-1], "--set", "input_size=100", "--out", tmp_path)
    assert "input_size=100 is not a multiple" in answer.out


def test_the_leaderboard_writes_tables(results: Path, tmp_path: Path) -> None:
    assert neco(*RUN, "--set", "input_size=224", "--out", results, "--limit", 3).code == 0
    answer = neco("leaderboard", "--results", results, "--out", tmp_path)
    assert answer.code == 0
    assert "baseline_rgb" in answer.out
    rows = list(csv.DictReader((tmp_path / "in_context.full.csv").open()))
    assert {row["model"] for row in rows} == {"baseline_rgb"}
    assert {row["limit"] for row in rows} == {"3", "4"}
    assert not (tmp_path / "in_context.csv").exists()  # limited and changed: never ranked
    assert (tmp_path / "in_context.unranked.csv").exists()


def test_tables_for_people(results: Path) -> None:
    answer = neco(*RUN, "--out", results)
    header, row = answer.out.splitlines()
    assert header.split() == [
        "model",
        "task",
        "protocol",
        "metric",
        "value",
        "95",
        "%",
        "interval",
        "over",
        "note",
        "seconds",
    ]
    assert row.split()[:4] == ["baseline_rgb", "shapes_ic", "hbird-2*", "mIoU"]
    assert "limit 4" in row
    assert answer.err == "baseline_rgb on shapes_ic@hbird-2*: already stored\n"


def test_check() -> None:
    answer = neco("check", "baseline_hog", "--device", "cpu")
    assert answer.code == 0
    header, *rows = answer.out.splitlines()
    assert header.split() == ["check", "passed", "detail"]
    assert len(rows) == 10
    assert all("  pass  " in row for row in rows)


def test_check_of_an_encoder_at_fault(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    made = nn.AvgPool2d(8); made.embed_dim, made.stride = 4, 8\n"
        "    return made\n"
    )
    answer = neco("check", f"{tmp_path}/mine.py:make", "--json", "--device", "cpu")
    assert answer.code == 4
    assert {row["check"]: row["passed"] for row in json.loads(answer.out)}["shape and stride"] == "FAIL"
    assert "Traceback" not in answer.err


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, sub in getattr(command, "commands", {}).items():
        yield from _commands(sub, (*path, name))


ROOT = typer.main.get_command(app)
COMMANDS = dict(_commands(ROOT))


def test_the_promised_commands_are_there() -> None:
    assert {(name,) for name in ("run", "models", "tasks", "check", "leaderboard", "doctor", "data")} <= COMMANDS.keys()
    assert {("data", "list"), ("data", "check")} <= COMMANDS.keys()


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_help_ends_with_an_example_that_parses(path: tuple[str, ...]) -> None:
    shown = neco(*path, "--help")
    assert shown.code == 0
    assert "Example: neco-bench" in shown.out
    last = (COMMANDS[path].help or "").strip().splitlines()[-1]
    program, *arguments = shlex.split(last.removeprefix("Example: "))
    assert program == "neco-bench"
    depth = max(d for d in range(1, len(arguments) + 1) if tuple(arguments[:d]) in COMMANDS)
    example = tuple(arguments[:depth])
    assert example[: len(path)] == path  # of this command; a group shows one of its own
    context = COMMANDS[example].make_context(example[-1], arguments[depth:])  # parses, and runs nothing
    assert not context.args
