"""Rows that are gathered on the fly are RecBole's rows, one for one."""

import numpy as np
import pytest
import torch
from recbole.data.dataset import SequentialDataset as RecBoleDataset

from recbole_ssm.data import create_dataset
from recbole_ssm.data.dataset import SequentialDataset
from recbole_ssm.data.prefixes import Prefixes
from recbole_ssm.quick_start import configure


class WrittenOut(SequentialDataset):
    """The same data set by RecBole's own augmentation and splits."""

    data_augmentation = RecBoleDataset.data_augmentation
    leave_one_out = RecBoleDataset.leave_one_out
    split_by_ratio = RecBoleDataset.split_by_ratio
    time_based_split = RecBoleDataset.time_based_split


@pytest.fixture
def data(write_dataset):
    """Histories of 1 to 30 events with ties in time, a float column and a list of numbers."""
    rng = np.random.default_rng(0)
    lines = ["user_id:token\titem_id:token\ttimestamp:float\trating:float\ttags:token_seq"]
    for user in range(25):
        for _ in range(1 + rng.integers(30)):
            tags = " ".join(f"g{t}" for t in rng.integers(0, 5, rng.integers(1, 4)))
            lines.append(f"u{user}\ti{rng.integers(1, 40)}\t{rng.integers(9)}\t{rng.random():.3f}\t{tags}")
    options = write_dataset("\n".join(lines) + "\n")
    options["config_dict"] |= {
        "MAX_ITEM_LIST_LENGTH": 7,
        "load_col": {"inter": ["user_id", "item_id", "timestamp", "rating", "tags"]},
    }
    return options


SPLITS = [
    {"split": {"LS": "valid_and_test"}},
    {"split": {"LS": "valid_only"}},
    {"split": {"LS": "test_only"}},
    {"split": {"RS": [0.8, 0.1, 0.1]}},
    {"split": {"RS": [0.6, 0.2, 0.2]}, "group_by": None},
    {"split": {"TS": [0.8, 0.1, 0.1]}},
]


@pytest.mark.parametrize("eval_args", SPLITS)
def test_rows_are_recboles_in_its_order(data, eval_args):
    data["config_dict"]["eval_args"] = eval_args
    config = configure("SASRec", **data)
    for ours, written_out in zip(SequentialDataset(config).build(), WrittenOut(config).build()):
        assert isinstance(ours.inter_feat, Prefixes)
        assert len(ours) == len(written_out)
        rows = np.arange(len(ours))
        found, expected = ours[rows], written_out[rows]
        assert list(found) == list(expected) == list(ours.inter_feat)
        for column in expected:
            assert found[column].dtype == expected[column].dtype
            assert torch.equal(found[column], expected[column])
            assert torch.equal(ours.inter_feat[column], expected[column])


def test_numerical_fields_keep_their_second_column(data):
    data["config_dict"]["numerical_features"] = ["rating"]
    config = configure("SASRec", **data)
    ours, written_out = (kind(config).build()[0][np.arange(20)] for kind in (SequentialDataset, WrittenOut))
    assert torch.equal(ours["rating_list"], written_out["rating_list"])


def test_it_answers_like_an_interaction(data):
    train = SequentialDataset(configure("SASRec", **data)).build()[0]
    rows = train.inter_feat
    assert "item_id_list" in rows and "nothing" not in rows
    whole = rows[:]
    assert torch.equal(rows[3]["item_id_list"], whole["item_id_list"][3])
    assert torch.equal(rows[np.int64(3)]["item_id_list"], whole["item_id_list"][3])
    mask = whole["item_length"] == 1
    assert torch.equal(rows[mask]["item_id"], whole["item_id"][mask])
    assert torch.equal(rows[[2, 0]]["item_id"], whole["item_id"][[2, 0]])
    rows.sort(by=["item_id", "user_id"])
    whole.sort(by=["item_id", "user_id"])
    assert torch.equal(rows["item_id_list"], whole["item_id_list"])
    rows.sort(by="item_id", ascending=False)
    assert (rows["item_id"].diff() <= 0).all()
    rows.shuffle()
    assert sorted(rows["item_id"].tolist()) == sorted(whole["item_id"].tolist())
    rows.drop("rating")
    assert "rating" not in rows and "rating_list" not in rows[:]


def test_interaction_matrix_counts_every_training_event(data):
    config = configure("SASRec", **data)
    ours, written_out = (kind(config).build()[0].inter_matrix().toarray() for kind in (SequentialDataset, WrittenOut))
    assert np.array_equal(ours, written_out) and ours.sum() > 100


def test_a_model_with_rows_of_its_own_keeps_them(toy):
    toy["config_dict"]["load_col"] = {"inter": ["user_id", "item_id", "timestamp"]}
    data = create_dataset(configure("DIEN", **toy))
    train = data.build()[0]
    assert "neg_item_list" in train.inter_feat.columns or "neg_item_id_list" in train.inter_feat.columns


def test_a_row_costs_eight_bytes(data):
    train = SequentialDataset(configure("SASRec", **data)).build()[0].inter_feat
    assert train.target.nbytes + train.length.nbytes == 8 * len(train)
