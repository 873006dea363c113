"""The best items of a large catalogue without a product with all of them: an inverted file of faiss.

The vectors are put into lists around centres (k-means); a query looks into the lists of the centres nearest to it
(Jégou, Douze and Schmid, 2011). What is found has its exact score; what lies in other lists is missed, and how often
that happens is measured when the index is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_ssm.errors import require

INSTALL = "serve: {:,} items are searched with faiss; pip install 'recbole-ssm[ann]', or raise --ann_above"
VECTORS_OF_A_LIST = 40
"""There is at most one list for so many vectors, and k-means reads so many, drawn at random, for each centre."""
FEW = 50_000
"""Where rules leave so few items or fewer, each of them is scored, without the index."""
WANTED_RECALL = 0.95
MEASURED_AT = 10
"""Recall is the share of so many best items that are found."""
Found = list[tuple[int, float]]


class Nearest:
    """An index of item vectors.

    Args:
        vectors: of all items, that of padding first ``[V, d]``.
        queries: vectors as they will be asked for, by which recall is measured ``[n, d]``.

    Attributes:
        probes: how many lists a query looks into: the smallest power of two whose recall is 95 % or more, but at most
            an eighth of all lists.
        recall: the share of the ten best items of these queries that those lists hold.
    """

    def __init__(self, vectors: Tensor, queries: Tensor) -> None:
        self._faiss = require("faiss", INSTALL.format(len(vectors) - 1))
        self._vectors = np.ascontiguousarray(vectors.detach().cpu().float().numpy())
        count, width = self._vectors.shape
        lists = max(1, min(2 * math.isqrt(count), count // VECTORS_OF_A_LIST))
        # The index reads the centres for as long as it lives.
        self._centres = self._faiss.IndexFlatIP(width)
        self._index = self._faiss.IndexIVFFlat(self._centres, width, lists, self._faiss.METRIC_INNER_PRODUCT)
        self._index.cp.niter, self._index.cp.max_points_per_centroid = 8, VECTORS_OF_A_LIST
        self._index.train(self._vectors[1:])
        for begin in range(1, count, 1 << 16):
            part = slice(begin, min(begin + (1 << 16), count))
            self._index.add_with_ids(self._vectors[part], np.arange(part.start, part.stop))
        self._tune(queries.detach().cpu().float(), lists)

    def _tune(self, queries: Tensor, lists: int) -> None:
        scores = queries @ torch.from_numpy(self._vectors[1:]).T
        best = (scores.topk(min(MEASURED_AT, scores.shape[1])).indices + 1).tolist()
        for probes in (2**power for power in range(20)):
            self.probes = max(1, min(probes, lists // 8))
            found = self._search(queries.numpy(), len(best[0]), None)
            shares = [len({item for item, _ in one} & set(mine)) / len(mine) for one, mine in zip(found, best)]
            self.recall = sum(shares) / len(shares)
            if self.recall >= WANTED_RECALL or probes >= lists // 8:
                return

    def best(
        self,
        queries: np.ndarray,
        k: int,
        refused: Sequence[Tensor | None] = (),
        excluded: Sequence[Sequence[int]] = (),
    ) -> list[Found]:
        """The k best items of each query that are found, with their scores, best first; of equal scores, the item with
        the lower id first. Where the search finds fewer than k, every item that is left is scored.

        Args:
            queries: ``[n, d]``.
            k: how many; fewer where there are not so many.
            refused: for each query, which items are left out ``[V]``, or None. They are passed over in the search.
            excluded: for each query, ids of further items that are left out.
        """
        filters = list(zip(refused or [None] * len(queries), excluded or [()] * len(queries)))
        found: list[Found] = [[] for _ in queries]
        plain = [number for number, (mask, ids) in enumerate(filters) if mask is None and not ids]
        if plain:
            for number, one in zip(plain, self._search(queries[plain], k, None)):
                enough = len(one) == min(k, self._index.ntotal)
                found[number] = one if enough else self._best_allowed(queries[number], k, None, ())
        for number, (mask, ids) in enumerate(filters):
            if mask is not None or ids:
                found[number] = self._best_allowed(queries[number], k, mask, ids)
        return found

    def _best_allowed(self, query: np.ndarray, k: int, mask: Tensor | None, ids: Sequence[int]) -> Found:
        allowed = np.ones(len(self._vectors), dtype=bool) if mask is None else ~mask.numpy()
        allowed[[0, *ids]] = False
        left = int(allowed.sum())
        if left > FEW:
            bits = np.packbits(allowed, bitorder="little")
            selector = self._faiss.IDSelectorBitmap(bits)
            (found,) = self._search(query[None], k, selector)
            if len(found) == min(k, left):
                return found
        if not left:
            return []
        items, scores = allowed.nonzero()[0], torch.from_numpy(self._vectors[allowed] @ query)
        # All that are equal to the k-th, of which those with the lowest ids are taken.
        best = (scores >= scores.topk(min(k, left)).values[-1]).nonzero().flatten()
        order = best[scores[best].sort(descending=True, stable=True).indices[:k]]
        return list(zip(items[order.numpy()].tolist(), scores[order].tolist()))

    def _search(self, queries: np.ndarray, k: int, selector: Any) -> list[Found]:
        options = self._faiss.SearchParametersIVF(nprobe=self.probes, sel=selector)
        scores, items = self._index.search(np.ascontiguousarray(queries), min(k, self._index.ntotal), params=options)
        found = []
        for row, mine in zip(items.tolist(), scores.tolist()):
            pairs = [(item, score) for item, score in zip(row, mine) if item >= 0]
            found.append(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))
        return found
