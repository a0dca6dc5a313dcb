"""COCO 2017 as semantic segmentation: COCO-Things (12 merged classes) and COCO-Stuff (15 merged, 27, 171 classes).

All sets share the folder `coco/` and read the first existing annotation of their `sources`; its name is part of the
fingerprint. File values are category ids 1..200 (0 = none), except in stuffthingmaps, which contain category id - 1 and
255 = none. Reading stuffthingmaps as category ids is an off-by-one error: `person` becomes void, bicycles become
`person`. NeCo's code does this if `annotations/{train,val}2017` contains stuffthingmaps. `coco_things_shifted`
reproduces it deliberately; `coco_things` never does it.

The JSON files `panoptic` and `instances` are kept in memory completely; `neco-bench data prepare coco_panoptic`
converts the former to masks once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from neco_bench.core.errors import BadInputError
from neco_bench.data.base import IGNORE
from neco_bench.data.folder import AbsentSplitError, Files, PairedFolders, Tree, contents, locate, missing, read_list
from neco_bench.data.io import decoding, id_table, map_ids, read_image, read_json, valid_name

_THINGS = """
accessory: 27 backpack, 28 umbrella, 31 handbag, 32 tie, 33 suitcase
animal: 16 bird, 17 cat, 18 dog, 19 horse, 20 sheep, 21 cow, 22 elephant, 23 bear, 24 zebra, 25 giraffe
appliance: 78 microwave, 79 oven, 80 toaster, 81 sink, 82 refrigerator
electronic: 72 tv, 73 laptop, 74 mouse, 75 remote, 76 keyboard, 77 cell phone
food: 52 banana, 53 apple, 54 sandwich, 55 orange, 56 broccoli, 57 carrot, 58 hot dog, 59 pizza, 60 donut,
    61 cake
furniture: 62 chair, 63 couch, 64 potted plant, 65 bed, 67 dining table, 70 toilet
indoor: 84 book, 85 clock, 86 vase, 87 scissors, 88 teddy bear, 89 hair drier, 90 toothbrush
kitchen: 44 bottle, 46 wine glass, 47 cup, 48 fork, 49 knife, 50 spoon, 51 bowl
outdoor: 10 traffic light, 11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench
person: 1 person
sports: 34 frisbee, 35 skis, 36 snowboard, 37 sports ball, 38 kite, 39 baseball bat, 40 baseball glove,
    41 skateboard, 42 surfboard, 43 tennis racket
vehicle: 2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat
"""

_STUFF = """
building: 95 bridge, 96 building-other, 128 house, 151 roof, 158 skyscraper, 166 tent
ceiling: 102 ceiling-other, 103 ceiling-tile
floor: 101 carpet, 114 floor-marble, 115 floor-other, 116 floor-stone, 117 floor-tile, 118 floor-wood
food-stuff: 121 food-other, 122 fruit, 153 salad, 170 vegetable
furniture-stuff: 98 cabinet, 107 counter, 108 cupboard, 110 desk-stuff, 112 door-stuff, 123 furniture-other,
    130 light, 133 mirror-stuff, 156 shelf, 161 stairs, 165 table
ground: 111 dirt, 125 gravel, 126 ground-other, 136 mud, 140 pavement, 144 platform, 145 playingfield,
    147 railroad, 149 road, 154 sand, 159 snow
plant: 94 branch, 97 bush, 119 flower, 124 grass, 129 leaves, 134 moss, 142 plant-other, 163 straw, 169 tree
raw-material: 100 cardboard, 132 metal, 139 paper, 143 plastic
sky: 106 clouds, 157 sky-other
solid: 127 hill, 135 mountain, 150 rock, 160 solid-other, 162 stone, 182 wood
structural: 99 cage, 113 fence, 138 net, 146 railing, 164 structural-other
textile: 92 banner, 93 blanket, 104 cloth, 105 clothes, 109 curtain, 131 mat, 137 napkin, 141 pillow, 152 rug,
    167 textile-other, 168 towel
wall: 171 wall-brick, 172 wall-concrete, 173 wall-other, 174 wall-panel, 175 wall-stone, 176 wall-tile,
    177 wall-wood
