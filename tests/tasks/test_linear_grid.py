"""Heads of several learning rates and starts in one pass: each scores as it does alone."""

from __future__ import annotations

import numpy as np
import pytest

from neco_bench.core.protocol import find_tasks
from neco_bench.core.task import Context, Outcome
from neco_bench.encoders import load_encoder
from neco_bench.metrics.intervals import estimate
from neco_bench.metrics.sums import miou_sums
from neco_bench.runner.job import plan
from neco_bench.runner.options import RunOptions


def probe(protocol: str, seed: int = 0, **changes: object) -> tuple[Outcome, dict]:
    common = {"epochs": 2, "batch_size": 8, "drop_last_val": False}
    (task,) = find_tasks([f"shapes_linear@{protocol}"], {**common, **changes})
    job = plan("baseline_hog", task, RunOptions(limit=8, seed=seed))
    context = Context(seed=seed, batch_size=8)
    outcome = task.module.run(load_encoder("baseline_hog"), dict(job.data), task.settings(), context)
    return outcome, context.run.notes


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["neco-1", "clean-1"])
def test_the_best_rate_scores_as_it_does_alone(protocol: str) -> None:
    rates = [0.0001, 1.0]
    grid, notes = probe(protocol, learning_rates=rates)
    alone = {rate: probe(protocol, learning_rate=rate)[0] for rate in rates}
    values = {str(rate): outcome.metrics["mIoU"] for rate, outcome in alone.items()}
    assert notes["mIoU_by_learning_rate"] == pytest.approx(values, abs=1e-4)
    best = notes["learning_rate_reported"]
    assert len(set(values.values())) > 1
    assert values[str(best)] == max(values.values())
    assert grid.metrics == pytest.approx(alone[best].metrics, abs=1e-4)
    assert grid.statistics["confusion"].shape == alone[best].statistics["confusion"].shape


def test_starts_are_averaged() -> None:
    one, _ = probe("clean-1", learning_rate=0.1)
    two, _ = probe("clean-1", learning_rate=0.1, probe_seeds=2)
    confusions = two.statistics["confusion"]
    assert confusions.shape == (2, *one.statistics["confusion"].shape)
    assert (confusions[0] != one.statistics["confusion"]).mean() < 0.01
    assert (confusions[0] != confusions[1]).any()
    assert two.metrics["mIoU_std"] > 0
    found = estimate(miou_sums(confusions)).interval()
    assert found.repeats == 2
    assert found.ends is not None
    assert found.ends[0] < two.metrics["mIoU"] < found.ends[1]
    values = [two.metrics["mIoU"] + sign * two.metrics["mIoU_std"] / 2**0.5 for sign in (-1, 1)]
    assert np.abs(np.array(values) - one.metrics["mIoU"]).min() < 1e-3
