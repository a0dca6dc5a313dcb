"""Exact search in single precision."""

from __future__ import annotations

import faiss
import numpy as np
import torch
from torch import Tensor

from neco_bench.search.faiss_gpu import to_gpu
from neco_bench.search.topk import Found, blocked


class _Faiss:
    """FAISS's flat index on a GPU. (On CPUs its wheel's BLAS is never faster than the better of the other two.)"""

    def __init__(self, keys: Tensor) -> None:
        self.index = to_gpu(faiss.IndexFlatIP(keys.shape[1]), keys.device)
        self.index.add(keys.cpu().numpy())

    def search(self, queries: Tensor, k: int) -> Found:
        scores, ids = self.index.search(np.ascontiguousarray(queries.cpu().numpy()), k)
        return torch.from_numpy(scores), torch.from_numpy(ids)


class _Torch:
    """Products by PyTorch, in single precision."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys

    def search(self, queries: Tensor, k: int) -> Found:
        return blocked(self.keys, queries, k, torch.mm)


class _Numpy(_Torch):
    """Products by numpy, whose BLAS is another one and on some CPUs several times faster than PyTorch's."""

    def search(self, queries: Tensor, k: int) -> Found:
        def multiply(some: Tensor, block: Tensor, out: Tensor) -> None:
            np.matmul(some.numpy(), block.numpy(), out=out.numpy())

        return blocked(self.keys, queries, k, multiply)
