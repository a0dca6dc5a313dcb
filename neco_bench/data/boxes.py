"""Images with the boxes of their objects: PASCAL VOC 2007 and 2012, COCO 20k, and the embedded scenes."""

from __future__ import annotations

import abc
import re
import xml.etree.ElementTree as ElementTree  # local files only; expat loads no external entities
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from neco_bench.core.errors import BadInputError, MissingError
from neco_bench.data.base import BoxDataset
from neco_bench.data.folder import checked_box, contents, file_digest, locate, missing, read_list
from neco_bench.data.io import decoding, no_file, read_image, read_json, valid_name
from neco_bench.data.shapes import Scene, Shapes, segmentation_scene


class _BoxFolder(BoxDataset):
    """Images in a folder. A subclass sets `folder`, `split`, `ids`, `list_file`, and defines the paths of files."""

    folder: Path
    list_file: Path

    @abc.abstractmethod
    def image_file(self, image_id: str) -> Path:
        """Return the path of an image."""

    @abc.abstractmethod
    def annotation_files(self) -> list[Path]:
        """Return the paths of the annotation files."""

    @classmethod
    def has_images(cls, folder: Path, split: str) -> bool:
        """Return whether the first image of the list exists."""
        data = cls(folder, split)  # type: ignore[call-arg]
        return data.image_file(data.ids[0]).is_file()

    def read_image(self, image_id: str) -> np.ndarray:
        """Read an image, (H, W, 3) uint8 RGB. Raises MissingError and BadInputError."""
        return read_image(self.image_file(image_id), listed_in=self.list_file)

    def fingerprint(self) -> str:
        """Return the sha256 over name, reader version, split, ids, and names and sizes of images and annotations."""
        facts = (self.name, self.version, self.split, *self.ids)
        return file_digest(facts, self.folder, [*map(self.image_file, self.ids), *self.annotation_files()])


