"""Prepare downloads for the readers: unpack archives, convert SBD, COCO's panoptic annotation, NYUv2 and NAVI.

Originals are never changed or overwritten. New files are written next to the target (`*.partial`) and renamed when they
are complete. An interrupted command therefore leaves no incomplete data, and the same command continues from there.
Only one process at a time writes to a target.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from neco_bench.core.errors import BadInputError, MissingError, NecoBenchError, UsageError
from neco_bench.core.files import write_whole
from neco_bench.core.paths import data_root
from neco_bench.data.coco import find_annotation, panoptic_categories, read_segments
from neco_bench.data.depth import MM, KITTIDepth, LabelledFrames
from neco_bench.data.folder import locate, missing
from neco_bench.data.integrity import Progress
from neco_bench.data.io import decoding, id_table, read_mask, read_mat, read_text, voc_colours
from neco_bench.data.load import dataset_class
from neco_bench.data.navi import NAVI, prepare_navi
from neco_bench.data.nyuv2 import FRAMES, LABELS, NYUv2, frames
from neco_bench.data.voc2012 import VOC2012

# Errors of the system for names in an archive that cannot be written; other errors are caused by the disk.
_BAD_NAME = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.EILSEQ, errno.ELOOP}


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, the number of files written into it, and a note."""

    path: str
    written: int
    note: str = ""


def prepare(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    source: Path | None = None,
    into: str = "",
    progress: Progress | None = None,
) -> list[Prepared]:
    """Prepare a data set: unpack its archive or convert its annotations.

    name: `voc_sbd` (source: SBD, folder or archive), `coco_panoptic`, `nyuv2` (source: nyu_depth_v2_labeled.mat),
    `navi` (source: its archive, or none if it is unpacked), or any data set, whose `source` archive is unpacked (for
    KITTI, into `gt_depth` or `input`).

    into: sub-folder of the data set's folder for the archive, such as "stuffthingmaps". progress: as in
    `check_dataset`. Raises UsageError (also where nothing can be written), MissingError (no source, no originals) and
    BadInputError (damaged or unsafe archive, wrong annotation).
    """
    base = data_root(root)
    if base is None:
        raise UsageError("No data root is given. Use --data-root DIR or set NECO_BENCH_DATA.")
    wrap: Progress = progress or (lambda items, desc: items)
    if source is not None and not source.exists():
        raise MissingError(f"There is no {source}, given as --source.")
    try:
        return _prepare(name, base, source, into, wrap)
    except OSError as error:
        raise NecoBenchError(
            f"Cannot write below {base}: {error}. Make it writable or free some space; the same command then continues."
        ) from error


def _prepare(name: str, base: Path, source: Path | None, into: str, wrap: Progress) -> list[Prepared]:
    if name == "coco_panoptic":
        return _coco_panoptic(base / "coco", wrap)
    if name == "voc_sbd":
        if source is None:
            raise UsageError("voc_sbd needs --source: the SBD archive (benchmark.tgz) or the folder it unpacks to.")
        return _voc_sbd(base, source, wrap)
    cls = dataset_class(name, base)
    if issubclass(cls, NAVI):
        done = [] if source is None else [unpack(source, base / cls.name, wrap)]
        path, written, note = prepare_navi(base / cls.name, wrap)
        return [*done, Prepared(str(path), written, note)]
    if source is None or not source.is_file():
        raise UsageError(f"Preparing {name!r} needs its archive: give it as --source FILE.zip or FILE.tar.gz.")
    folder = base / (cls.folder_name or cls.name)
    if issubclass(cls, NYUv2 | LabelledFrames) and source.suffix.lower() == ".mat":
        return _nyuv2(folder, source, wrap)
    if issubclass(cls, KITTIDepth) and not into:
        into = "gt_depth" if source.name.startswith("data_depth") else "input"
    if Path(into).is_absolute() or ".." in Path(into).parts:
        raise UsageError(f"--into {into!r} must be a folder inside that of the data set, such as stuffthingmaps.")
    return [unpack(source, folder / into, wrap)]


