"""The small ViT that the tiny recipes train, and the pair of encoders that came of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import neco_bench
from neco_bench.cli.common import app
from neco_bench.encoders import load_encoder
from neco_bench.encoders.check import check_encoder
from neco_bench.results.store import ResultStore
from neco_bench.training.recipe import load_recipe

PAIR = Path(__file__).parents[2] / "leaderboards" / "tiny"


def test_it_is_an_encoder_like_others() -> None:
    encoder = load_encoder(load_recipe("tiny_base").base)
    assert load_recipe("tiny_neco").base == load_recipe("tiny_base").base
    assert (encoder.embed_dim, encoder.stride, encoder.has_final_norm) == (128, 8, True)
    assert sum(p.numel() for p in encoder.parameters()) == 843_136
    assert encoder.encode(torch.rand(1, 3, 32, 48)).map.shape == (1, 128, 4, 6)
    assert all(row.passed for row in check_encoder(encoder))


@pytest.mark.parametrize("model", ["tiny_base", "tiny_neco"])
def test_the_packaged_weights_are_those_of_the_results(model: str) -> None:
    own = [r for r in ResultStore(PAIR / "results").load_all() if r.model == model]
    assert len(own) == 6
    assert {r.provenance["weights_id"] for r in own} == {load_encoder(model).weights_id}


@pytest.mark.slow
def test_they_score_as_stored(tmp_path: Path) -> None:
    rows = ResultStore(PAIR / "results").load_all()
    stored = next(r for r in rows if (r.model, r.task) == ("tiny_neco", "shapes_ic"))
    result = neco_bench.run("tiny_neco", "shapes_ic", out=tmp_path, workers=0)
    assert result.metrics["mIoU"] == pytest.approx(stored.metrics["mIoU"], abs=1e-3)
    low, high = stored.ci95["mIoU"]
    assert low <= result.metrics["mIoU"] <= high
    assert result.provenance["encoder"]["weights_report"]["source"] == "neco-bench: weights/tiny_neco.safetensors"


def test_the_comparisons_in_the_readme_are_those_of_the_results() -> None:
    """NeCo gains with an interval above zero on at least four of six, and the control on none."""
    text = (PAIR / "README.md").read_text(encoding="utf-8")
    printed = re.findall(r"neco-bench (compare tiny_base [^\n]*)\n\n```\n(.*?)```", text, flags=re.S)
    assert len(printed) == 2
    above = []
    for command, table in printed:
        done = CliRunner().invoke(app, command.replace("leaderboards/tiny", str(PAIR)).split())
        assert done.exit_code == 0, done.output
        assert [line.split() for line in table.splitlines()] == [line.split() for line in done.stdout.splitlines()]
        above.append(sum("[+" in line for line in table.splitlines()))
        assert len(table.splitlines()) == 2 + 6
    assert above[0] >= 4
    assert above[1] == 0