class _VOCBoxes(_BoxFolder):
    """The detection annotation of PASCAL VOC: every object, also difficult and truncated ones."""

    images_from = "voc"
    splits = ("trainval",)
    year: ClassVar[str]

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = locate(folder, "ImageSets/Main/trainval.txt", name=self.year)
        self.split, self.list_file = split, self.folder / "ImageSets" / "Main" / f"{split}.txt"
        self.ids = read_list(type(self), self.list_file, stems=True)
        if not (self.folder / "Annotations").is_dir():
            raise missing(type(self), f"there is no folder {self.folder / 'Annotations'}. {contents(self.folder)}")

    def image_file(self, image_id: str) -> Path:
        """Return the path of an image."""
        return self.folder / "JPEGImages" / f"{image_id}.jpg"

    def _annotation(self, image_id: str) -> Path:
        return self.folder / "Annotations" / f"{image_id}.xml"

    def annotation_files(self) -> list[Path]:
        """Return the annotation of each image."""
        return [self._annotation(item) for item in self.ids]

    def boxes(self, image_id: str) -> np.ndarray:
        """Read the boxes: the file has 1-based, inclusive integers, so 1 is subtracted at the left and top."""
        path = self._annotation(image_id)
        try:
            with decoding(f"{path} is not an annotation of Pascal VOC"):
                root = ElementTree.fromstring(path.read_bytes())  # noqa: S314 - as at the import
                boxes = []
                for item in root.iter("object"):
                    sides = [float(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")]
                    boxes.append(checked_box(np.subtract(sides, (1, 1, 0, 0))))
        except FileNotFoundError:
            raise no_file("annotation", path, self.list_file) from None
        return np.array(boxes, np.float64).reshape(-1, 4)


class VOC2007Boxes(_VOCBoxes):
    """PASCAL VOC 2007 trainval with object boxes, 5,011 images. Ids are file stems such as 000005."""

    name, folder_name, year = "voc2007_boxes", "voc2007", "2007"
    expected = {"trainval": 5011}
    citation = "Everingham et al., IJCV 2010"
    layout = """\
  <data root>/voc2007/VOCdevkit/VOC2007/      or voc2007/VOC2007/, or directly voc2007/
    ImageSets/Main/trainval.txt               one image name per line
    JPEGImages/NAME.jpg
    Annotations/NAME.xml"""


class VOC2012Boxes(_VOCBoxes):
    """PASCAL VOC 2012 trainval with object boxes, 11,540 images. Ids are file stems such as 2008_000008."""

    name, folder_name, year = "voc2012_boxes", "voc2012", "2012"
    expected = {"trainval": 11540}
    citation = "Everingham et al., IJCV 2015"
    layout = """\
  <data root>/voc2012/VOCdevkit/VOC2012/      or voc2012/VOC2012/, or directly voc2012/
    ImageSets/Main/trainval.txt               one image name per line
    JPEGImages/NAME.jpg
    Annotations/NAME.xml"""


class COCO20k(_BoxFolder):
    """COCO 20k: 19,817 images of COCO train2014 (Vo et al., ECCV 2020) with the boxes of their objects, without crowds.

    The list is not part of COCO: it is `datasets/coco_20k_filenames.txt` in the repositories of LOST and TokenCut, with
    a line "train2014/COCO_train2014_NUMBER.jpg" of 42 bytes for each image. Its sha256 is not known. The reader checks
    the form of each line, that lines are unique, that there are 19,817, and that each image is in the annotation.
    The annotation is one JSON file for all 82,783 images of train2014, which is kept in memory while it is read.
    """

    name, folder_name = "coco20k", "coco"
    splits = ("train",)
    expected = {"train": 19817}
    citation = "Lin et al., Microsoft COCO, ECCV 2014; the list: Vo et al., ECCV 2020, as in LOST, BMVC 2021"
    layout = """\
  <data root>/coco/
    coco_20k_filenames.txt                    from the repository of LOST or TokenCut: 19,817 lines
    images/train2014/NAME.jpg                 or train2014/NAME.jpg
    annotations/instances_train2014.json"""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = locate(folder, "coco_20k_filenames.txt"), split
        self.list_file = self.folder / "coco_20k_filenames.txt"
        names = read_list(type(self), self.list_file)
        wrong = [name for name in names if not re.fullmatch(r"train2014/COCO_train2014_\d{12}\.jpg", name)]
        if wrong:
            raise BadInputError(
                f"{self.list_file} has the line {wrong[0]!r}; lines look like "
                f"train2014/COCO_train2014_000000000009.jpg. Restore the list of LOST or TokenCut."
            )
        self.ids = tuple(name.removeprefix("train2014/").removesuffix(".jpg") for name in names)
        images = (self.folder / "images" / "train2014", self.folder / "train2014")
        self._images = next((path for path in images if path.is_dir()), images[0])
        self._annotation = self.folder / "annotations" / "instances_train2014.json"
        if not self._annotation.is_file():
            raise missing(type(self), f"{self._annotation} does not exist.")
        self._boxes: dict[str, np.ndarray] | None = None

    def image_file(self, image_id: str) -> Path:
        """Return the path of an image."""
        return self._images / f"{image_id}.jpg"

    def annotation_files(self) -> list[Path]:
        """Return the annotation file and the list."""
        return [self._annotation, self.list_file]

    def boxes(self, image_id: str) -> np.ndarray:
        """Read the boxes, (x, y, x + width, y + height), in fractional pixels as in COCO."""
        if self._boxes is None:
            self._boxes = self._read()
        if image_id not in self._boxes:
            raise MissingError(f"{self._annotation} has no image {image_id}, which {self.list_file} names.")
        return self._boxes[image_id]

    def _read(self) -> dict[str, np.ndarray]:
        wanted = set(self.ids)

        def parse(raw: Any) -> dict[str, np.ndarray]:
            names = {item["id"]: Path(valid_name(item["file_name"])).stem for item in raw["images"]}
            boxes: dict[str, list[list[float]]] = defaultdict(list)
            for item in raw["annotations"]:
                name = names[item["image_id"]]
                if name in wanted and not item["iscrowd"]:
                    x, y, width, height = map(float, item["bbox"])
                    boxes[name].append([x, y, x + width, y + height])
            return {name: np.array(boxes[name], np.float64).reshape(-1, 4) for name in names.values() if name in wanted}

        return read_json(self._annotation, parse, "COCO annotation file")


class ShapesBoxes(BoxDataset):
    """The 80 val scenes of the embedded data, 224x224, with the box of the visible part of each of 3 to 5 objects."""

    name = "shapes_boxes"
    version = Shapes.version
    needs_root = False
    splits = ("val",)
    expected = {"val": Shapes.expected["val"]}
    citation = Shapes.citation
    layout = Shapes.layout

    def __init__(self, folder: None, split: str) -> None:
        self.split = split
        self.ids = tuple(f"{index:03d}" for index in range(self.expected[split]))

    def _scene(self, image_id: str) -> Scene:
        return segmentation_scene(self.split, int(image_id))

    def read_image(self, image_id: str) -> np.ndarray:
        """Draw the scene."""
        return self._scene(image_id).image

    def boxes(self, image_id: str) -> np.ndarray:
        """Return the box of the visible part of each object; hidden objects have none."""
        owner = self._scene(image_id).owner
        places = [np.nonzero(owner == number) for number in range(1, int(owner.max()) + 1)]
        return np.array(
            [[x.min(), y.min(), x.max() + 1, y.max() + 1] for y, x in places if len(y)], np.float64
        ).reshape(-1, 4)

    def fingerprint(self) -> str:
        """Return a digest of name, version, split and ids, which determine the scenes."""
        return file_digest((self.name, self.version, self.split, *self.ids), Path(), ())
