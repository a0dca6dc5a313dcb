"""Names to tasks; protocols that cannot change under their id; settings that fit every card."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from neco_bench.core.config import parse_changes
from neco_bench.core.errors import BadInputError, UsageError
from neco_bench.core.files import digest
from neco_bench.core.protocol import FAMILIES, Settings, _read_family, all_cards, find_tasks, protocol

HASHES = json.loads(Path(__file__).with_name("protocol_hashes.json").read_text())
CARDS = all_cards()[0]
EVERY = [f"{card.name}@{name}" for card in CARDS.values() for name in card.protocols]


def test_constants_do_not_change_under_an_id() -> None:
    """`protocol_hashes.json` holds what was published: "family/protocol" over all constants, "task@protocol" over a
    card's, "family/own.ending" over the table of tasks on data sets of one's own.
    A task or protocol that is new is added there."""
    now = {
        f"{card.family}/{name}": protocol(card.family, name).hash for card in CARDS.values() for name in card.protocols
    }
    now |= {f"{card.name}@{name}": card.hash(name) for card in CARDS.values() for name in card.protocols}
    now |= {f"{f}/own.{e}": digest(table) for f in FAMILIES for e, table in _read_family(f).own.items()}
    changed = sorted(name for name in now if name in HASHES and now[name] != HASHES[name])
    assert not changed, (
        f"Constants changed under the ids {changed}: stored results would be compared with other measurements. Undo "
        f"the change, or give the protocol a new id (name-2) and keep the old one."
    )
    new = {name: now[name] for name in sorted(now) if name not in HASHES}
    assert not new, f"add to protocol_hashes.json, in its order: {json.dumps(new, indent=2)[1:-1]}"
    assert now.keys() == HASHES.keys(), "no protocol and no task may disappear"


@pytest.mark.parametrize("name", EVERY)
def test_every_card_has_valid_settings(name: str) -> None:
    (task,) = find_tasks([name])
    settings = task.settings()
    assert f"{task.card.name}@{task.label}" == name
    with pytest.raises(Exception, match="frozen"):
        settings.input_size = 1


def test_requests_are_names_globs_protocols_and_lists() -> None:
    def names(*requests: str) -> list[str]:
        return [f"{task.card.name}@{task.label}" for task in find_tasks(requests)]

    assert names("camvid_ic") == ["camvid_ic@hbird-2"]
    assert names("spair_224") == ["spair_224@probe3d-1"]  # the first protocol of the card, not of the family
    assert names("camvid_ic@clean-1, shapes_linear", "camvid_ic@clean-1") == [
        "camvid_ic@clean-1",
        "shapes_linear@neco-1",
    ]
    assert names("camvid_ic", "camvid_ic@clean-1") == ["camvid_ic@hbird-2", "camvid_ic@clean-1"]
    assert set(names("shapes_*")) == {f"{n}@{c.default_protocol}" for n, c in CARDS.items() if n.startswith("shapes_")}
    pairs = ["shapes_correspondence@probe3d-1", "spair@probe3d-1", "spair_224@probe3d-1"]
    others = ["navi@probe3d-1", "shapes_views@probe3d-1", "shapes_normals@probe3d-1", "nyu_normals@probe3d-1"]
    assert sorted(names("*@probe3d-1")) == sorted([*pairs, *others])
    assert names("voc_overcluster_[35]00") == ["voc_overcluster_300@neco-1", "voc_overcluster_500@neco-1"]


def test_a_task_on_another_split_is_another_task() -> None:
    plain, test, clean = find_tasks(["camvid_ic, camvid_ic[test]", "camvid_ic[test]@clean-1,camvid_ic[test]"])
    assert [task.card.name for task in (plain, test, clean)] == ["camvid_ic", "camvid_ic[test]", "camvid_ic[test]"]
    assert (test.label, clean.label) == ("hbird-2", "clean-1")
    assert test.card.splits == {"train": "train", "val": "test"}
    assert plain.card.splits == {"train": "train", "val": "val"}
    assert test.card.hash("hbird-2") != plain.card.hash("hbird-2") == HASHES["camvid_ic@hbird-2"]
    assert (test.hash, test.constants) == (plain.hash, plain.constants)
    assert find_tasks(["camvid_ic[val]", "camvid_ic"]) == [plain]  # the split that it has
    (clusters,) = find_tasks(["camvid_cluster_gt[train]"])  # nothing is trained
    assert clusters.card.splits == {"val": "train"}
    assert [task.card.name for task in find_tasks(["camvid_i[a-c]"])] == ["camvid_ic"]  # a glob


@pytest.mark.parametrize("dataset", ["coco_stuff27", "coco_stuff171", "pascal_context60", "nyuv2_13", "camvid"])
def test_every_segmentation_family_has_the_data_set(dataset: str) -> None:
    own = {
        f"{f}/{ending}"
        for f in FAMILIES
        for ending, table in _read_family(f).own.items()
        if table["kind"] == "segmentation"
    }
    assert len(own) == 8
    missing = {
        name
        for name in own
        if f"{dataset}_{name.partition('/')[2]}" not in CARDS and name != "overclustering/overcluster_300"
    }
    assert not missing
    assert {card.dataset for card in CARDS.values() if card.name.startswith(f"{dataset}_overcluster_")} == {dataset}


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        ("shape_ic", "Did you mean 'shapes_ic'"),
        ("shapes_ic@hbird-1", "Unknown protocol 'hbird-1'.*Did you mean 'hbird-2'"),
        ("spair@hbird-2", "Unknown protocol 'hbird-2' of family 'correspondence'"),
        ("nothing_*", "No task matches 'nothing_"),
        ("voc_*@probe3d-1", "No task matches"),
        ("camvid_ic[test]@hbird-1", "Unknown protocol 'hbird-1'"),
        ("camvid_icc[test]", "No task matches"),
        ("camvid_ic[train]", "'camvid_ic' is trained on the split 'train'"),
        ("voc_ic[train]", "trained on the split 'trainaug': 'train' has images of it"),
        ("voc_unsup[trainaug]", "trained on the split 'train'"),
        ("coco_stuff_linear[train]", "trained on the split 'train_1of10_0'"),
        ("voc_ic_1of8[trainaug_1of8_0]", "trained on the split"),
    ],
)
def test_unknown_names(request_: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        find_tasks([request_])


def test_a_protocol_that_a_card_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    card = replace(CARDS["camvid_ic"], protocols={"hbird-2": {}})
    monkeypatch.setattr("neco_bench.core.protocol.all_cards", lambda *_: ({card.name: card}, {}))
    with pytest.raises(UsageError, match="not defined under protocol 'clean-1'; it has hbird-2"):
        find_tasks(["camvid_ic@clean-1"])


def test_a_changed_constant_marks_the_protocol() -> None:
    (plain,) = find_tasks(["shapes_ic"])
    (changed,) = find_tasks(["shapes_ic"], parse_changes(["neighbours=5", "std = [0.2, 0.2, 0.2]", "absent=exclude"]))
    (other,) = find_tasks(["shapes_ic"], {"neighbours": 6})
    assert (plain.label, changed.label) == ("hbird-2", "hbird-2*")
    assert len({plain.hash, changed.hash, other.hash}) == 3
    assert changed.settings().model_dump() == {
        **plain.settings().model_dump(),
        "neighbours": 5,
        "std": (0.2, 0.2, 0.2),
        "absent": "exclude",
    }
    assert plain.hash == protocol("in_context", "hbird-2").hash


def test_the_card_wins_over_the_protocol_and_set_over_both() -> None:
    voc, shapes = find_tasks(["voc_ic", "shapes_ic"])
    assert (voc.settings().passes, shapes.settings().passes) == (2, 1)  # type: ignore[attr-defined]
    (changed,) = find_tasks(["voc_ic"], {"passes": 3})
    assert changed.settings().passes == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("task", "change", "told"),
    [
        ("shapes_ic", "neighbors=3", "neighbors: .*Did you mean 'neighbours'"),
        ("shapes_ic", "neighbours=many", "neighbours: .*integer"),
        ("shapes_ic", "neighbours=0", "neighbours: .*greater than 0"),
        ("shapes_ic", "temperature=nan", "temperature: .*finite"),
        ("shapes_ic", "matching=best", "matching: .*'hungarian' or 'identity'"),
        ("shapes_ic", "crop_scale=[1.0, 0.5]", r"crop_scale: give the smaller limit first\."),
        ("shapes_ic", "crop_scale=[0, 1]", "crop_scale.0: .*greater than 0"),
        ("shapes_ic", "jitter=0.6", "jitter: .*0.5"),
        ("shapes_linear", "epochs=0", "epochs: .*greater than 0"),
        ("shapes_linear", "shuffle=7", "shuffle: .*boolean"),
        ("shapes_overcluster_50", "clusters=-1", "clusters: .*greater than 0"),
        ("shapes_overcluster_50", "iterations=1e11", "iterations: .*less than 2147483648"),
        ("shapes_overcluster_50", "components=0", "components: .*greater than 0"),
        ("shapes_correspondence", "alphas=[]", "alphas: .*at least 1"),
        ("spair", "pairs_per_bin=0", "pairs_per_bin: .*greater than 0"),
    ],
)
def test_wrong_changes(task: str, change: str, told: str) -> None:
    (found,) = find_tasks([task], parse_changes([change]))
    with pytest.raises(UsageError, match=told):
        found.settings()


@pytest.mark.parametrize("assignment", ["neighbours", "=3", ""])
def test_assignments_need_a_key_and_a_value(assignment: str) -> None:
    with pytest.raises(UsageError, match="KEY=VALUE"):
        parse_changes([assignment])


def test_finding_tasks_imports_no_torch() -> None:
    code = "import sys, neco_bench; neco_bench.find_tasks(['*']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_checking_settings_imports_no_torch() -> None:
    """Of every card under each of its protocols, so that a wrong `--set` is an error at once."""
    code = (
        "import sys\n"
        "from neco_bench.core.protocol import all_cards, find_tasks\n"
        "for card in all_cards()[0].values():\n"
        "    for task in find_tasks([f'{card.name}@{name}' for name in card.protocols]):\n"
        "        task.settings()\n"
        "print(*{'torch', 'scipy', 'sklearn', 'faiss'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.slow
def test_planning_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from neco_bench.core.protocol import find_tasks\n"
        "from neco_bench.results.store import ResultStore\n"
        "from neco_bench.runner.job import plan_all\n"
        "from neco_bench.runner.options import RunOptions\n"
        f"jobs = plan_all(['baseline_rgb'], find_tasks(['shapes_*']), RunOptions(), ResultStore({str(tmp_path)!r}))\n"
        "print(len(jobs), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[0]) > 5
    assert done.stdout.split()[1] == "False"


def test_a_family_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cards are found, so it shows only when it is to run."""
    monkeypatch.setitem(sys.modules, "neco_bench.tasks.in_context.task", None)
    (task,) = find_tasks(["shapes_ic"])
    with pytest.raises(BadInputError, match=r"'in_context' of neco-bench .*could not be loaded: ModuleNotFoundError"):
        _ = task.module
    assert set(FAMILIES) == {card.family for card in CARDS.values()}


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [(448, 14, 448), (448, 16, 448), (320, 14, 322), (518, 16, 512), (800, 14, 798), (5, 16, 16), (24, 16, 32)],
)
def test_sizes_are_taken_to_the_stride(size: int, stride: int, expected: int) -> None:
    assert Settings(input_size=size).input_size_for(stride) == expected
    assert Settings(input_size=size, tokens_per_side=32).input_size_for(stride) == 32 * stride


def test_a_protocol_of_other_authors_cites_them() -> None:
    cited = {t.label: t.citation for t in find_tasks(["ade20k_linear@neco-1", "ade20k_linear@dinov3-1"])}
    assert "Pariza" in cited["neco-1"]
    assert "DINOv3" in cited["dinov3-1"]
