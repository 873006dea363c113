"""Invariant 5: the metrics that a run reports are those of RecBole's evaluator, and of their definitions."""

import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recbole.data import data_preparation
from recbole.data.interaction import Interaction
from recbole.evaluator.collector import DataStruct
from recbole.evaluator.register import metrics_dict

from recbole_ssm import run_recbole_ssm
from recbole_ssm.data import create_dataset
from recbole_ssm.data.loader import create_loaders
from recbole_ssm.data.sampling import Candidates
from recbole_ssm.errors import UserError
from recbole_ssm.evaluation import ranks
from recbole_ssm.evaluation.metrics import (
    AFTER_AN_HOUR,
    LATER_DAY,
    OF_ITEMS,
    PAUSES,
    SAME_DAY,
    SAME_MOMENT,
    WITHIN_AN_HOUR,
    by_group,
    of_items,
    text_of,
)
from recbole_ssm.evaluation.ranks import Ranking, Scorer
from recbole_ssm.model import get_model
from recbole_ssm.ops import Seen
from recbole_ssm.quick_start import configure
from recbole_ssm.trainer import Ranks, Trainer, checkpoint

METRICS = {f"{name}@{k}" for name in ("hit", "ndcg", "mrr") for k in (1, 10)}
OF_RANKS = ["Hit", "MRR", "MAP", "Recall", "NDCG", "Precision", "GAUC"]


def untrained(model, options, hooks=(), prepare=create_loaders):
    """A trainer of an untrained model, and the loaders."""
    config = configure(model, options["dataset"], config_dict={"metric_decimal_place": 12, **options["config_dict"]})
    loaders = prepare(config, create_dataset(config))
    torch.manual_seed(3)
    return Trainer(config, get_model(model)(config, loaders[0]._dataset).eval(), hooks), *loaders


def scores_of(trainer, rows):
    """Scores of all items for the rows of a split, one row at a time."""
    with torch.no_grad():
        found = [trainer.model.full_sort_predict(rows[[row]]).view(1, -1) for row in range(len(rows))]
    scores = torch.cat(found)
    scores[:, 0] = -torch.inf
    return scores.numpy()


def repeated(write_dataset, **more):
    """Options of a data set in which users come back to items, with histories longer than a model reads."""
    random = np.random.default_rng(5)
    rows = [f"u{user}\ti{random.integers(30)}\t{time}\n" for user in range(40) for time in range(6 + user % 9)]
    options = write_dataset("user_id:token\titem_id:token\ttimestamp:float\n" + "".join(rows))
    options["config_dict"] |= {"MAX_ITEM_LIST_LENGTH": 5, "state": "ERROR", "topk": [1, 5], "valid_metric": "Hit@5"}
    options["config_dict"] |= more
    return options


@pytest.mark.parametrize("valid_metric", ["masked Hit@5", "Hit@5"])
def test_the_list_that_chooses_the_best_epoch(write_dataset, valid_metric):
    options = repeated(write_dataset, valid_metric=valid_metric, epochs=3, learning_rate=0.01, show_progress=False)
    found = run_recbole_ssm("Mamba4Rec", options["dataset"], config_dict=options["config_dict"])
    scores = {"Hit@5": found["best_valid_result"], "masked Hit@5": found["best_valid_result_masked"]}
    assert found["best_valid_score"] == scores[valid_metric]["hit@5"]
    assert scores["Hit@5"] != scores["masked Hit@5"]


@pytest.mark.parametrize("model", ["Mamba4Rec", "STAMP"])
def test_metrics_equal_recboles_and_their_definitions(toy, model):
    import recbole.trainer

    toy["config_dict"] |= {"topk": [5, 2], "metrics": OF_RANKS, "valid_metric": "NDCG@5", "metric_decimal_place": 10}
    trainer, _, _, test = untrained(model, toy, prepare=data_preparation)
    found = trainer.evaluate(test, load_best_model=False)
    expected = recbole.trainer.Trainer(trainer.config, trainer.model).evaluate(test, load_best_model=False)
    # RecBole computes GAUC alone in float32.
    assert found.pop("gauc") == pytest.approx(expected.pop("gauc"), abs=1e-6)
    assert found == expected
    hit = ndcg = mrr = 0.0
    rows = test._dataset.inter_feat
    for row, target in zip(scores_of(trainer, rows), rows["item_id"].tolist()):
        rank = int((row > row[target]).sum()) + 1
        if rank <= 5:
            hit, ndcg, mrr = hit + 1, ndcg + 1 / math.log2(rank + 1), mrr + 1 / rank
    for name, value in (("hit@5", hit), ("ndcg@5", ndcg), ("mrr@5", mrr)):
        assert abs(found[name] - value / len(rows)) < 1e-9


