"""What RecBole offers beside items and times: further columns and files, transforms, labels."""

import logging

import numpy as np
import pytest
import torch

from recbole_ssm import run_recbole_ssm
from recbole_ssm.data import create_dataset
from recbole_ssm.data.loader import create_loaders
from recbole_ssm.data.splits import training_events
from recbole_ssm.errors import UserError
from recbole_ssm.quick_start import configure

INTER = ["user_id", "item_id", "timestamp"]
ROWS = [(f"u{u}", f"i{(u + t) % 15}", t + 100 * u) for u in range(20) for t in range(8)]


@pytest.fixture
def data(write_dataset):
    lines = [f"{user}\t{item}\t{time}\t1 {time} 2.5\t{time % 5}" for user, item, time in ROWS]
    head = "user_id:token\titem_id:token\ttimestamp:float\tvector:float_seq\trating:float"
    options = write_dataset("\n".join([head, *lines]) + "\n")
    lines = [f"i{k}\t{k} 1.5\t{k}.5\tc{k} d" for k in range(15)]
    write_dataset(
        "\n".join(["item_id:token\tpair:float_seq\tprice:float\tclass:token_seq", *lines]) + "\n", suffix="item"
    )
    lines = [f"e{k}\t{k} 1" for k in range(5)]
    write_dataset("\n".join(["ent_id:token\tent_vector:float_seq", *lines]) + "\n", suffix="ent")
    options["config_dict"] |= {"topk": [1, 5], "valid_metric": "NDCG@5", "state": "WARNING", "epochs": 1}
    return options


def create(data, model="GRU4Rec", **changes):
    data["config_dict"] |= changes
    return create_dataset(configure(model, **data))


def batch_of(data, model="GRU4Rec", **changes):
    """All rows of training as one batch, with what the loader's transform adds."""
    config = configure(model, **{**data, "config_dict": {**data["config_dict"], **changes, "train_batch_size": 10_000}})
    train, _, _ = create_loaders(config, create_dataset(config))
    return train, next(iter(train)).parts[0].batch


def test_columns_that_are_not_used_go(data):
    found = create(data, load_col={"inter": [*INTER, "rating"]}, unused_col={"inter": ["rating", "timestamp"]})
    columns = found.build()[0].inter_feat.columns
    assert not {"rating", "rating_list", "timestamp", "timestamp_list"} & set(columns) and "item_id_list" in columns
    assert run_recbole_ssm("GRU4Rec", **data, saved=False)["test_result"]
    for unused, message in (
        ({"user": ["x"]}, "no file .user is loaded"),
        ({"inter": ["item_id"]}, "item_id is needed"),
    ):
        with pytest.raises(UserError, match=f"unused_col: {message}"):
            create(data, unused_col=unused).build()


