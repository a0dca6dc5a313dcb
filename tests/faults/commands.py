"""Real commands in processes of their own, stopped or denied the disk at a chosen file operation.

A child forks from a server that has imported everything, so that a command costs no start-up time. An audit hook counts
the operations of the child that change files below its folder (opening to write, renaming, deleting, making folders).
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from neco_bench.data.io import voc_colours
from tests.processes import forking

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
NEEDS_SPACE = {"open", "os.mkdir", "os.link", "os.symlink"}
SECONDS = 300  # after which a command hangs


@dataclass(frozen=True)
class Fault:
    """What happens at the file operation with number `at`, counted from 0.

    kill: the process ends `delay` seconds later, as by SIGKILL. full, readonly: this and all later operations fail.
    deleted: another process deletes the output folder. at None: nothing. size: the most bytes that a file may have,
    from the start.
    """

    kind: str = "none"
    at: int | None = None
    delay: float = 0.0
    size: int | None = None


NONE = Fault()


class Ended(NamedTuple):
    """How a child ended: exit code (negative for a signal, None for a hang), its stderr, and its file operations."""

    code: int | None
    err: str
    operations: int


def _child(folder: Path, words: Sequence[str], fault: Fault, output: str, log: Path) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ |= {
        "HOME": str(folder), "NECO_BENCH_CACHE": str(folder / "cache"), "NECO_BENCH_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    os.environ.pop("NECO_BENCH_DATA", None)
    with log.with_suffix(".err").open("w") as err:
        os.dup2(err.fileno(), 2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
    import torch

    torch.set_num_threads(1)
    if fault.size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.size, fault.size))
    count = os.open(log.with_suffix(".count"), os.O_WRONLY | os.O_CREAT)
    below, number, parent, deleting = str(folder) + os.sep, 0, os.getpid(), False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal number, deleting
        if event not in CHANGES and not (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        path = arguments[0]
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str) or not os.path.abspath(path).startswith(below) or os.getpid() != parent:
            return
        if deleting:
            return
        if fault.at is not None and number >= fault.at:
            if fault.kind == "kill" and number == fault.at:
                if not fault.delay:
                    os.kill(parent, signal.SIGKILL)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process at once, as SIGKILL does
                signal.setitimer(signal.ITIMER_REAL, fault.delay)
            elif fault.kind == "deleted" and number == fault.at:
                deleting = True
                shutil.rmtree(folder / output, ignore_errors=True)
                deleting = False
            elif fault.kind == "full" and event in NEEDS_SPACE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            elif fault.kind == "readonly":
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        number += 1
        os.pwrite(count, str(number).encode(), 0)

    sys.addaudithook(hook)
    from neco_bench.cli.app import main

    main(list(words))


class Server:
    """Starts commands in children of a process that has imported everything."""

    def __init__(self) -> None:
        self.context = forking()

    def start(self, folder: Path, words: Sequence[object], fault: Fault, output: str, log: Path) -> Any:
        child = self.context.Process(target=_child, args=(folder, [str(word) for word in words], fault, output, log))
        child.start()
        return child

    def end(self, child: Any, log: Path) -> Ended:
        child.join(SECONDS)
        code = child.exitcode
        if code is None:
            child.kill()
            child.join()
        err, count = log.with_suffix(".err"), log.with_suffix(".count")
        message, number = (path.read_text(errors="replace") if path.exists() else "" for path in (err, count))
        for path in (err, count):
            path.unlink(missing_ok=True)
        return Ended(code, message, int(number or 0))

    def run(self, folder: Path, words: Sequence[object], fault: Fault = NONE, output: str = "") -> Ended:
        log = folder.with_name(f"{folder.name}.log")
        return self.end(self.start(folder, words, fault, output, log), log)


# The commands, each with the folder that it starts from.

RUN = (
    "run", "--model", "baseline_rgb", "--task", "voc_cluster_gt@clean-1,voc_ic", "--data-root", "data",
    "--set", "input_size=32", "--device", "cpu", "--workers", 0,
)  # fmt: skip
TRAIN = (
    "train", "--data", "data/voc2012/VOCdevkit/VOC2012/JPEGImages", "--base", "timm:test_vit?pretrained=false",
    "--recipe", "neco_dino_vits16", "--set", "global_size=64", "--set", "local_size=32", "--set", "head_hidden=32",
    "--set", "head_dim=16", "--set", "batch_size=2", "--device", "cpu", "--workers", 0, "--save-every", 1,
    "--out", "run",
)  # fmt: skip
RESULTS = Path(__file__).parents[2] / "leaderboards" / "tiny" / "results"


@dataclass(frozen=True)
class Command:
    """words: the command under test; output: where it writes. make, before: what makes the folder it starts from."""

    name: str
    words: tuple[object, ...]
    output: str
    before: tuple[tuple[object, ...], ...] = ()
    make: tuple[Callable[[Path], None], ...] = ()


def voc(folder: Path) -> None:
    """A VOC 2012 of six images of 48 x 64 pixels: four to train on, two to score."""
    base = folder / "data" / "voc2012" / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
        (base / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"2007_00000{i}" for i in range(6)]
    for i, name in enumerate(names):
        mask = np.kron(rng.integers(0, 5, (3, 4)), np.ones((16, 16))).astype(np.uint8)
        mask[0] = 255
        image = np.stack([mask * 40 + 20] * 3, axis=2) + rng.integers(0, 20, (48, 64, 3))
        Image.fromarray(image.astype(np.uint8)).save(base / "JPEGImages" / f"{name}.jpg")
        drawn = Image.fromarray(mask)
        drawn.putpalette(voc_colours(256).tobytes())
        drawn.save(base / ("SegmentationClassAug" if i < 4 else "SegmentationClass") / f"{name}.png")
    lists = base / "ImageSets" / "Segmentation"
    (lists / "trainaug.txt").write_text("".join(f"{name}\n" for name in names[:4]))
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in names[4:]))


def archive(folder: Path) -> None:
    """A zip of a CamVid of a few files in folders."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(folder / "camvid.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for split in ("train", "val"):
            for i in range(3):
                file.writestr(f"{split}/{i}.png", rng.bytes(3000))
            file.writestr(f"{split}.txt", "".join(f"{split}/{i}.png\n" for i in range(3)))


