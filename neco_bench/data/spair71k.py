"""SPair-71k in its official layout: pairs of VOC images with common keypoints.

Items are the pairs of Layout/large (of Layout/small in the splits *_small), sorted by name, so that results do not
depend on the order of folders and lists. Points and boxes are used as they are in the pair files: integers, x up to and
including the image width; the authors do not state their origin. Image ids are "<category>/<stem>".
"""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

import numpy as np

from neco_bench.core.errors import BadInputError, MissingError
from neco_bench.data.base import Pair
from neco_bench.data.folder import PairFolder, locate, missing, parse_pair, read_list
from neco_bench.data.io import read_image, read_json


class SPair71k(PairFolder):
    """SPair-71k: 53,340/5,384/12,234 pairs, 18 categories, up to 30 keypoint names per category.

    Attributes: viewpoint_variation and scale_variation 0 easy, 1 medium, 2 hard; truncation and occlusion 0 none,
    1 source, 2 target, 3 both.
    """

    name = "spair71k"
    images_from = "voc"
    splits = ("trn", "val", "test", "trn_small", "val_small", "test_small")
    expected = {
        "trn": 53340, "val": 5384, "test": 12234, "trn_small": 10652, "val_small": 1070, "test_small": 2438,
    }  # fmt: skip
    # Counts over the official files by third parties; each adds up to 12,234.
    expected_attributes = {
        "test": {
            "viewpoint_variation": (6654, 4474, 1106),
            "scale_variation": (6458, 3794, 1982),
            "truncation": (7050, 2166, 2166, 852),
            "occlusion": (8166, 1806, 1806, 456),
        }
    }
    citation = "Min et al., SPair-71k: A Large-scale Benchmark for Semantic Correspondence, arXiv 1908.10543"
    layout = """\
  <data root>/spair71k/                       or spair71k/SPair-71k/
    Layout/large/trn.txt  val.txt  test.txt   one pair name per line; Layout/small/ for the splits *_small
    PairAnnotation/{trn,val,test}/PAIR.json   PAIR as in 000167-2008_007604-2009_001056:aeroplane
    JPEGImages/CATEGORY/NAME.jpg"""

    def __init__(self, folder: Path, split: str) -> None:
        self.split = split
        self._set_places(folder)
        self.ids = tuple(sorted(read_list(type(self), self.list_file)))
        self.pairs = tuple(self._read_pair(name) for name in self.ids)

    def _set_places(self, folder: Path) -> None:
        self.folder = locate(folder, "PairAnnotation", "Layout")
        part, _, small = self.split.partition("_")
        self.list_file = self.folder / "Layout" / (small or "large") / f"{part}.txt"
        self._annotations = self.folder / "PairAnnotation" / part
        self._sizes: dict[str, tuple[int, int]] = {}

    @classmethod
    def has_images(cls, folder: Path, split: str) -> bool:
        """Return whether the folder has the first image of a split, without reading it."""
        data = cls.__new__(cls)
        data.split = split
        data._set_places(folder)
        pair = data._read_pair(read_list(cls, data.list_file)[0])
        return data.image_file(pair.source_id).is_file()

    def _read_pair(self, name: str) -> Pair:
        path = self._annotations / f"{name}.json"

        def parse(raw: Any) -> Pair:
            pair = parse_pair(name, raw)
            for image_id, key in ((pair.source_id, "src_imsize"), (pair.target_id, "trg_imsize")):
                self._sizes[image_id] = (int(raw[key][1]), int(raw[key][0]))
            return pair

        try:
            return read_json(path, parse, "pair annotation of SPair-71k")
        except FileNotFoundError:
            near = sorted(path.parent.glob(glob.escape(name.partition(":")[0]) + "*"))
            renamed = [file for file in near if ":" not in file.name]
            if renamed:
                raise MissingError(
                    f"No pair annotation {path}, but {renamed[0].name!r} is there: the ':' in file names was replaced "
                    f"when SPair-71k was unpacked (Windows, exFAT and some copies do this). Unpack the archive again "
                    f"on a file system that allows colons."
                ) from None
            raise missing(type(self), f"no pair annotation {path}, but {self.list_file} names it.") from None

    def read_image(self, image_id: str) -> np.ndarray:
        """Read an image (H, W, 3) uint8 RGB with the annotated size. Raises MissingError and BadInputError."""
        path = self.image_file(image_id)
        image = read_image(path, listed_in=self._annotations)
        expected = self._sizes.get(image_id, image.shape[:2])
        if image.shape[:2] != expected:
            raise BadInputError(
                f"Image {path} is {image.shape[1]}x{image.shape[0]} pixels, but its annotations are for "
                f"{expected[1]}x{expected[0]}: it was resized or rotated. Restore the original file."
            )
        return image

    def image_file(self, image_id: str) -> Path:
        """Return the path of an image."""
        return self.folder / "JPEGImages" / f"{image_id}.jpg"
