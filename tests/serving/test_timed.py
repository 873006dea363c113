"""Models that read times at work: recommend, sessions and commands say the same, and one line says what is missing."""

import csv
import itertools
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_ssm import load_recommender, ops, run_recbole_ssm
from recbole_ssm.cli import main
from recbole_ssm.commands import evaluate
from recbole_ssm.errors import UserError
from recbole_ssm.ops import native

BACKENDS = ["torch"] if native.unusable else ["torch", "native"]
START = 978_300_000
WAYS = {
    "gaps": ("Mamba4Rec", {"time": "gaps"}),
    "query": ("2Mamba4Rec", {"time": "query"}),
    "calendar": ("2Mamba4Rec", {"time": "query", "query_calendar": True, "norm_position": "pre", "score": "cosine"}),
    "output": ("Mamba4Rec", {"time": "query", "query_enters": "output", "query_calendar": True}),
    "step": ("2Mamba4Rec", {"time": "query", "gap_enters": "step", "norm_position": "pre"}),
    "gaps in the step": ("2Mamba4Rec", {"time": "gaps", "gap_enters": "step"}),
    "attention": ("SASRec", {"time": "query"}),
    "none": ("2Mamba4Rec", {}),
}
STATEFUL = ["gaps", "query", "calendar", "output", "step", "gaps in the step"]