@pytest.mark.parametrize("model", ["GRU4Rec", "STAMP"])
def test_masked_lists_hold_nothing_of_the_whole_history_but_the_target(write_dataset, model):
    """A history is all that the user did before, though the model reads five events of it."""
    hook = Ranks()
    options = repeated(write_dataset, eval_batch_size=7)
    trainer, _, _, test = untrained(model, options, [hook])
    found = trainer.evaluate(test, load_best_model=False)
    events = list(test._dataset.field2id_token["item_id"])
    history = {}
    for line in Path("data/made/made.inter").read_text().splitlines()[1:]:
        user, item, _ = line.split("\t")
        history.setdefault(user, []).append(events.index(item))
    rows = test._dataset.inter_feat
    assert max(map(len, history.values())) > 5 and len(hook.users) == 40
    came_back = 0
    for scores, user, target, rank, masked in zip(
        scores_of(trainer, rows), hook.users, rows["item_id"].tolist(), hook.ranks, hook.masked
    ):
        assert rank == 1 + (scores > scores[target]).sum()
        assert history[user][-1] == target
        own = scores[target]
        came_back += target in history[user][:-1]
        scores[history[user][:-1]] = -np.inf
        assert masked == 1 + (scores > own).sum()
    assert came_back > 3
    assert found["hit@5"] == pytest.approx(np.mean(hook.ranks <= 5))
    assert found.masked["hit@5"] == pytest.approx(np.mean(hook.masked <= 5)) != found["hit@5"]
    assert found.masked.keys() == found.keys() and "unmasked  hit@1" in str(found) and "\nmasked    hit@1" in str(found)


def test_a_model_that_scores_in_its_own_way_is_ranked_by_that(write_dataset):
    """Though its parent's scores are products, by which ranks could be counted."""

    class Upside(get_model("GRU4Rec")):
        def full_sort_predict(self, interaction):
            return -super().full_sort_predict(interaction)

    trainer, _, _, test = untrained("GRU4Rec", repeated(write_dataset))
    ranks = trainer.evaluate(test, load_best_model=False).ranking.ranks[:, 0]
    trainer.model.__class__ = Upside
    result = trainer.evaluate(test, load_best_model=False)
    assert (result.ranking.ranks[:, 0] == 31 - ranks).all()


@pytest.mark.parametrize("model", ["GRU4Rec", "STAMP", "DIN"])
def test_rows_are_scored_in_pieces_whatever_the_batch(write_dataset, model, monkeypatch):
    """What is asked for without bounds at a million items would be 16 GB a batch."""
    results, most = [], []
    for largest in (2**24, 100):
        monkeypatch.setattr(ranks, "LARGEST_SCORES", largest)
        trainer, _, _, test = untrained(model, repeated(write_dataset, metrics=["Hit", "ItemCoverage"]))
        if model != "DIN":
            whole = trainer.model.full_sort_predict
            sizes = []
            trainer.model.full_sort_predict = lambda rows, f=whole, s=sizes: s.append(len(rows)) or f(rows)
        results.append(trainer.evaluate(test, load_best_model=False))
        most += [max(sizes)] if model != "DIN" else []
    assert results[0] == results[1] and results[0].masked == results[1].masked
    assert model == "DIN" or most == [40, 3]


