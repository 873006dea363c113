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
"""At least; k-means reads as many, drawn at random, for each centre."""
FEW = 50_000
"""Of so few items that rules leave, each is scored."""
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
        probes: into so many lists a query looks: the fewest with a recall of 95 %, but an eighth of all at most.
        recall: the share of the ten best items of these queries that are found.
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
            found = self.best(queries.numpy(), len(best[0]))
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
        """The k best items of each query that are found, with their scores, best first.

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
                found[number] = one
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
        places = allowed.nonzero()[0]
        scores = torch.from_numpy(self._vectors[places] @ query)
        values, best = scores.topk(min(k, left))
        return list(zip(places[best.numpy()].tolist(), values.tolist()))

    def _search(self, queries: np.ndarray, k: int, selector: Any) -> list[Found]:
        options = self._faiss.SearchParametersIVF(nprobe=self.probes, sel=selector)
        scores, items = self._index.search(np.ascontiguousarray(queries), min(k, self._index.ntotal), params=options)
        return [
            [(item, score) for item, score in zip(row, mine) if item >= 0]
            for row, mine in zip(items.tolist(), scores.tolist())
        ]
