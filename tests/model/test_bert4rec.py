"""BERT4Rec reads whole histories, where RecBole leaves out the oldest event."""

import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender.bert4rec import BERT4Rec as RecBoleBERT4Rec

from recbole_ssm import load_recommender, run_recbole_ssm
from recbole_ssm.data import create_dataset
from recbole_ssm.model import get_model
from recbole_ssm.quick_start import configure
from recbole_ssm.serving import Recommender

LENGTH = 6


@pytest.fixture
def model(toy):
    config = configure("BERT4Rec", toy["dataset"], config_dict={**toy["config_dict"], "MAX_ITEM_LIST_LENGTH": LENGTH})
    torch.manual_seed(0)
    return get_model("BERT4Rec")(config, create_dataset(config)).eval()


def scores(model, histories):
    padded = torch.tensor([history + [0] * (LENGTH - len(history)) for history in histories])
    lengths = torch.tensor([len(history) for history in histories])
    rows = Interaction({"item_id_list": padded, "item_length": lengths, "item_id": torch.full_like(lengths, 7)})
    with torch.no_grad():
        every = model.full_sort_predict(rows)
        torch.testing.assert_close(model.predict(rows), every[:, 7])
    return every


def test_the_mask_stands_behind_the_history(model):
    histories = torch.tensor([[4, 0, 0, 0, 0, 0], [4, 5, 6, 0, 0, 0], [4, 5, 6, 7, 8, 0], [3, 4, 5, 6, 7, 8]])
    found = model.reconstruct_test_data(histories, torch.tensor([1, 3, 5, 6]))
    m = model.mask_token
    assert found.tolist() == [[4, m, 0, 0, 0, 0], [4, 5, 6, m, 0, 0], [4, 5, 6, 7, 8, m], [4, 5, 6, 7, 8, m]]


def test_the_oldest_event_counts_unless_the_history_is_full(model):
    one, other = ([first, 5, 6] for first in (2, 3))
    assert not torch.allclose(*scores(model, [one, other]))
    assert not torch.allclose(*scores(model, [[2], [3]]))
    assert torch.allclose(*scores(model, [[2, *range(4, 9)], [3, *range(4, 9)]]))


def test_full_histories_score_as_in_recbole(model):
    histories = [[*range(k, k + LENGTH)] for k in (1, 5, 9)]
    found = scores(model, histories)
    model.__class__ = RecBoleBERT4Rec
    torch.testing.assert_close(found, scores(model, histories))


def test_recommend_and_evaluation_agree(model):
    tokens = [f"i{k}" for k in range(model.n_items)]
    config = {"ITEM_ID_FIELD": "item_id", "LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "item_length"}
    config |= {"MAX_ITEM_LIST_LENGTH": LENGTH, "device": "cpu", "model": "BERT4Rec", "TIME_FIELD": "timestamp"}
    recommender = Recommender(model, config, tokens)
    expected = scores(model, [[4, 9]])
    expected[:, 0] = -torch.inf
    assert recommender.recommend(["i4", "i9"], 1)[0][0] == tokens[int(expected.argmax())]


@pytest.mark.slow
def test_one_event_is_enough_to_know_what_follows(write_dataset):
    """Users alternate between two items of their own; none is right where one event is the mask alone."""
    rows = "".join(f"u{user}\t{'AB'[time % 2]}{user % 10}\t{time}\n" for user in range(200) for time in range(8))
    options = write_dataset("user_id:token\titem_id:token\ttimestamp:float\n" + rows)
    options["config_dict"] |= {"epochs": 60, "learning_rate": 0.003, "MAX_ITEM_LIST_LENGTH": 20, "state": "ERROR"}
    recommender = load_recommender(run_recbole_ssm("BERT4Rec", **options)["checkpoint"])
    assert [recommender.recommend([f"A{k}"], 1)[0][0] for k in range(10)] == [f"B{k}" for k in range(10)]
