"""Constants of the unsupervised segmentation protocols. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from neco_bench.core.protocol import Rounds, Share
from neco_bench.core.protocol import Settings as BaseSettings
from neco_bench.metrics import segmentation


class Settings(BaseSettings):
    """Constants of a protocol and a card.

    mask_size: side of the shrunk maps and masks, in pixels, on which all is counted; None: patches, and masks at their
    own resolution. foreground: what is taken for a first, noisy foreground: patches with the top `mass` of the class
    token's "attention", or the side of the normalised "cut" with the seed, at cosine `tau`. foreground_clusters: of all
    patches, each of them foreground or not. threshold: of the precision of a foreground cluster, the best one on the
    ground truth of train ("train_masks"), or from the precisions alone ("otsu"). community_clusters: of foreground
    patches, the nodes of the graph. reach: distances, in cells, at which clusters are neighbours. angles: of
    neighbours, the "reference"'s with its slip, or "even" steps of 45 degrees. weight_threshold: of an edge; None: as
    often as if all clusters were equally near. markov_time: of Infomap. seeds, direct_seeds: of Infomap, and of k-means
    with a cluster for each class.
    """

    mask_size: PositiveInt | None = None
    components: PositiveInt
    iterations: Rounds
    redos: Rounds
    foreground: Literal["attention", "cut"]
    mass: Share = 0.65
    tau: Annotated[float, Field(ge=-1, le=1)] = 0.2
    foreground_clusters: PositiveInt
    threshold: Literal["train_masks", "otsu"]
    community_clusters: PositiveInt
    reach: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    angles: Literal["reference", "even"]
    weight_threshold: NonNegativeFloat | None = None
    markov_time: PositiveFloat
    seeds: PositiveInt
    direct_seeds: PositiveInt
    absent: segmentation.AbsentClasses
