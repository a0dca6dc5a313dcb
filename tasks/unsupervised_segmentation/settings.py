"""Constants of the unsupervised segmentation protocols. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from neco_bench.core.protocol import Rounds, Share
from neco_bench.core.protocol import Settings as BaseSettings
from neco_bench.metrics import segmentation


class Settings(BaseSettings):
    """Constants of a protocol and a card.

    mask_size: side in pixels of the reduced maps and masks on which everything is counted; None: patches, and masks at
    their own resolution. foreground: the first, noisy foreground: patches with the top `mass` of the class token's
    "attention", or the part of the normalised "cut" that contains the seed, at cosine `tau`. foreground_clusters:
    number of clusters of all patches, each of which is foreground or not. threshold: of the precision of foreground
    clusters; the best on the ground truth of train ("train_masks"), or from the precisions alone ("otsu").
    community_clusters: number of clusters of foreground patches, the nodes of the graph. reach: distances in cells at
    which clusters are neighbours. angles: directions of neighbours, those of the "reference" with its error, or "even"
    steps of 45 degrees. weight_threshold: smallest weight of an edge; None: the share if all clusters were neighbours
    equally often. markov_time: of Infomap. seeds: number of seeds of Infomap. direct_seeds: number of seeds of k-means
    with one cluster per class.
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
