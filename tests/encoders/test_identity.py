"""No two encoders share a result: what a number depends on is part of what it is stored under."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neco_bench
from neco_bench.core import files
from neco_bench.core.errors import BadInputError, UsageError
from neco_bench.core.protocol import find_tasks
from neco_bench.encoders import DenseFeatures, Encoder, content_id, identity, load_encoder
from neco_bench.encoders.spec import needs_loading, parse_spec, training_of
from neco_bench.encoders.zoo import ZooEntry, aliases, models, zoo
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore
from neco_bench.runner import job
from neco_bench.runner.options import RunOptions
from tests.command import neco

QUICK: dict[str, Any] = {"limit": 4, "workers": 0, "changes": {"input_size": 56}}
SHIPPED = Path(sys.modules[zoo.__module__]._FILE).parent / "weights"
DRAWN = """
import torch

def f():
    torch.manual_seed({seed})
    module = torch.nn.Conv2d(3, {channels}, 8, 8)
    module.embed_dim, module.stride = {channels}, 8
    return module
"""
READING = """
from pathlib import Path

import torch

def f():
    module = torch.nn.Conv2d(3, 4, 8, 8)
    module.load_state_dict(torch.load(Path(__file__).with_name("weights.pt"), weights_only=True))
    module.embed_dim, module.stride = 4, 8
    return module
"""


def score(model: object, out: Path, **options: Any) -> Result:
    result: Result = neco_bench.run(model, "shapes_ic", out=out, **{**QUICK, **options})  # type: ignore[call-overload]
    return result


def save_weights(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    torch.save(nn.Conv2d(3, 4, 8, 8).state_dict(), folder / "weights.pt")


LARGE = """
import torch

def f():
    module = torch.nn.Conv2d(3, 4, 8, 8)
    module.more = torch.nn.Parameter(torch.zeros(1 << 22))
    module.embed_dim, module.stride = 4, 8
    return module
"""


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are hashed."""
    paths: list[Path] = []
    digest_of = files._digest

    def digest(path: Path) -> str:
        paths.append(path)
        return digest_of(path)

    monkeypatch.setattr(files, "_digest", digest)
    return paths


@pytest.mark.slow
def test_a_large_weights_file_is_hashed_once_however_many_tasks(tmp_path: Path, hashed: list[Path]) -> None:
    """Before and after loading, for keys, provenance and overlap, in all runs; again where it has other content."""
    (tmp_path / "large.py").write_text(LARGE)
    weights, model = tmp_path / "weights.pt", f"{tmp_path}/large.py:f"
    for seed, times in ((0, 1), (1, 2)):
        torch.manual_seed(seed)
        state = nn.Conv2d(3, 4, 8, 8).state_dict() | {"more": torch.ones(1 << 22)}
        torch.save(state, weights)
        for _ in range(2):
            tasks = ["shapes_ic", "shapes_knn"]
            results = neco_bench.run(model, tasks, out=tmp_path / "out", weights=weights, limit=4, workers=0)
            assert [result.status for result in results] == ["ok", "ok"]
        assert hashed.count(weights) == times


def test_a_model_that_must_be_loaded_is_identified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text(DRAWN.format(seed=0, channels=4))
    model = f"{tmp_path}/own.py:f"
    result = score(model, tmp_path / "out")
    counted = Mock(side_effect=identity.content_id)
    for module in (identity, job):
        monkeypatch.setattr(module, "content_id", counted)
    (again,) = job.plan_all(
        [model],
        find_tasks(["shapes_ic"], QUICK["changes"]),
        RunOptions(limit=4, workers=0),
        ResultStore(tmp_path / "out"),
    )
    assert again.key == result.key
    assert counted.call_count == 1


