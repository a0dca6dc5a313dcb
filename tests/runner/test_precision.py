"""`--precision auto`: bf16 where the protocol allows it and the device is fast in it, and never in secret."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import neco_bench
from neco_bench.core.errors import UsageError
from neco_bench.core.protocol import all_cards, find_tasks, protocol
from neco_bench.encoders import load_encoder
from neco_bench.encoders.load import is_fast_in_bf16
from neco_bench.reports.tables import build_tables
from neco_bench.results.schema import Result
from neco_bench.runner.job import job_of, plan
from neco_bench.runner.options import RunOptions
from tests.command import neco

QUICK: dict[str, Any] = {"limit": 2, "workers": 0, "changes": {"input_size": 64, "memory_size": 64}, "features": "off"}


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Sets whether devices are fast in bf16, whatever this machine has."""

    def choose(answer: bool) -> None:
        monkeypatch.setattr("neco_bench.runner.job.is_fast_in_bf16", lambda _: answer)

    return choose


def precision(task: str, chosen: str | None) -> str | None:
    (found,) = find_tasks([task])
    return plan("baseline_rgb", found, RunOptions(precision=chosen)).options.precision


def cell(results: list[Result]) -> str:
    """The one cell of the leaderboard of limited results."""
    table = next(table for table in build_tables(results) if table.name.endswith("unranked"))
    assert table.detailed is not None
    ((_, text),) = table.detailed.itertuples(index=False, name=None)
    return str(text)


@pytest.mark.slow
def test_auto_takes_bf16_where_the_protocol_allows_it(fast: Callable[[bool], None]) -> None:
    fast(True)
    assert precision("shapes_ic@clean-1", "auto") == "bf16"
    assert precision("shapes_ic@hbird-2", "auto") == "fp32"  # as its reference
    assert precision("shapes_overcluster_50@clean-1", "auto") == "fp32"  # the study found it moved
    fast(False)
    assert precision("shapes_ic@clean-1", "auto") == "fp32"
    assert precision("shapes_ic@clean-1", "bf16") == "bf16"
    assert precision("shapes_ic@clean-1", None) is None  # the default stays fp32


def test_what_allows_bf16_is_ours_and_no_constant() -> None:
    cards = all_cards()[0].values()
    allowed = {
        (card.family, name) for card in cards for name in card.protocols if protocol(card.family, name).allows_bf16
    }
    assert {name for _, name in allowed} == {"clean-1"}
    assert "allows_bf16" not in protocol("in_context", "clean-1").constants


@pytest.mark.slow
def test_auto_is_the_precision_that_it_takes(fast: Callable[[bool], None]) -> None:
    (task,) = find_tasks(["shapes_ic@clean-1"])
    keys = {name: plan("baseline_rgb", task, RunOptions(precision=name)).key for name in ("fp32", "bf16")}
    assert keys["fp32"] == plan("baseline_rgb", task, RunOptions()).key
    for answer, name in ((True, "bf16"), (False, "fp32")):
        fast(answer)
        assert plan("baseline_rgb", task, RunOptions(precision="auto")).key == keys[name]


@pytest.mark.slow
def test_results_say_what_was_used_and_no_cell_mixes(tmp_path: Path, fast: Callable[[bool], None]) -> None:
    model = "timm:vit_tiny_patch16_224?pretrained=false&seed=0"

    def run(seed: int) -> Result:
        result = neco_bench.run(
            model, "shapes_ic@clean-1", out=tmp_path, precision="auto", seed=seed, device="cpu", **QUICK
        )
        assert isinstance(result, Result)
        return result

    fast(True)
    half = run(0)
    fast(False)
    whole = run(0)
    assert [result.provenance["precision"] for result in (half, whole)] == ["bf16", "fp32"]
    assert half.key != whole.key
    assert job_of(half).options.precision == "bf16"  # also where it is looked at on a machine that is not fast
    other = run(1)
    assert cell([half, whole]) == "ambiguous"  # one seed in two precisions
    assert cell([half, other]) == "ambiguous"  # a seed in each
    assert cell([whole, other]) != "ambiguous"
    renamed = whole.model_copy(update={"model": "other"})
    marked = next(t for t in build_tables([half, renamed]) if t.name.endswith("conditions")).frame
    assert "precision bf16, others fp32" in marked.to_string()


def test_auto_on_the_command_line(tmp_path: Path, fast: Callable[[bool], None]) -> None:
    fast(True)
    run = ["run", "--model", "baseline_rgb", "--task", "shapes_ic@clean-1", "--limit", 2, "--out", tmp_path]
    answer = neco(*run, "--precision", "auto", "--json")
    (result,) = json.loads(answer.out)
    assert (answer.code, result["provenance"]["precision"]) == (0, "bf16")
    assert neco("check", "baseline_rgb", "--precision", "auto").code == 2  # of no protocol
    with pytest.raises(UsageError, match="auto"):
        RunOptions(precision="fp8")
    with pytest.raises(UsageError, match="precision"):
        neco_bench.run(load_encoder("baseline_rgb"), "shapes_ic@clean-1", precision="auto")


@pytest.mark.parametrize(
    ("capability", "fast_in_it"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)]
)
def test_gpus_are_asked_for_their_capability(
    capability: tuple[int, int], fast_in_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neco_bench.encoders.load.resolve_device", lambda _: torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability if device.index == 1 else None)
    assert is_fast_in_bf16("cuda:1") == fast_in_it


def test_a_processor_is_asked_for_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neco_bench.encoders.load.resolve_device", lambda _: torch.device("mps"))
    assert not is_fast_in_bf16("mps")
    monkeypatch.undo()
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        pytest.skip("needs /proc/cpuinfo")
    if "avx2" not in flags:
        pytest.skip("needs an x86 processor")
    assert is_fast_in_bf16("cpu") == any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))