def unpack(archive: Path, folder: Path, wrap: Progress = lambda items, desc: items) -> Prepared:
    """Unpack a zip or tar archive into a folder; existing files with the same size are kept.

    Only regular files with relative paths without ".." are unpacked; anything else, including links, is refused before
    it is written. Raises BadInputError (damaged, unsafe) and UsageError (another file with this name exists, or another
    process unpacks the archive).
    """
    staging = _staging(archive, folder)
    moves: dict[Path, Path] = {}
    with _alone(staging):
        try:
            for name, size, read in wrap(_members(archive), desc=archive.name):
                goal, path = folder / name, staging / name
                if goal.exists():
                    if goal.stat().st_size != size:
                        raise UsageError(f"{goal} already exists and differs from that in {archive}. Move it away.")
                    continue
                if goal in moves or not path.exists() or path.stat().st_size != size:  # the last of equal names is used
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with read() as content, path.open("wb") as file:
                        shutil.copyfileobj(content, file)
                    if path.stat().st_size != size:
                        raise EOFError(f"{name} ends early")
                moves[goal] = path
        except Exception as error:  # damaged archives may raise any error
            meant = _archive_error(archive, error)
            if isinstance(meant, BadInputError):  # its content cannot be trusted
                shutil.rmtree(staging, ignore_errors=True)
            raise meant from error
        for goal, path in moves.items():
            goal.parent.mkdir(parents=True, exist_ok=True)
            path.replace(goal)
        shutil.rmtree(staging, ignore_errors=True)
    return Prepared(str(folder), len(moves))


def _archive_error(archive: Path, error: Exception) -> Exception:
    """Return the error to report when unpacking fails: `error` itself if the archive is not at fault."""
    if isinstance(error, NecoBenchError):
        return error
    if isinstance(error, OSError) and error.errno is not None:  # gzip and bz2 raise it without a number
        if error.errno not in _BAD_NAME:
            return error
        return BadInputError(f"Archive {archive} cannot be unpacked here: {error}. Unpack it yourself.")
    if isinstance(error, RuntimeError):  # encrypted, or an unsupported compression
        return BadInputError(f"Archive {archive} cannot be unpacked here: {error}. Unpack it yourself.")
    text = str(error).partition("\n")[0].rstrip(":")
    return BadInputError(
        f"Archive {archive} is damaged or was downloaded in part, or is not a zip or tar: {text}. Download it again."
    )


def _staging(archive: Path, folder: Path) -> Path:
    """Return the temporary folder into which an archive is unpacked until it is complete."""
    return folder / f".{archive.name}.partial"