def test_two_files_of_one_folder_are_two_results(tmp_path: Path) -> None:
    for name, seed, channels in (("a", 0, 8), ("b", 1, 64)):
        (tmp_path / f"{name}.py").write_text(DRAWN.format(seed=seed, channels=channels))
    specs = [f"{tmp_path}/{name}.py:f" for name in "ab"]
    assert content_id(specs[0]) != content_id(specs[1])
    arguments = (
        "--task",
        "shapes_ic",
        "--out",
        tmp_path / "out",
        "--limit",
        4,
        "--workers",
        0,
        "--set",
        "input_size=56",
    )
    answer = neco("run", "--model", ",".join(specs), *arguments, "--json")
    assert answer.code == 0, answer.err
    a, b = json.loads(answer.out)
    assert (a["key"] != b["key"], a["metrics"] != b["metrics"]) == (True, True)
    assert [r["provenance"]["encoder"]["embed_dim"] for r in (a, b)] == [8, 64]
    assert len(ResultStore(tmp_path / "out").load_all()) == 2


@pytest.mark.slow
def test_code_that_reads_other_weights_is_another_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    for seed, name in enumerate("AB"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "enc.py").write_text(READING)
        save_weights(tmp_path / name, seed)
    by_folder = {}
    for name in "AB":  # one spec, one code: only the weights differ
        monkeypatch.chdir(tmp_path / name)
        by_folder[name] = score("enc.py:f", out)
    assert by_folder["A"].provenance["weights_id"] != by_folder["B"].provenance["weights_id"]
    assert by_folder["A"].metrics != by_folder["B"].metrics
    replaced = score("enc.py:f", out, overwrite=True)
    assert (replaced.key, replaced.metrics) == (by_folder["B"].key, by_folder["B"].metrics)
    monkeypatch.chdir(tmp_path / "A")
    again = score("enc.py:f", out)
    assert (again.key, again.timing) == (by_folder["A"].key, by_folder["A"].timing)  # the stored one
    assert len(ResultStore(out).load_all()) == 2
    save_weights(tmp_path / "A", 2)
    assert score("enc.py:f", out).metrics not in [result.metrics for result in by_folder.values()]
    assert len(ResultStore(out).load_all()) == 3


def test_an_encoder_that_can_no_longer_be_loaded_gets_no_stored_result(tmp_path: Path) -> None:
    (tmp_path / "enc.py").write_text(READING)
    save_weights(tmp_path, 0)
    score(f"{tmp_path}/enc.py:f", tmp_path / "out")
    (tmp_path / "weights.pt").unlink()
    with pytest.raises(BadInputError, match="FileNotFoundError"):
        score(f"{tmp_path}/enc.py:f", tmp_path / "out")


def test_where_loading_alone_shows_the_weights(tmp_path: Path) -> None:
    (tmp_path / "enc.py").write_text(READING)
    content: dict[str, Any] = {
        "base": f"{tmp_path}/enc.py:f",
        "student": "s",
        "teacher": None,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    content |= {"layers": None, "embed_dim": 4, "stride": 8, "step": 1, "training_data": ""}
    (tmp_path / "encoder.json").write_text(json.dumps(content))
    known = {
        "enc.py:f": True,
        "hub:owner/repo:vits": True,
        str(tmp_path): True,
        "hf:owner/name": False,
        "timm:resnet18": False,
        "dinov2_vits14": False,
        "baseline_hog": False,
    }
    assert {spec: needs_loading(parse_spec(spec)) for spec in known} == known


def test_tensors_outside_the_state_dict_are_weights_too(tmp_path: Path) -> None:
    source = (
        "import numpy, torch\n\n\nclass Scaled(torch.nn.Module):\n    embed_dim, stride = 3, 8\n\n"
        "    def __init__(self, buffer, plain, array):\n        super().__init__()\n"
        "        self.register_buffer('scale', torch.tensor(buffer), persistent=False)\n"
        "        self.plain, self.array = torch.tensor(plain), numpy.float64(array) * numpy.ones(2)\n\n"
        "    def forward(self, x):\n"
        "        return torch.nn.functional.avg_pool2d(x, 8) * self.scale * self.plain * self.array[0]\n\n\n"
    )
    values = {"one": (1.0, 1.0, 1.0), "two": (2.0, 1.0, 1.0), "three": (1.0, 2.0, 1.0), "four": (1.0, 1.0, 2.0)}
    source += "".join(f"def {name}():\n    return Scaled{given}\n\n\n" for name, given in values.items())
    (tmp_path / "enc.py").write_text(source)
    ids = [load_encoder(f"{tmp_path}/enc.py:{name}").weights_id for name in values]
    assert len(set(ids)) == len(values)
    assert load_encoder(f"{tmp_path}/enc.py:one").weights_id == ids[0]


def test_the_commit_of_a_repository_in_the_cache_is_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for spec, folder in (("hf:owner/name", "owner--name"), ("timm:resnet18", "timm--resnet18.a1_in1k")):
        ids = {content_id(spec)}
        main = tmp_path / f"models--{folder}" / "refs" / "main"
        main.parent.mkdir(parents=True)
        for commit in ("1" * 40, "2" * 40):
            main.write_text(commit)
            ids.add(content_id(spec))
        assert len(ids) == 3


def test_the_parts_of_weights_are_part_of_it(tmp_path: Path) -> None:
    index, part = tmp_path / "model.safetensors.index.json", tmp_path / "model-1.safetensors"
    index.write_text("{}")
    part.write_bytes(b"1")
    before = [content_id("dinov2_vits14", weights) for weights in (index, tmp_path)]
    part.write_bytes(b"2")
    assert not {content_id("dinov2_vits14", weights) for weights in (index, tmp_path)} & set(before)


class Projection(Encoder):
    """Every one calls its weights the same."""

    name, weights_id = "projection", "mine"
    embed_dim, stride = 4, 8

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, 3, 8, 8))

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        return DenseFeatures(F.conv2d(images, self.weight, stride=8), 8)


