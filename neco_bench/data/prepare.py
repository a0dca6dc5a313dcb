"""Turn what one downloads into what the readers need: unpack archives, convert SBD and COCO's panoptic annotation.

Originals are never changed or overwritten. New files are written beside the goal (`*.partial`) and renamed when they
are whole, so an interrupted command leaves nothing that a reader takes for data, and the same command goes on from
there.
"""

from __future__ import annotations

import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from PIL import Image

from neco_bench.data import DATASETS, data_root
from neco_bench.data.coco import find_annotation, panoptic_categories, read_segments
from neco_bench.data.folder import missing, voc_colours
from neco_bench.data.io import id_table, read_mask, read_mat
from neco_bench.data.voc2012 import VOC2012
from neco_bench.errors import BadInputError, MissingError, UsageError

_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)
_SBD_IMAGES = 10582

Progress = Callable[..., Iterable[Any]]


@dataclass(frozen=True)
class Prepared:
    """What is there now: a folder, how many files were written into it, and what is to know about it."""

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
    """`voc_sbd` (source: SBD, folder or archive), `coco_panoptic`, or a data set whose `source` archive is unpacked.

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
        raise UsageError(
            f"Cannot write below {base}: {error}. Make it writable or free some space; the same command then goes on."
        ) from error


def _prepare(name: str, base: Path, source: Path | None, into: str, wrap: Progress) -> list[Prepared]:
    if name == "coco_panoptic":
        return _coco_panoptic(base / "coco", wrap)
    if name == "voc_sbd":
        if source is None:
            raise UsageError("voc_sbd needs --source: the SBD archive (benchmark.tgz) or the folder it unpacks to.")
        return _voc_sbd(base, source, wrap)
    cls = DATASETS.load(name)
    if source is None or not source.is_file():
        raise UsageError(f"Preparing {name!r} means unpacking an archive: give it as --source FILE.zip or FILE.tar.gz.")
    folder = base / (cls.folder_name or cls.name)
    if Path(into).is_absolute() or ".." in Path(into).parts:
        raise UsageError(f"--into {into!r} must be a folder inside that of the data set, such as stuffthingmaps.")
    return [unpack(source, folder / into, wrap)]


def unpack(archive: Path, folder: Path, wrap: Progress = lambda items, desc: items) -> Prepared:
    """Unpack a zip or tar archive into a folder; files already there with the same size are kept.

    Only regular files are taken, under relative paths without "..": anything else, links included, is refused before
    it is written. Raises BadInputError (damaged, unsafe) and UsageError (another file of that name is there).
    """
    staging = _staging(archive, folder)
    moves: dict[Path, Path] = {}
    try:
        for name, size, read in wrap(_members(archive), desc=archive.name):
            goal, path = folder / name, staging / name
            if goal.exists():
                if goal.stat().st_size != size:
                    raise UsageError(f"{goal} is there already and differs from the one in {archive}. Move it away.")
                continue
            if goal in moves or not path.exists() or path.stat().st_size != size:  # of equal names the last counts
                path.parent.mkdir(parents=True, exist_ok=True)
                with read() as content, path.open("wb") as file:
                    shutil.copyfileobj(content, file)
                if path.stat().st_size != size:
                    raise EOFError(f"{name} ends early")
            moves[goal] = path
    except (*_DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # gzip and bz2 raise it without a number
            raise
        raise BadInputError(
            f"Archive {archive} is damaged or was downloaded in part: {error}. Download it again."
        ) from error
    except RuntimeError as error:  # encrypted, or compressed in a way that Python does not know
        raise BadInputError(f"Archive {archive} cannot be unpacked here: {error}. Unpack it yourself.") from error
    for goal, path in moves.items():
        goal.parent.mkdir(parents=True, exist_ok=True)
        path.replace(goal)
    shutil.rmtree(staging, ignore_errors=True)
    return Prepared(str(folder), len(moves))


def _staging(archive: Path, folder: Path) -> Path:
    """Where an archive is unpacked to, until all of it is there."""
    return folder / f".{archive.name}.partial"


class _Strict(tarfile.TarInfo):
    """tarfile takes a header that it cannot read, or a file that ends early, for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Strict:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if "end of file header" in str(error):  # the zeros that an archive ends with
                raise
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from error


