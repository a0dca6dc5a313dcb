"""What one sees on the terminal: version, how much is said, progress, suggestions, and errors that come once."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import neco_bench
from neco_bench.core import progress
from neco_bench.core.progress import Progress
from neco_bench.core.task import Context
from tests.command import neco

RUN = ("run", "--task", "shapes_cluster_gt", "--limit", 4, "--workers", 0, "--set", "input_size=32")


@pytest.fixture(autouse=True)
def _level() -> object:
    log = logging.getLogger("neco_bench")
    before = log.level
    yield
    log.setLevel(before)


def test_version() -> None:
    assert neco("--version") == (0, f"neco-bench {neco_bench.__version__}\n", "")


def test_quiet_and_verbose_stand_anywhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = ("--model", "baseline_rgb", "--out", tmp_path / "results", "--overwrite")
    quiet = neco(*RUN, *out, "--quiet")
    assert (quiet.code, quiet.err) == (0, "")
    assert "baseline_rgb" in quiet.out
    with caplog.at_level(logging.INFO, "neco_bench"):
        assert "baseline_rgb on shapes_cluster_gt@neco-1*: done" in neco("--verbose", *RUN, *out).err
    assert "val val (4 items)" in caplog.text
    answer = neco("models", "--quiet", "--verbose")
    assert (answer.code, "exclude each other" in answer.err) == (2, True)


def test_quiet_still_says_errors(tmp_path: Path) -> None:
    answer = neco("--quiet", *RUN, "--model", "baseline_rgb", "--set", "clusters=9999", "--out", tmp_path)
    assert answer.code == 2
    assert "error:" in answer.err


def test_completion_of_tasks_and_models() -> None:
    from neco_bench.cli.common import task_names, zoo_names

    assert {"shapes_ic", "shapes_linear"} <= set(task_names("shapes_"))
    assert all(name.startswith("baseline_") for name in zoo_names("baseline_"))
    assert zoo_names("baseline_")
    environment = {
        **os.environ,
        "_NECO_BENCH_COMPLETE": "complete_bash",
        "COMP_WORDS": "neco-bench run --task shapes_i",
    }
    code = "from neco_bench.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, "COMP_CWORD": "3"}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["shapes_ic"]


def test_a_line_now_and_then_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.05)
    context = Context(progress=Progress("[3 of 12] mine on shapes_ic@hbird-2"))
    assert context.progress is not None
    with context.progress:
        with context.phase("load_encoder"):
            time.sleep(0.15)
        for _ in context.track([1, 2, 3], "query"):
            time.sleep(0.15)
    lines = capsys.readouterr().err.splitlines()
    assert "[3 of 12] mine on shapes_ic@hbird-2: load encoder, 0:00" in lines
    assert any(re.fullmatch(r"\[3 of 12\] mine on shapes_ic@hbird-2: query [12] of 3, 0:0\d", line) for line in lines)
    time.sleep(0.15)
    assert capsys.readouterr().err == ""  # none once it is done


def test_jobs_are_numbered(tmp_path: Path) -> None:
    answer = neco(*RUN, "--model", "baseline_rgb,baseline_hog", "--out", tmp_path)
    assert [line.partition(" on ")[0] for line in answer.err.splitlines()] == [
        "[1 of 2] baseline_rgb",
        "[2 of 2] baseline_hog",
    ]


def test_a_name_of_timm_is_recognised() -> None:
    answer = neco("run", "--model", "vit_tiny_patch16_224?pretrained=false", "--task", "shapes_ic")
    assert answer.code == 2
    assert "write timm:vit_tiny_patch16_224?pretrained=false" in answer.err


def test_flags_are_taken_as_python_writes_them() -> None:
    from neco_bench.encoders.identity import content_id
    from neco_bench.encoders.spec import parse_spec

    spec = parse_spec("timm:resnet18?pretrained=False")
    assert (spec.name, spec.pretrained) == ("timm:resnet18?pretrained=false", False)
    assert content_id(spec) == content_id("timm:resnet18?pretrained=false")


ENCODERS = """
from torch import nn

class Cells(nn.Module):
    embed_dim, stride = 3, 8
    def forward(self, images):
        return nn.functional.avg_pool2d(images, 8)

class Fixed(Cells):
    def forward(self, images):
        assert images.shape[-2:] == (224, 224), "224x224 only"
        return super().forward(images)

class Tokens(Cells):
    def forward(self, images):
        return super().forward(images).flatten(2)

class LastTokens(Cells):
    def forward(self, images):
        tokens = super().forward(images).flatten(2).transpose(1, 2)
        return nn.functional.pad(tokens, (0, 0, 2, 0))

class Fails(Cells):
    def forward(self, images):
        raise RuntimeError("no kernel for this")

def fixed(): return Fixed()
def tokens(): return Tokens()
def last_tokens(): return LastTokens()
def fails(): return Fails()
def says_its_size():
    module = Fixed()
    module.only_size = 224
    return module
"""


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Exit code and text of `check` for one of ENCODERS."""
    (tmp_path / "mine.py").write_text(ENCODERS)

    def run(name: str, *more: str) -> tuple[int, str]:
        answer = neco("check", f"{tmp_path / 'mine.py'}:{name}", "--device", "cpu", *more)
        return answer.code, answer.out

    return run


def test_check_prints_an_error_once(check: Callable[..., tuple[int, str]]) -> None:
    code, text = check("fails")
    assert code == 4
    assert text.count("no kernel for this") == 1
    assert text.count("as shape and stride") >= 6
    rows = json.loads(check("fails", "--json")[1])
    assert sum("no kernel for this" in row["detail"] for row in rows) >= 7  # whole for programs


def test_check_tries_a_fixed_size_encoder_at_its_size(check: Callable[..., tuple[int, str]]) -> None:
    code, text = check("fixed")
    assert code == 4
    assert [line.split()[0] for line in text.splitlines() if " FAIL " in line] == ["non-square"]
    assert "set only_size = 224" in text
    assert check("says_its_size")[0] == 0


def test_tokens_are_recognised(check: Callable[..., tuple[int, str]]) -> None:
    assert "These are tokens (B, D, N): return x.unflatten(2, (H // stride, W // stride))" in check("tokens")[1]
    code, text = check("last_tokens")
    assert code == 4
    assert "tokens (B, N, D): return x.transpose(1, 2)[..., 2:].unflatten" in text
    assert "The first 2 are class and register tokens" in text
