"""`run`, `compare`, `show` and `load_results` as one uses them in a notebook; the notebook of the docs runs."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import neco_bench
from neco_bench.core.errors import BadInputError, UsageError

TOUR = Path(__file__).parents[2] / "docs" / "pages" / "tour.ipynb"
QUICK: dict[str, Any] = {"limit": 4, "workers": 0, "changes": {"input_size": 32}}


def shown(value: object) -> str | bytes:
    """What a notebook shows of the value of a cell."""
    for name in ("_repr_html_", "_repr_png_"):
        if hasattr(value, name):
            content: str | bytes = getattr(value, name)()
            return content
    return repr(value)


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    document = json.loads(TOUR.read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    values = []
    for cell in document["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == []
        *lines, last = ast.parse("".join(cell["source"])).body
        exec(compile(ast.Module(lines, []), str(TOUR), "exec"), names)  # noqa: S102 - the notebook is ours
        assert isinstance(last, ast.Expr)
        value = eval(compile(ast.Expression(last.value), str(TOUR), "eval"), names)  # noqa: S307
        values.append(shown(value))
    tables = [text for text in values if isinstance(text, str) and text.lstrip().startswith(("<table", "<div"))]
    assert len(tables) >= 4
    assert any(isinstance(value, bytes) and value.startswith(b"\x89PNG") for value in values)
    links = [word for cell in document["cells"] for word in "".join(cell["source"]).split() if word.startswith("([")]
    assert links
    assert all((TOUR.parent / link.partition("](")[2].rstrip("). ")).is_file() for link in links)


class Cells(nn.Module):
    """Mean colours of cells, with a part that must stay in train mode."""

    embed_dim, stride = 3, 8

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.frozen = nn.BatchNorm2d(3)
        self.frozen.training = False

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Pool."""
        return self.frozen(nn.functional.avg_pool2d(images, 8)) * self.scale


def test_a_module_is_run_as_it_is_and_left_as_it_was(tmp_path: Path) -> None:
    module = Cells()
    first = neco_bench.run(module, "shapes_cluster_gt", out=tmp_path, **QUICK)
    assert (first.model, first.status) == ("Cells", "ok")
    assert module.training
    assert not module.frozen.training
    assert module.scale.requires_grad
    again = neco_bench.run(Cells(), "shapes_cluster_gt", out=tmp_path, **QUICK)
    assert again.timing == first.timing  # the same weights: stored
    other = neco_bench.run(Cells(2.0), "shapes_cluster_gt", out=tmp_path, **QUICK)
    assert other.key != first.key
    assert other.provenance["weights_id"] != first.provenance["weights_id"]
    module.stride = "8"  # type: ignore[assignment]
    with pytest.raises(BadInputError, match="The module Cells has the stride '8'"):
        neco_bench.run(module, "shapes_cluster_gt", **QUICK)


def test_a_list_holds_what_failed() -> None:
    results = neco_bench.run("baseline_rgb", "shapes_cluster_gt,shapes_overcluster_50", **QUICK)
    assert isinstance(results, neco_bench.ResultList)
    assert [(r.task, r.status) for r in results] == [("shapes_cluster_gt", "ok"), ("shapes_overcluster_50", "ok")]
    failing = neco_bench.run("baseline_rgb", ["shapes_overcluster_50"], **{**QUICK, "limit": 1})
    assert failing[0].status == "failed"
    assert "50 clusters" in failing._repr_html_()
    assert failing.to_dataframe().status.tolist() == ["failed"]
    seeds = neco_bench.run("baseline_rgb", "shapes_cluster_gt", seeds=1, **QUICK)
    assert isinstance(seeds, neco_bench.ResultList)


def test_comparisons_name_what_they_cannot_find(tmp_path: Path) -> None:
    for model in ("baseline_rgb", "baseline_hog"):
        neco_bench.run(model, "shapes_cluster_gt,shapes_overcluster_50", out=tmp_path, **QUICK)
    comparison = neco_bench.compare("baseline_rgb", "baseline_hog", results=tmp_path)
    frame = comparison.to_dataframe()
    assert len(frame) == 2
    for tasks, number in (("", 2), ("shapes_cluster_gt, shapes_overcluster_50", 2), (["shapes_cluster_gt ,"], 1)):
        assert len(neco_bench.compare("baseline_rgb", "baseline_hog", tasks, results=tmp_path).rows) == number
    assert (frame.difference - (frame.second - frame["first"])).abs().max() < 1e-12
    with pytest.raises(UsageError, match=r"2 tasks were compared\. Name one of: shapes_cluster_gt"):
        comparison.classes()
    assert len(comparison.images("shapes_cluster_gt")) == 4
    with pytest.raises(UsageError, match="has 2 results: name one by its task"):
        neco_bench.show("baseline_rgb", results=tmp_path)