def _members(archive: Path) -> Iterator[tuple[PurePosixPath, int, Callable[[], IO[bytes]]]]:
    """(checked path, size, how to open it) of each file of an archive."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                kind = info.external_attr >> 28  # 0 where the archive was made on Windows, 8 regular, 4 folder
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
                pass  # a compressed stream is checked where it ends


def _open_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(member)
    assert content is not None  # of regular files it never is
    return content


def _junk(name: str) -> bool:
    last = PurePosixPath(name).name
    return name.startswith("__MACOSX/") or last.startswith("._") or last in (".DS_Store", "Thumbs.db")


def _safe(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or name[1:3] == ":/":
        raise _unsafe(archive, name)
    return path


def _unsafe(archive: Path, name: str) -> BadInputError:
    return BadInputError(
        f"Archive {archive} is not safe to unpack: {name!r} is a link, a device or a path out of the folder. "
        f"Get the archive from its official place."
    )


def _convert(goal: Path, names: list[str], make: Callable[[str], Image.Image], wrap: Progress) -> Prepared:
    """Write `make(name)` as NAME.png for all names into a folder that appears when it is whole."""
    if goal.exists():
        absent = [name for name in names if not (goal / f"{name}.png").is_file()]
        if absent:
            raise UsageError(
                f"{goal} is there already, but lacks {len(absent)} of {len(names)} files, the first is "
                f"{absent[0]}.png. Move it away to have it made anew."
            )
        return Prepared(str(goal), 0, "is there already")
    staging = goal.with_name(f"{goal.name}.partial")
    staging.mkdir(parents=True, exist_ok=True)
    written = 0
    temporary = staging / f".{os.getpid()}.tmp"
    for name in wrap(names, desc=goal.name):
        path = staging / f"{name}.png"
        if not path.exists():
            make(name).save(temporary, "png")
            temporary.replace(path)
            written += 1
    staging.replace(goal)
    return Prepared(str(goal), written)


def _voc_sbd(base: Path, source: Path, wrap: Progress) -> list[Prepared]:
    """SegmentationClassAug and trainaug.txt: all SBD images and VOC train, without VOC val; VOC's own masks first."""
    done = []
    if source.is_file():
        done.append(unpack(source, base / "sbd", wrap))
        source = base / "sbd"
    places = (source, source / "cls", source / "dataset" / "cls", source / "benchmark_RELEASE" / "dataset" / "cls")
    folder = next((place for place in places if next(place.glob("*.mat"), None)), None)
    if folder is None:
        raise MissingError(f"No SBD below {source}: benchmark_RELEASE/dataset/cls/NAME.mat is expected.")
    annotated = {path.stem for path in folder.glob("*.mat") if not path.name.startswith("._")}
    for file in (folder.parent / "train.txt", folder.parent / "val.txt"):
        listed = set(file.read_text(encoding="utf-8", errors="replace").split()) if file.is_file() else set()
        if absent := sorted(listed - annotated):
            raise MissingError(
                f"{folder} lacks {len(absent)} of the {len(listed)} files that {file} names, the first is "
                f"{absent[0]}.mat: SBD was unpacked in part. Unpack it again."
            )
    if not (base / VOC2012.name).is_dir():
        raise missing(VOC2012, f"there is no folder {base / VOC2012.name}.")
    train, val = VOC2012(base / VOC2012.name, "train"), VOC2012(base / VOC2012.name, "val")
    official = set(train.ids)
    names = sorted((annotated | official) - set(val.ids))

    def make(name: str) -> Image.Image:
        path = train.files(name)[1] if name in official else folder / f"{name}.mat"
        if name in official:
            mask = read_mask(path, table=id_table({value: value for value in range(256)}), listed_in=train.list_file)
        else:
            try:
                mask = read_mat(path)["GTcls"]["Segmentation"][0, 0].astype(np.uint8)
                if mask.ndim != 2:
                    raise ValueError(f"an array of shape {mask.shape}")
            except (KeyError, ValueError, IndexError) as error:
                raise BadInputError(f"{path} is not a class file of SBD (GTcls.Segmentation): {error!r}.") from error
        made = Image.fromarray(mask)
        made.putpalette(voc_colours(256).tobytes())
        return made

    note = "" if len(names) == _SBD_IMAGES else f"{len(names)} images, the whole set has {_SBD_IMAGES}"
    made = _convert(train.folder / "SegmentationClassAug", names, make, wrap)
    done.append(Prepared(made.path, made.written, "; ".join(filter(None, (made.note, note)))))
    assert train.list_file is not None
    path = train.list_file.with_name("trainaug.txt")
    text = "".join(f"{name}\n" for name in names)
    if not path.exists():
        temporary = path.with_name(f".{os.getpid()}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
        done.append(Prepared(str(path), 1))
    else:
        same = set(path.read_text(encoding="utf-8").split()) == set(names)
        note = "is there already" if same else "is there already with other images and was left as it is"
        done.append(Prepared(str(path), 0, note))
    return done


def _coco_panoptic(coco: Path, wrap: Progress) -> list[Prepared]:
    """Semantic PNGs (category ids, 0 = none) from panoptic PNGs and their JSON, for the splits that are there."""
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