@contextlib.contextmanager
def _alone(staging: Path) -> Iterator[None]:
    """Create a folder and lock it for this process. Raises UsageError if another process has locked it."""
    staging.mkdir(parents=True, exist_ok=True)
    lock = FileLock(staging / ".neco-bench.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"Another process is writing to {staging}. Wait until it is done.") from None
    try:
        yield
    finally:
        lock.release()


class _Strict(tarfile.TarInfo):
    """Raise errors for unreadable headers and truncated archives; tarfile takes both as the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Strict:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if "end of file header" in str(error):  # the zeros that an archive ends with
                raise
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from error


def _members(archive: Path) -> Iterator[tuple[PurePosixPath, int, Callable[[], IO[bytes]]]]:
    """Yield (checked path, size, function to open it) of each file of an archive."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                kind = info.external_attr >> 28  # 0: the archive was made on Windows, 8: regular file, 4: folder
                if info.is_dir() or _junk(info.filename):
                    continue
                if kind not in (0, 8):
                    raise _unsafe(archive, info.filename)
                yield _safe(info.filename, archive), info.file_size, partial(file.open, info)
    else:
        with tarfile.open(archive, tarinfo=_Strict) as tar:
            for member in tar:
                if member.isdir() or _junk(member.name):
                    continue
                if not member.isreg():
                    raise _unsafe(archive, member.name)
                yield _safe(member.name, archive), member.size, partial(_open_member, tar, member)
            while tar.fileobj is not None and tar.fileobj.read(1 << 20):
                pass  # reading to the end checks a compressed stream


def _open_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(member)
    assert content is not None  # noqa: S101 - of regular files it never is
    return content


def _junk(name: str) -> bool:
    last = PurePosixPath(name).name
    return name.startswith("__MACOSX/") or last.startswith("._") or last in (".DS_Store", "Thumbs.db")


def _safe(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or name[1:3] == ":/":
        raise _unsafe(archive, name)
    if not path.parts or "\0" in name:
        raise BadInputError(f"Archive {archive} contains a file with the name {name!r}. Download it again.")
    return path


def _unsafe(archive: Path, name: str) -> BadInputError:
    return BadInputError(
        f"Archive {archive} is not safe to unpack: {name!r} is a link, a device or a path out of the folder. "
        f"Download the archive from its official source."
    )


def _convert(goal: Path, names: list[str], make: Callable[[str], Image.Image], wrap: Progress) -> Prepared:
    """Write `make(name)` as NAME.png for all names into a folder, which is renamed to its name when complete."""
    if goal.exists():
        absent = [name for name in names if not (goal / f"{name}.png").is_file()]
        if absent:
            raise UsageError(
                f"{goal} already exists, but lacks {len(absent)} of {len(names)} files; the first is "
                f"{absent[0]}.png. Move it away to create it again."
            )
        return Prepared(str(goal), 0, "already exists")
    staging = goal.with_name(f"{goal.name}.partial")
    written = 0
    temporary = staging / ".tmp"
    with _alone(staging):
        for name in wrap(names, desc=goal.name):
            path = staging / f"{name}.png"
            if not path.exists():
                with decoding(f"{name}.png of {goal} cannot be created from its source"):
                    image = make(name)
                image.save(temporary, "png")
                temporary.replace(path)
                written += 1
        for rest in [path for path in staging.iterdir() if path.name.startswith(".")]:
            rest.unlink()
        staging.replace(goal)
    return Prepared(str(goal), written)


def _voc_sbd(base: Path, source: Path, wrap: Progress) -> list[Prepared]:
    """Write SegmentationClassAug and trainaug.txt: SBD and VOC train without VOC val; VOC's masks are preferred."""
    done = []
    if source.is_file():
        done.append(unpack(source, base / "sbd", wrap))
        source = base / "sbd"
    folder = source if next(source.glob("*.mat"), None) else locate(source, "cls/*.mat") / "cls"
    if not folder.is_dir():
        raise MissingError(f"No SBD below {source}: benchmark_RELEASE/dataset/cls/NAME.mat is expected.")
    annotated = {path.stem for path in folder.glob("*.mat") if not path.name.startswith("._")}
    for file in (folder.parent / "train.txt", folder.parent / "val.txt"):
        listed = set(read_text(file, "List").split()) if file.is_file() else set()
        if absent := sorted(listed - annotated):
            raise MissingError(
                f"{folder} lacks {len(absent)} of the {len(listed)} files that {file} names; the first is "
                f"{absent[0]}.mat: SBD was unpacked only in part. Unpack it again."
            )
    if not (base / VOC2012.name).is_dir():
        raise missing(VOC2012, f"there is no folder {base / VOC2012.name}.")
    train, val = VOC2012(base / VOC2012.name, "train"), VOC2012(base / VOC2012.name, "val")
    official = set(train.ids)
    names = sorted((annotated | official) - set(val.ids))

    def parse(variables: dict[str, Any]) -> np.ndarray:
        mask = variables["GTcls"]["Segmentation"]
        if mask.ndim != 2 or mask.size == 0 or mask.dtype != np.uint8:
            raise ValueError(f"GTcls.Segmentation has shape {mask.shape} and type {mask.dtype}")
        return mask

    def make(name: str) -> Image.Image:
        if name in official:
            path = train.files(name)[1]
            mask = read_mask(path, table=id_table({value: value for value in range(256)}), listed_in=train.list_file)
        else:
            mask = read_mat(folder / f"{name}.mat", parse, "class file of SBD")
        made = Image.fromarray(mask)
        made.putpalette(voc_colours(256).tobytes())
        return made

    full = VOC2012.expected["trainaug"]
    note = "" if len(names) == full else f"{len(names)} images, the whole set has {full}"
    made = _convert(train.folder / "SegmentationClassAug", names, make, wrap)
    done.append(Prepared(made.path, made.written, "; ".join(filter(None, (made.note, note)))))
    assert train.list_file is not None  # noqa: S101 - every split of VOC has a list
    path = train.list_file.with_name("trainaug.txt")
    if not path.exists():
        write_whole(path, "".join(f"{name}\n" for name in names).encode())
        done.append(Prepared(str(path), 1))
    else:
        same = set(read_text(path, "List").split()) == set(names)
        note = "already exists" if same else "already exists with other images and was not changed"
        done.append(Prepared(str(path), 0, note))
    return done


def _nyuv2(folder: Path, source: Path, wrap: Progress) -> list[Prepared]:
    """Write images, labels and raw depth (if available) of nyu_depth_v2_labeled.mat in the official split.

    The file is HDF5 with transposed arrays. Depth is the sensor depth with holes, not `depths`, where they are filled.
    """
    try:
        import h5py
    except ImportError as error:
        raise UsageError(f"Reading {source.name} needs h5py: pip install 'neco-bench[nyuv2]'.") from error
    wrong, fix = f"{source} is not nyu_depth_v2_labeled.mat", "Download it again."
    height, width = NYUv2.image_size
    with contextlib.ExitStack() as stack:
        with decoding(wrong, fix):
            file = stack.enter_context(h5py.File(source, "r"))
            images, labels = file["images"], file["labels"]  # (N, 3, W, H) and (N, W, H)
            count = len(images)
            right = images.shape[1:] == (3, width, height) and labels.shape == (count, width, height)
            if not (right and images.dtype == np.uint8 and labels.dtype == np.uint16 and count <= FRAMES):
                raise ValueError(
                    f"it holds images {images.shape} {images.dtype} and labels {labels.shape} {labels.dtype}"
                )

        def image(name: str) -> Image.Image:
            with decoding(wrong, fix):
                return Image.fromarray(np.ascontiguousarray(images[int(name) - 1].T))

        def depth(name: str) -> Image.Image:
            with decoding(wrong, fix):
                metres = np.ascontiguousarray(file["rawDepths"][int(name) - 1].T)
                if not 0 <= metres.min() <= metres.max() <= 12:  # the sensor measures at most 10 m
                    raise ValueError(f"frame {name} holds depths of {metres.min():g} to {metres.max():g}, not metres")
                return Image.fromarray(np.rint(metres * MM).astype(np.uint16))

        def mask(name: str) -> Image.Image:
            with decoding(wrong, fix):
                frame = np.ascontiguousarray(labels[int(name) - 1].T)
                if frame.max() > LABELS:
                    raise ValueError(f"frame {name} holds label {frame.max()}, the highest is {LABELS}")
                return Image.fromarray(frame)

        kinds = [("rgb", image), ("labels_894", mask)]
        if "rawDepths" in file:
            with decoding(wrong, fix):
                if file["rawDepths"].shape != (count, width, height):
                    raise ValueError(f"it holds rawDepths {file['rawDepths'].shape}")
            kinds.append(("depth", depth))
        done = []
        for split, (kind, make) in itertools.product(NYUv2.splits, kinds):
            if names := [f"{number:04d}" for number in frames(split) if number <= count]:
                done.append(_convert(folder / f"{split}_{kind}", names, make, wrap))
    if count < FRAMES:
        done = [replace(row, note=f"{row.note or f'{count} frames'}, the whole set has {FRAMES}") for row in done]
    return done


def _coco_panoptic(coco: Path, wrap: Progress) -> list[Prepared]:
    """Write semantic PNGs (category ids, 0 = none) from panoptic PNGs and their JSON, for the existing splits."""
    done = []
    for split in ("train", "val"):
        for archive in sorted((coco / "annotations").glob(f"panoptic_{split}2017.zip")):
            begun = _staging(archive, coco / "annotations").exists()
            if begun or find_annotation(coco, "panoptic", split) is None:
                done.append(unpack(archive, coco / "annotations", wrap))
        place = find_annotation(coco, "panoptic", split)
        if place is None:
            continue
        segments = read_segments(place.with_name(f"{place.name}.json"))
        goal = coco / "annotations" / "panoptic_annotations" / f"semantic_segmentation_{split}2017"

        def make(name: str, place: Path = place, segments: dict[str, list[Any]] = segments) -> Image.Image:
            return Image.fromarray(panoptic_categories(place / f"{name}.png", segments[name]))

        done.append(_convert(goal, sorted(segments), make, wrap))
    if not done:
        raise MissingError(
            f"No panoptic annotation in {coco / 'annotations'}: unpack panoptic_annotations_trainval2017.zip with "
            f"`neco-bench data prepare coco_things --source panoptic_annotations_trainval2017.zip`."
        )
    return done
