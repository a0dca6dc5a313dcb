"""Peak memory of each segmentation family on 2,000 and on 8,000 generated images: it should not grow.

    python tests/benchmarks/bench_memory.py [IMAGES ...]

Training and val split both have that many images. Each run is a process of its own; the bank of in-context is full at
its 10,240 rows with either number.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

TASKS = {
    "camvid_ic": ["memory_size=10240", "passes=1"],
    "camvid_linear": ["epochs=1", "train_mask_size=32"],
    "camvid_linear@dinov3-1": ["iterations=200", "evaluate_every=100"],
    "camvid_cluster_gt": ["seeds=1", "redos=1"],
    "camvid_overcluster_50@clean-1": ["seeds=1", "redos=1"],
}
SIDE = 64


def make(root: Path, count: int) -> None:
    """CamVid in SegNet's layout with `count` noisy images of blocks in each split."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder in (split, f"{split}annot"):
            (root / "camvid" / folder).mkdir(parents=True)
        lines = []
        for i in range(count):
            mask = np.kron(rng.integers(0, 12, (4, 4)), np.ones((SIDE // 4, SIDE // 4), int)).astype(np.uint8)
            image = (mask[..., None] * 20 + rng.integers(0, 30, (SIDE, SIDE, 3))).astype(np.uint8)
            Image.fromarray(image).save(root / "camvid" / split / f"{i:05d}.png")
            Image.fromarray(mask).save(root / "camvid" / f"{split}annot" / f"{i:05d}.png")
            lines.append(f"/SegNet/{split}/{i:05d}.png /SegNet/{split}annot/{i:05d}.png\n")
        (root / "camvid" / f"{split}.txt").write_text("".join(lines))


def peak(root: Path, task: str) -> float:
    """Peak memory in MB of one run in a fresh process."""
    changes = [part for change in [f"input_size={SIDE}", *TASKS[task]] for part in ("--set", change)]
    command = [sys.executable, "-m", "neco_bench", "run", "--model", "baseline_rgb", "--task", task, "--json"]
    options = ["--data-root", str(root), "--out", str(root / "out"), "--workers", "0", *changes]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(json.loads(done.stdout)[0]["peak_memory_mb"])


def main() -> None:
    counts = [int(word) for word in sys.argv[1:]] or [2000, 8000]
    peaks: dict[str, list[float]] = {task: [] for task in TASKS}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), count)
            for task in TASKS:
                peaks[task].append(peak(Path(folder), task))
    print("task", *(f"{count} images" for count in counts), "ratio", sep="\t")
    for task, values in peaks.items():
        print(task, *(f"{value:.0f} MB" for value in values), f"{values[-1] / values[0]:.2f}", sep="\t")


if __name__ == "__main__":
    main()