def test_metrics_of_items_equal_recboles_and_numpys(write_dataset):
    metrics = ["Hit", "ItemCoverage", "AveragePopularity", "ShannonEntropy", "GiniIndex", "TailPercentage"]
    options = repeated(write_dataset, metrics=metrics, topk=[2, 6], tail_ratio=0.3, valid_metric="Hit@2")
    trainer, train, _, test = untrained("GRU4Rec", options)
    found = trainer.evaluate(test, load_best_model=False)
    rows = test._dataset.inter_feat
    scores = scores_of(trainer, rows)
    popularity = Counter(train._dataset.inter_feat["item_id"].tolist())
    for protocol, values in (("unmasked", found), ("masked", found.masked)):
        if protocol == "masked":
            for row, target in enumerate(rows["item_id"].tolist()):
                event = rows.target[row]
                seen = rows.events["item_id"][:event][rows.events["user_id"][:event] == rows.events["user_id"][event]]
                own = scores[row, target]
                scores[row, seen] = -np.inf
                scores[row, target] = own
        best = np.argsort(-scores, axis=1, kind="stable")
        collected = DataStruct()
        for name, value in (("rec.items", torch.tensor(best[:, :6])), ("data.num_items", 31)):
            collected.set(name, value)
        collected.set("data.count_items", popularity)
        for name in OF_ITEMS:
            expected = metrics_dict[name](trainer.config).calculate_metric(collected)
            assert {key: values[key] for key in expected} == pytest.approx(expected, abs=1e-11), (protocol, name)
        items, counts = np.unique(best[:, :2], return_counts=True)
        assert values["itemcoverage@2"] == pytest.approx(len(items) / 31)
        assert values["averagepopularity@2"] == pytest.approx(np.mean([popularity[i] for i in best[:, :2].ravel()]))
        full = np.sort(np.r_[np.zeros(31 - len(items)), counts])
        gini = ((2 * np.arange(1, 32) - 31 - 1) * full).sum() / (31 * full.sum())
        assert values["giniindex@2"] == pytest.approx(gini)


class Fixed:
    """A model of which one row of scores is all there is."""

    def __init__(self, scores):
        self.scores = torch.tensor([scores])

    def full_sort_predict(self, interaction):
        return self.scores.clone()

    def predict(self, interaction):
        return self.scores[0, interaction["item_id"]]


def rank_one(scores, target, seen, k=0, candidates=None):
    """What a scorer makes of one row."""
    items = Interaction({"item_id": torch.arange(len(scores))})
    dataset = SimpleNamespace(item_num=len(scores), iid_field="item_id", get_item_feature=lambda: items)
    seen = Seen(torch.tensor(seen, dtype=torch.int64), torch.tensor([0, len(seen)]))
    row = {"interaction": Interaction({"item_id": torch.tensor([target])}), "target": torch.tensor([target])}
    return Scorer(Fixed(scores), dataset, 10).rank(SimpleNamespace(**row, seen=seen, candidates=candidates), k)


