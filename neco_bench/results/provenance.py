"""Provenance of a number: package versions, machine, commit of the source tree. Imports no torch."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

# Distributions that can change a number or a timing.
PACKAGES = (
    "neco-bench",
    "torch",
    "torchvision",
    "timm",
    "infomap",
    "transformers",
    "faiss-gpu",
    "faiss-cpu",
    "numpy",
    "scipy",
    "pandas",
    "pillow",
    "opencv-python-headless",
    "kornia-rs",
    "huggingface-hub",
    "safetensors",
    "pydantic",
)


def environment() -> dict[str, Any]:
    """Return the versions of PACKAGES, python, platform, cpu model, usable cores, git commit and dirty flag.

    `git_commit` (40 hex digits) and `git_dirty` describe the checkout from which neco_bench was imported, not that of
    the working directory; both are None outside a checkout. Dirty means that `neco_bench/` or `tasks/` differ from the
    commit.
    """
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit, dirty = _git_state(Path(__file__).resolve().parents[1])
    return {
        "packages": packages,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "git_commit": commit,
        "git_dirty": dirty,
    }


def peak_memory_mb() -> float:
    """Return the largest resident memory of this process so far, in MiB, without child processes (data workers).

    0.0 means "not measured": Windows has no `resource` module.
    """
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux KiB


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_state(package: Path) -> tuple[str | None, bool | None]:
    """Return (commit, dirty) of the checkout that has `package` at its top level; (None, None) outside a checkout."""
    # Hooks and `git rebase --exec` set GIT_DIR and similar variables, which could point to another repository.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env["GIT_OPTIONAL_LOCKS"] = "0"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30, env=env)  # noqa: S603 - git
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:  # a venv inside another project
            return None, None
        commit = git("rev-parse", "HEAD")
        return commit, bool(git("status", "--porcelain", "--", package.name, "tasks"))
    except (OSError, subprocess.SubprocessError):
        return None, None
