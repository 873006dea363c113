"""The split by time against its definition, and through the whole configuration."""

import datetime
import logging
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_ssm import run_recbole_ssm
from recbole_ssm.data import create_dataset, temporal
from recbole_ssm.data.temporal import is_position, leak_of_leave_one_out, split_by_time
from recbole_ssm.errors import UserError
from recbole_ssm.quick_start import configure

HEADER = "user_id:token\titem_id:token\ttimestamp:float\n"


@given(
    times=st.lists(st.integers(0, 30), min_size=10, max_size=200),
    ratios=st.tuples(*[st.sampled_from([0.1, 0.2, 0.5, 1, 3])] * 3),
)
def test_parts_follow_each_other_and_have_their_shares(times, ratios):
    times, shares = np.array(times, dtype=np.float64), np.array(ratios) / sum(ratios)
    try:
        parts = split_by_time(times, shares)
    except UserError as error:
        assert "leaves a part without events" in str(error)
        return
    for before, after in ((0, 1), (1, 2)):
        assert times[parts == before].max() < times[parts == after].min()
    # as many as asked for, up to the events that share the time of the boundary
    for part in (0, 1):
        asked = shares[: part + 1].sum() * len(times)
        reached = (parts <= part).sum()
        assert asked - 1e-6 <= reached < asked + np.sum(times == times[parts <= part].max()) + 1e-6


@given(rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=40))
def test_the_leak_counts_later_training_events(rows):
    users, times = (np.array(column) for column in zip(*rows))
    training, targets = [], []
    for user in set(users.tolist()):
        own = sorted(times[users == user].tolist())
        if len(own) >= 3:
            training += own[:-2]
            targets.append(own[-1])
    found = leak_of_leave_one_out(users, times.astype(np.float64))
    later = [sum(time > target for time in training) for target in targets]
    assert found["targets"] == len(targets)
    if targets:
        assert found["after_targets"] == pytest.approx(np.mean([count > 0 for count in later]))
        assert found["median_future"] == pytest.approx(np.median(later) / len(training))


def test_positions():
    users = np.array([0, 1, 0, 1, 0])
    assert is_position(users, np.array([0.0, 0, 1, 1, 2]))
    assert is_position(users, np.array([1.0, 2, 3, 1, 2]))
    assert not is_position(users, np.array([0.0, 0, 1, 2, 2]))
    assert not is_position(users, np.array([0.0, 1, 1, 2, 2]))
    assert not is_position(np.zeros(3, dtype=int), np.arange(3.0))  # one user: these may be times


@pytest.mark.parametrize("split", ["LS", "GTS"])
def test_a_look_at_times_takes_little_memory(split):
    draw, rows = np.random.default_rng(0), 300_000
    users, items = draw.integers(0, 1000, (2, rows))
    times = draw.integers(0, 1 << 30, rows).astype(np.float64)
    tracemalloc.start()
    if split == "LS":
        assert temporal.leave_one_out_warning(users, times)
    else:
        parts = split_by_time(times, [0.8, 0.1, 0.1])
        temporal.parts_of_targets(parts, users, times)
        temporal.describe(parts, users, items, times)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak / rows < 28  # bytes, beside the 24 of the events themselves


def events(seed=0, base=978_300_000):
    """Events a second apart, finer than RecBole's float32 can tell."""
    draw = np.random.default_rng(seed)
    return [(f"u{draw.integers(6)}", f"i{draw.integers(15)}", base + t) for t in draw.permutation(120)]


def text(rows):
    return HEADER + "".join(f"{user}\t{item}\t{time}\n" for user, item, time in rows)


GTS = {"eval_args": {"split": {"GTS": [0.6, 0.2, 0.2]}}}


def test_each_event_is_a_target_of_its_part_with_its_whole_past(write_dataset, caplog):
    rows = events()
    options = write_dataset(text(rows))
    options["config_dict"] |= GTS
    with caplog.at_level(logging.INFO):
        data = create_dataset(configure("GRU4Rec", **options))
        parts = data.build()
    assert "split by time: 72 events train, 24 after 978300071 validate, 24 after 978300095 test" in caplog.text
    assert "leave-one-out" not in caplog.text
    by_time = sorted(rows, key=lambda row: row[2])
    for part, (low, high) in zip(parts, ((0, 72), (72, 96), (96, 120))):
        expected = []
        for place, (user, item, _) in enumerate(by_time[low:high], low):
            past = [name for who, name, _ in by_time[:place] if who == user]
            if past:
                expected.append((user, tuple(past), item))
        items, users = data.field2id_token["item_id"], data.field2id_token["user_id"]
        found = [
            (
                users[row["user_id"]],
                tuple(items[row["item_id_list"][: row["item_length"]].numpy()]),
                items[row["item_id"]],
            )
            for row in (part.inter_feat[index] for index in range(len(part.inter_feat)))
        ]
        assert sorted(found) == sorted(expected)


def test_rows_get_the_part_of_their_own_time_in_recboles_order_too(write_dataset):
    rows = [(user, item, 978_300_000 + 17 * (time - 978_300_000)) for user, item, time in events(seed=3)]
    options = write_dataset(text(rows))
    options["config_dict"] |= {**GTS, "legacy_time_order": True}
    parts = create_dataset(configure("GRU4Rec", **options)).build()
    times = [part.inter_feat["timestamp"] for part in parts]
    assert times[0].max() < times[1].min() and times[1].max() < times[2].min()
    assert sum(map(len, times)) == len(rows) - len({user for user, _, _ in rows})


