"""The order of a user's events of one time: that of the file, or one that a seed draws for itself."""

import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_ssm import run_recbole_ssm
from recbole_ssm.cli import main
from recbole_ssm.commands.evaluate import evaluate
from recbole_ssm.commands.histories import histories_of
from recbole_ssm.data import create_dataset
from recbole_ssm.data.ties import are_tied, drawn_numbers, rows_by_time
from recbole_ssm.errors import UserError
from recbole_ssm.quick_start import configure
from recbole_ssm.trainer import checkpoint

HEADER = "user_id:token\titem_id:token\ttimestamp:float\n"
EVENTS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 4)), max_size=40)


def in_order(events, seed):
    """Events (user, item, time) as ``ties: random`` orders those of each user, and the rows that they had."""
    users, items, times = (np.array([event[field] for event in events], dtype=np.int64) for field in range(3))
    names = [f"u{number}" for number in range(4)], [f"i{number}" for number in range(10)]
    rows = rows_by_time(users, times, drawn_numbers((users, names[0]), (items, names[1]), times, seed))
    by_user = rows[np.argsort(users[rows], kind="stable")]
    return [events[row] for row in by_user], rows


@given(events=EVENTS, seed=st.integers(0, 2**32 - 1), shuffle=st.randoms(use_true_random=False))
def test_an_order_is_a_permutation_within_ties_whatever_the_order_of_the_file(events, seed, shuffle):
    found, rows = in_order(events, seed)
    times, users = ([event[field] for event in events] for field in (2, 0))
    stable = sorted(range(len(events)), key=times.__getitem__)
    assert sorted(rows) == list(range(len(events)))
    # Row by row the user and the time are those of the stable order, so events have moved within ties alone.
    assert [(times[row], users[row]) for row in rows] == [(times[row], users[row]) for row in stable]
    assert in_order(events, seed)[0] == found
    shuffled = list(events)
    shuffle.shuffle(shuffled)
    assert in_order(shuffled, seed)[0] == found
    # Other users' events and other times decide nothing.
    some = [event for event in events if event[0] == 1 and event[2] > 1]
    assert in_order(some, seed)[0] == [event for event in found if event in some]


def test_the_order_differs_by_seed_user_and_time_and_every_order_comes():
    six = [(0, item, 0) for item in range(6)]
    orders = [tuple(item for _, item, _ in in_order(six, seed)[0]) for seed in range(300)]
    assert len(set(orders)) > 200
    assert all(abs(sum(order[place] == 0 for order in orders) - 50) < 35 for place in range(6))
    found = in_order([(user, item, time) for user in range(4) for time in range(5) for item in range(6)], 1)[0]
    assert len({tuple(item for _, item, _ in found[at : at + 6]) for at in range(0, 120, 6)}) > 15


def test_a_fraction_in_one_row_changes_no_number_of_another():
    users, items, times = np.zeros(7, dtype=int), np.arange(7), np.array([5, 5, 5, -1, 0, 2**53, 6])
    columns = (users, ["u"]), (items, list("abcdefg"))
    whole = drawn_numbers(*columns, times, 7)
    fractions = times.astype(float)
    fractions[6] = 6.5
    found = drawn_numbers(*columns, fractions, 7)
    assert found[:6].tolist() == whole[:6].tolist() and found[6] != whole[6]


def test_the_file_order_is_the_stable_one():
    times, users = np.array([3, 1, 3, 1, 2]), np.array([0, 0, 0, 1, 1])
    assert rows_by_time(users, times).tolist() == [1, 3, 4, 0, 2]
    assert are_tied(np.array([0, 0, 1, 1]), np.array([5, 5, 5, 6])).tolist() == [False, True, False, False]
    assert are_tied(np.array([], dtype=int), np.array([], dtype=int)).tolist() == []


def tied_data(write_dataset, shuffle=None, name="made"):
    """Users whose four events of one second are always written in the order of their items, then one later event."""
    rows = [f"u{u}\ti{item}\t{978300000 + item // 4}\n" for u in range(30) for item in range(9)]
    if shuffle:
        random.Random(shuffle).shuffle(rows)
    options = write_dataset(HEADER + "".join(rows), name=name)
    options["config_dict"] |= {"topk": [1, 5], "valid_metric": "Hit@1", "epochs": 1, "state": "INFO"}
    return options


