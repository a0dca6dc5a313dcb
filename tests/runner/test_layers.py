"""`run --layers all`: one result per block, each that of `--layers N`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import neco_bench
from tests.command import neco

QUICK = ("--task", "shapes_cluster_gt", "--limit", 2, "--workers", 0, "--set", "input_size=56", "--features", "off")


def test_every_block_has_a_result_that_is_kept(tmp_path: Path) -> None:
    one = neco("run", "--model", "tiny_base", "--layers", 1, "--out", tmp_path, "--json", *QUICK)
    assert one.code == 0, one.err
    (single,) = json.loads(one.out)
    words = ("run", "--model", "tiny_base", "--layers", "all", "--out", tmp_path, *QUICK)
    encoder: Any = neco_bench.load_encoder("tiny_base", device="cpu")
    depth = len(encoder.model.blocks)
    rows = json.loads(neco(*words, "--dry-run", "--json").out)
    assert [row["model"] for row in rows] == [f"tiny_base[layers={layer}]" for layer in range(depth)]
    assert [row["stored"] for row in rows] == [layer == 1 for layer in range(depth)]
    swept = json.loads(neco(*words, "--json").out)
    assert [result["model"] for result in swept] == [row["model"] for row in rows]
    assert swept[1] == single  # was not run again
    assert len({result["key"] for result in swept}) == depth
    assert len({result["metrics"]["mIoU"] for result in swept}) > 1
    again = neco_bench.run(
        "tiny_base",
        "shapes_cluster_gt",
        out=tmp_path,
        limit=2,
        workers=0,
        layers="all",
        changes={"input_size": 56},
        features="off",
    )
    assert [result.model_dump(mode="json") for result in again] == swept


def test_encoders_without_layers_are_refused(tmp_path: Path) -> None:
    answer = neco("run", "--model", "baseline_hog", "--layers", "all", "--out", tmp_path, *QUICK)
    assert answer.code == 2
    assert "baseline_hog" in answer.err
    assert "layers" in answer.err
