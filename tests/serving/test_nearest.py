"""The index of a large catalogue: it finds what a product with all items finds, and heeds what is left out."""

import numpy as np
import pytest
import torch

pytest.importorskip("faiss", reason="the extra ann is not installed")

from recbole_ssm.serving import nearest as module
from recbole_ssm.serving.nearest import Nearest

ITEMS, WIDTH = 20_000, 16


@pytest.fixture(scope="module")
def index():
    """An index of vectors that lie in groups, as those of trained models do, with its vectors and some queries."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(100, WIDTH, generator=generator)
    vectors = groups[torch.randint(0, 100, (ITEMS + 1,), generator=generator)]
    vectors = vectors + 0.3 * torch.randn(ITEMS + 1, WIDTH, generator=generator)
    vectors[0] = 100.0
    queries = torch.randn(40, WIDTH, generator=generator)
    return Nearest(vectors, queries[:20]), vectors, queries[20:]


def recall(found, scores, k):
    best = scores.topk(k).indices.tolist()
    return np.mean([len({item for item, _ in one} & set(mine)) / k for one, mine in zip(found, best)])


def test_it_finds_what_a_product_with_all_items_finds(index):
    nearest, vectors, queries = index
    scores = queries @ vectors.T
    scores[:, 0] = -torch.inf
    found = nearest.best(queries.numpy(), 10)
    assert nearest.recall >= 0.95 and recall(found, scores, 10) > 0.9
    assert nearest.probes <= nearest._index.nlist / 8
    for one, row in zip(found, scores):
        assert [score for _, score in one] == sorted((score for _, score in one), reverse=True)
        assert [score for _, score in one] == pytest.approx([row[item].item() for item, _ in one], rel=1e-5, abs=1e-5)
        assert 0 not in [item for item, _ in one]


@pytest.mark.parametrize("few", [0, 50_000])
def test_what_is_left_out_is_not_found_and_there_are_enough_others(index, monkeypatch, few):
    """By the search itself, and by scoring each of the few that are left."""
    monkeypatch.setattr(module, "FEW", few)
    nearest, vectors, queries = index
    exact = queries @ vectors.T
    exact[:, 0] = -torch.inf
    masks = [torch.rand(ITEMS + 1, generator=torch.Generator().manual_seed(n)) < 0.5 for n in range(10)]
    seen = [exact[n].topk(5).indices.tolist() if n % 2 else [] for n in range(20)]
    for row, mask in zip(exact, masks):
        row[mask] = -torch.inf
    for row, ids in zip(exact, seen):
        row[ids] = -torch.inf
    found = nearest.best(queries.numpy(), 10, [*masks, *[None] * 10], seen)
    assert recall(found, exact, 10) > (0.85 if few == 0 else 0.95)
    for one, row in zip(found, exact):
        assert len(one) == 10 and all(row[item] > -torch.inf for item, _ in one)


@pytest.mark.parametrize("few", [0, 50_000])
def test_there_are_k_where_the_lists_looked_into_hold_fewer(index, monkeypatch, few):
    monkeypatch.setattr(module, "FEW", few)
    nearest, vectors, queries = index
    monkeypatch.setattr(nearest, "probes", 1)
    assert max(len(one) for one in nearest._search(queries.numpy(), 5000, None)) < 5000
    exact = queries @ vectors[1:].T
    for one, row in zip(nearest.best(queries[:2].numpy(), 5000), exact):
        # A product in another order of its sums may swap two of the last.
        assert [score for _, score in one] == pytest.approx(row.topk(5000).values.tolist(), abs=1e-4)
        assert [score for _, score in one] == pytest.approx([row[item - 1].item() for item, _ in one], abs=1e-4)
    assert len(nearest.best(queries[:1].numpy(), ITEMS + 5)[0]) == ITEMS


def test_of_equal_scores_the_lower_id_is_first():
    """Of the search, and of scoring each item that is left, where the k-th and the next are equal too."""
    vectors = torch.ones(101, 4)
    vectors[::2] = 2.0
    nearest = Nearest(vectors, torch.ones(1, 4))
    refused = torch.zeros(101, dtype=torch.bool)
    for mask, first in [(None, [*range(2, 101, 2), *range(1, 101, 2)]), (refused, [2, 4, 6, 8])]:
        (found,) = nearest.best(np.ones((1, 4), dtype=np.float32), len(first), [mask])
        assert [item for item, _ in found] == first


@pytest.mark.parametrize("few", [0, 50_000])
def test_hardly_any_item_is_left(index, monkeypatch, few):
    monkeypatch.setattr(module, "FEW", few)
    nearest, _, queries = index
    mask = torch.ones(ITEMS + 1, dtype=torch.bool)
    mask[[5, 900, 17_000]] = False
    (found,) = nearest.best(queries[:1].numpy(), 10, [mask], [[900]])
    assert {item for item, _ in found} == {5, 17_000}
    mask[:] = True
    assert nearest.best(queries[:1].numpy(), 10, [mask]) == [[]]
