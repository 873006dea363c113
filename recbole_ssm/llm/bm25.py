"""A search engine over titles: BM25, and the merge of what several queries find."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from recbole_ssm.errors import UserError, require

# Accents and vowel signs; above them only selectors of a letter's form are left.
MARKS = "".join(c for c in map(chr, range(0x300, 0xFE00)) if unicodedata.category(c) in ("Mn", "Mc"))
WORD = re.compile(rf"\w[\w{MARKS}]*")


class TitleSearch:
    """BM25 over the titles of a catalogue, in the form of Lucene: a title scores above 0 if it shares a word.

    The score of a title d is the sum, over the words w of the query, of
    ``ln(1 + (N - n + 0.5) / (n + 0.5)) * f / (f + k1 (1 - b + b |d| / average |d|))``, where n
    of the N titles hold w, and d does f times (Kamphuis et al., ECIR 2020; computed by bm25s).
    Words are runs of letters and digits in lower case; none is left out, as titles are short.

    Args:
        titles: by item id; id 0 is padding, which is never found.

    Raises:
        UserError: no title has a word.
    """

    def __init__(self, titles: Sequence[str]) -> None:
        self._corpus = [words(title) for title in titles[1:]]
        if not any(self._corpus):
            raise UserError("title_field: no title holds a letter or a digit to search for; name another column")
        self._index: Any = None
        self._built: tuple[float, float] | None = None

    def build(self, k1: float, b: float) -> None:
        """Index the titles with these parameters, unless it was done."""
        if self._built != (k1, b):
            self._index = require("bm25s").BM25(k1=k1, b=b, method="lucene", dtype="float64")
            self._index.index(self._corpus, show_progress=False)
            self._built = (k1, b)

    def scores(self, query: str) -> np.ndarray:
        """BM25 of each item id for a query, float64 ``[V]``; 0 where no word is shared, and for
        the padding.
        """
        assert self._built, "build first"
        known = self._index.get_tokens_ids(words(query))
        return np.concatenate([[0.0], self._index.get_scores_from_ids(known)])


def words(text: str) -> list[str]:
    """The words of a text, in lower case; accents and vowel signs belong to them, whether composed or apart."""
    return WORD.findall(unicodedata.normalize("NFC", text.lower()))


def found(scores: np.ndarray, most: int) -> list[int]:
    """The best item ids among those that score above 0, best first; of equal scores the lower
    id comes first.
    """
    items = np.flatnonzero(scores > 0)
    if len(items) > most:
        # Keep all that are as good as the last one that counts.
        items = items[scores[items] >= np.partition(scores[items], -most)[-most]]
    return items[np.argsort(-scores[items], kind="stable")][:most].tolist()


def merge(lists: Sequence[Sequence[int]], cutoffs: Sequence[int]) -> list[int]:
    """GPT4Rec's merge: of the K items shown, each of m queries gives K / m, best query first, none of them twice.

    Where K / m is not whole, the first queries give one more. For several cut-offs the list
    goes on from the smaller to the larger one, so that at each of them every query has given
    its share. A query that finds less leaves the list shorter.

    Args:
        lists: what each query found, best first; the queries in the order of their beam scores.
        cutoffs: the Ks.

    Returns:
        Item ids, at most the largest cut-off of them.
    """
    merged: dict[int, None] = {}
    queues: list[Iterator[int]] = [iter(items) for items in lists]
    given = [0] * len(lists)
    for cutoff in sorted(cutoffs):
        for number, queue in enumerate(queues):
            share = cutoff // len(lists) + (number < cutoff % len(lists))
            while given[number] < share:
                item = next((item for item in queue if item not in merged), None)
                if item is None:
                    break
                merged[item] = None
                given[number] += 1
    return list(merged)


def full_order(merged: Sequence[int], scores: np.ndarray) -> np.ndarray:
    """All items in the order in which they are recommended.

    The merged ones come first; then what else was found, by the best score that any query gives
    it; then the rest. Equal ones are in the order of their ids.

    Args:
        merged: item ids.
        scores: BM25 of each query ``[m, V]``.

    Returns:
        Item ids 1 to V - 1 ``[V - 1]``.
    """
    best = scores.max(0)
    best[list(merged)] = np.inf
    rest = np.argsort(-best[1:], kind="stable") + 1
    return np.concatenate([np.asarray(merged, dtype=np.int64), rest[len(merged) :]])
