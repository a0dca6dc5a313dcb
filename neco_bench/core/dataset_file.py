"""The schema of `dataset.toml`, which describes a user-defined data set, and messages on errors in it.

    classes = ["background", "leaf", "stem"]    # class k has the value k in the masks
    ignore = 255                                # the value that means void, or a list of values
    images = "images/{id}.jpg"                  # relative to this folder; {id} may include folders
    masks = "masks/{id}.png"
    splits = { train = "train.txt", val = "val.txt" }   # lists of ids; or ["train", "val"], the {split} in the patterns

The name of the folder is the name of the data set, and the prefix of its task names: `plants_ic`, `plants_linear`.
docs/pages/own_data.md has all keys.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from neco_bench.core.errors import did_you_mean

VOID = "void"  # value of `ids` for void

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

# Splits for each role of a task; the first that a data set has is used.
_ROLES = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "test", "testing"),
    "test": ("test", "testing", "val", "valid", "validation"),
}

Byte = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Byte, Byte, Byte]
MaskValue = Annotated[int, Field(ge=0, le=65535)]


class DatasetFile(BaseModel):
    """The content of a `dataset.toml`.

    kind: images with masks, or pairs of images with keypoints. images, masks: path patterns relative to the folder,
    with {id}, and with {split} if splits are folders; a pattern that ends in ".*" matches any image suffix. splits:
    {name: file}, a list with one id per line (for pairs, the JSON file), "" for a folder of that name. ignore: mask
    values that mean void. ids: {mask value: class or "void"}; without it, class k has the value k. palette: RGB of each
    class, for pictures. mask_values: "colours" if masks are RGB pictures in the colours of the palette. ignore_colours:
    RGB colours of void in these. citation: reported with results.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["segmentation", "pairs"] = "segmentation"
    classes: tuple[str, ...] = ()
    images: str
    masks: str = ""
    splits: dict[str, str]
    ignore: tuple[MaskValue, ...] = (255,)
    ids: dict[MaskValue, str] = {}
    palette: tuple[Colour, ...] = ()
    mask_values: Literal["ids", "colours"] = "ids"
    ignore_colours: tuple[Colour, ...] = ()
    citation: str = ""

    @field_validator("ignore", mode="before")
    @classmethod
    def _as_list(cls, value: object) -> object:
        return (value,) if isinstance(value, int) else value

    @field_validator("images", "masks")
    @classmethod
    def _is_pattern(cls, pattern: str) -> str:
        if pattern and pattern.count("{id}") != 1:
            raise ValueError('write the path with {id} once, as in "images/{id}.jpg"')
        return _inside(pattern)

    @field_validator("splits", mode="before")
    @classmethod
    def _as_table(cls, value: object) -> object:
        return dict.fromkeys(value, "") if isinstance(value, list) and all(isinstance(n, str) for n in value) else value

    @field_validator("splits")
    @classmethod
    def _are_names(cls, splits: dict[str, str]) -> dict[str, str]:
        if not splits:
            raise ValueError('name one or more, as in { train = "train.txt", val = "val.txt" }')
        for name, file in splits.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} must be made of letters, digits, _ and -")
            _inside(file)
        return splits

    @field_validator("classes")
    @classmethod
    def _are_distinct(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        twice = next((name for i, name in enumerate(classes) if name in classes[:i]), None)
        if twice is not None:
            raise ValueError(f"{twice!r} is named twice")
        if not all(name.strip() for name in classes) or VOID in classes:
            raise ValueError(f"a class needs a name other than {VOID!r}")
        if len(classes) > 255:
            raise ValueError(f"{len(classes)} classes: at most 255 fit into a mask")
        return classes

    @model_validator(mode="after")
    def _fits_together(self) -> DatasetFile:
        if "" in self.splits.values() and not (self.kind == "segmentation" and "{split}" in self.images):
            raise ValueError(
                'splits of pairs name their JSON files, as in { test = "pairs.json" }'
                if self.kind == "pairs"
                else "splits without files need {split} in images; else name a list of ids for each, as in "
                '{ train = "train.txt" }'
            )
        if self.kind == "pairs":
            given = sorted({"classes", "masks", "ignore", "ids", "palette", "mask_values"} & self.model_fields_set)
            if given:
                raise ValueError(f"{', '.join(given)}: pairs have no masks")
            return self
        if len(self.classes) < 2:
            raise ValueError("classes: name two or more")
        if not self.masks:
            raise ValueError('masks: give the path pattern, as in "masks/{id}.png"')
        if self.palette and len(self.palette) != len(self.classes):
            raise ValueError(f"palette has {len(self.palette)} colours for {len(self.classes)} classes")
        if self.mask_values == "colours":
            self._check_colours()
        else:
            self._check_ids()
        return self

    def _check_colours(self) -> None:
        if not self.palette:
            raise ValueError('palette: mask_values = "colours" needs the colour of each class')
        if self.ids:
            raise ValueError('ids: masks with mask_values = "colours" have no ids')
        colours = [*self.palette, *self.ignore_colours]
        twice = next((colour for i, colour in enumerate(colours) if colour in colours[:i]), None)
        if twice is not None:
            raise ValueError(f"palette: {list(twice)} is used for two classes, or for a class and void")

    def _check_ids(self) -> None:
        if self.ignore_colours:
            raise ValueError('ignore_colours is for mask_values = "colours"; use ignore')
        for value, name in self.ids.items():
            if name not in (*self.classes, VOID):
                raise ValueError(f"ids: {value} = {name!r} is not a class.{did_you_mean(name, (*self.classes, VOID))}")
        absent = [name for name in self.classes if self.ids and name not in self.ids.values()]
        if absent:
            raise ValueError(f"ids: no mask value stands for {', '.join(absent)}")
        both = [value for value in self.ignore if value in self.class_values]
        if both and "ignore" in self.model_fields_set:
            raise ValueError(
                f"ignore: {both[0]} is the value of class {self.classes[self.class_values[both[0]]]!r}; use ids to say "
                f"which value is which class"
            )

    @property
    def class_values(self) -> dict[int, int]:
        """Class id of each mask value, without void."""
        if self.ids:
            return {value: self.classes.index(name) for value, name in self.ids.items() if name != VOID}
        return {number: number for number in range(len(self.classes))}

    @property
    def void_values(self) -> tuple[int, ...]:
        """Mask values that mean void; `ids` has priority over the default of `ignore`."""
        named = [value for value, name in self.ids.items() if name == VOID]
        return tuple(dict.fromkeys([*named, *(value for value in self.ignore if value not in self.class_values)]))

    def role(self, role: str) -> str | None:
        """Return the split for the role "train", "val" or "test" of a task, None if there is none."""
        return next((name for name in _ROLES.get(role, (role,)) if name in self.splits), None)


def _inside(path: str) -> str:
    """Check that a path is inside the folder; links may lead out of it."""
    if path and (PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\\" in path):
        raise ValueError(
            f"{path!r} must be a path from the folder of dataset.toml, with / between folders; link what is elsewhere"
        )
    return path