@pytest.mark.parametrize("per_second", [1, 1000, 10**9])
def test_dates_split_too(write_dataset, caplog, per_second):
    """From 2020-01-01 and 2020-01-02T12:00 on, a day of events each: whoever is at the moment comes after it."""
    start = 1_577_836_800 - 86_400
    rows = [(f"u{k % 5}", f"i{k % 7}", (start + 3600 * k) * per_second) for k in range(90)]
    options = write_dataset(text(rows))
    options["config_dict"] |= {"eval_args": {"split": {"GTS": ["2020-01-01", "2020-01-02T12:00:00"]}}, "topk": 1}
    options["config_dict"]["valid_metric"] = "NDCG@1"
    with caplog.at_level(logging.INFO):
        parts = create_dataset(configure("GRU4Rec", **options)).build()
    assert [len(part) for part in parts] == [24 - 5, 36, 30]
    assert parts[1].inter_feat["timestamp"].min() == 1_577_836_800
    assert parts[2].inter_feat["timestamp"].min() == 1_577_836_800 + 36 * 3600
    assert "24 events train, 36 after" in caplog.text


def test_dates_that_do_not_split(write_dataset):
    options = write_dataset(text(events()))
    early, late = datetime.date(1990, 1, 1), datetime.date(1991, 1, 1)
    options["config_dict"]["eval_args"] = {"split": {"GTS": [early, late]}}
    with pytest.raises(UserError, match="GTS leaves a part without events, as all of them .from 978300000 to"):
        create_dataset(configure("GRU4Rec", **options)).build()
    options = write_dataset(text([(user, item, time - 978_300_000) for user, item, time in events()]))
    options["config_dict"]["eval_args"] = {"split": {"GTS": [early, late]}}
    with pytest.raises(UserError, match="GTS by dates needs clock times, and these go from 0 to"):
        create_dataset(configure("GRU4Rec", **options)).build()


def test_leave_one_out_tells_what_it_leaks(write_dataset, caplog):
    """In one line of information, since it is the project's own default."""
    with caplog.at_level(logging.INFO):
        create_dataset(configure("GRU4Rec", **write_dataset(text(events())))).build()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "leave-one-out: " in caplog.text and "recommendations are not concerned" in caplog.text
    typed = re.search('--eval_args="(.*)"', caplog.text)[1]
    # As a shell hands it on.
    config = configure("GRU4Rec", **write_dataset(text(events())), command_line=[f"--eval_args={typed}"])
    assert config["eval_args"]["split"] == {"GTS": [0.8, 0.1, 0.1]} and config["eval_args"]["order"] == "TO"


def test_the_moment_of_a_split_after_recboles_manner_is_exact(write_dataset):
    """In float32, as RecBole rounds them, times of 1998 lie 64 s apart, and rows of a minute fall to one side."""
    rows = "".join(f"u{u}\ti{t}\t{891382800 + 10 * t + u}\n" for u in range(5) for t in range(12))
    options = write_dataset(HEADER + rows)
    options["config_dict"] |= {"eval_args": {"split": {"TS": [0.8, 0.1, 0.1]}}}
    train, valid, test = create_dataset(configure("GRU4Rec", **options)).build()
    moment = np.percentile([891382800 + 10 * t + u for u in range(5) for t in range(1, 12)], 90)
    assert test.inter_feat["timestamp"].tolist() == [t for t in test.inter_feat["timestamp"].tolist() if t > moment]
    assert len(test) == 6 and len(train) + len(valid) == 49


@pytest.mark.parametrize("model", ["2Mamba4Rec", "SASRec"])
def test_a_run(write_dataset, model):
    options = write_dataset(text(events()))
    options["config_dict"] |= {**GTS, "epochs": 1, "MAX_ITEM_LIST_LENGTH": 8, "state": "WARNING"}
    assert 0 <= run_recbole_ssm(model, **options)["test_result"]["ndcg@10"] <= 1


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            {"GTS": [0.8, 0.2]},
            "eval_args: GTS takes three positive shares of the events, got [0.8, 0.2]; try split: {'GTS",
        ),
        ({"GTS": [0.8, 0.2, 0]}, "eval_args: GTS takes three positive shares of the events, got [0.8, 0.2, 0]"),
        ({"GTS": "late"}, "eval_args: GTS takes three positive shares of the events, got 'late'"),
        ({"GTS": ["2020-01-02", "2020-01-01"]}, "eval_args: GTS takes three positive shares of the events, got ['2020"),
        (
            {"GTS": ["2020-01-02", "soon"]},
            "eval_args: GTS takes three positive shares of the events, got ['2020-01-02', 's",
        ),
        ({"XS": 1}, "eval_args: there is no split 'XS'; known are RS, LS, TS, GTS"),
        ({"LS": "all"}, "eval_args: LS must be one of valid_and_test, valid_only, test_only, got 'all'"),
        ("LS", "eval_args: split must be one entry such as {'LS': 'valid_and_test'}, got 'LS'"),
    ],
)
def test_wrong_splits(split, message):
    with pytest.raises(UserError) as caught:
        configure("GRU4Rec", "toy", config_dict={"eval_args": {"split": split}})
    assert str(caught.value).startswith(message)


def test_parts_that_hold_nothing(write_dataset):
    options = write_dataset(HEADER + "".join(f"u{u}\ti{u + t}\t5\n" for u in range(3) for t in range(12)))
    options["config_dict"] |= GTS
    with pytest.raises(UserError, match="GTS leaves a part without events, as too many of them share one time"):
        create_dataset(configure("GRU4Rec", **options)).build()
    rows = "".join(f"u{u}\ti{t}\t{978300000 + t}\n" for u in range(3) for t in range(12))
    options = write_dataset(HEADER + rows + "".join(f"n{u}\ti1\t{978400000 + u}\n" for u in range(20)), name="new")
    options["config_dict"] |= GTS
    with pytest.raises(UserError, match="GTS leaves validation with nothing but first events of users"):
        create_dataset(configure("GRU4Rec", **options)).build()
