"""The interface of video data sets: sequences of frames, each with a mask of object ids, read frame by frame."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from neco_bench.core.errors import BadInputError
from neco_bench.data.base import IGNORE, Dataset, Sample
from neco_bench.data.folder import file_digest
from neco_bench.data.io import id_table, read_image, read_mask, read_size


class Clip:
    """The frames of one sequence, in order, as items that are loaded and encoded like images.

    id: id of the sequence. ids: "SEQUENCE/FRAME". Items are samples whose masks contain object ids, 0 for background.
    """

    def __init__(self, dataset: VideoDataset, sequence: str) -> None:
        self._dataset, self.id = dataset, sequence
        self.name, self.split = dataset.name, f"{dataset.split} {sequence}"
        self._frames = dataset.frames(sequence)
        self.ids = tuple(f"{sequence}/{frame}" for frame in self._frames)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        return self._dataset.sample(self.id, self._frames[index])

    @property
    def size(self) -> tuple[int, int]:
        """Size (H, W) of the first frame, which all frames have."""
        return read_size(self._dataset.files(self.id, self._frames[0])[0])

    def fingerprint(self) -> str:
        """Return a hex digest over names and sizes of the files of this sequence."""
        return self._dataset.digest([self.id])


class VideoDataset(Dataset):
    """A split of sequences, whose ids are the items. Masks contain object ids from 1, 0 (background), IGNORE (void).

    `folder` and `ids` are set by the reader. object_ids: meaning of file values. frame_height: height of all frames,
    None if they differ. frame_counts, object_counts: expected counts of full splits, for `data check`.
    """

    kind = "video"
    sampling_unit = "sequence"
    frame_height: ClassVar[int | None] = None
    frame_counts: ClassVar[dict[str, int]] = {}
    object_counts: ClassVar[dict[str, int]] = {}
    folder: Path

    @abc.abstractmethod
    def frames(self, sequence: str) -> tuple[str, ...]:
        """Return the names of the frames of a sequence in order, at least three."""

    @abc.abstractmethod
    def files(self, sequence: str, frame: str) -> tuple[Path, Path]:
        """Return the paths of the image and the mask of a frame."""

    @property
    def object_ids(self) -> np.ndarray:
        """Return the object id of each file value, see `id_table`: by default unchanged, 255 for void."""
        return id_table({i: i for i in range(256)})

    @property
    def colours(self) -> np.ndarray | None:
        """Return the palette (256, 3) uint8 of mask files that is accepted in addition to VOC's, see `read_mask`."""
        return None

    def clip(self, index: int) -> Clip:
        """Return the frames of sequence `index`."""
        return Clip(self, self.ids[index])

    def sample(self, sequence: str, frame: str) -> Sample:
        """Read a frame. Raises MissingError (no such file) and BadInputError (wrong kind of mask, wrong sizes)."""
        image_file, mask_file = self.files(sequence, frame)
        image = read_image(image_file)
        height, width, _ = image.shape
        if self.frame_height not in (None, height):
            raise BadInputError(
                f"Frame {image_file} is {width}x{height} pixels (width x height), but those of {self.name} are "
                f"{self.frame_height} high: it was resized, or has another resolution. J and F of resized frames "
                f"cannot be compared: restore the official frames."
            )
        mask = read_mask(mask_file, table=self.object_ids, colours=self.colours, size=(height, width))
        return Sample(image, mask, f"{sequence}/{frame}")

    def fingerprint(self) -> str:
        """Return the sha256 over name, reader version, split, the sequences, and names and sizes of their files."""
        return self.digest(self.ids)

    def digest(self, sequences: Sequence[str]) -> str:
        """Return the sha256 over name, reader version, split, some sequences, and names and sizes of their files."""
        paths = [path for name in sequences for frame in self.frames(name) for path in self.files(name, frame)]
        return file_digest((self.name, self.version, self.split, *sequences), self.folder, paths)


def object_count(mask: np.ndarray) -> int:
    """Return the number of objects of a first mask: its highest id, without void."""
    return int(mask[mask != IGNORE].max(initial=0))