def test_an_object_is_known_by_its_weights_not_by_what_it_calls_them(tmp_path: Path) -> None:
    first, second = (score(Projection(seed), tmp_path) for seed in (0, 1))
    assert (first.key != second.key, first.metrics != second.metrics) == (True, True)
    assert score(Projection(0), tmp_path).timing == first.timing


def test_a_module_without_values_is_refused(tmp_path: Path) -> None:
    source = DRAWN.format(seed=0, channels=4).replace("8, 8)", '8, 8, device="meta")')
    (tmp_path / "enc.py").write_text(source)
    with pytest.raises(BadInputError, match=r"2 of 2 weights are on the meta device.*the first is module\.weight"):
        load_encoder(f"{tmp_path}/enc.py:f")
    with pytest.raises(BadInputError, match=r"'projection': 1 of 1 weights are on the meta device"):
        score(Projection(0).to("meta"), tmp_path)


def test_what_is_no_spec_is_one_short_error(tmp_path: Path) -> None:
    module = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(50)])
    for given in (module, Projection(0), ["baseline_rgb"], None):
        with pytest.raises(UsageError, match=f"not by a {type(given).__name__}") as caught:
            load_encoder(given)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 400
    for task in (3, None, [3]):
        with pytest.raises(UsageError, match="takes the name of a task"):
            neco_bench.run("baseline_rgb", task)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="No task is named"):
        neco_bench.run("baseline_rgb", [])
    file = tmp_path / "enc.py"
    file.write_text(DRAWN.format(seed=0, channels=4))
    assert load_encoder(Path(f"{file}:f")).embed_dim == 4
    assert neco_bench.run(Path(f"{file}:f"), ["shapes_ic"], **QUICK)[0].status == "ok"


def test_a_factory_that_ends_python_ends_its_own_job_only(tmp_path: Path) -> None:
    (tmp_path / "enc.py").write_text("import sys\n\n\ndef f():\n    sys.exit('no weights here')\n")
    (tmp_path / "end.py").write_text("raise SystemExit(3)\n")
    for name, message in (("enc", "SystemExit: no weights here"), ("end", "SystemExit: 3")):
        with pytest.raises(BadInputError, match=message):
            load_encoder(f"{tmp_path}/{name}.py:f")


# The official weights of a name --------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [entry for entry in zoo().values() if entry.packaged], ids=lambda entry: entry.id)
def test_the_sha256_of_packaged_weights_is_that_of_their_file(entry: ZooEntry) -> None:
    assert load_encoder(entry.id).official is True


