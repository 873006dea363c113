"""What a training set says of its times: their unit and the longest gap; and which data have no clock times."""

import itertools

import numpy as np
import pytest

from recbole_ssm.data import create_dataset
from recbole_ssm.data.gaps import TimeScale, time_scale
from recbole_ssm.data.loader import PackedBatch, create_loaders
from recbole_ssm.data.outline import DatasetOutline
from recbole_ssm.errors import UserError
from recbole_ssm.quick_start import configure

START = 978_300_000
DAY = 86_400


def loaders(write_dataset, times, unit=1, **options):
    """Loaders of users u0, u1 ... with these times, each with events of the items i0, i1 ..."""
    lines = [f"u{user}\ti{n}\t{time * unit}" for user, row in enumerate(times) for n, time in enumerate(row)]
    made = write_dataset("user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(lines) + "\n")
    config = configure("2Mamba4Rec", "made", config_dict={**made["config_dict"], "topk": [1], "valid_metric": "Hit@1",
                       "time": "query", "state": "WARNING", **options})  # fmt: skip
    return create_loaders(config, create_dataset(config))


@pytest.mark.parametrize(("unit", "step"), [(1, 7), (1000, 30), (1, DAY), (10**9, 1)])
def test_the_unit_and_the_longest_gap_are_those_of_training(write_dataset, unit, step):
    """Whatever validation and test hold: their gaps, of 500 and 900 steps, are not seen."""
    rows = [[0, 1, 1, 12, 512, 1412], [3, 5, 9, 19, 519, 1419]]
    times = [[START + step * time for time in row] for row in rows]
    scale = time_scale(loaders(write_dataset, times, unit)[0]._dataset)
    assert scale == TimeScale(START % step, step, 11)


def test_an_outline_and_one_time_for_all_have_a_scale_too(write_dataset):
    assert time_scale(DatasetOutline(5)) == TimeScale(0, 1, 0)
    assert time_scale(loaders(write_dataset, [[START] * 5, [START] * 4])[0]._dataset) == TimeScale(0, 1, 0)


@pytest.mark.parametrize("times", [[1, 2, 3, 4], [0, 2, 3, 7], [18_000, 18_001, 18_007, 18_100]])
def test_positions_and_days_are_no_clock_times(write_dataset, times):
    with pytest.raises(UserError, match=f"time: query needs clock times, and timestamp goes from {times[0]} to"):
        loaders(write_dataset, [times, times])
    loaders(write_dataset, [times, times], time="none")


def test_rounded_times_and_changed_histories_are_refused(write_dataset):
    times = [[START, START + 1, START + 2]] * 2
    with pytest.raises(UserError, match="legacy_time_order: rounds times, which time: query reads; leave it out"):
        loaders(write_dataset, times, legacy_time_order=True)
    with pytest.raises(UserError, match="transform: crop_itemseq moves the items of histories and not their times"):
        loaders(write_dataset, times, transform="crop_itemseq", eta=0.5)


@pytest.mark.parametrize("given", [{"query_enters": "output"}, {"query_calendar": True}])
def test_what_is_of_query_alone_is_refused_elsewhere(toy, given):
    for time, shown in (("gaps", "gaps"), (None, "none")):
        with pytest.raises(
            UserError, match=f"{next(iter(given))}: is of time: query, and time is {shown}; leave it out"
        ):
            configure("GRU4Rec", "toy", config_dict={**toy["config_dict"], "time": time, **given})


def test_a_gap_enters_only_where_times_are_read(toy):
    given = {**toy["config_dict"], "gap_enters": "step"}
    with pytest.raises(UserError, match="gap_enters: is of time: gaps or query, and time is none; leave it out"):
        configure("2Mamba4Rec", "toy", config_dict=given)
    with pytest.raises(UserError, match="gap_enters: there is no such key"):
        configure("Mamba4Rec", "toy", config_dict={**given, "time": "gaps"})


def test_an_empty_value_is_the_text_none(toy):
    for given in (None, "none"):
        assert configure("SASRec", "toy", config_dict={**toy["config_dict"], "time": given})["time"] is None
    with pytest.raises(UserError, match="time: 'gap' is not one of .*gaps"):
        configure("SASRec", "toy", config_dict={**toy["config_dict"], "time": "gap"})


@pytest.mark.parametrize("length", [3, 50])
def test_batches_carry_times_and_the_moment_of_asking(write_dataset, length):
    """Packed: each event knows when the next one came. Rows: their own time is that of the target."""
    generator = np.random.default_rng(0)
    times = [(START + generator.integers(1, 10**6, 12).cumsum()).tolist() for _ in range(3)]
    options = {"MAX_ITEM_LIST_LENGTH": length, "train_batch_size": 4}
    train, valid, _ = loaders(write_dataset, times, **options)
    follows = {(one, other) for row in times for one, other in itertools.pairwise(row)}
    seen = set()
    for step in train:
        for _, batch in step.parts:
            assert isinstance(batch, PackedBatch)
            seen |= set(zip(batch.times[batch.at].tolist(), batch.now[batch.at].tolist()))
            assert set(zip(batch.times.tolist(), batch.now.tolist())) <= follows
    assert seen == {(one, other) for row in times for one, other in itertools.pairwise(row[:-2])}
    (batch,) = valid
    newest = batch.interaction["timestamp_list"].amax(1).tolist()
    assert set(zip(newest, batch.interaction["timestamp"].tolist())) == {tuple(row[-3:-1]) for row in times}
    for step in loaders(write_dataset, times, **options, time="none")[0]:
        assert all(batch.times is None and batch.now is None for _, batch in step.parts)


@pytest.mark.parametrize("split", [{"GTS": [0.6, 0.2, 0.2]}, {"TS": [0.6, 0.2, 0.2]}])
@pytest.mark.parametrize("mode", ["packed", "prefix"])
def test_under_a_split_by_time_training_sees_no_time_beyond_the_cut(write_dataset, mode, split):
    """Neither as an event nor as a moment of asking; what is evaluated is asked at the time of the target."""
    generator = np.random.default_rng(1)
    starts = START + generator.integers(0, 4 * 10**6, 12)
    times = [(start + generator.integers(0, 10**6, 14).cumsum()).tolist() for start in starts]
    options = {"MAX_ITEM_LIST_LENGTH": 5, "train_mode": mode, "eval_args": {"split": split}}
    train, valid, test = loaders(write_dataset, times, **options)
    follows = {(one, other) for row in times for one, other in itertools.pairwise(row)}
    asked = [set(), set(), set()]
    for part in (part for step in train for part in step.parts):
        batch = part.batch
        if mode == "packed":
            newest, now = batch.times[batch.at], batch.now[batch.at]
            assert set(zip(batch.times.tolist(), batch.now.tolist())) <= follows
            assert batch.now.max() == now.max()
        else:
            newest, now = batch["timestamp_list"].amax(1), batch["timestamp"]
        asked[0] |= set(zip(newest.tolist(), now.tolist()))
    for found, rows in zip(asked[1:], (valid, test)):
        for row in (batch.interaction for batch in rows):
            found |= set(zip(row["timestamp_list"].amax(1).tolist(), row["timestamp"].tolist()))
    assert set.union(*asked) == follows and sum(map(len, asked)) == len(follows)
    moments = [[now for _, now in pairs] for pairs in asked]
    assert max(moments[0] + moments[1]) < min(moments[2])
    assert "TS" in split or max(moments[0]) < min(moments[1])
    longest = max(now - newest for newest, now in asked[0])
    assert time_scale(train._dataset).longest == longest