def rows_of(options, **more):
    """User and part -> history and target, as tokens, of all rows."""
    config = configure("GRU4Rec", options["dataset"], config_dict={**options["config_dict"], **more})
    data = create_dataset(config)
    found = {}
    for part, split in enumerate(data.build()):
        rows = split.inter_feat[:]
        for user, items, target, length in zip(
            *(rows[key] for key in ("user_id", "item_id_list", "item_id", "item_length"))
        ):
            history = data.id2token("item_id", items[:length].numpy())
            key = part, str(data.id2token("user_id", int(user))), int(length)
            found[key] = [*map(str, history), str(data.id2token("item_id", int(target)))]
    return found


@pytest.mark.parametrize(
    "split",
    [{"LS": "valid_and_test"}, {"RS": [0.6, 0.2, 0.2]}, {"TS": [0.6, 0.2, 0.2]}, {"GTS": [0.3, 0.3, 0.4]}],
    ids=lambda split: next(iter(split)),
)
def test_every_split_is_of_the_drawn_order(write_dataset, split):
    options = tied_data(write_dataset)
    how = {"eval_args": {"split": split}}
    file, drawn = rows_of(options, **how), rows_of(options, ties="random", **how)
    assert file == rows_of(options, ties="file", **how) and file != drawn
    assert file.keys() == drawn.keys()
    assert drawn == rows_of(options, ties="random", **how) != rows_of(options, ties="random", ties_seed=1, **how)
    if next(iter(split)) in ("LS", "GTS"):
        # RecBole's shares follow the rows of a user in their order, which a file decides among users only.
        other = tied_data(write_dataset, shuffle=3, name="other")
        assert rows_of(other, ties="random", **how) == drawn != rows_of(other, **how)
    for row in drawn.values():
        seconds = [int(item[1:]) // 4 for item in row]
        assert seconds == sorted(seconds)


def test_a_run_says_its_ties_and_keeps_them(write_dataset, caplog, capsys):
    options = tied_data(write_dataset)
    options["config_dict"]["ties"] = "random"
    with caplog.at_level(logging.INFO):
        result = run_recbole_ssm("GRU4Rec", **options)
    assert (
        "ties: random; 75.0% of consecutive events of a user have one time, and their order is drawn by ties_seed 2020"
        in caplog.text
    )
    protocol = {"ties": "random", "ties_seed": 2020, "seed": 2020}
    assert protocol.items() <= result["protocol"].items()
    path = result["checkpoint"]
    info = checkpoint.find_best(Path(path))[1].info
    assert (info["config"]["ties"], info["config"]["ties_seed"]) == ("random", 2020)
    assert evaluate(path) == result["test_result"]
    assert evaluate(path, command_line=["--ties=file"]).protocol["ties"] == "file"
    assert main(["evaluate", path, "--json=found.json"]) == 0
    assert "'ties': 'random'" in capsys.readouterr().out
    with open("found.json") as file:
        assert protocol.items() <= json.load(file)["protocol"].items()
    with pytest.raises(UserError, match="resume: ties is 'file' here and was 'random'"):
        run_recbole_ssm(resume=path, config_dict={"ties": "file", "epochs": 2})


def test_recommended_histories_are_in_the_order_that_was_learned(write_dataset):
    options = tied_data(write_dataset)
    for more in ({}, {"ties": "random"}):
        config = configure("GRU4Rec", options["dataset"], config_dict={**options["config_dict"], **more})
        histories = histories_of("all", config)
        tests = {user: row for (part, user, _), row in rows_of(options, **more).items() if part == 2}
        assert {user: list(items) for user, items in zip(histories.users, histories)} == tests


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"legacy_time_order": True}, "ties: random needs times that are not touched, and legacy_time_order rounds"),
        ({"benchmark_filename": ["a", "b", "c"]}, "ties: random .* benchmark_filename's rows are made; take ties: fil"),
        ({"ties": "rand"}, "ties: 'rand' is not one of file, random; did you mean 'random'"),
    ],
)
def test_mistakes(toy, options, message):
    with pytest.raises(UserError, match=message):
        configure("GRU4Rec", "toy", config_dict={**toy["config_dict"], "ties": "random", **options})


def test_inspect_says_what_may_stand_on_the_order_of_the_file(write_dataset, capsys):
    options = tied_data(write_dataset)
    command = ["inspect", "made", f"--data_path={options['config_dict']['data_path']}", "--json=found.json"]
    assert main(command) == 0
    with open("found.json") as file:
        assert json.load(file)["ties"] == {"events": 180, "share": 0.75, "targets": 0.0}
    out = capsys.readouterr().out
    assert "(75.0% of consecutive pairs); 0.0% of the test targets" in out
    assert "so a result may stand on the order of the file; state it beside every figure, and its twin by" in out
