"""Settings that exceed what there is are refused before anything is allocated, and what is needed is counted right."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from neco_bench.core.distributed import RankShard
from neco_bench.core.errors import UsageError
from neco_bench.training import limits
from neco_bench.training.images import MAX_SHAPES, open_images
from neco_bench.training.limits import check, needs, process_memory, sorting_bytes
from neco_bench.training.neco import NeCo
from neco_bench.training.networks import Network
from neco_bench.training.sorting import DISTRIBUTIONS, Tape, plan, sort_columns
from neco_bench.training.views import GLOBALS
from tests.command import neco

from . import helpers
from .helpers import batch, recipe, small_encoder


@pytest.mark.parametrize("n", [2, 3, 5, 8, 13, 31, 49, 64])
def test_memory_of_sorting_is_that_of_its_columns_and_tape(n: int) -> None:
    rows = 3
    for network in ("bitonic", "odd_even"):
        tape: Tape = []
        layers = plan(network, n, torch.device("cpu"))
        columns = sort_columns(torch.zeros(n, rows), layers, DISTRIBUTIONS["cauchy"], tape)
        by_layer = [sum(t.numel() for t in differences) for _, _, differences in tape]
        bytes_ = 4 * (2 * columns.numel() + sum(by_layer) + max(by_layer))
        counted = rows * sorting_bytes(network, n)
        assert counted == bytes_ if network == "bitonic" else 0.6 * bytes_ < counted <= bytes_


def test_memory_of_each_part_is_that_of_what_is_made() -> None:
    settings, encoder = recipe(queue_length=60, head_layers=6), small_encoder()
    network = Network(encoder, settings, 0)
    objective = NeCo(settings, network)
    needed = {need.what: need.bytes for need in needs(settings, encoder, RankShard(0, 4), prefetched=2)}
    views = batch(4, settings=settings)
    assert needed["views"] == 4 * (views.global_views.numel() + views.local_views.numel())
    assert needed["loaded views"] == 3 * needed["views"] // 4
    assert needed["the queue"] == 4 * objective.queue.numel() * (GLOBALS + 1) // GLOBALS
    matrices = sum(p.numel() for p in network.projection_head.parameters() if p.dim() > 1)
    assert needed["projection heads"] == 4 * 5 * matrices
    embedded = torch.zeros(2 * 5, 4, 7 * 7, 16)  # pairs of views, images, cells, width
    assert needed["aligned vectors"] == 2 * 4 * embedded.numel()
    assert needed["references"] == 4 * 2 * 5 * 4 * 49 * 16
    assert needed["similarities"] == 3 * 4 * 2 * 5 * 4 * 49 * 49


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"references": 100_000}, "references=100000 is more than the 196 vectors .* Use --set references=196 or"),
        ({"references": 100, "queue_length": 60}, r"more than the 60 vectors .*\(queue_length\)"),
        ({"references": 100_000, "queue_length": 100_000}, r"at least [\d,.]+ GiB .* for sorting; .* references"),
        ({"references": 10_000, "queue_length": 10_000, "network": "odd_even"}, "for sorting"),
        ({"cells": 100_000}, "for similarities; .* Use smaller references, cells"),
        ({"global_size": 1_600_000}, "for views; .* Use smaller batch_size, global_size"),
        ({"locals": 2**31 - 1}, "Use smaller"),
        ({"head_hidden": 2**31 - 1}, "for projection heads; .* Use smaller head_hidden"),
        ({"head_layers": 2**31 - 1, "head_hidden": 2048}, "for projection heads"),
        ({"queue_length": 2**31 - 1}, "for the queue; .* Use smaller queue_length"),
    ],
)  # fmt: skip
def test_settings_beyond_what_there_is(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check(recipe(**changes), small_encoder(), RankShard(0, 4), 6, 0)


def test_settings_that_fit_are_not_refused(caplog: pytest.LogCaptureFixture) -> None:
    for changes in ({}, {"references": 196}, {"queue_length": 60}, {"cells": 40, "head_dim": 64}):
        check(recipe(**changes), small_encoder(), RankShard(0, 4), 6, 2)
    check(recipe(objective="mim", use_teacher=False, references=10**6), small_encoder(), RankShard(0, 4), 6, 2)
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        check(recipe(queue_length=60, queue_per_image=17), small_encoder(), RankShard(0, 4), 6, 2)
    assert "a global view has 16 patches only" in caplog.text


def test_what_is_counted_is_measured_against_the_memory_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    total = sum(need.bytes for need in needs(recipe(), small_encoder(), RankShard(0, 4), prefetched=0))
    monkeypatch.setattr(limits, "process_memory", lambda: total)
    check(recipe(), small_encoder(), RankShard(0, 4), 6, 0)
    monkeypatch.setattr(limits, "process_memory", lambda: total - 1)
    with pytest.raises(UsageError, match="GiB"):
        check(recipe(), small_encoder(), RankShard(0, 4), 6, 0)
    monkeypatch.undo()
    whole = process_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert whole is None or process_memory() == whole // 4


def test_processes_and_generated_images_have_a_bound(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--workers=100000: each is a process.* Use at most \d+"):
        check(recipe(), small_encoder(), RankShard(0, 4), 6, 100_000)
    for count in (MAX_SHAPES + 1, 10**15, "9" * 5000):
        with pytest.raises(UsageError, match="shapes:N with the number of images to generate, at most 10,000,000"):
            open_images(f"shapes:{count}")
    assert len(open_images("shapes:64")) == 64


def test_the_command_says_it_at_once(tmp_path: Path) -> None:
    answer = neco("train", "--data", "shapes:64", "--recipe", "tiny_neco", "--base", helpers.SMALL, "--out",
                  tmp_path / "run", "--set", "references=100000", "--set", "local_size=32", "--set",
                  "global_size=64")  # fmt: skip
    assert answer.code == 2
    assert "references=100000 is more than the" in answer.err
    assert not (tmp_path / "run").exists()
