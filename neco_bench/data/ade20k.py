"""ADE20K in the layout of the scene parsing challenge (ADEChallengeData2016): 8-bit masks, 0 = other, 1..150 = classes.

There are three forms of the same files. `ade20k` has the 150 classes (file value minus one), and "other" is void.
`ade20k_151` uses file values as class ids: "other" is class 0 of 151, is part of memories and heads, and is void in
scored ground truth (`void_class`), as in open-hummingbird-eval and NeCo. `ade20k_151_scored` is the same, but "other"
is a class like all others, learned and scored, as in the code of JAFAR and NAF.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from neco_bench.data.base import IGNORE
from neco_bench.data.folder import Files, PairedFolders, Tree, locate, missing

# The first synonym of each line of objectInfo150.txt.
_NAMES = """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
    table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field,
    armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard,
    chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway,
    case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower,
    book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine,
    hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television, airplane,
    dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship,
    fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag,
    minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher,
    screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
    monitor, bulletin board, shower, radiator, glass, clock, flag
"""


class ADE20K(PairedFolders):
    """ADE20K, 150 classes, 20,210/2,000 images. Ids are file stems."""

    name = "ade20k"
    folder_name = "ade20k"
    splits = ("train", "val")
    expected = {"train": 20210, "val": 2000}
    fractions = {"train": {128: 150, 64: 300, 8: 2550}}
    citation = "Zhou et al., Scene Parsing through ADE20K Dataset, CVPR 2017"
    layout = """\
  <data root>/ade20k/ADEChallengeData2016/    or directly ade20k/
    images/{training,validation}/NAME.jpg
    annotations/{training,validation}/NAME.png   8-bit ids, 0 = other, 1..150"""
    classes = tuple(" ".join(name.split()) for name in _NAMES.split(","))
    first_value = 1
    void: ClassVar[int | None] = 0
    causes = {IGNORE: "that ids were already shifted to 0..149 with 255 for other, while 0 = other is needed"}
    rare_class = 149  # "flag", in 2 % of the images
    sizes_differ = True

    @classmethod
    def tree(cls, folder: Path, split: str) -> Tree:
        """Return where the files of a split should be."""
        base = locate(folder, "images/training", "images/validation", "images/ADE", name="ADEChallengeData2016")
        full = [path for path in folder.glob("ADE20K_20*") if path.is_dir()]
        full += [path for name in ("index_ade20k.*", "images/ADE", "images/*/a") for path in base.glob(name)]
        if full:
            raise missing(
                cls,
                f"{full[0]} belongs to the full ADE20K (thousands of labels, colour-coded masks), not to the scene "
                f"parsing challenge with its 150 classes. Use ADEChallengeData2016.zip instead.",
            )
        part = {"train": "training", "val": "validation"}[split]
        return Tree(base, Files(base / "images" / part, ".jpg"), Files(base / "annotations" / part, ".png"))


class ADE20K151(ADE20K):
    """ADE20K with 151 classes: id 0 is "other", a separate class that is void in scored ground truth."""

    name = "ade20k_151"
    classes = ("other", *ADE20K.classes)
    first_value, void = 0, None
    void_class: ClassVar[int | None] = 0
    rare_class = 150


class ADE20K151Scored(ADE20K151):
    """ADE20K with 151 classes, including "other" (0), which is learned and scored."""

    name = "ade20k_151_scored"
    void_class = None