def test_no_two_official_files_have_one_sha256() -> None:
    stated = [(entry.sha256, entry.weights) for entry in zoo().values() if entry.sha256]
    assert len({sha256 for sha256, _ in stated}) == len(set(stated))
    assert all(len(sha256) == 64 and set(sha256) <= set("0123456789abcdef") for sha256, _ in stated if sha256)
    assert {entry.id for entry in zoo().values() if entry.sha256} >= {"dinov2_vits14", "dinov2_vits14_reg", "tiny_neco"}


def test_other_weights_under_a_name_of_the_zoo(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = score("tiny_neco", tmp_path, weights=SHIPPED / "tiny_base.safetensors")
    assert result.provenance["official"] is False
    assert "not the official ones of 'tiny_neco'" in caplog.text
    # It is known what those were trained on: they are the official ones of another name.
    assert result.provenance["training"]["contamination"] == "seen"
    official = score("tiny_neco", tmp_path, weights=SHIPPED / "tiny_neco.safetensors")
    assert official.provenance["official"] is True
    assert official.provenance["training"] == score("tiny_neco", tmp_path).provenance["training"]
    plain = load_encoder("timm:neco_tiny_patch8", weights=SHIPPED / "tiny_neco.safetensors")
    assert (plain.overlap, plain.official) == ({"shapes": "seen"}, None)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The weights file of `small`, an entry whose official sha256 is not known."""
    module = sys.modules[zoo.__module__]
    entry = """
        [model.small]
        family = "tiny"
        weights = "weights/small.safetensors"
        citation = "none"
    """
    (tmp_path / "zoo.toml").write_text(module._FILE.read_text() + entry)
    (tmp_path / "weights").mkdir()
    monkeypatch.setattr(module, "_FILE", tmp_path / "zoo.toml")
    for cached in (zoo, aliases, models):
        cached.cache_clear()
    yield tmp_path / "weights" / "small.safetensors"
    monkeypatch.undo()
    for cached in (zoo, aliases, models):
        cached.cache_clear()


def test_weights_that_cannot_be_verified(small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small.write_bytes((SHIPPED / "tiny_base.safetensors").read_bytes())
    result = score("small", tmp_path / "out")
    assert result.provenance["official"] is False
    assert "The sha256 of the official weights of 'small' is not known yet" in caplog.text
    assert result.provenance["training"]["contamination"] == "seen"  # as its name says


def test_what_has_no_official_weights(tmp_path: Path) -> None:
    assert load_encoder("baseline_hog").official is None
    assert load_encoder("random_vit_small").official is None
    mine = Projection(0)
    mine.name = "dinov2_vits14"  # the name of another
    assert score(mine, tmp_path / "out").provenance["official"] is False


# What an encoder was trained on --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("declared", "known"),
    [("imagenet, Shapes", "seen"), ("imagenet", "none known"), ("none", "none known"), ("", "unknown")],
)
def test_an_encoder_may_declare_its_training_data(tmp_path: Path, declared: str, known: str) -> None:
    source = DRAWN.format(seed=0, channels=4).replace("return", f"module.training_data = {declared!r}\n    return")
    (tmp_path / "enc.py").write_text(source)
    result = neco_bench.run(f"{tmp_path}/enc.py:f", "shapes_ic", **QUICK)
    assert result.provenance["training"] == {"data": declared, "contamination": known}
    mine = Projection(0)
    mine.training_data = declared
    assert neco_bench.run(mine, "shapes_ic", **QUICK).provenance["training"]["contamination"] == known


def test_a_declaration_of_another_kind_is_refused(tmp_path: Path) -> None:
    source = DRAWN.format(seed=0, channels=4).replace("return", "module.training_data = ['coco']\n    return")
    (tmp_path / "enc.py").write_text(source)
    with pytest.raises(BadInputError, match="whose training_data is list; write the names"):
        load_encoder(f"{tmp_path}/enc.py:f")


def test_other_weights_have_seen_what_nobody_knows(tmp_path: Path) -> None:
    other = tmp_path / "w.safetensors"
    other.write_bytes(b"no official file")
    assert training_of(parse_spec("dinov2_vits14", other)) == ("", {"*": "unknown"})
