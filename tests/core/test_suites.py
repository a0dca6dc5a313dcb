"""Suites: what ships, a file of one's own, and everything that can be wrong with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from neco_bench.core.errors import BadInputError, MissingError, UsageError
from neco_bench.core.suites import Suite, all_suites, find_suite, find_suites
from neco_bench.encoders.spec import parse_spec
from neco_bench.training.recipe import load_recipe
from tests.command import neco

SHIPPED = all_suites()


def test_every_table_of_the_paper_and_its_figure_has_one() -> None:
    tables = {f"neco_table{number}" for number in range(1, 6)} | {"neco_figure2"}
    ablations = {"steepness", "network", "references", "patches", "teacher", "data", "batch"}
    assert SHIPPED.keys() >= tables | {f"neco_ablation_{name}" for name in ablations}
    assert SHIPPED.keys() >= {"dense_core", "dinov3_dense", "shapes_core"}


@pytest.mark.parametrize("suite", SHIPPED.values(), ids=SHIPPED)
def test_all_that_a_suite_names_is_there(suite: Suite) -> None:
    columns = suite.columns()
    assert len({column.title for column in columns}) == len(columns)
    for column in columns:
        column.task.settings()
    for spec in suite.specs:
        parse_spec(spec)
    for run in suite.runs:
        load_recipe(run.recipe, run.set)


OWN = """
[suite.mine]
models = ["baseline_rgb", { name = "printed", published = "iBOT", arch = "ViT-S/16" }]
tasks = ["shapes_i*", "shapes_linear@clean-1"]
"""


def own(tmp_path: Path, text: str = OWN) -> Path:
    (tmp_path / "my.toml").write_text(text)
    return tmp_path / "my.toml"


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = own(tmp_path)
    for name in (f"{file}:mine", str(file)):
        suite = find_suite(name)
        assert [(column.title, column.task.label) for column in suite.columns()] == [
            ("shapes_ic@hbird-2", "hbird-2"),
            ("shapes_linear@clean-1", "clean-1"),
        ]
        assert suite.specs == ["baseline_rgb"]
        assert [row.title for row in suite.rows] == ["baseline_rgb", "printed"]
    assert [suite.id for suite in find_suites([f"{file}:mine,shapes_core", "shapes_core"])] == ["mine", "shapes_core"]


def test_a_glob_gives_a_column_each() -> None:
    suite = Suite(id="x", title="x", tasks=["shapes_*corr*", "shapes_ic", "shapes_ic@hbird-2"])
    assert [column.title for column in suite.columns()] == ["shapes_correspondence@pck-1", "shapes_ic"]
    several = Suite(id="x", title="x", tasks=["shapes_overcluster_50", "shapes_c*"])
    assert [column.title for column in several.columns()][1:] == [
        "shapes_cluster_gt@neco-1",
        "shapes_correspondence@pck-1",
    ]
    with pytest.raises(BadInputError, match="column 'c' matches several tasks"):
        Suite(id="x", title="x", tasks={"c": "shapes_c*"}).columns()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[suite.mine]\ntasks = []", "tasks"),
        ("[suite.mine]\ntaks = ['shapes_ic']", "taks: there is no such key. Did you mean 'tasks'"),
        ("[suite.mine]\ntasks = ['shapes_ic']\nmodels = [{}]", "give a model"),
        ("[suite.mine]\ntasks = ['shapes_ic']\nmodels = ['a', 'a']", "a is listed twice"),
        (
            "[suite.mine]\ntasks = ['shapes_ic']\nruns = [{recipe = 'r', data = 'coco', name = '../x'}]",
            "name of a folder",
        ),
        ("[suite.mine]\ntasks = ['shapes_ic']\nstands_for = {b = 'voc_ic'}", "there is no column 'b'"),
        ("[suite.'a/b']\ntasks = ['shapes_ic']", "a name has letters"),
        ("[mine]\ntasks = ['shapes_ic']", r"has tables \[suite.NAME\]"),
        ("suite = 3", r"has tables \[suite.NAME\]"),
        ("[suite", "not valid TOML"),
    ],
)
def test_wrong_files(text: str, message: str, tmp_path: Path) -> None:
    file = own(tmp_path, text)
    with pytest.raises(BadInputError, match=message) as error:
        find_suite(f"{file}:mine")
    assert str(file) in str(error.value)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'neco_table3'.*neco-bench suites"):
        find_suite("neco_tabel3")
    with pytest.raises(UsageError, match=r"Did you mean 'mine'\? It has: mine"):
        find_suite(f"{own(tmp_path)}:mime")
    with pytest.raises(MissingError, match=r"nowhere\.toml does not exist"):
        find_suite(f"{tmp_path}/nowhere.toml:mine")


def test_listing() -> None:
    code, out, _ = neco("suites")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()[1:]} == SHIPPED.keys()
    code, out, err = neco("suites", "neco_ablation_steepness")
    assert code == 0
    assert "ablation_steepness_10_1000 on coco" in out
    assert "steepness of student" in err


def test_listing_is_instant() -> None:
    code = (
        "import sys; from neco_bench.cli.app import main\n"
        "try:\n    main(['suites'])\nexcept SystemExit:\n"
        "    print([m for m in ('rich', 'pandas', 'jinja2', 'torch', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[]"
