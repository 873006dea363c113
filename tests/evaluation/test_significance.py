"""Known ranks in, known metrics and p-values out."""

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from recbole_ssm.evaluation.significance import corrected, holm, metric, over_users, paired


def test_metrics_of_known_ranks():
    ranks = np.array([1.0, 3.0, 10.0, 10.5, 11.0])
    assert metric("Hit@10", ranks).tolist() == [1, 1, 1, 0, 0]
    assert metric("MRR@10", ranks).tolist() == [1, 1 / 3, 0.1, 0, 0]
    assert metric("NDCG@10", ranks).tolist() == [1, 0.5, 1 / math.log2(11), 0, 0]
    assert metric("Hit@3", ranks).tolist() == [1, 1, 0, 0, 0]


def test_users_are_averaged_over_rows_and_seeds():
    seeds = [
        (np.array(["a", "b"]), np.array([1.0, 20.0])),
        (np.array(["b", "a"]), np.array([2.0, 40.0])),
    ]
    assert over_users("Hit@10", seeds) == {"a": 0.5, "b": 0.5}
    assert over_users("MRR@10", seeds) == {"a": 0.5, "b": 0.25}
    assert over_users("Hit@10", [(np.array(["a", "a", "b"]), np.array([1.0, 99.0, 99.0]))]) == {"a": 0.5, "b": 0}


def test_a_pair_by_hand():
    """Differences 1, 2, 3, 4: mean 2.5, standard error sqrt(5/3)/2, t = 3.873 with 3 degrees of freedom."""
    first = {user: float(value) for user, value in zip("abcd", (2, 4, 6, 8))}
    second = {user: float(value) for user, value in zip("dcbae", (4, 3, 2, 1, 100))}
    pair = paired("Hit@10", ("x", first), ("y", second))
    assert (pair.users, pair.difference) == (4, 2.5)
    assert pair.t_p == pytest.approx(0.030466, abs=1e-6)  # of a table of Student's t
    assert pair.wilcoxon_p == pytest.approx(2 / 16)  # all four of one sign, exactly
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert (pair.low, pair.high) == pytest.approx((2.5 - half, 2.5 + half), abs=1e-5)


def test_p_values_are_scipys():
    random = np.random.default_rng(0)
    one, two = random.random(200), random.random(200) + 0.03
    two[:50] = one[:50]
    names = [str(n) for n in range(200)]
    pair = paired("NDCG@10", ("x", dict(zip(names, one))), ("y", dict(zip(names, two))))
    assert pair.t_p == pytest.approx(stats.ttest_rel(one, two).pvalue)
    assert pair.wilcoxon_p == pytest.approx(stats.wilcoxon(one, two).pvalue)
    interval = stats.ttest_rel(one, two).confidence_interval()
    assert (pair.low, pair.high) == pytest.approx((interval.low, interval.high))


def test_no_difference_and_the_same_difference():
    values = {"a": 0.25, "b": 0.5, "c": 0.0}
    same = paired("Hit@10", ("x", values), ("y", dict(values)))
    assert (same.difference, same.t_p, same.wilcoxon_p) == (0, 1, 1)
    more = {user: value + 0.5 for user, value in values.items()}
    assert paired("Hit@10", ("x", more), ("y", values)).t_p == 0


def test_one_user_proves_nothing_and_spoils_no_other_pair():
    lonely = paired("Hit@10", ("x", {"a": 1.0, "b": 0.0}), ("y", {"a": 0.0}))
    assert lonely.users == 1 and math.isnan(lonely.difference) and math.isnan(lonely.t_p)
    values = {"a": 0.1, "b": 0.5, "c": 0.3}
    other = paired("Hit@10", ("x", values), ("y", {"a": 0.2, "b": 0.9, "c": 0.3}))
    found = corrected([lonely, other])
    assert math.isnan(found[0].holm_p) and found[1].holm_p == other.t_p


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_is_over_all_pairs():
    random = np.random.default_rng(1)
    models = [(name, dict(enumerate(random.random(30) + more))) for name, more in (("x", 0), ("y", 0.1), ("z", 0.4))]
    pairs = corrected(paired("NDCG@10", one, other) for one, other in combinations(models, 2))
    assert [(pair.first, pair.second) for pair in pairs] == [("x", "y"), ("x", "z"), ("y", "z")]
    assert [pair.holm_p for pair in pairs] == holm([pair.t_p for pair in pairs])
    assert min(pair.holm_p for pair in pairs) == pytest.approx(3 * min(pair.t_p for pair in pairs))
