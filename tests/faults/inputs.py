"""Changed files for every reader: each must be read, or refused with an error of ours, in bounded time.

A reader is given a folder that it can read, with one file changed. Changes are of bytes (bits, cuts, insertions,
copies), of words in texts (numbers, names, brackets), and of values in JSON documents.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import tarfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import torch
from PIL import Image
from safetensors.torch import save_file

from neco_bench import load_encoder
from neco_bench.core.config import read_toml
from neco_bench.core.errors import NecoBenchError
from neco_bench.data.base import PairDataset, SegmentationDataset
from neco_bench.data.load import load_dataset
from neco_bench.training.images import open_images
from neco_bench.training.recipe import load_recipe
from tests.command import neco
from tests.faults.commands import Server, shipped_results, voc

SECONDS = 30  # after which a reader hangs
TEXTS = (
    b"nan", b"inf", b"-1", b"0", b"1e308", b"1e400", b"-0.0", b"9" * 25, b"9" * 5000, b"true", b"null", b'""', b"[]",
    b"{}", b"[" * 5000, b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\\ud800", "é✓\u202e".encode(), b"..", b"../../outside",
    b"/etc/passwd", b"\r", b"\n\n", b"=1+1", b"'", b'"', b",", b" ", b"%s{0}", b"a" * 300, b"1970-01-01", b"0x10",
    b"-" * 50,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 10**400, 1e308, -1e308, float("nan"), float("inf"), "", "\ud800", "\0", "../../outside",
    "x" * 5000, [], {}, [None], [[]], {"a": {}}, [1e308] * 4, [0] * 3, "é\n",
)  # fmt: skip


class Hang(BaseException):
    """A reader took too long."""


def changed(content: bytes, rng: random.Random, suffix: str) -> bytes:
    """`content` with one to three changes."""
    if suffix == ".json" and rng.random() < 0.6:
        with contextlib.suppress(ValueError):
            document = json.loads(content)
            for _ in range(rng.randint(1, 2)):
                document = _other_value(document, rng)
            return json.dumps(document).encode("utf-8", "surrogatepass")
    for _ in range(rng.randint(1, 3)):
        content = rng.choice(_CHANGES)(content, rng)
    return content


def _other_value(document: Any, rng: random.Random) -> Any:
    """The document with a value, a key or an item replaced somewhere."""
    if not isinstance(document, dict | list) or not document or rng.random() < 0.15:
        return rng.choice(VALUES)
    key = rng.choice(list(document)) if isinstance(document, dict) else rng.randrange(len(document))
    copy: Any = dict(document) if isinstance(document, dict) else list(document)
    kind = rng.random()
    if kind < 0.1:
        del copy[key]
    elif kind < 0.15 and isinstance(copy, dict):
        copy[rng.choice(["", "x", "\0", "\ud800", "../x"])] = copy.pop(key)
    else:
        copy[key] = _other_value(copy[key], rng)
    return copy


def _place(content: bytes, rng: random.Random) -> tuple[int, int]:
    begin = rng.randint(0, len(content))
    return begin, min(len(content), begin + rng.choice([1, 2, 4, 16, 200]))


def _bits(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8, 64]) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _header(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    if data:
        data[rng.randrange(min(len(data), 200))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    return bytes(data)


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice([0, 1, len(content) // 2, max(0, len(content) - 1), rng.randint(0, len(content))])]


def _without(content: bytes, rng: random.Random) -> bytes:
    begin, end = _place(content, rng)
    return content[:begin] + content[end:]


def _twice(content: bytes, rng: random.Random) -> bytes:
    begin, end = _place(content, rng)
    return content[:end] + content[begin:]


def _inserted(content: bytes, rng: random.Random) -> bytes:
    begin, end = _place(content, rng)
    text = rng.choice([*TEXTS, rng.randbytes(rng.choice([1, 4, 64]))])
    return content[:begin] + text + content[rng.choice([begin, end]) :]


def _word(content: bytes, rng: random.Random) -> bytes:
    """Another word in place of a number or a name."""
    words = list(re.finditer(rb"-?[0-9][0-9.e+-]*|[A-Za-z_]+|[\[\]{}\"=,:]", content[:20000]))
    if not words:
        return _bits(content, rng)
    word = rng.choice(words)
    return content[: word.start()] + rng.choice(TEXTS) + content[word.end() :]


def _encoded(content: bytes, rng: random.Random) -> bytes:
    text = content.decode("latin-1")
    return text.encode(rng.choice(["utf-16", "utf-32", "utf-16-be", "utf-8"]))


_CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _bits, _bits, _header, _header, _cut, _without, _twice, _inserted, _word, _word, _word, _encoded,
)  # fmt: skip


# Readers: `make` writes the files of one, `read` reads them, `files` are patterns of those to be changed.


@dataclass(frozen=True)
class Reader:
    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]
    files: tuple[str, ...]


def _use(name: str, split: str, **options: Any) -> Callable[[Path], None]:
    """A reader of a data set: opened, digested, and all items read."""

    def read(folder: Path) -> None:
        data = load_dataset(name, split, root=folder / "data", **options)
        data.fingerprint()
        assert isinstance(data, (PairDataset, SegmentationDataset))
        if isinstance(data, SegmentationDataset):
            data.sample_sanity_check()
        for index in range(min(3, len(data))):
            data[index]

    return read


def _answered(*words: str) -> Callable[[Path], None]:
    """A reader that is a command, run in the folder."""

    def read(folder: Path) -> None:
        with _chdir(folder):
            answer = neco(*words)
        if "Traceback" in answer.err:
            raise AssertionError(answer.err[-1500:])
        if answer.code not in (0, 1, 2, 3, 4, 5):
            raise AssertionError(f"exit code {answer.code}: {answer.err[-500:]}")

    return read


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _image(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _camvid(folder: Path) -> None:
    base = folder / "data" / "camvid"
    for name in ("val", "valannot"):
        (base / name).mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (480, 360), (i, 90, 20)).save(base / "val" / f"f{i}.png")
        Image.fromarray(np.kron(np.arange(12).reshape(3, 4), np.ones((120, 120))).astype(np.uint8)).save(
            base / "valannot" / f"f{i}.png"
        )
    (base / "val.txt").write_text("".join(f"/SegNet/val/f{i}.png /SegNet/valannot/f{i}.png\n" for i in range(2)))


def _spair(folder: Path) -> None:
    base = folder / "data" / "spair71k" / "SPair-71k"
    for name in ("JPEGImages/cat", "Layout/large", "PairAnnotation/val"):
        (base / name).mkdir(parents=True)
    for name, size in (("a", (20, 30)), ("b", (40, 25))):
        _image(1, *size).save(base / "JPEGImages" / "cat" / f"{name}.jpg")
    name = "000003-a-b:cat"
    (base / "Layout" / "large" / "val.txt").write_text(f"{name}\n")
    pair = {
        "filename": name, "src_imname": "a.jpg", "trg_imname": "b.jpg", "src_imsize": [30, 20, 3],
        "trg_imsize": [25, 40, 3],
        "src_bndbox": [1, 2, 20, 19], "trg_bndbox": [2, 3, 24, 18], "category": "cat", "src_kps": [[3, 4], [5, 6]],
        "trg_kps": [[7, 8], [9, 10]], "kps_ids": ["0", "12"], "viewpoint_variation": 1, "scale_variation": 2,
        "truncation": 3, "occlusion": 0,
    }  # fmt: skip
    (base / "PairAnnotation" / "val" / f"{name}.json").write_text(json.dumps(pair))


def _willow(folder: Path) -> None:
    base = folder / "data" / "pf_willow" / "car(G)"
    base.mkdir(parents=True)
    for i, name in enumerate("ab"):
        _image(2, 30, 40).save(base / f"{name}.png")
        scipy.io.savemat(base / f"{name}.mat", {"pts_coord": np.arange(1.0 + i, 21 + i).reshape(2, 10)})


def _panoptic(folder: Path) -> None:
    base = folder / "data" / "coco" / "annotations"
    (base / "panoptic_val2017").mkdir(parents=True)
    (folder / "data" / "coco" / "val2017").mkdir()
    _image(3, 30, 40).save(folder / "data" / "coco" / "val2017" / "000000000139.jpg")
    ids = np.zeros((30, 40, 3), np.uint8)
    ids[..., 0] = 7
    ids[:10, :, 0] = 9
    Image.fromarray(ids).save(base / "panoptic_val2017" / "000000000139.png")
    document = {
        "annotations": [
            {
                "image_id": 139,
                "file_name": "000000000139.png",
                "segments_info": [{"id": i, "category_id": c, "iscrowd": 0} for i, c in ((7, 1), (9, 119))],
            }
        ],
        "categories": [{"id": 1, "isthing": 1, "name": "person"}, {"id": 119, "isthing": 0, "name": "flower"}],
        "images": [{"id": 139, "file_name": "000000000139.jpg", "height": 30, "width": 40}],
    }
    (base / "panoptic_val2017.json").write_text(json.dumps(document))


def _instances(folder: Path) -> None:
    base = folder / "data" / "coco"
    (base / "annotations").mkdir(parents=True)
    (base / "val2017").mkdir()
    _image(3, 30, 40).save(base / "val2017" / "000000000139.jpg")
    common = {"image_id": 139, "category_id": 1, "area": 50.0}
    document = {
        "images": [{"id": 139, "file_name": "000000000139.jpg", "height": 30, "width": 40}],
        "annotations": [
            {**common, "id": 1, "iscrowd": 0, "segmentation": [[1, 1, 20, 1, 20, 9, 1, 9]]},
            {**common, "id": 2, "iscrowd": 1, "segmentation": {"counts": [300, 60, 840], "size": [30, 40]}},
        ],
        "categories": [{"id": 1, "name": "person"}],
    }
    (base / "annotations" / "instances_val2017.json").write_text(json.dumps(document))


def _sbd(folder: Path) -> None:
    voc(folder)
    base = folder / "data" / "voc2012" / "VOCdevkit" / "VOC2012"
    shutil.rmtree(base / "SegmentationClassAug")
    (base / "ImageSets" / "Segmentation" / "trainaug.txt").unlink()
    (base / "ImageSets" / "Segmentation" / "train.txt").write_text("2007_000004\n")
    (base / "ImageSets" / "Segmentation" / "val.txt").write_text("2007_000005\n")
    cls = folder / "source" / "cls"
    cls.mkdir(parents=True)
    dtype = [("Segmentation", object), ("CategoriesPresent", object)]
    entry = np.zeros((1, 1), dtype=dtype)
    entry["Segmentation"][0, 0] = np.ones((48, 64), np.uint8)
    entry["CategoriesPresent"][0, 0] = np.array([[1]], np.uint8)
    scipy.io.savemat(cls / "2007_000000.mat", {"GTcls": entry})


def _packed(kind: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        names = {f"train/{i}.png": bytes([i] * 500) for i in range(3)} | {"val.txt": b"a\nb\n"}
        if kind == "zip":
            with zipfile.ZipFile(folder / "packed.zip", "w", zipfile.ZIP_DEFLATED) as file:
                for name, content in names.items():
                    file.writestr(name, content)
            return
        with tarfile.open(folder / f"packed.{kind}", "w:gz" if kind == "tar.gz" else "w") as tar:
            for name, content in names.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    return make


_PUBLISHED = Path(__file__).parents[2] / "leaderboards" / "published.csv"


def _leaderboard(folder: Path) -> None:
    shipped_results(folder)
    lines = _PUBLISHED.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "published.csv").write_text("".join(lines[:12]), encoding="utf-8")


def _leaderboard_read(folder: Path) -> None:
    """One bad result is left out, and hides no other."""
    documents = len(list((folder / "results").rglob("*.json")))
    with _chdir(folder):
        answer = neco("leaderboard", "--published", "published.csv", "--json")
    assert "Traceback" not in answer.err, answer.err[-1500:]
    assert answer.code in (0, 4), answer
    assert answer.code == 4 or json.loads(answer.out)["results"] >= documents - 1, answer


RECIPE = """# A recipe.
extends = "neco_dino_vits16"
batch_size = 4
steps = 10
lr_backbone = 1e-4
global_scale = [0.25, 1.0]
precision = "fp32"
use_teacher = true
"""
CODE = """
import torch
from torch import nn

