"""Ranks are those of the scores, and give RecBole's metrics."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recbole.data import data_preparation

from recbole_ssm.data import create_dataset
from recbole_ssm.model import get_model
from recbole_ssm.ops import rank_scores
from recbole_ssm.quick_start import configure
from recbole_ssm.trainer import Ranks, Trainer

inf, nan = math.inf, math.nan


@pytest.mark.parametrize(
    ("scores", "item", "rank"),
    [
        ([0.0, 3.0, 1.0, 2.0], 1, 1),
        ([0.0, 3.0, 1.0, 2.0], 0, 4),
        ([1.0, 3.0, 1.0, 1.0], 2, 3),  # ranks 2, 3 and 4 are shared
        ([1.0, 1.0, 1.0, 1.0], 3, 2.5),
        ([-inf, 3.0, 1.0, nan], 2, 3),
        ([-inf, 3.0, 1.0, nan], 3, 4),
        ([nan, nan, nan, nan], 3, 4),
    ],
)
def test_known_ranks(scores, item, rank):
    found = rank_scores(torch.tensor([scores]), torch.tensor([item])).ranks
    assert found.tolist() == [[rank, rank]]


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 9))
def test_mean_of_the_ranks_that_a_sort_may_give(seed, rows, items):
    """With the items of the history, and without them; the target stays in its list."""
    random = np.random.default_rng(seed)
    scores = random.integers(0, 4, (rows, items)).astype(np.float32)
    target, seen = random.integers(0, items, rows), random.random((rows, items)) < 0.4
    pairs = np.argwhere(seen)[random.integers(0, seen.sum(), 3 * seen.sum())] if seen.any() else np.argwhere(seen)
    seen = np.zeros_like(seen)
    seen[tuple(pairs.T)] = True
    found = rank_scores(torch.tensor(scores), torch.tensor(target), seen=tuple(torch.tensor(pairs.T))).ranks
    for r, (i, ranks) in enumerate(zip(target, found.tolist())):
        for listed, rank in zip((np.ones(items, dtype=bool), ~seen[r] | (np.arange(items) == i)), ranks):
            own, rest = scores[r, i], scores[r, listed]
            ahead, alike = (rest > own).sum(), (rest == own).sum()
            assert rank == np.mean([ahead + place for place in range(1, alike + 1)])


def test_recboles_metrics_follow_from_the_ranks(toy):
    options = {**toy["config_dict"], "topk": [3, 5], "valid_metric": "NDCG@5", "metric_decimal_place": 12}
    config = configure("Mamba4Rec", toy["dataset"], config_dict={**options, "eval_batch_size": 7})
    _, valid, test = data_preparation(config, create_dataset(config))
    torch.manual_seed(3)
    hook = Ranks()
    trainer = Trainer(config, get_model("Mamba4Rec")(config, test._dataset), [hook])
    trainer.evaluate(valid, load_best_model=False)
    found = trainer.evaluate(test, load_best_model=False)
    assert hook.users.tolist() == [f"u{n}" for n in range(60)] and len(set(hook.ranks.tolist())) > 5
    for k in (3, 5):
        within = hook.ranks <= k
        assert abs(found[f"hit@{k}"] - within.mean()) < 1e-12
        assert abs(found[f"ndcg@{k}"] - (within / np.log2(hook.ranks + 1)).mean()) < 1e-12
        assert abs(found[f"mrr@{k}"] - (within / hook.ranks).mean()) < 1e-12
