"""The feature store: same numbers, nothing computed twice, nothing lost, nothing trusted that was damaged."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from filelock import FileLock
from neco_bench.tasks.linear_segmentation.augment import CropFlip

from neco_bench.core.errors import NumericalError, UsageError
from neco_bench.core.protocol import find_tasks
from neco_bench.core.task import Context
from neco_bench.encoders import load_encoder
from neco_bench.features.extract import FeatureBatch, FeatureExtractor, Transform
from neco_bench.features.store import FeatureStore, budget, remove_file, store_folder, stored_files
from neco_bench.features.transforms import ResizeSquare
from neco_bench.results.schema import Result
from neco_bench.runner.execute import execute
from neco_bench.runner.job import plan
from neco_bench.runner.options import RunOptions
from tests.typed import load_segmentation

pytestmark = pytest.mark.usefixtures("own_store")

MODEL = "baseline_rgb"


def batches(
    context: Context, transform: Transform | None = None, count: int = 20, epochs: int = 1
) -> list[FeatureBatch]:
    dataset = load_segmentation("shapes", "val", limit=count)
    items = [(epoch, i) for epoch in range(epochs) for i in range(count)]
    extractor = FeatureExtractor(load_encoder(MODEL), context)
    return list(extractor.stream(dataset, transform or ResizeSquare(64, "pil"), "x", items=items))


def with_store(dtype: str = "fp32", batch_size: int = 8) -> Context:
    return Context(batch_size=batch_size, store=FeatureStore(dtype, "one"))


def flat(streamed: list[FeatureBatch]) -> tuple[torch.Tensor, np.ndarray, list[int]]:
    masks = np.stack([mask for batch in streamed for mask in batch.masks])
    return torch.cat([b.features for b in streamed]), masks, [p for b in streamed for p in b.positions]


def assert_same(a: list[FeatureBatch], b: list[FeatureBatch]) -> None:
    for first, second in zip(flat(a), flat(b), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("transform", [ResizeSquare(64, "pil"), CropFlip(64, (0.2, 1.0), (0.75, 1.3), 0.5)])
def test_what_comes_back_is_what_was_computed(transform: Transform, encoded: list[int]) -> None:
    plain = batches(Context(batch_size=8), transform, epochs=2)
    first, context = batches(with_store(), transform, epochs=2), with_store(batch_size=7)
    computed = sum(encoded)
    again = batches(context, transform, epochs=2)
    assert sum(encoded) == computed == 80
    assert context.run.reused == 40
    assert_same(plain, first)
    assert_same(plain, again)


def test_what_another_number_would_need_is_not_shared(encoded: list[int]) -> None:
    batches(with_store())
    batches(with_store(), ResizeSquare(80, "pil"))
    crop = CropFlip(64, (0.2, 1.0), (0.75, 1.3), 0.5)
    batches(with_store(), crop)
    batches(Context(batch_size=8, seed=1, store=FeatureStore(identity="one")), crop)
    assert (sum(encoded), len(stored_files())) == (80, 4)


@pytest.mark.parametrize("rule", ["torch", "native"])
def test_other_masks_and_seeds_share_features(rule: Literal["torch", "native"], encoded: list[int]) -> None:
    transform = ResizeSquare(64, rule)
    plain = batches(Context(batch_size=8), transform)
    batches(with_store())
    encoded.clear()
    assert_same(plain, batches(with_store(batch_size=7), transform))
    assert_same(plain, batches(Context(batch_size=8, seed=1, store=FeatureStore(identity="one")), transform))
    assert not encoded
    assert len(stored_files()) == 1


@pytest.mark.parametrize(
    ("first", "second", "own"),
    [
        ("shapes_knn@capi-1", "shapes_knn@clean-1", 0),  # other masks to score on
        # Another seed; the other one of a head is trained on other augmented images, in 2 steps of 8.
        pytest.param("shapes_vos@clean-1", "shapes_vos@clean-1", 0, marks=pytest.mark.slow),
        pytest.param("shapes_depth@clean-1", "shapes_depth@clean-1", 16, marks=pytest.mark.slow),
    ],
)
def test_protocols_and_seeds_share_what_is_not_drawn(first: str, second: str, own: int, encoded: list[int]) -> None:
    for seed, name in enumerate((first, second)):
        encoded.clear()
        (task,) = find_tasks([name], {"iterations": 2} if "depth" in name else {})
        result, _ = execute(plan(MODEL, task, RunOptions(workers=0, limit=2, seed=seed)), None)
        assert result.status == "ok", result.error
        assert sum(encoded) > own or seed
    assert sum(encoded) == own


def test_a_longer_list_computes_what_is_missing(encoded: list[int]) -> None:
    dataset, encoder = load_segmentation("shapes", "val", limit=20), load_encoder(MODEL)

    def streamed(context: Context, order: list[int], **options: Any) -> list[FeatureBatch]:
        extractor = FeatureExtractor(encoder, context, **options)
        return list(extractor.stream(dataset, ResizeSquare(64, "pil"), "x", items=[(0, i) for i in order]))

    plain = streamed(Context(batch_size=4), list(range(20))[::-1])
    streamed(with_store(batch_size=4), list(range(12)))
    encoded.clear()
    same = {"mean": encoder.mean, "std": encoder.std, "final_norm": None}
    assert_same(plain, streamed(with_store(batch_size=4), list(range(20))[::-1], **same))
    assert sum(encoded) == 8
    streamed(with_store(batch_size=4), list(range(12)), mean=(0.1, 0.2, 0.3))
    assert sum(encoded) == 20


def test_damaged_shared_features_are_computed(encoded: list[int]) -> None:
    plain = batches(Context(batch_size=8), ResizeSquare(64, "torch"))
    batches(with_store())
    path = Path(stored_files()[0]["folder"]) / "features.bin"
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    encoded.clear()
    assert_same(plain, batches(with_store(), ResizeSquare(64, "torch")))
    assert sum(encoded) == 4  # the batch of the damaged item


def test_other_code_of_a_transform_shares_nothing(encoded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    batches(with_store())
    monkeypatch.setattr("inspect.getsource", lambda module: "another version")
    batches(with_store())
    assert (sum(encoded), len(stored_files())) == (40, 2)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["none", "half an item", "lost index", "lost masks"])
def test_a_killed_run_loses_no_more_than_an_item(damage: str, encoded: list[int]) -> None:
    plain = batches(Context(batch_size=4))
    encoded.clear()
    dataset, items = load_segmentation("shapes", "val", limit=20), [(0, i) for i in range(20)]
    context = with_store(batch_size=4)
    extractor = FeatureExtractor(load_encoder(MODEL), context)
    started = cast(Generator, extractor.stream(dataset, ResizeSquare(64, "pil"), "x", items=items))
    for _ in range(3):  # the third is appended when the fourth is asked for
        next(started)
    started.close()
    (row,) = stored_files()
    assert row["done"] == 12
    folder = Path(row["folder"])
    lost = {"none": 0, "half an item": 1, "lost index": 1, "lost masks": 1}[damage]
    if damage == "half an item":
        os.truncate(folder / "features.bin", (folder / "features.bin").stat().st_size - 5)
    elif damage == "lost index":
        os.truncate(folder / "index.bin", (folder / "index.bin").stat().st_size - 3)
    elif damage == "lost masks":
        os.truncate(folder / "masks.bin", (folder / "masks.bin").stat().st_size - 1)
    encoded.clear()
    context = with_store(batch_size=4)
    assert_same(plain, batches(context))
    assert (context.run.reused, sum(encoded)) == (12 - lost, 8 + lost)
    encoded.clear()
    assert_same(plain, batches(with_store()))
    assert not encoded


@pytest.mark.parametrize("file", ["features.bin", "masks.bin"])
def test_a_damaged_stream_is_computed_again(file: str, encoded: list[int], caplog: pytest.LogCaptureFixture) -> None:
    plain = batches(with_store())
    path = Path(stored_files()[0]["folder"]) / file
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    assert_same(plain, batches(with_store()))
    assert "checksum" in caplog.text
    assert not stored_files()
    batches(with_store())
    encoded.clear()
    assert_same(plain, batches(with_store()))
    assert not encoded


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["zeroed", "far", "flat", "no features", "no masks"])
def test_a_damaged_index_is_computed_again(damage: str, encoded: list[int]) -> None:
    plain = batches(with_store())
    folder = Path(stored_files()[0]["folder"])
    index = folder / "index.bin"
    content = bytearray(index.read_bytes())
    record = len(content) // 20
    if damage == "zeroed":
        content[10 * record :] = bytes(10 * record)
    elif damage == "far":
        content[12 * record : 12 * record + 8] = (2**40).to_bytes(8, "little")
    elif damage == "flat":
        content[12 * record + 12 : 12 * record + 16] = (3).to_bytes(4, "little")
    else:
        (folder / {"no features": "features.bin", "no masks": "masks.bin"}[damage]).unlink()
    index.write_bytes(content)
    assert_same(plain, batches(with_store()))
    batches(with_store())
    encoded.clear()
    assert_same(plain, batches(with_store()))
    assert not encoded


def test_a_disk_may_be_full_before_a_buffer_is_written(caplog: pytest.LogCaptureFixture) -> None:
    resource = pytest.importorskip("resource")
    plain = batches(Context(batch_size=8))
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    streamed = []
    try:
        for most in (300, 2000, 5000, 30000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
            streamed.append(batches(with_store()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    for part in streamed:
        assert_same(plain, part)
    assert caplog.text.count("no longer stored") == len(streamed)
    assert_same(plain, batches(with_store()))


def test_a_second_process_computes_for_itself(encoded: list[int]) -> None:
    plain = batches(with_store())
    folder = Path(stored_files()[0]["folder"])
    os.truncate(folder / "index.bin", 10 * 20)
    encoded.clear()
    with FileLock(folder / "lock"):
        assert_same(plain, batches(with_store()))
        assert not remove_file(folder)
    assert sum(encoded) == 10
    assert stored_files()[0]["done"] == 10


def test_the_least_recently_used_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        batches(Context(batch_size=8, store=FeatureStore(identity=f"{seed}")))
    rows = stored_files()
    order = {row["folder"]: i for i, row in enumerate(rows)}
    for row in rows:
        os.utime(Path(row["folder"]) / "about.json", (order[row["folder"]], order[row["folder"]]))
    monkeypatch.setenv("NECO_BENCH_FEATURES_GB", str(3.5 * rows[0]["bytes"] / 1e9))
    batches(Context(batch_size=8, store=FeatureStore(identity="3")))
    assert {row["folder"] for row in rows[1:]} < {row["folder"] for row in stored_files()}
    assert rows[0]["folder"] not in {row["folder"] for row in stored_files()}
    monkeypatch.setenv("NECO_BENCH_FEATURES_GB", "0.000001")
    assert len(batches(Context(batch_size=8, store=FeatureStore(identity="4")))) == 3
    assert len(stored_files()) == 3  # what does not fit at all drives nothing out
    monkeypatch.setenv("NECO_BENCH_FEATURES_GB", "much")
    with pytest.raises(UsageError, match="NECO_BENCH_FEATURES_GB='much'"):
        budget()


def test_a_full_disk_ends_the_keeping_and_not_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(content: bytes, level: int) -> bytes:
        raise OSError(28, "No space left on device")

    plain = batches(Context(batch_size=8))
    monkeypatch.setattr("neco_bench.features.store.zlib.compress", full)
    assert_same(plain, batches(with_store()))
    assert "no longer stored (No space left" in caplog.text


def test_half_precision_is_stated_and_bounded() -> None:
    plain, half = flat(batches(Context(batch_size=8)))[0], flat(batches(with_store("fp16")))[0]
    assert torch.equal(half, flat(batches(with_store("fp16")))[0])
    assert not torch.equal(half, plain)
    assert ((half - plain).abs() <= plain.abs() * 2**-11 + 2**-25).all()
    with pytest.raises(NumericalError, match="--features fp32"):
        FeatureStore("fp16").rounded(torch.tensor([1e6]))


@pytest.mark.slow
def test_tasks_share_features_and_results_say_so(encoded: list[int]) -> None:
    def run(task: str, **options: Any) -> tuple[Result, int]:
        job = plan(MODEL, find_tasks([task])[0], RunOptions(workers=0, limit=12, **options))
        encoded.clear()
        result, _ = execute(job, None)
        assert result.status == "ok", result.error
        return result, sum(encoded)

    off, computed = run("shapes_ic", features="off")
    assert not store_folder().exists()
    first, filling = run("shapes_ic")
    second, none = run("shapes_ic", overwrite=True)
    assert (filling, none) == (computed, 0)
    assert off.metrics == first.metrics == second.metrics
    assert off.key == first.key == second.key
    assert second.provenance["features_reused"] == computed
    run("shapes_cluster_gt")
    _, shared = run("shapes_overcluster_50")
    assert shared == 0
    half, _ = run("shapes_ic", features="fp16")
    assert half.key != off.key
    assert (off.provenance["features"]["dtype"], half.provenance["features"]["dtype"]) == ("float32", "float16")
    assert half.metrics["mIoU"] == pytest.approx(off.metrics["mIoU"], abs=0.01)
    with pytest.raises(UsageError, match="--features"):
        RunOptions(features="int4")


def test_code_that_changed_shares_nothing_with_what_it_was(tmp_path: Path) -> None:
    """Weights are the same in both; what the module does with them is not."""
    file = tmp_path / "mine.py"
    code = (
        "import torch\n"
        "class Mine(torch.nn.Module):\n"
        "    embed_dim, stride = 8, 16\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        torch.manual_seed(0)\n"
        "        self.net = torch.nn.Conv2d(3, 8, 16, 16)\n"
        "    def forward(self, x):\n"
        "        return self.net(x)\n"
        "def mine():\n"
        "    return Mine()\n"
    )

    def run() -> tuple[float, int]:
        job = plan(f"{file}:mine", find_tasks(["shapes_ic"])[0], RunOptions(workers=0, limit=8))
        result, _ = execute(job, None)
        assert result.status == "ok", result.error
        return result.metrics["mIoU"], result.provenance["features_reused"]

    file.write_text(code)
    first, _ = run()
    assert run() == (first, 16)
    file.write_text(code.replace("self.net(x)", "self.net(x.abs()).relu()"))
    second, reused = run()
    assert reused == 0
    assert second != first


def test_features_that_another_process_deleted_are_computed(encoded: list[int]) -> None:
    plain = batches(with_store())
    folder = Path(stored_files()[0]["folder"])
    encoded.clear()
    extractor = FeatureExtractor(load_encoder(MODEL), with_store())
    reading = extractor.stream(load_segmentation("shapes", "val", limit=20), ResizeSquare(64, "pil"), "x")
    streamed = [next(reading)]
    (folder / "features.bin").unlink()
    streamed += reading
    assert_same(plain, streamed)
    assert sum(encoded) == 12


def test_an_encoder_object_keeps_nothing() -> None:
    job = plan(MODEL, find_tasks(["shapes_ic"])[0], RunOptions(workers=0, limit=4), identity="mine")
    execute(job, load_encoder(MODEL))
    assert not store_folder().exists()


def test_what_killed_processes_left_goes_with_the_next_stream() -> None:
    """A stream without its description: one that was being made, or deleted."""
    old, new, locked = (store_folder() / name for name in ("old", "new", "locked"))
    for folder in (old, new, locked):
        folder.mkdir(parents=True)
        (folder / "features.bin").write_bytes(b"half")
        if folder != new:
            os.utime(folder, (0, 0))
    with FileLock(locked / "lock"):
        os.utime(locked, (0, 0))
        batches(with_store())
        assert not old.exists()
        assert locked.exists()  # another process has it
        assert new.exists()  # may just be made
