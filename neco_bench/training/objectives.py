"""What is learned in a step: patch neighbour consistency (NeCo), or masked image modelling to begin from nothing.

An objective is called with a batch, student and teacher, and gives the loss of the images that this process has;
gradients are averaged over processes. What it keeps between steps is in its `state_dict`.
"""

from __future__ import annotations

from neco_bench.training.mim import MaskedImages
from neco_bench.training.neco import NeCo

OBJECTIVES = {"neco": NeCo, "mim": MaskedImages}