def test_crop_keeps_a_share_of_each_history(data):
    _, batch = batch_of(data, transform="crop_itemseq", eta=0.5)
    histories, lengths = batch["item_id_list"], batch["item_length"]
    cropped, kept = batch["Crop_item_id_list"], batch["Crop_item_id_listitem_length"]
    assert torch.equal(kept, lengths // 2) and cropped.shape == histories.shape
    for history, length, crop, size in zip(histories.tolist(), lengths.tolist(), cropped.tolist(), kept.tolist()):
        runs = [history[start : start + size] for start in range(length - size + 1)]
        assert crop[:size] in runs and not any(crop[size:])


def test_reorder_keeps_the_items_of_each_history(data):
    _, batch = batch_of(data, transform="reorder_itemseq", beta=1.0)
    before, after = batch["item_id_list"], batch["Reorder_item_id_list"]
    assert torch.equal(before.sort().values, after.sort().values) and not torch.equal(before, after)


def test_mask_and_inverse(data):
    train, batch = batch_of(data, transform="mask_itemseq", mask_ratio=0.5)
    before, masked = batch["item_id_list"], batch["Mask_item_id_list"]
    hidden = masked == train._dataset.item_num
    assert hidden.any() and torch.equal(masked[~hidden], before[~hidden])
    _, batch = batch_of(data, transform="inverse_itemseq")
    assert torch.equal(batch["Inverse_item_id_list"].sort().values, batch["item_id_list"].sort().values)


@pytest.mark.parametrize("transform", ["crop_itemseq", "reorder_itemseq", "mask_itemseq", "inverse_itemseq"])
def test_a_run_with_a_transform(data, transform):
    data["config_dict"] |= {"transform": transform, "eta": 0.6, "beta": 0.6, "mask_ratio": 0.3}
    assert run_recbole_ssm("SASRec", **data, saved=False)["test_result"]


MISTAKES = [
    ({"transform": "crop_itemseq"}, "eta: crop_itemseq needs it, a share of the history; try eta: 0.5"),
    ({"transform": "mask_itemseq"}, "mask_ratio: mask_itemseq needs it"),
    ({"transform": "user_defined"}, "transform: 'user_defined' is not one of None, mask_itemseq, inverse"),
    ({"eval_args": {"mode": "labeled"}}, "eval_args: mode: labeled ranks nothing; take mode: full, or metrics of"),
    (
        {"eval_args": {"mode": "labeled"}, "metrics": ["AUC"], "valid_metric": "AUC"},
        "eval_args: mode: labeled needs labels; load a column label, or make it of another by threshold",
    ),
    ({"numerical_features": ["timestamp"]}, "numerical_features: timestamp is the time of events, not a feature"),
    ({"selected_features": ["price"]}, "selected_features: price is not loaded; see load_col"),
    (
        {"selected_features": ["pair"], "load_col": {"inter": INTER, "item": ["item_id", "pair"]}},
        "selected_features: pair is a number; name it in numerical_features too",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistakes_are_one_line(data, changes, message):
    with pytest.raises(UserError) as caught:
        batch_of(data, "GRU4RecF" if "selected_features" in changes else "GRU4Rec", **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_labels_are_evaluated(data):
    data["config_dict"] |= {"load_col": {"inter": [*INTER, "rating"]}, "threshold": {"rating": 3}}
    data["config_dict"] |= {"eval_args": {"mode": "labeled"}, "metrics": ["AUC", "LogLoss"], "valid_metric": "AUC"}
    assert set(run_recbole_ssm("GRU4Rec", **data, saved=False)["test_result"]) == {"auc", "logloss"}


@pytest.mark.parametrize("numerical", [[], ["vector"]])
def test_sequences_of_numbers_stand_by_their_event(data, numerical):
    _, batch = batch_of(data, load_col={"inter": [*INTER, "vector"]}, numerical_features=numerical, train_mode="prefix")
    values = batch["vector"][..., 0] if numerical else batch["vector"]
    lists = batch["vector_list"][..., 0] if numerical else batch["vector_list"]
    times, past = batch["timestamp"], batch["timestamp_list"]
    assert torch.equal(
        values,
        torch.stack([torch.ones_like(times), times, torch.full_like(times, 2.5)], 1).float()
        + torch.tensor([0, 0, 0.5]),
    )
    assert torch.equal(lists[..., 1], past.float())


def test_features_of_items_stand_by_their_item(data):
    load = {"inter": INTER, "item": ["item_id", "pair", "price"]}
    found = create(data, "GRU4RecF", load_col=load, numerical_features=["pair", "price"], selected_features=["pair"])
    train = found.build()[0]
    items = train.item_feat
    number = np.array([int(name[1:]) for name in found.id2token("item_id", items["item_id"][1:])])
    assert np.array_equal(items["pair"][1:, :, 0], np.stack([number, np.full(15, 1.5)], 1))
    assert np.allclose(items["price"][1:, 0], number + 0.5)
    assert run_recbole_ssm("GRU4RecF", **data, saved=False)["test_result"]


def test_further_files_are_loaded_with_ids_of_their_own(data):
    found = create(data, additional_feat_suffix=["ent"], load_col={"inter": INTER, "ent": ["ent_id", "ent_vector"]})
    train = found.build()[0]
    assert list(found.id2token("ent_id", train.ent_feat["ent_id"])) == [f"e{k}" for k in range(5)]
    assert train.ent_feat["ent_vector"].tolist() == [[k, 1.0] for k in range(5)]
    assert found.item_num == 16


def test_contradicting_descriptions_are_counted(data, write_dataset, caplog):
    lines = ["i1\t1\ta b", "i2\t2\tc", "i1\t1\ta b", "i2\t3\tc", "i3\t\td", "i3\t\td", "i1\t1\ta", "i1\t4\ta"]
    write_dataset("\n".join(["item_id:token\tprice:float\tclass:token_seq", *lines]) + "\n", suffix="item")
    with caplog.at_level(logging.WARNING):
        load = {"inter": INTER, "item": ["item_id", "price", "class"]}
        found = create(data, load_col=load, topk=1, valid_metric="NDCG@1")
    assert "made.item, line 5: item_id 'i2' again, with other values, and 2 such ids in all; the first" in caplog.text
    assert found.item_feat["price"][found.token2id("item_id", "i2")] == 2


FILES = {
    "item": "item_id:token\t{}\n" + "".join(f"i{k}\t{k}\n" for k in range(15)),
    "user": "user_id:token\t{}\n" + "".join(f"u{k}\t{k}\n" for k in range(20)),
}


@pytest.mark.parametrize("load_col", [None, {"inter": "*", "user": "*", "item": "*"}])
@pytest.mark.parametrize(
    ("of_users", "of_items", "message"),
    [
        ("age:float", "timestamp:float", "made.item, line 1: made.inter has a column timestamp too"),
        ("age:float", "rating:token", "made.item, line 1: made.inter has a column rating too"),
        ("age:float", "user_id:token", "made.item, line 1: made.inter has a column user_id too"),
        ("item_id:token", "price:float", "made.user, line 1: made.inter has a column item_id too"),
        ("stars:float", "stars:float", "made.item, line 1: made.user has a column stars too"),
    ],
)
def test_a_column_of_two_files_is_refused(data, write_dataset, load_col, of_users, of_items, message):
    """RecBole joins users and items to events by name: the time of an event would be that of its item."""
    for suffix, column in (("user", of_users), ("item", of_items)):
        write_dataset(FILES[suffix].format(column), suffix=suffix)
    with pytest.raises(UserError, match=message) as caught:
        create(data, load_col=load_col)
    assert "rename one, or load one alone (load_col, unload_col)" in str(caught.value)
    more = {"item": of_items.split(":")[:1], "user": of_users.split(":")[:1]}
    assert create(data, load_col=None, unload_col=more).item_num == 16


@pytest.mark.parametrize("suffix", ["item", "user"])
def test_lines_without_an_id_are_faulty(data, write_dataset, suffix, caplog):
    write_dataset(FILES[suffix].format("price:float") + "\t1\n\t2\n", suffix=suffix)
    line = {"item": 17, "user": 22}[suffix]
    load = {"inter": INTER, suffix: [f"{suffix}_id", "price"]}
    with pytest.raises(UserError, match=f"made.{suffix}, line {line}: {suffix}_id is empty; fill it in or drop the"):
        create(data, load_col=load)
    assert create(data, load_col=load, on_bad_lines="skip").item_num == 16
    assert f"made.{suffix}: 2 lines skipped, the first because line {line}" in caplog.text


@pytest.mark.parametrize("drop", [False, True])
def test_targets_that_training_never_saw_are_counted_and_may_go(write_dataset, caplog, drop):
    """u0 to u3 meet i0 to i7; then two of them test on an item that nobody trained on, and one validates on it."""
    rows = [(f"u{u}", f"i{t}", t) for u in range(4) for t in range(8)]
    rows += [("u0", "i1", 8), ("u0", "new", 9), ("u1", "other", 8), ("u1", "new", 9), ("u2", "i1", 8), ("u2", "i2", 9)]
    options = write_dataset(
        "user_id:token\titem_id:token\ttimestamp:float\n" + "".join(f"{u}\t{i}\t{t}\n" for u, i, t in rows)
    )
    options["config_dict"] |= {"topk": 1, "valid_metric": "NDCG@1", "drop_cold_targets": drop}
    config = configure("GRU4Rec", **options)
    with caplog.at_level(logging.INFO):
        _, valid, test = create_loaders(config, create_dataset(config))
    mend = "they are left out" if drop else "drop_cold_targets: True leaves them out"
    assert f"valid: 1 of 4 targets are items that training never saw; {mend}" in caplog.text
    assert f"test: 2 of 4 targets are items that training never saw; {mend}" in caplog.text
    assert [len(loader.dataset) for loader in (valid, test)] == ([3, 2] if drop else [4, 4])


@pytest.mark.parametrize("cut", [{"train_rows": 5}, {"train_rows": 30}, {"train_last": 1}, {"train_newest": 1}, {}])
def test_what_is_left_out_of_training_was_not_seen(toy, caplog, cut):
    """Targets and all of their histories were seen, and nothing else."""
    toy["config_dict"] |= cut | {"drop_cold_targets": True}
    config = configure("GRU4Rec", **toy)
    with caplog.at_level(logging.INFO):
        train, _, test = create_loaders(config, create_dataset(config))
    batch = train._dataset.inter_feat[:]
    seen = {0, *batch["item_id"].tolist(), *batch["item_id_list"].flatten().tolist()}
    assert np.flatnonzero(training_events(train._dataset)).tolist() == sorted(seen - {0})
    tested = test._dataset.inter_feat["item_id"].tolist()
    assert seen.issuperset(tested)
    assert f"test: {60 - len(tested)} of 60 targets are items that training never saw" in caplog.text