def test_lists_that_end_before_the_cutoff_hold_no_seen_item_and_no_padding():
    scores = [9.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    _, listed, best = rank_one(scores, 1, [2, 3, 4], k=6)
    assert best.tolist() == [[[5, 4, 3, 2, 1, -1], [5, 1, -1, -1, -1, -1]]] and listed.tolist() == [[5, 2]]
    training = SimpleNamespace(item_num=6)
    assert of_items("itemcoverage", best[:, 1].numpy(), {}, training) == 2 / 6
    assert of_items("shannonentropy", best[:, 1].numpy(), {}, training) == pytest.approx(math.log(2) / 2)
    _, _, best = rank_one(scores, 1, [3], k=3, candidates=torch.tensor([[1, 3, 5]]))
    assert best.tolist() == [[[5, 3, 1], [5, 1, -1]]]


@pytest.mark.parametrize("own", [math.nan, -math.inf])
@pytest.mark.parametrize("candidates", [None, torch.tensor([[2, 1, 3]])])
def test_a_target_without_a_score_is_the_last_of_its_list(own, candidates):
    ranks, listed, _ = rank_one([0.0, 1.0, own, 3.0], 2, [3], candidates=candidates)
    assert ranks.tolist() == listed.tolist() == [[3, 2]]


@pytest.mark.parametrize("model", ["GRU4Rec", "STAMP"])
@pytest.mark.parametrize("split", [{"LS": "valid_and_test"}, {"RS": [0.6, 0.2, 0.2]}])
def test_samples_are_one_list_a_target_and_depend_on_row_and_seed_alone(write_dataset, model, split):
    """Where a user has several targets, each has a history and a list of its own."""
    lists, results = [], []
    for size, sampled in ((4096, None), (3, None), (1, 9)):
        options = repeated(
            write_dataset, eval_batch_size=size, eval_args={"split": split, "mode": "uni8"}, eval_rows=sampled
        )
        hook = Ranks()
        trainer, _, _, test = untrained(model, options, [hook])
        results.append(trainer.evaluate(test, load_best_model=False))
        rows = test._dataset.inter_feat
        candidates = torch.cat([batch.candidates for batch in test])
        lists.append(dict(zip(rows.target.tolist(), candidates.tolist())))
        for scores, items, rank in zip(scores_of(trainer, rows), candidates.tolist(), hook.ranks):
            near = 1e-5 * np.abs(scores[1:]).max()
            assert rank == 1 + (scores[items] > scores[items[0]] + near).sum()
        assert candidates[:, 0].tolist() == rows["item_id"].tolist() and (candidates > 0).all()
        assert all(len(set(items)) == 9 for items in candidates.tolist())
    assert results[0] == results[1] and lists[0] == lists[1]
    assert len(lists[2]) == 9 and all(lists[0][row] == items for row, items in lists[2].items())
    assert len(set(map(tuple, lists[0].values()))) == len(lists[0])


@pytest.mark.parametrize("count", [2, 4])
def test_candidates_are_drawn_by_their_weights_without_replacement(count):
    """The first two of five by the formula of successive draws; four of five are all that are left."""
    weights = np.array([0.0, 1, 2, 3, 4, 0, 5])
    candidates = Candidates(count, weights, (7, 1))
    drawn = [candidates.draw(row, 3).tolist() for row in range(4000)]
    assert candidates.draw(17, 3).tolist() == drawn[17] != candidates.draw(18, 3).tolist()
    assert all(items[0] == 3 and len(set(items)) == count + 1 for items in drawn)
    left = {item: weight for item, weight in enumerate(weights) if weight and item != 3}
    total = sum(left.values())
    for first, second in ((6, 4), (1, 2), (4, 6)):
        chance = left[first] / total * left[second] / (total - left[first])
        assert np.mean([items[1:3] == [first, second] for items in drawn]) == pytest.approx(chance, abs=0.03)


def test_more_samples_than_items_are_all_items(toy, caplog):
    toy["config_dict"] |= {"eval_args": {"mode": "pop50"}}
    _, _, _, test = untrained("GRU4Rec", toy)
    assert "mode: pop50 asks for 50 items beside each target, and there are 19; all of them are taken" in caplog.text
    assert all(sorted(items.tolist()) == list(range(1, 21)) for batch in test for items in batch.candidates)


def test_checkpoints_and_resumed_runs_hold_both_protocols(toy):
    trainer, train, valid, _ = untrained("GRU4Rec", {**toy, "config_dict": {**toy["config_dict"], "epochs": 1}})
    _, best = trainer.fit(train, valid)
    training = checkpoint.newest(trainer.folder)[1].info["training"]
    assert training["best_valid_result"] == best and training["best_valid_result_masked"] == best.masked != best
    again, train, valid, _ = untrained("GRU4Rec", {**toy, "config_dict": {**toy["config_dict"], "epochs": 1}})
    again.resume_checkpoint(trainer.folder)
    _, found = again.fit(train, valid)
    assert found == best and found.masked == best.masked


def test_popularity_needs_the_training_set(toy):
    toy["config_dict"] |= {"metrics": ["AveragePopularity"], "valid_metric": "AveragePopularity@10"}
    trainer, _, _, test = untrained("GRU4Rec", toy, prepare=data_preparation)
    with pytest.raises(UserError, match="metrics: averagepopularity needs the training set"):
        trainer.evaluate(test, load_best_model=False)


def test_groups_of_targets_make_up_the_whole(toy):
    """Frequent, rare and unseen items, and histories of three kinds of length; both protocols."""
    random = np.random.default_rng(0)
    n, events = 300, np.array([0, 9, 9, 8, 1, 1, 1, 1, 1, 0, 2, 1])
    ranking = Ranking(
        user=np.arange(n),
        item=random.integers(1, 12, n),
        events=random.integers(1, 30, n),
        ranks=random.integers(1, 12, (n, 2)).astype(float),
        listed=np.full((n, 2), 11),
        best=np.empty((n, 2, 0), dtype=int),
    )
    config = {"metrics": ["Hit", "GAUC", "ItemCoverage"], "topk": [3], "metric_decimal_place": 12}
    found = by_group(ranking, config, events)
    items = [found.pop(name) for name in ("head items", "tail items", "items that training never saw")]
    assert np.isin(ranking.item, [1, 2]).sum() == items[0]["targets"]
    assert (ranking.item == 9).sum() == items[2]["targets"]
    hit = np.mean(ranking.ranks[np.isin(ranking.item, [1, 2])] <= 3, axis=0)
    assert [items[0]["hit@3"], items[0]["masked hit@3"]] == pytest.approx(hit.tolist())
    assert len(found) == 3 and all(re.fullmatch(r"histories of \d+ to \d+ events", name) for name in found)
    for groups in (items, found.values()):
        assert sum(group["targets"] for group in groups) == n
        for name, value in (("hit@3", ranking.ranks[:, 0] <= 3), ("masked gauc", (11 - ranking.ranks[:, 1]) / 10)):
            assert sum(group["targets"] * group[name] for group in groups) / n == pytest.approx(value.mean())
    assert "head items" in text_of(by_group(ranking, config, events))


@pytest.mark.parametrize(
    ("pauses", "whole_days", "expected"),
    [
        ([0, 1, 3600, 3601, 10**6, 0], False, {SAME_MOMENT: 2, WITHIN_AN_HOUR: 2, AFTER_AN_HOUR: 2}),
        ([-9, 86_400, 86_400, 86_400, 0, 0], False, {SAME_MOMENT: 3, AFTER_AN_HOUR: 3}),
        ([0, 86_400, 3 * 86_400, 0, 0, 0], True, {SAME_DAY: 4, LATER_DAY: 2}),
        ([0] * 6, False, {SAME_MOMENT: 6}),
    ],
)
def test_targets_stand_apart_by_the_time_since_the_event_before(pauses, whole_days, expected):
    """Dates know of no hours; groups without targets are left out; an older target counts as of the same moment."""
    ranks = np.stack([np.arange(1.0, 7), np.ones(6)], 1)
    columns = (
        np.arange(6),
        np.ones(6, dtype=int),
        np.arange(6),
        ranks,
        np.full((6, 2), 6),
        np.empty((6, 2, 0), dtype=int),
    )
    config = {"metrics": ["Hit"], "topk": [2], "metric_decimal_place": 4}
    found = by_group(Ranking(*columns), config, np.array([0, 1]), np.array(pauses), whole_days)
    assert {name: found[name]["targets"] for name in found if name in PAUSES} == expected
    zero = next(iter(expected))
    assert found[zero]["hit@2"] == pytest.approx(np.mean(ranks[np.array(pauses) <= 0, 0] <= 2), abs=1e-4)
    assert not set(PAUSES) & by_group(Ranking(*columns), config, np.array([0, 1])).keys()


def test_a_run_tells_both_protocols_and_its_groups(toy, caplog):
    toy["config_dict"] |= {"epochs": 0, "state": "INFO"}
    with caplog.at_level("DEBUG"):
        result = run_recbole_ssm("GRU4Rec", **toy)
    assert result["test_result"].keys() == result["test_result_masked"].keys() == METRICS
    groups = result["test_by_group"]
    assert groups["head items"]["targets"] + groups["tail items"]["targets"] == 60
    assert "test result:\nunmasked  hit@1 : " in caplog.text and "masked hit@10" in caplog.text
    for phase in ("valid", "test"):
        assert f"{phase}: 0 of 60 targets are items that training never saw" in caplog.text


@pytest.mark.parametrize("saved", [True, False])
def test_no_epochs_evaluate_the_model_as_it_is(toy, saved):
    """The untrained one, or the one of a checkpoint."""
    toy["config_dict"] |= {"epochs": 0}
    untrained_result = run_recbole_ssm("GRU4Rec", **toy, saved=saved)
    assert untrained_result["best_valid_result"] is None and 0 < untrained_result["test_result"]["hit@10"] < 1
    toy["config_dict"]["epochs"] = 2
    trained = run_recbole_ssm("GRU4Rec", **toy)
    toy["config_dict"]["epochs"] = 0
    again = run_recbole_ssm("GRU4Rec", **toy, saved=saved, resume=trained["checkpoint"])
    assert again["test_result"] == trained["test_result"] != untrained_result["test_result"]
