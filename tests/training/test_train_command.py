"""`neco-bench train` as a user meets it: from images to a benchmarked model, and every way to get it wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import processes
from tests.command import Answer, neco

SMALL = (
    "--base", "timm:test_vit?pretrained=false", "--recipe", "neco_dino_vits16", "--workers", 0,
    "--set", "global_size=64", "--set", "local_size=32", "--set", "head_hidden=32", "--set", "head_dim=16",
    "--set", "batch_size=4", "--set", "steps=2",
)  # fmt: skip


def train(out: Path, *arguments: object) -> Answer:
    return neco("train", "--data", "shapes:12", "--out", out, *SMALL, *arguments)


@pytest.mark.slow
def test_two_commands(tmp_path: Path) -> None:
    done = train(tmp_path / "run")
    assert (done.code, done.out.strip()) == (0, str(tmp_path / "run"))
    again = train(tmp_path / "run")
    assert again.code == 2
    assert "Give --resume to continue it" in again.err
    assert train(tmp_path / "run", "--resume").code == 0
    scored = neco("run", "--model", tmp_path / "run", "--task", "shapes_ic", "--limit", 4, "--workers", 0,
                  "--out", tmp_path / "results")  # fmt: skip
    assert scored.code == 0, scored.err
    assert "shapes_ic" in scored.out
    exported = neco("export", tmp_path / "run", "--layout", "dinov2", "--out", tmp_path / "run.pth")
    assert (exported.code, (tmp_path / "run.pth").is_file()) == (0, True)
    further = train(tmp_path / "further", "--base", tmp_path / "run")
    assert further.code == 0, further.err


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_ends_the_run_in_order(kind: signal.Signals, tmp_path: Path) -> None:
    """As a terminal and a cluster send it: loading processes get it too."""
    out = tmp_path / "run"
    words = ["train", "--data", "shapes:12", "--out", out, *SMALL, "--workers", 2, "--set", "steps=5000"]
    child = processes.Running(words, tmp_path, session=True)
    child.wait_for((out / "log.csv").is_file)
    os.killpg(child.pid, kind)
    code, message = child.wait(60), child.err
    assert code == 130, message
    assert "--resume continues from there" in message
    assert "Traceback" not in message
    assert len(list(out.glob("checkpoint-*"))) == 2


@pytest.mark.slow
def test_sigterm_to_torchrun_and_its_workers_saves_the_state(tmp_path: Path) -> None:
    """As a cluster sends it to all processes of a job: a worker gets it from torchrun too."""
    out = tmp_path / "run"
    words = ["train", "--data", "shapes:12", "--out", out, *SMALL, "--set", "steps=5000", "--save-every", 10000]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "neco_bench", *map(str, words)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (out / "log.csv").is_file() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    for number in (*map(int, workers), child.pid):
        os.kill(number, signal.SIGTERM)
    _, message = child.communicate(timeout=120)
    assert len(workers) == 2
    assert "--resume continues from there" in message, message
    saved = sorted(path.name for path in out.glob("checkpoint-*"))
    assert len(saved) == 2
    assert saved[1] > "checkpoint-0000000"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--recipe", "neco_vits14_51"], 2, "Did you mean 'neco_vits14_518'"),
        (["--set", "lr=1"], 2, "recipes have no such key"),
        (["--base", "dinov2_vits14_rex"], 2, "Did you mean"),
        (["--data", "nowhere"], 3, "neither a folder"),
        (["--data", "EMPTY"], 3, "no images, at any depth"),
        (["--set", "global_size=65"], 2, "not a multiple of the patch size 16"),
        (["--set", "precision=fp8"], 2, "precision"),
        (["--weights", "nowhere.pth"], 3, "nowhere.pth does not exist"),
        (["--save-every", 0], 2, "--save-every must be at least 1"),
        (["--compile"], 2, "Add --set drop_path=0"),
        (["--eval", "shapes_icc"], 2, "Did you mean 'shapes_ic'"),
    ],
)
def test_mistakes(arguments: list[object], code: int, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    arguments = [tmp_path / "empty" if a == "EMPTY" else a for a in arguments]
    answer = train(tmp_path / "run", *arguments)
    assert answer.code == code
    assert message in answer.err
    assert "Traceback" not in answer.err
    assert not (tmp_path / "run").exists()