class Cells(nn.Module):
    embed_dim, stride = 8, 8
    def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(3, 8, 8, 8)
    def forward(self, x):
        return self.project(x)

def cells(): return Cells()
"""


def _weights(folder: Path) -> None:
    torch.manual_seed(0)
    tensors = {"project.weight": torch.randn(8, 3, 8, 8), "project.bias": torch.randn(8)}
    save_file(tensors, folder / "weights.safetensors")
    torch.save({"state_dict": tensors, "epoch": 3}, folder / "weights.pth")
    torch.save(tensors, folder / "weights.ckpt", _use_new_zipfile_serialization=False)
    (folder / "mine.py").write_text(CODE)


def _load(name: str) -> Callable[[Path], object]:
    return lambda folder: load_encoder(f"{folder / 'mine.py'}:cells", weights=folder / name, device="cpu")


def _run_folder(folder: Path) -> None:
    sizes = ("steps=1", "warmup_steps=0", "batch_size=2", "global_size=32", "local_size=16")
    words = [
        "--recipe",
        "tiny_base",
        "--workers",
        "0",
        "--device",
        "cpu",
        *(w for size in sizes for w in ("--set", size)),
    ]
    _images(folder)
    answer = neco("train", "--data", folder / "images", "--out", folder / "run", *words)
    assert answer.code == 0, answer


def _images(folder: Path) -> None:
    (folder / "images").mkdir()
    for i in range(3):
        _image(i, 40, 40).save(folder / "images" / f"{i}.jpg")
    (folder / "list.txt").write_text("".join(f"images/{i}.jpg\n" for i in range(3)))


def _read_images(folder: Path) -> None:
    images = open_images(str(folder / "list.txt"))
    images.fingerprint()
    for index in range(len(images)):
        images.read(index)


_PLUGIN = Path(__file__).parents[1] / "plugin" / "neco_bench_plugin_example" / "foreground" / "cards.toml"
_LIST = Path("data", "voc2012", "VOCdevkit", "VOC2012", "ImageSets", "Segmentation", "trainaug.txt")
PREPARE = ("data", "prepare", "camvid", "--data-root", "data", "--source")


def _restricted(folder: Path) -> None:
    load_dataset("voc2012", "trainaug", root=folder / "data", split_file=folder / _LIST)


def _recipe(folder: Path) -> None:
    (folder / "mine.toml").write_text(RECIPE)


def _cards(folder: Path) -> None:
    shutil.copy(_PLUGIN, folder)


READERS = (
    Reader("voc2012", voc, _use("voc2012", "trainaug"), ("data/**/2007_000000.*", "data/**/trainaug.txt")),
    Reader("split_file", voc, _restricted, ("data/**/trainaug.txt",)),
    Reader("camvid", _camvid, _use("camvid", "val"), ("data/camvid/val.txt", "data/camvid/*/f0.png")),
    Reader("spair71k", _spair, _use("spair71k", "val"), ("data/**/*.json", "data/**/val.txt", "data/**/a.jpg")),
    Reader("pf_willow", _willow, _use("pf_willow", "test"), ("data/**/a.mat", "data/**/a.png")),
    Reader("coco_instances", _instances, _use("coco_things", "val"), ("data/coco/annotations/*.json",)),
    Reader(
        "coco_panoptic",
        _panoptic,
        _answered("data", "prepare", "coco_panoptic", "--data-root", "data"),
        ("data/coco/annotations/*.json", "data/coco/annotations/*/*.png"),
    ),
    Reader(
        "voc_sbd",
        _sbd,
        _answered("data", "prepare", "voc_sbd", "--source", "source", "--data-root", "data"),
        ("source/**/*.mat",),
    ),
    *(
        Reader(kind, _packed(kind), _answered(*PREPARE, f"packed.{kind}"), (f"packed.{kind}",))
        for kind in ("zip", "tar", "tar.gz")
    ),
    Reader("results", _leaderboard, _leaderboard_read, ("results/**/tiny_neco*.json",)),
    Reader("published", _leaderboard, _leaderboard_read, ("published.csv",)),
    Reader(
        "statistics", shipped_results, _answered("compare", "tiny_base", "tiny_neco", "--json"), ("results/**/*.npz",)
    ),
    Reader("recipe", _recipe, lambda folder: load_recipe(str(folder / "mine.toml")), ("mine.toml",)),
    Reader("cards", _cards, lambda folder: read_toml(folder / "cards.toml"), ("cards.toml",)),
    *(Reader(name, _weights, _load(name), (name,)) for name in ("weights.safetensors", "weights.pth", "weights.ckpt")),
    Reader("images", _images, _read_images, ("list.txt", "images/0.jpg")),
    Reader(
        "run_folder",
        _run_folder,
        lambda folder: load_encoder(str(folder / "run"), device="cpu"),
        ("run/encoder.json", "run/checkpoint-*/*.safetensors"),
    ),
)


def _listing(folder: Path, besides: Path) -> dict[str, int]:
    """Files around the one folder in which a reader may write, with their times."""
    files = (path for path in folder.rglob("*") if besides not in (path, *path.parents) and path.is_file())
    return {str(path): path.stat().st_mtime_ns for path in files}


def attempt(reader: Reader, folder: Path) -> str:
    """What is wrong with how a reader takes the files in `folder`; "" for nothing."""

    def late(number: int, frame: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        reader.read(folder)
    except NecoBenchError:
        return ""
    except Hang:
        return f"takes more than {SECONDS} s"
    except MemoryError:
        return "MemoryError"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:300]} ({Path(place.filename).name}:{place.lineno} {place.name})"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return ""


def _share(work: Path, name: str, begin: int, end: int, seed: int, verbose: bool) -> None:
    """Give a reader its changed files. File `wrong`: one line for each fault; file `at`: the current number."""
    (reader,) = (reader for reader in READERS if reader.name == name)
    warnings.simplefilter("ignore")
    os.environ |= {"NECO_BENCH_CACHE": str(work / "cache"), "NECO_BENCH_OFFLINE": "1", "HOME": str(work)}
    torch.set_num_threads(1)
    whole, box = work / "whole", work / "changed"
    folder = box / "inner" / "folder"
    if not whole.exists():
        whole.mkdir(parents=True)
        reader.make(whole)
    shutil.rmtree(box, ignore_errors=True)
    shutil.copytree(whole, folder)
    if problem := attempt(reader, folder):
        raise AssertionError(f"{name}: whole files: {problem}")
    around = _listing(box, folder)
    files = sorted({path.relative_to(whole) for pattern in reader.files for path in whole.glob(pattern)})
    for count in range(begin, end):
        rng = random.Random(f"{seed}/{name}/{count}")
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        file = rng.choice(files)
        (folder / file).write_bytes(changed((folder / file).read_bytes(), rng, file.suffix))
        (work / "at").write_text(str(count))
        problem = attempt(reader, folder)
        if not problem and (now := _listing(box, folder)) != around:
            problem = f"wrote outside: {sorted(set(now.items()) ^ set(around.items()))}"
        if problem:
            _note(work, f"{name}, input {count} of seed {seed} ({file}): {problem}", verbose)
    (work / "at").write_text(str(end))


def _note(work: Path, line: str, verbose: bool) -> None:
    with (work / "wrong").open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(" ".join(line.split()) + "\n")
    if verbose:
        print(line.encode("utf-8", "backslashreplace").decode(), flush=True)


def _watch(child: Any, at: Path) -> None:
    """Wait for a child; kill it where one file takes so long that not even a signal is handled."""
    last, since = "", time.monotonic()
    while child.exitcode is None:
        child.join(1)
        now = at.read_text() if at.exists() else ""
        if now != last:
            last, since = now, time.monotonic()
        if last and time.monotonic() - since > 2 * SECONDS:
            child.kill()


def many(work: Path, number: int, seed: int, names: Sequence[str] = (), verbose: bool = False) -> list[str]:
    """`number` changed files shared out among the readers; what went wrong, one line each.

    Each reader has a process of its own: a library that crashes on a file ends that one, and the next goes on.
    """
    server, wrong = Server(), []
    readers = [reader for reader in READERS if not names or reader.name in names]
    for index, reader in enumerate(readers):
        folder, begin = work / reader.name, 0
        folder.mkdir(parents=True)
        share = number // len(readers) + (index < number % len(readers))
        while begin < share:
            child = server.context.Process(target=_share, args=(folder, reader.name, begin, share, seed, verbose))
            child.start()
            _watch(child, folder / "at")
            assert (folder / "at").exists(), f"{reader.name} does not read whole files"
            begin = int((folder / "at").read_text()) + bool(child.exitcode)
            if child.exitcode:
                line = f"{reader.name}, input {begin - 1} of seed {seed}: the process ended with {child.exitcode}"
                _note(folder, line, verbose)
        lines = (folder / "wrong").read_text().splitlines() if (folder / "wrong").exists() else []
        wrong += lines
        if verbose:
            print(f"{reader.name}: {share} inputs, {len(lines)} faults", flush=True)
        shutil.rmtree(folder)
    return wrong
