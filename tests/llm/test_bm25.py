"""BM25 against the formula written out, and the merge of several queries by hand."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_ssm.errors import UserError
from recbole_ssm.llm.bm25 import TitleSearch, found, full_order, merge, words

TITLES = [
    "",
    "Toy Story",
    "Toy Story 2",
    "The Story of O",
    "Die Hard: With a Vengeance",
    "???",
    "toy story",
    "Ran, Ran!",
]


def plain_bm25(query, titles, k1, b):
    """Kamphuis et al., ECIR 2020, table 1, Lucene (accurate)."""
    documents = [words(title) for title in titles]
    average = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        total = 0.0
        for word in words(query):
            holding = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            count = Counter(document)[word]
            if count:
                total += idf * count / (count + k1 * (1 - b + b * len(document) / average))
        scores.append(total)
    return scores


@pytest.mark.parametrize("k1", [0.5, 1.2, 2.0])
@pytest.mark.parametrize("b", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("query", ["toy story", "STORY story of", "ran", "a word nobody wrote", "", "vengeance: 2"])
def test_bm25_is_the_formula(query, k1, b):
    search = TitleSearch(TITLES)
    search.build(k1, b)
    scores = search.scores(query)
    assert scores.shape == (8,) and scores[0] == 0
    np.testing.assert_allclose(scores[1:], plain_bm25(query, TITLES[1:], k1, b), rtol=1e-12, atol=1e-15)


def test_equal_titles_tie_exactly_and_the_lower_id_comes_first():
    search = TitleSearch(TITLES)
    search.build(1.2, 0.75)
    scores = search.scores("a story of toy")
    assert scores[1] == scores[6]
    order = found(scores, 9)
    assert order.index(1) + 1 == order.index(6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Cafe\u0301 no. 1_2", ["caf\u00e9", "no", "1_2"]),
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u0917\u0940\u0924",
            ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u0917\u0940\u0924"],
        ),
        ("I \u2764\ufe0f it\u2122", ["i", "it"]),
    ],
)
def test_accents_and_vowel_signs_belong_to_words(text, expected):
    assert words(text) == expected


def test_titles_without_a_word_are_refused():
    with pytest.raises(UserError, match="title_field: no title holds a letter or a digit"):
        TitleSearch(["", "???", "!"])


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(1, 40))
def test_found_is_a_stable_sort_cut_short(scores, most):
    order = sorted((item for item, score in enumerate(scores) if score), key=lambda item: -scores[item])
    assert found(np.array(scores, dtype=float), most) == order[:most]


def test_an_index_is_built_anew_for_other_parameters_alone():
    search = TitleSearch(TITLES)
    search.build(1.2, 0.75)
    first, scores = search._index, search.scores("story")
    search.build(1.2, 0.75)
    assert search._index is first
    search.build(1.2, 0.0)
    assert not np.allclose(search.scores("story"), scores)


@pytest.mark.parametrize(
    ("lists", "cutoffs", "expected"),
    [
        ([[1, 2, 3], [4, 5, 6]], [4], [1, 2, 4, 5]),
        ([[1, 2, 3], [1, 2, 6]], [4], [1, 2, 6]),  # the second finds one that is new, not two
        ([[1, 2, 3], [2, 1, 6, 7]], [4], [1, 2, 6, 7]),
        ([[1, 2, 3], [4, 5, 6]], [5], [1, 2, 3, 4, 5]),  # the first gives one more
        ([[1], [4, 5, 6]], [4], [1, 4, 5]),
        ([[], [4, 5, 6]], [4], [4, 5]),
        ([[1, 2, 3, 7], [4, 5, 6, 8]], [2, 6], [1, 4, 2, 3, 5, 6]),
        ([[1, 2], [4, 5], [6]], [1], [1]),
        ([[3, 2, 1]], [10], [3, 2, 1]),
    ],
)
def test_merge_by_hand(lists, cutoffs, expected):
    assert merge(lists, cutoffs) == expected


lists_of_items = st.lists(st.lists(st.integers(1, 30), unique=True, max_size=12), min_size=1, max_size=5)


@given(lists_of_items, st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True))
def test_merged_items_are_distinct_and_no_query_gives_more_than_its_share(lists, cutoffs):
    merged = merge(lists, cutoffs)
    assert len(set(merged)) == len(merged) <= max(cutoffs)
    assert set(merged) <= {item for items in lists for item in items}
    for number, items in enumerate(lists):
        others = {item for other in lists[:number] + lists[number + 1 :] for item in other}
        shares = [cutoff // len(lists) + (number < cutoff % len(lists)) for cutoff in cutoffs]
        own = [item for item in items if item not in others]
        assert len(set(own) & set(merged)) <= max(shares)
        if not set(items) & others:
            assert [item for item in merged if item in items] == items[: max(shares)]


@given(lists_of_items)
def test_all_items_are_ordered_once_and_what_was_found_comes_first(lists):
    scores = np.zeros((len(lists), 31))
    for number, items in enumerate(lists):
        scores[number, items] = np.arange(len(items), 0, -1)
    merged = merge([found(one, 5) for one in scores], [5])
    order = full_order(merged, scores).tolist()
    assert sorted(order) == list(range(1, 31)) and order[: len(merged)] == merged
    hits = {item for items in lists for item in items}
    assert set(order[: len(hits)]) == hits
    assert order[len(hits) :] == sorted(order[len(hits) :])