def times_of(user, count):
    """From no time at all to a month between two events."""
    gaps = [0, *np.random.default_rng(user).integers(0, 12, count - 1)]
    return [START + int(second) for second in np.cumsum([gap**6 for gap in gaps])]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Way -> checkpoint and test result, of a data set of 30 users."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data" / "timed").mkdir(parents=True)
    lines = [f"u{user}\ti{(user + n) % 20}\t{time}" for user in range(30) for n, time in enumerate(times_of(user, 8))]
    text = "user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(lines) + "\n"
    (folder / "data" / "timed" / "timed.inter").write_text(text)
    options = {"data_path": str(folder / "data"), "checkpoint_dir": str(folder / "saved"), "epochs": 2, "topk": [5]}
    options |= {"valid_metric": "NDCG@5", "MAX_ITEM_LIST_LENGTH": 8, "show_progress": False, "state": "WARNING"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield {
            way: run_recbole_ssm(name, "timed", config_dict={**options, **more}) for way, (name, more) in WAYS.items()
        }


@pytest.fixture(scope="module")
def recommenders(trained):
    return {way: load_recommender(result["checkpoint"], device="cpu") for way, result in trained.items()}


HISTORY = [f"i{n}" for n in (3, 9, 4, 4, 17, 0, 8, 2)]
TIMES = times_of(77, 8)


def assert_same(found, expected, tolerance=1e-5):
    assert [token for token, _ in found] == [token for token, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=tolerance)


def differ(found, other):
    return dict(found) != dict(other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", STATEFUL)
def test_a_session_recommends_what_recommend_does(recommenders, way, backend):
    recommender = recommenders[way]
    with ops.use_backend(backend):
        for begin in (0, 1, 5):
            session = recommender.session(HISTORY[:begin], times=TIMES[:begin])
            for end, (item, time) in enumerate(zip(HISTORY[begin:], TIMES[begin:]), begin + 1):
                session.update(item, time)
                for wait in (0, 40, 10**6):
                    # Asking leaves nothing behind, however often it is done.
                    now = TIMES[end - 1] + wait
                    expected = recommender.recommend(HISTORY[:end], 20, times=TIMES[:end], now=now)
                    assert_same(session.top(20, now=now), expected)


@pytest.mark.parametrize("way", STATEFUL)
def test_a_session_goes_on_from_its_state(recommenders, way):
    recommender = recommenders[way]
    session = recommender.session(HISTORY[:4], times=TIMES[:4])
    other = recommender.session()
    other.load_state_dict(session.state_dict())
    copied = session.clone()
    for one in (session, other, copied):
        one.update(HISTORY[4], TIMES[4])
    now = TIMES[4] + 99
    assert session.top(5, now=now) == other.top(5, now=now) == copied.top(5, now=now)
    assert differ(session.top(20, now=now), recommender.session(HISTORY[:4], times=TIMES[:4]).top(20, now=now))
    broken = {name: tensor for name, tensor in session.state_dict().items() if name != "newest"}
    with pytest.raises(UserError, match="a state of another model; it differs in newest"):
        other.load_state_dict(broken)
    with pytest.raises(UserError, match="a state of another model"):
        recommenders["none"].session().load_state_dict(session.state_dict())
    other.load_state_dict(recommender.session().state_dict())
    assert other.top(3).source == "popularity"


@pytest.mark.parametrize("way", WAYS)
def test_only_what_it_reads_counts(recommenders, way):
    recommender = recommenders[way]
    now = TIMES[-1] + 60
    at_once = recommender.recommend(HISTORY, 20, times=TIMES, now=now)
    other_gap = [*TIMES[:3], *[time + 10**6 for time in TIMES[3:]]]
    assert differ(at_once, recommender.recommend(HISTORY, 20, times=other_gap, now=now + 10**6)) == (way != "none")
    later = recommender.recommend(HISTORY, 20, times=TIMES, now=now + 10**5)
    assert differ(at_once, later) == (way not in ("none", "gaps", "gaps in the step"))


@pytest.mark.parametrize("way", ["gaps", "query", "step"])
def test_a_time_before_the_event_before_counts_as_its_time(recommenders, way):
    recommender, now = recommenders[way], TIMES[5] + 700
    backwards = [*TIMES[:4], TIMES[3] - 5000, TIMES[3] - 90, *TIMES[5:7]]
    counted = [*TIMES[:4], TIMES[3], TIMES[3], *TIMES[5:7]]
    expected = recommender.recommend(HISTORY, 20, times=counted, now=now)
    assert recommender.recommend(HISTORY, 20, times=backwards, now=now) == expected
    session = recommender.session()
    for item, time in zip(HISTORY, backwards):
        session.update(item, time)
    assert_same(session.top(20, now=now), expected)


def test_times_and_moments_are_of_each_history(recommenders):
    for name, given in (("times", {"times": [TIMES], "now": 5}), ("now", {"times": [TIMES, TIMES], "now": [5]})):
        with pytest.raises(UserError, match=f"{name}: has fewer entries than there are histories"):
            recommenders["query"].recommend_many([HISTORY, HISTORY], **given)


def test_a_typed_history_has_no_times(trained, capsys):
    assert main(["recommend", str(Path(trained["gaps"]["checkpoint"]).parent), "--history=i1,i2"]) == 2
    assert "this model reads the times of events, and these events have none" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["query", "output", "attention"])
def test_a_moment_may_be_written_as_one_likes(recommenders, way):
    recommender = recommenders[way]

    def top(now, times=TIMES):
        return recommender.recommend(HISTORY, 20, times=times, now=now)

    now = TIMES[-1] + 12_345
    expected = top(now)
    east = timezone(timedelta(hours=9))
    moment = datetime.fromtimestamp(now, timezone.utc)
    written = [now + 0.9, np.int64(now), np.float64(now), moment, moment.replace(tzinfo=None), moment.isoformat()]
    for one in [*written, moment.astimezone(east), np.datetime64(now, "s"), np.datetime64(now * 1000, "ms")]:
        assert top(one) == expected
    dates = [datetime.fromtimestamp(time, timezone.utc) for time in TIMES]
    assert top(now, dates) == top(now, np.array(TIMES)) == expected
    # Before the newest event is at the newest event, and beyond the longest gap of training is the longest gap.
    assert top(0) == top(TIMES[-1]) != expected
    week = 7 * 86_400
    assert top(TIMES[-1] + 2000 * week) == top(TIMES[-1] + 9000 * week)
    assert differ(top(TIMES[-1] + 2000 * week), expected)


def test_many_histories_equal_one_by_one(recommenders):
    for way in ("query", "attention"):
        recommender = recommenders[way]
        histories = [HISTORY[:2], [], HISTORY, ["nosuch", *HISTORY[:3]]]
        times = [TIMES[:2], [], TIMES, [START - 10**6, *TIMES[:3]]]
        for now in (TIMES[-1] + 500, [TIMES[-1] + wait for wait in (1, 2, 3000, 4)]):
            together = recommender.recommend_many(histories, 5, times=times, now=now, skip_unknown=True)
            moments = now if isinstance(now, list) else [now] * 4
            for number in (0, 2):
                one = recommender.recommend(histories[number], 5, times=times[number], now=moments[number])
                assert_same(together[number], one)
            assert together[1].source == "popularity" and together[3].skipped == 1
            # What is skipped takes its time with it: the gap is to the event before it, and here there is none.
            assert_same(together[3], recommender.recommend(HISTORY[:3], 5, times=TIMES[:3], now=moments[3]))
        vectors = recommender.user_vectors(histories, skip_unknown=True, times=times, now=TIMES[-1] + 500)
        scores = recommender.score(HISTORY, ["i1", "i5"], times=TIMES, now=TIMES[-1] + 500)
        table = recommender.item_vectors()[[recommender.items.index(token) - 1 for token in ("i1", "i5")]]
        assert (table @ vectors[2]).tolist() == pytest.approx(scores, abs=1e-5)
        assert not vectors[1].any()


def test_vectors_of_users_in_pieces_are_those_of_all(trained, recommenders, monkeypatch):
    """Each history with its own times, whatever piece it comes in; an error names the history."""
    folder, recommender = Path(trained["query"]["checkpoint"]).parent, recommenders["query"]
    now = START + 10**7
    monkeypatch.setattr("recbole_ssm.serving.recommender.MOST_EVENTS", 2 * recommender.max_length)
    assert main(["export", str(folder), "--what=users", "--out=v.npy", "--device=cpu", f"--now={now}"]) == 0
    users, vectors = Path("v.npy.ids.txt").read_text().split(), np.load("v.npy")
    assert sorted(users) == sorted(f"u{number}" for number in range(30))
    for user, vector in zip(users, vectors):
        number = int(user[1:])
        history = [f"i{(number + n) % 20}" for n in range(8)]
        expected = recommender.user_vectors([history], times=[times_of(number, 8)], now=now)[0]
        np.testing.assert_allclose(vector, expected, atol=1e-5)
    with pytest.raises(UserError, match=r"histories\[5\]: item 'x' is not in the catalogue"):
        recommender.user_vectors([*[HISTORY] * 5, ["x"]], times=[*[TIMES] * 5, [START]], now=now)


def test_what_is_missing_is_one_line(recommenders):
    timed, gaps = recommenders["query"], recommenders["gaps"]
    with pytest.raises(UserError, match="times: this model reads the times of events; give one for each item of hist"):
        timed.recommend(HISTORY, now=TIMES[-1])
    with pytest.raises(UserError, match="now: this model reads how long ago the newest event was"):
        timed.recommend(HISTORY, times=TIMES)
    with pytest.raises(UserError, match=r"times\[1\]: has 1 times for the 8 items of histories\[1\]"):
        timed.recommend_many([HISTORY[:1], HISTORY], times=[TIMES[:1]] * 2, now=TIMES[-1])
    with pytest.raises(UserError, match=r"times\[2\]: must be seconds since 1970, a datetime, or a date .*got 'noon'"):
        timed.recommend(HISTORY[:3], times=[1, 2, "noon"], now=3)
    with pytest.raises(UserError, match="now: must be seconds since 1970, got 978300000000, which is beyond"):
        timed.recommend(HISTORY, times=TIMES, now=START * 1000)
    for wrong in (True, float("nan"), [], np.datetime64("NaT")):
        with pytest.raises(UserError, match="now: must be seconds since 1970, a datetime, or a date"):
            timed.score(HISTORY, ["i1"], times=TIMES, now=wrong)
    with pytest.raises(UserError, match="times: must be a list with a time for each item, got 5"):
        gaps.recommend(HISTORY, times=5)
    assert gaps.recommend(HISTORY, times=TIMES) == gaps.recommend(HISTORY, times=TIMES, now=TIMES[-1] + 10**6)
    with pytest.raises(UserError, match="reads the times of events; give times beside the items"):
        timed.scores([[1, 2]])
    with pytest.raises(UserError, match="times: this model reads"):
        gaps.session(HISTORY)
    session = timed.session(HISTORY[:2], times=TIMES[:2])
    before = session.top(now=TIMES[2])
    for item, time in ((HISTORY[2], None), ("nosuch", TIMES[2]), (HISTORY[2], "noon")):
        with pytest.raises(UserError):
            session.update(item, time)
    with pytest.raises(UserError, match="now: this model reads"):
        session.top()
    assert session.top(now=TIMES[2]) == before
    # A model without times passes over them.
    plain = recommenders["none"].session(HISTORY[:2], times=TIMES[:2])
    plain.update(HISTORY[2], TIMES[2])
    assert plain.top(now=TIMES[2]) == plain.top()


def test_evaluation_again_gives_the_results_of_the_run(trained):
    for way in ("gaps", "query", "output"):
        found = evaluate(trained[way]["checkpoint"], config_dict={"state": "WARNING", "show_progress": False})
        assert dict(found) == dict(trained[way]["test_result"])


@pytest.mark.parametrize("source", ["all", "events.inter", "milliseconds.csv"])
def test_the_command_reads_times_and_the_moment(trained, recommenders, source):
    users = {f"u{user}": ([f"i{(user + n) % 20}" for n in range(8)], times_of(user, 8)) for user in range(30)}
    events = [(user, *event) for user, columns in users.items() for event in zip(*columns)]
    header = "user_id:token\titem_id:token\ttimestamp:float"
    Path("events.inter").write_text("\n".join([header, *("\t".join(map(str, row)) for row in events)]) + "\n")
    rows = [f"{user},{item},{time}000" for user, item, time in events]
    Path("milliseconds.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    checkpoint = trained["query"]["checkpoint"]
    assert main(["recommend", checkpoint, f"--users={source}", "--k=3", "--device=cpu", "--now=2001-06-01"]) == 0
    with open("recommendations.csv", newline="") as file:
        found = [(row["user_id"], row["item_id"], float(row["score"])) for row in csv.DictReader(file)]
    assert len(found) == 90
    for user, rows in itertools.groupby(found, lambda row: row[0]):
        history, times = users[user]
        expected = recommenders["query"].recommend(history, 3, times=times, now="2001-06-01")
        assert_same([row[1:] for row in rows], expected)


def test_the_commands_say_what_is_missing(trained, capsys):
    checkpoint = trained["query"]["checkpoint"]
    assert main(["recommend", checkpoint, "--device=cpu"]) != 0
    assert "now: this model reads how long ago" in capsys.readouterr().err
    Path("order.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"u1,i{n},{n}\n" for n in range(5)))
    assert main(["recommend", checkpoint, "--device=cpu", "--users=order.csv", "--now=2001-06-01"]) != 0
    assert "this model reads the times of events" in capsys.readouterr().err
    assert main(["export", checkpoint, "--device=cpu", "--what=users", "--out=u.npy", "--now=2001-06-01"]) == 0
    assert np.load("u.npy").shape[0] == 30
    assert main(["export", checkpoint, "--device=cpu", "--what=users", "--out=v.npy"]) != 0
    assert "now: this model reads" in capsys.readouterr().err


def test_what_the_checkpoint_keeps_of_the_data(trained, recommenders):
    kept = recommenders["query"].model.time_encoding.scale
    longest = max(b - a for user in range(30) for a, b in itertools.pairwise(times_of(user, 8)[:6]))
    assert kept[1] == 1 and kept[2] == longest
    assert torch.equal(kept, recommenders["attention"].model.time_encoding.scale)


def test_training_on_keeps_the_scale_that_the_buckets_have(trained, write_dataset):
    """Gaps of days and longer ones in the new data: what was trained by seconds goes on by seconds."""
    days = [f"u{user}\ti{(user + n) % 20}\t{START + 86_400 * 50 * n}" for user in range(30) for n in range(6)]
    given = write_dataset("user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(days) + "\n", name="timed")
    first = trained["query"]["checkpoint"]
    options = {**given["config_dict"], "epochs": 1, "topk": [5], "valid_metric": "NDCG@5", "state": "WARNING"}
    second = run_recbole_ssm(None, "timed", config_dict=options, init=first)["checkpoint"]
    scales = [load_recommender(path, device="cpu").model.time_encoding.scale for path in (first, second)]
    assert torch.equal(*scales) and scales[0][1] == 1
    with pytest.raises(UserError, match="init: time is 'gaps' here and was 'query'"):
        run_recbole_ssm(None, "timed", config_dict={**options, "time": "gaps"}, init=first)
