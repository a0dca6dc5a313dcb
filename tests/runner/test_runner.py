"""The Python API, and what a result says about itself."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

import neco_bench
from neco_bench.core.errors import BadInputError, MissingError, NumericalError, UsageError
from neco_bench.core.protocol import find_tasks
from neco_bench.encoders import DenseFeatures, Encoder, load_encoder
from neco_bench.results.store import ResultStore
from neco_bench.runner import execute
from neco_bench.runner.job import plan
from neco_bench.runner.options import RunOptions

HEX64 = re.compile("[0-9a-f]{64}")
QUICK: dict[str, Any] = {"limit": 4, "workers": 0, "changes": {"input_size": 56}}


class Mean(Encoder):
    """Mean colour of each cell."""

    embed_dim, stride = 3, 8

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        return DenseFeatures(F.avg_pool2d(images, 8), 8)


class NotFinite(Mean):
    name, weights_id = "not_finite", "0"

    def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
        return DenseFeatures(F.avg_pool2d(images, 8) / 0, 8)


def test_a_result_says_what_produced_it(tmp_path: Path) -> None:
    result = neco_bench.run("baseline_hog", "shapes_ic", limit=4, workers=0, batch_size=3, out=tmp_path)
    assert (result.status, result.protocol, result.limit, result.n_images) == ("ok", "hbird-2", 4, 4)
    assert (result.subset, result.changed, result.rankable) == (None, {}, False)
    facts = result.provenance
    (task,) = find_tasks(["shapes_ic"])
    assert facts["weights_id"] == load_encoder("baseline_hog").weights_id
    assert facts["card_hash"] == task.card.hash("hbird-2")
    assert facts["protocol_hash"] == task.protocol.hash
    assert facts["settings"] == task.constants
    assert facts["features"] == {
        "input_size": 224,
        "used_size": 224,
        "only_size": None,
        "size_multiple": 8,
        "resize": "squash",
        "final_norm": True,
        "tokens": 784,
        "layer": "last",
        "pos_interp": "none",
        "dtype": "float32",
    }
    assert facts["dataset"]["val"] == {"name": "shapes", "split": "val", "items": 4}
    assert facts["dataset_fingerprint"].keys() == {"train", "val"}
    assert all(HEX64.fullmatch(value) for value in facts["dataset_fingerprint"].values())
    assert {"torch", "timm", "numpy", "neco-bench"} <= facts["packages"].keys()
    assert {"git_commit", "git_dirty", "python", "cpu", "platform"} <= facts.keys()
    assert (facts["batch_size_used"], facts["workers"]) == (3, 0)
    assert facts["arguments"]["batch_size"] == "3"
    assert isinstance(facts["device"], str)
    assert result.timing["total"] >= sum(v for k, v in result.timing.items() if k != "total") > 0
    assert result.peak_memory_mb > 100
    (document,) = tmp_path.rglob("*.json")
    assert json.loads(document.read_bytes())["provenance"]["card_hash"] == facts["card_hash"]


def test_sizes_are_taken_to_the_stride() -> None:
    """An input of the card is rounded and both sizes are told; one that the user sets must fit."""
    model = "timm:vit_tiny_patch16_224?pretrained=false&seed=0"
    result = neco_bench.run(model, "shapes_correspondence", limit=1, workers=0, changes={"input_size": 32})
    assert result.provenance["features"]["used_size"] == 32
    assert result.provenance["features"]["pos_interp"] == "timm"
    with pytest.raises(UsageError, match=r"input_size=60 is not a multiple of the stride 16.*Use 48 or 64"):
        neco_bench.run(model, "shapes_correspondence", limit=1, workers=0, changes={"input_size": 60})


def test_an_encoder_object_is_run_as_it_is(tmp_path: Path) -> None:
    encoder = Mean()
    encoder.name, encoder.weights_id = "mine", "0" * 64
    first = neco_bench.run(encoder, "shapes_ic", out=tmp_path, **QUICK)
    assert (first.model, first.provenance["weights_id"]) == ("mine", "0" * 64)
    again = neco_bench.run(encoder, "shapes_ic", out=tmp_path, **QUICK)
    assert (again.key, again.timing) == (first.key, first.timing)  # the stored one
    encoder.weights_id = "1" * 64
    assert neco_bench.run(encoder, "shapes_ic", out=tmp_path, **QUICK).key != first.key
    Mean.__qualname__, before = "Typed", Mean.__qualname__
    try:  # code that cannot be found: never the same
        unread = [neco_bench.run(encoder, "shapes_ic", out=tmp_path, **QUICK).key for _ in range(2)]
    finally:
        Mean.__qualname__ = before
    assert len({*unread, first.key}) == 3
    with pytest.raises(UsageError, match="give device to load_encoder"):
        neco_bench.run(encoder, "shapes_ic", device="cpu", **QUICK)


def test_overwrite_runs_one_s_own_code_again(tmp_path: Path) -> None:
    """What it imports from elsewhere may have changed, so kept features are not read."""
    file = tmp_path / "enc.py"
    file.write_text(
        "import torch\n\n\ndef make():\n    module = torch.nn.AvgPool2d(8)\n"
        "    module.embed_dim, module.stride = 3, 8\n    return module\n"
    )

    def reused(**options: Any) -> int:
        result = neco_bench.run(f"{file}:make", "shapes_ic", **{**QUICK, **options})
        return int(result.provenance["features_reused"])

    first, second, overwritten = reused(), reused(), reused(overwrite=True)
    assert (first, second > 0, overwritten) == (0, True, 0)
    assert reused(overwrite=True) == second  # once for a process: its other tasks share them


def test_a_failed_overwrite_keeps_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = partial(neco_bench.run, "baseline_rgb", "shapes_ic", out=tmp_path, **QUICK)
    good = run()

    def fails(*_: Any) -> None:
        raise NumericalError("not a number")

    monkeypatch.setattr("neco_bench.runner.execute._outcome", fails)
    with pytest.raises(NumericalError):
        run(overwrite=True)
    store = ResultStore(tmp_path)
    (stored_result,) = store.load_all()
    assert (stored_result.status, stored_result.metrics) == ("ok", good.metrics)
    assert store.statistics(stored_result)["confusion"].shape[0] == good.n_images


@pytest.mark.slow
def test_layers_of_one_encoder_are_two_results(tmp_path: Path) -> None:
    """The same weights read elsewhere give other numbers: never the stored ones."""
    spec = "timm:vit_tiny_patch16_224?pretrained=false&seed=0"
    results = [
        neco_bench.run(load_encoder(spec, layers=layers), "shapes_ic", out=tmp_path, limit=4, workers=0)
        for layers in (None, 3)
    ]
    assert [result.model for result in results] == [spec, f"{spec}[block 3]"]
    assert results[0].key != results[1].key
    assert results[0].metrics != results[1].metrics


def test_errors_are_those_of_the_command_line(tmp_path: Path) -> None:
    for arguments, error, message in (
        (("baseline_hgo", "shapes_ic"), UsageError, "baseline_hog"),
        (("baseline_hog", "shape_ic"), UsageError, "shapes_ic"),
        (("baseline_hog", "voc_ic"), MissingError, "data root"),
        ((nn.Conv2d(3, 8, 8), "shapes_ic"), BadInputError, "The module Conv2d has no embed_dim"),
        ((3, "shapes_ic"), UsageError, "not int"),
        ((Mean(), "shapes_ic"), BadInputError, "has no name, weights_id"),
        ((NotFinite(), "shapes_ic"), NumericalError, "NaN or infinite"),
    ):
        with pytest.raises(error, match=message):
            neco_bench.run(*arguments, **QUICK)
    for options, message in (
        ({"batchsize": 3}, "Unknown option.*batchsize"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"changes": {"input_size": "large"}}, "input_size: .*integer"),
        ({"changes": {"neighbors": 3}}, "Did you mean 'neighbours'"),
    ):
        with pytest.raises(UsageError, match=message):
            neco_bench.run("baseline_rgb", "shapes_ic", **options)


def test_a_run_without_a_folder_stores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert neco_bench.run("baseline_rgb", "shapes_ic", **QUICK).status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_speaks_of_memory_is_the_encoder_s_own() -> None:
    class Forgetful(Mean):
        name, weights_id = "forgetful", "0"

        def _encode(self, images: Tensor, *, final_norm: bool, attention: bool) -> DenseFeatures:
            raise ValueError("no such memory format")

    with pytest.raises(BadInputError, match=r"'forgetful' failed.*no such memory format"):
        neco_bench.run(Forgetful(), "shapes_ic", **QUICK)


def test_the_batch_is_halved_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    encode = Mean._encode

    def tight(self: Mean, images: Tensor, **options: Any) -> DenseFeatures:
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, images, **options)

    encoder = Mean()
    encoder.name, encoder.weights_id = "tight", "0"
    plain = neco_bench.run(encoder, "shapes_ic", **QUICK)
    monkeypatch.setattr(Mean, "_encode", tight)
    halved = neco_bench.run(encoder, "shapes_ic", **QUICK)
    assert (plain.provenance["batch_size_used"], halved.provenance["batch_size_used"]) == (16, 2)
    assert halved.metrics == plain.metrics


@pytest.mark.parametrize(
    ("task", "roles"),
    [
        ("camvid_ic", {"train"}),  # its val split is whole
        ("voc_cluster_gt@clean-1", {"val"}),
        ("spair_224@pck-1", {"test"}),
    ],
)
def test_real_samples_are_marked_as_a_subset(task: str, roles: set[str], real_data: Path) -> None:
    changes: dict[str, Any] = {"input_size": 112}
    changes |= {"seeds": 1, "redos": 1, "iterations": 2} if "cluster" in task else {}
    result = neco_bench.run("baseline_rgb", task, data_root=real_data, limit=3, workers=0, changes=changes)
    assert result.subset is not None
    assert result.subset.keys() == roles
    for role, counts in result.subset.items():
        split = neco_bench.load_dataset(*_split(task, role), root=real_data)
        assert counts == {"found": len(split), "expected": split.expected[split.split]}
        assert counts["found"] < counts["expected"]
    assert not result.rankable


def _split(task: str, role: str) -> tuple[str, str]:
    card = find_tasks([task])[0].card
    return card.dataset, card.splits[role]


def test_planning_opens_the_data_but_loads_no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "load_encoder", lambda *a, **k: pytest.fail("loaded"))
    (task,) = find_tasks(["shapes_ic"])
    job = plan("baseline_rgb", task, RunOptions(limit=4, layers="3"))
    assert (job.label, len(job.data["val"])) == ("baseline_rgb[layers=3]", 4)
    other = plan("baseline_rgb", task, RunOptions(limit=4, layers="3", seed=1))
    same = plan("baseline_rgb", task, RunOptions(limit=4, layers="3", batch_size=2, workers=1))
    assert job.key == same.key != other.key  # what moves no number is no part of the key


@pytest.mark.parametrize(("origin", "code"), [("someone-else", 4), ("neco-bench", 1)])
def test_an_error_inside_a_family(
    origin: str, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A plug-in's family that fails is named; an error in one of ours is a bug and shows its traceback. Both are failed
    results, so that other jobs run."""

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("division by zero")

    entry = execute.FAMILIES.entry("in_context")
    monkeypatch.setattr("neco_bench.tasks.in_context.task.run", broken)
    monkeypatch.setattr(execute.FAMILIES, "entry", lambda _: type(entry)(entry.name, entry.value, origin))
    job = plan("baseline_rgb", find_tasks(["shapes_ic"])[0], RunOptions(limit=2, device="cpu"))
    result, _ = execute.execute(job, None)
    assert (result.status, result.error_code) == ("failed", code)
    assert "ZeroDivisionError: division by zero" in (result.error or "")
    assert (origin in (result.error or "")) == (code == 4)
    assert ("in broken" in "".join(result.provenance.get("traceback", []))) == (code == 1)
    assert ("in broken" in caplog.text) == (code == 1)
