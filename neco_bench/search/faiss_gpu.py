"""FAISS on a GPU, where it sees one."""

from __future__ import annotations

import functools
from typing import Any

import faiss
import torch


def faiss_sees_gpu() -> bool:
    """Whether FAISS is built for GPUs and finds one."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


@functools.cache
def _resources() -> Any:
    """FAISS's scratch memory on GPUs, 1.5 GiB on each that is used, for all indexes of this process."""
    return faiss.StandardGpuResources()


def to_gpu(index: faiss.Index, device: torch.device) -> Any:
    """The index on that GPU."""
    return faiss.index_cpu_to_gpu(_resources(), device.index or 0, index)