def shipped_results(folder: Path) -> None:
    """Two shipped results of each of two families."""
    for path in sorted(RESULTS.rglob("*/shapes_ic/*")) + sorted(RESULTS.rglob("*/shapes_linear/*")):
        goal = folder / "results" / path.relative_to(RESULTS)
        goal.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, goal)


PREPARE = ("data", "prepare", "camvid", "--source", "camvid.zip", "--data-root", "data")
SHOW = ("show", "baseline_rgb", "--data-root", "data", "--worst", 1, "--best", 1, "--device", "cpu")
COMMANDS = (
    Command("run", (*RUN, "--overwrite"), "results", (RUN,), (voc,)),
    Command("train", (*TRAIN, "--set", "steps=4", "--resume"), "run", ((*TRAIN, "--set", "steps=2"),), (voc,)),
    Command("leaderboard", ("leaderboard",), "leaderboards", (), (shipped_results,)),
    Command("prepare", PREPARE, "data/camvid", (), (archive,)),
    Command("show", SHOW, "pictures", (RUN,), (voc,)),
)


def begin(server: Server, command: Command, folder: Path) -> None:
    """Make the folder that a command starts from."""
    folder.mkdir(parents=True)
    for make in command.make:
        make(folder)
    for words in command.before:
        ended = server.run(folder, words)
        assert ended.code == 0, f"{command.name}: {ended}"


# What must hold.


def contents(folder: Path) -> dict[str, Any]:
    """What matters of each file below a folder; raises where a file that has its final name is not whole.

    None for names that begin with a dot, and what is in such folders: not whole, and not taken for it.
    """
    return {
        str(name): None if any(part.startswith(".") for part in name.parts) else _content(path)
        for path in sorted(folder.rglob("*"))
        for name in [path.relative_to(folder)]
        if path.is_file() and path.name not in ("lock", ".lock")
    }