water: 120 fog, 148 river, 155 sea, 178 water-other, 179 waterdrops
window: 180 window-blind, 181 window-other
"""


def _parse(text: str) -> dict[str, dict[int, str]]:
    """Parse to {super-category: {category id: name}}."""
    merged = {}
    for line in text.strip().replace("\n    ", " ").splitlines():
        name, _, members = line.partition(": ")
        merged[name] = {int(number): word for number, word in (part.split(" ", 1) for part in members.split(", "))}
    return merged


THINGS, STUFF = _parse(_THINGS), _parse(_STUFF)

_THING_NAMES = {number: name for group in THINGS.values() for number, name in group.items()}

_STUFF_NAMES = {number: name for group in STUFF.values() for number, name in group.items()}


# Stuff ids of the panoptic annotation: some of COCO-Stuff's, and 184..200, which merge several.
_PANOPTIC_STUFF = (
    92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145, 147, 148, 149, 151, 154,
    155, 156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181, *range(184, 201),
)  # fmt: skip

# Category id (0 = none) of every value that may occur in each kind of annotation.
_PANOPTIC_VALUES = {i: i for i in (0, *_THING_NAMES, *_PANOPTIC_STUFF)}


VALUES: dict[str, dict[int, int]] = {
    "panoptic_semantic": _PANOPTIC_VALUES,
    "panoptic": _PANOPTIC_VALUES,
    "stuffthingmaps": {**{i - 1: i for i in (*_THING_NAMES, *_STUFF_NAMES)}, 255: 0},
    "pixelmaps": {0: 0, **{i: i for i in _STUFF_NAMES}, 183: 0},
    "instances": {i: i for i in (0, *_THING_NAMES)},
}


# Possible paths of each; {} is train or val. The JSON of panoptic PNGs is next to their folder.
_PLACES = {
    "panoptic_semantic": ("annotations/panoptic_annotations/semantic_segmentation_{}2017",),
    "panoptic": ("annotations/panoptic_{}2017", "annotations/panoptic_annotations/panoptic_{}2017"),
    "stuffthingmaps": ("stuffthingmaps/{}2017", "stuffthingmaps_trainval2017/{}2017", "annotations/{}2017"),
    "pixelmaps": ("annotations/stuff_annotations/stuff_{}2017_pixelmaps", "annotations/stuff_{}2017_pixelmaps"),
    "instances": ("annotations/instances_{}2017.json",),
}


CURATED = "Coco164kFull_Stuff_Coarse.txt"


def find_annotation(folder: Path, source: str, split: str) -> Path | None:
    """Return the path of a kind of annotation in a COCO folder; None if it does not exist."""
    places = (folder / place.format(split) for place in _PLACES[source])
    return next((path for path in places if path.exists()), None)


def read_segments(path: Path) -> dict[str, list[Any]]:
    """Return the annotated segments of a panoptic or instances JSON, by image stem. Raises BadInputError."""

    def parse(raw: Any) -> dict[str, list[Any]]:
        if raw["images"] and "segments_info" in raw["annotations"][0]:
            return {Path(valid_name(item["file_name"])).stem: item["segments_info"] for item in raw["annotations"]}
        stems = {item["id"]: Path(valid_name(item["file_name"])).stem for item in raw["images"]}
        segments: dict[str, list[Any]] = {stem: [] for stem in stems.values()}
        for item in raw["annotations"]:
            segments[stems[item["image_id"]]].append(item)
        return segments

    return read_json(path, parse, "COCO annotation file")


def panoptic_categories(path: Path, segments: list[Any]) -> np.ndarray:
    """Return category ids (H, W) uint8, 0 = none, of a panoptic PNG, whose colours are segment ids.

    Raises BadInputError for colours that are not in the JSON, and for category ids that COCO panoptic does not have.
    """
    colours = read_image(path).astype(np.int64)
    numbers, where = np.unique(colours @ (1, 256, 65536), return_inverse=True)
    categories = {0: 0, **{int(item["id"]): int(item["category_id"]) for item in segments}}
    wrong = [number for number in numbers.tolist() if categories.get(number) not in _PANOPTIC_VALUES]
    if wrong:
        raise BadInputError(
            f"Panoptic map {path} has segment {wrong[0]}, for which the JSON has no category of COCO panoptic. PNGs "
            f"and JSON are of different versions: restore both."
        )
    values = np.array([categories[number] for number in numbers.tolist()], np.uint8)
    return values[where.reshape(colours.shape[:2])]


def instance_categories(segments: list[Any], size: tuple[int, int]) -> np.ndarray:
    """Return category ids (H, W) uint8, 0 = none, from polygons and run lengths: crowds below, small objects on top."""
    categories = np.zeros(size, np.uint8)
    for item in sorted(segments, key=lambda item: (-item.get("iscrowd", 0), -item["area"], item["id"])):
        shape = item["segmentation"]
        inside = _inside_polygons(shape, size) if isinstance(shape, list) else _inside_runs(shape, size)
        categories[inside] = item["category_id"]
    return categories


def _inside_polygons(polygons: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    """Return a mask (H, W) bool. Raises ValueError for input that would crash pycocotools."""
    from pycocotools import mask as rle

    for polygon in polygons:
        points = np.array(polygon, np.float64)
        if points.ndim != 1 or len(points) < 6 or len(points) % 2 or not (np.abs(points) < 10_000).all():
            raise ValueError(f"a polygon needs three or more points inside its image, got {str(polygon)[:60]}")
    return rle.decode(rle.merge(rle.frPyObjects(polygons, *size))) > 0


def _inside_runs(shape: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Return a mask (H, W) bool from lengths of alternating runs of 0 and 1, column by column. Raises ValueError."""
    counts = _run_lengths(shape["counts"]) if isinstance(shape["counts"], str) else list(map(int, shape["counts"]))
    if tuple(shape["size"]) != size or min(counts) < 0 or sum(counts) != size[0] * size[1]:
        raise ValueError(f"runs of {sum(counts)} pixels for {shape['size']}, but its image has {size}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size[::-1]).T


def _run_lengths(text: str) -> list[int]:
    """Decode COCO's compressed run lengths: 5 bits per character, lowest first, with differences from the fourth on."""
    counts: list[int] = []
    value = shift = 0
    for code in text.encode():
        value |= (code - 48 & 31) << shift
        shift += 5
        if not code - 48 & 32:
            if code - 48 & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


class _Coco(PairedFolders):
    """Base class of COCO sets. rows: class id by category id; others are void. sources: the first is preferred.

    shift: offset added to category ids of file values, which is wrong unless it is 0.
    """

    folder_name = "coco"
    splits = ("train", "val")
    expected = {"train": 118287, "val": 5000}
    fractions = {"train": {10: 11828}}
    longest_side = 640
    sizes_differ = True
    citation = "Lin et al., Microsoft COCO, ECCV 2014; Caesar et al., COCO-Stuff, CVPR 2018; Kirillov et al., CVPR 2019"
    layout = """\
  <data root>/coco/
    images/{train,val}2017/NAME.jpg             or {train,val}2017/NAME.jpg
  and masks from one of (things: any but pixelmaps; stuff, 15 classes: pixelmaps or stuffthingmaps; else stuffthingmaps)
    annotations/panoptic_annotations/semantic_segmentation_{train,val}2017/NAME.png   `data prepare coco_panoptic`
    annotations/panoptic_{train,val}2017/NAME.png and panoptic_{train,val}2017.json
    stuffthingmaps/{train,val}2017/NAME.png     or annotations/{train,val}2017: category id - 1, 255 = none
    annotations/stuff_annotations/stuff_{train,val}2017_pixelmaps/NAME.png
    annotations/instances_{train,val}2017.json"""
    rows: ClassVar[Mapping[int, int]]
    sources: ClassVar[tuple[str, ...]]
    causes = {
        **dict.fromkeys(range(184, 201), "that the file contains panoptic category ids (0 = none, up to 200)"),
        255: "that the file is a stuffthingmap (category id - 1, 255 = none), which belongs in stuffthingmaps/",
    }
    shift: ClassVar[int] = 0

    @classmethod
    def tree(cls, folder: Path, split: str) -> Tree:
        """Return where the files of a split should be."""
        folder = locate(folder, "annotations", "images", "stuffthingmaps*", "train2017", "val2017")
        folders = (folder / "images" / f"{split}2017", folder / f"{split}2017")
        images = Files(next((path for path in folders if path.is_dir()), folders[0]), ".jpg")
        places = {source: place for source in cls.sources if (place := find_annotation(folder, source, split))}
        if not places and not images.folder.is_dir():
            text = f"split {split!r} has no images in {images.folder}. {contents(images.folder)}"
            raise missing(cls, text, AbsentSplitError)
        if not places:
            raise missing(cls, f"split {split!r} has no annotation; one of {', '.join(cls.sources)} is needed.")
        source, place = next(iter(places.items()))
        shared = {"panoptic": (place.with_name(f"{place.name}.json"),), "instances": (place,)}.get(source, ())
        return Tree(folder, images, Files(place, "" if source == "instances" else ".png"), source, shared)

    @classmethod
    def has_images(cls, folder: Path, split: str) -> bool:
        """Return whether the folder has images and masks of a split, without reading them."""
        tree = cls.tree(folder, split)
        return tree.images.any() and (tree.source == "instances" or tree.masks.any())

    def __init__(self, folder: Path, split: str) -> None:
        self._set_tree(self.tree(folder, split), split)
        self._segments = read_segments(self.shared_files[0]) if self.shared_files else {}
        image_ids = self._images.ids()
        if self.source != "instances":
            self.check_pairing(image_ids, self._masks.ids())
        if self.shared_files:
            self.check_pairing(image_ids, set(self._segments))
        self.ids = tuple(sorted(image_ids))

    def files(self, item: str) -> tuple[Path, Path]:
        """Return the image file and the mask file of an item."""
        image, mask = super().files(item)
        return image, self.shared_files[0] if self.source == "instances" else mask

    @property
    def table(self) -> np.ndarray:
        """Return the class id of each file value, see `id_table`."""
        values = VALUES[self.source].items()
        return id_table({value: self.rows.get(id_ + self.shift if id_ else 0, IGNORE) for value, id_ in values})

    @property
    def known_palette(self) -> bool:
        """Return False for pixelmaps: their colours are Matlab's `jet` in another order."""
        return self.source != "pixelmaps"

    def read_mask(self, item: str, size: tuple[int, int]) -> np.ndarray:
        if not self.shared_files:
            return super().read_mask(item, size)
        path = self.files(item)[1]
        with decoding(f"The annotation of image {item} in {self.shared_files[0]} is wrong"):
            segments = self._segments[item]
            panoptic = self.source == "panoptic"
            categories = panoptic_categories(path, segments) if panoptic else instance_categories(segments, size)
        return map_ids(categories, path, table=self.table, size=size)


def _merged(groups: Mapping[str, Mapping[int, str]]) -> dict[int, int]:
    """Return class id by category id, one class per group in the order of the groups."""
    return {number: row for row, group in enumerate(groups.values()) for number in group}


class CocoThings(_Coco):
    """COCO-Things: the 80 object categories merged into 12 super-categories, stuff void."""

    name = "coco_things"
    classes = tuple(THINGS)
    rows = _merged(THINGS)
    sources: ClassVar[tuple[str, ...]] = ("panoptic_semantic", "panoptic", "stuffthingmaps", "instances")


class CocoThingsShifted(CocoThings):
    """COCO-Things with stuffthingmaps read as category ids: wrong by one, see the module."""

    name = "coco_things_shifted"
    sources = ("stuffthingmaps",)
    shift = -1


class CocoStuff(_Coco):
    """COCO-Stuff: the 91 stuff categories merged into 15 super-categories, objects void."""

    name = "coco_stuff"
    classes = tuple(STUFF)
    rows = _merged(STUFF)
    sources = ("pixelmaps", "stuffthingmaps")


class CocoStuff27(_Coco):
    """COCO-Stuff-27: the 12 super-categories of things, then the 15 of stuff."""

    name = "coco_stuff27"
    classes = (*THINGS, *STUFF)
    rows = _merged(THINGS | STUFF)
    sources = ("stuffthingmaps",)


class CocoStuff27Curated(CocoStuff27):
    """COCO-Stuff-27 on the images of a list of IIC, which PiCIE and STEGO distribute and JAFAR and NAF use."""

    name = "coco_stuff27_curated"
    expected = {"train": 97702, "val": 4172}
    fractions = {}
    layout = f"""{CocoStuff27.layout}
  and the lists from the code and data of IIC, PiCIE and STEGO
    curated/{{train,val}}2017/{CURATED}   one NAME per line"""

    @classmethod
    def _list_of(cls, folder: Path, split: str) -> Path:
        return cls.tree(folder, split).folder / "curated" / f"{split}2017" / CURATED

    @classmethod
    def has_images(cls, folder: Path, split: str) -> bool:
        """Return whether the folder has images of a split and their list, without reading them."""
        return super().has_images(folder, split) and cls._list_of(folder, split).is_file()

    def __init__(self, folder: Path, split: str) -> None:
        super().__init__(folder, split)
        self.list_file = self._list_of(folder, split)
        listed = set(read_list(type(self), self.list_file, stems=True))
        here, self.ids = self.ids, tuple(item for item in self.ids if item in listed)
        if not self.ids:
            raise BadInputError(
                f"None of the {len(listed)} names in {self.list_file}, such as {min(listed)!r}, is the name of an "
                f"image of split {split!r}, such as {here[0]!r}. Restore the list or the images."
            )


class CocoStuff171(_Coco):
    """COCO-Stuff-171 (164k): 80 things and 91 stuff, by increasing category id."""

    name = "coco_stuff171"
    classes = tuple(name for _, name in sorted((_THING_NAMES | _STUFF_NAMES).items()))
    rows = {number: row for row, number in enumerate(sorted(_THING_NAMES | _STUFF_NAMES))}
    sources = ("stuffthingmaps",)