def _content(path: Path) -> Any:
    if path.suffix == ".json":
        document = json.loads(path.read_bytes())
        changing = ("timing", "peak_memory_mb", "provenance", "created")
        return {key: value for key, value in document.items() if key not in changing}
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: arrays[name].tolist() for name in arrays.files}
    if path.suffix == ".safetensors":
        return {name: (array.shape, array.tobytes()) for name, array in load_file(path).items()}
    if path.suffix in (".png", ".jpg") and "pictures" in path.parts:
        with Image.open(path) as image:
            return image.size, image.tobytes()
    if path.suffix == ".pt":
        import torch

        torch.load(path, weights_only=True)
        return "whole"
    if path.suffix == ".csv" and path.name == "log.csv":
        return [line.split(",")[0] for line in path.read_text().splitlines()]  # the rest holds seconds
    if "cache" in path.parts:
        return "cached"
    content = path.read_bytes()
    assert content or path.suffix == ".txt", f"{path} is empty"
    return content


def check_after(
    server: Server,
    command: Command,
    folder: Path,
    before: dict[str, Any],
    whole: dict[str, Any],
    *,
    names_only: bool = False,
) -> str:
    """What is wrong after a fault: something lost or torn, or left over once the command ran again; "" for nothing."""
    try:
        now = contents(folder)
    except Exception as error:
        return f"torn: {type(error).__name__}: {error}"
    lost = [name for name in before if name not in now and name in whole]
    if lost:
        return f"lost: {lost}"
    again = server.run(folder, command.words)
    if again.code != 0 or "Traceback" in again.err:
        return f"the next run ended with {again.code}: {again.err[-800:]}"
    after = contents(folder)
    if extra := sorted(set(after) - set(whole)):
        return f"left over: {extra}"
    if absent := sorted(set(whole) - set(after)):
        return f"absent: {absent}"
    if not names_only and (other := sorted(name for name in whole if after[name] != whole[name])):
        return f"other content: {other}"
    return ""


def faults(rng: random.Random, operations: int, number: int, kinds: Sequence[str]) -> list[Fault]:
    """`number` faults, spread over the operations of a command so that each phase has some."""
    chosen = []
    for i in range(number):
        at = int((i + rng.random()) * operations / number)
        delay = rng.choice([0.0, 0.0001, 0.001, 0.01, 0.1])
        chosen.append(Fault(kinds[i % len(kinds)], at, delay))
    return chosen


def trial(server: Server, command: Command, start: Path, folder: Path, fault: Fault, whole: dict[str, Any]) -> str:
    """One fault in a copy of the folder `start`; what is wrong afterwards, "" for nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(start, folder)
    ended = server.run(folder, command.words, fault, command.output)
    if ended.code is None:
        return "hangs"
    if "Traceback" in ended.err:
        return f"a traceback: {ended.err[-1200:]}"
    if ended.code not in ((-signal.SIGKILL, -signal.SIGALRM, 0) if fault.kind == "kill" else (0, 1, 3, 4)):
        return f"exit code {ended.code} for {fault}: {ended.err[-300:]}"
    deleted = fault.kind == "deleted"  # what was there cannot be kept, and training begins again with other settings
    wrong = check_after(server, command, folder, {} if deleted else contents(start), whole, names_only=deleted)
    shutil.rmtree(folder, ignore_errors=True)
    return wrong


def many(
    work: Path,
    number: int,
    seed: int,
    kinds: Sequence[str] = ("kill",),
    names: Sequence[str] = (),
    verbose: bool = False,
) -> list[str]:
    """`number` faults shared out among the commands; what went wrong, one line each."""
    server, rng, wrong = Server(), random.Random(seed), []
    commands = [command for command in COMMANDS if not names or command.name in names]
    for index, command in enumerate(commands):
        start, done = work / command.name, work / f"{command.name}-done"
        begin(server, command, start)
        shutil.copytree(start, done)
        first = server.run(done, command.words)
        assert first.code == 0, f"{command.name}: {first}"
        whole = contents(done)
        share = number // len(commands) + (index < number % len(commands))
        begun = time.monotonic()
        for fault in faults(rng, first.operations, share, kinds):
            problem = trial(server, command, start, work / f"{command.name}-fault", fault, whole)
            if problem:
                wrong.append(f"{command.name}, {fault}: {problem}")
                if verbose:
                    print(wrong[-1], flush=True)
        if verbose:
            seconds = time.monotonic() - begun
            print(f"{command.name}: {share} faults at {first.operations} file operations, {seconds:.0f} s", flush=True)
    return wrong
