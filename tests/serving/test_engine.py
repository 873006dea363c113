"""The engine: whatever comes in whatever order, a state is what its events give, and an answer what recommend gives."""

import errno
import random
import struct
import time
import zlib

import numpy as np
import pytest
import torch

from recbole_ssm.bench.untrained import untrained_model
from recbole_ssm.errors import UserError
from recbole_ssm.serving import Recommender
from recbole_ssm.serving.engine import Engine
from recbole_ssm.serving.record import STATE_EVERY, Record, chunk_key, packed_state, state_key
from recbole_ssm.serving.served import Rules, Served
from recbole_ssm.serving.states import Unread
from recbole_ssm.serving.store import MemoryStore, StoreError
from recbole_ssm.serving.visits import Event, Visit
from tests.serving.conftest import record_of, row_of

CONFIG = {
    "ITEM_ID_FIELD": "item_id", "LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "item_length",
    "TIME_FIELD": "timestamp", "MAX_ITEM_LIST_LENGTH": 20, "device": torch.device("cpu"),
}  # fmt: skip


def untrained(name, seed, letter="i", **options):
    """A model of 20 items, ``i0`` to ``i19``, as it is served; its vectors are as large as those of a trained one."""
    torch.manual_seed(seed)
    cpu, items = torch.device("cpu"), ["[PAD]", *(f"{letter}{number}" for number in range(20))]
    model = untrained_model(name, 20, cpu, MAX_ITEM_LIST_LENGTH=20, **options)
    with torch.no_grad():
        model.item_embedding.weight.mul_(10)
    counts = torch.arange(21)
    return Served(Recommender(model, CONFIG | {"model": name}, items, counts), f"{seed:064x}"[::-1])


@pytest.fixture(scope="module")
def models():
    """Name -> a model as it is served; ``other`` is another Mamba-2 of the same items."""
    return {
        "Mamba4Rec": untrained("Mamba4Rec", 1),
        "2Mamba4Rec": untrained("2Mamba4Rec", 2, num_layers=2),
        "other": untrained("2Mamba4Rec", 3, num_layers=1),
        "SASRec": untrained("SASRec", 4, train_neg_sample_args=None),
        "cosine": untrained("2Mamba4Rec", 5, score="cosine", temperature=0.1),
    }


def assert_same(found, expected):
    assert [item for item, _ in found] == [item for item, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], rel=1e-6, abs=1e-5)


def assert_states_are_those_of_their_events(engine, tolerance=1e-5):
    served = engine.served
    for user in engine.store.users():
        expected = served.states.read(Unread(served.catalogue.ids(record_of(engine.store, user).items.texts())))
        row = row_of(engine.store, user, served, tolerance)
        np.testing.assert_allclose(row, expected, atol=tolerance, rtol=tolerance)


def visit(engine, *visits):
    found = engine.visit(visits)
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


@pytest.mark.parametrize("name", ["Mamba4Rec", "2Mamba4Rec", "SASRec", "cosine"])
def test_recommendations_are_those_of_the_whole_history(models, name):
    engine = Engine(models[name], MemoryStore())
    recommender = models[name].recommender
    histories = {f"u{n}": [f"i{(3 * n + j) % 20}" for j in range(2 + n)] for n in range(9)}
    for j in range(10):
        now = {user: history[j] for user, history in histories.items() if j < len(history)}
        found = visit(engine, *(Visit(user, [Event(item)], k=5) for user, item in now.items()))
        for user, one in zip(now, found):
            assert_same(one.recommended, recommender.recommend(histories[user][: j + 1], 5))
            assert (one.taken, one.events, one.model) == (1, j + 1, models[name].digest)
    asked = [Visit(user, k=20, exclude_seen=True, candidates=["i3", "i1"]) for user in histories]
    for user, one in zip(histories, visit(engine, *asked)):
        assert_same(one.recommended, recommender.recommend(histories[user], 20, exclude_seen=True))
        assert one.scores == pytest.approx(recommender.score(histories[user], ["i3", "i1"]), abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("state_type", ["float32", "bf16"])
def test_any_order_of_events_gives_the_state_of_the_events_in_order(models, seed, state_type):
    """Late events, repeated ones, unknown items, several events and several visits of a user at once."""
    draw = random.Random(seed)
    engine = Engine(models["2Mamba4Rec"], MemoryStore(), state_type=state_type)
    expected: dict = {}
    known: dict = {}
    for _ in range(30):
        visits = []
        for _ in range(draw.randint(1, 5)):
            user, events = f"u{draw.randint(0, 3)}", []
            for _ in range(draw.randint(0, 4)):
                item = draw.choice(["unknown", *(f"i{n}" for n in range(20))])
                moment, event_id = float(draw.randint(0, 50)), draw.choice([None, f"e{draw.randint(0, 99)}"])
                events.append(Event(item, moment, event_id))
                if item == "unknown" or event_id in known.setdefault(user, []):
                    continue
                if event_id is not None:
                    known[user] = [*known[user], event_id][-64:]
                mine = expected.setdefault(user, [])
                mine.insert(sum(other <= moment for other, _ in mine), (moment, item))
            visits.append(Visit(user, events, k=draw.choice([0, 3])))
        visit(engine, *visits)
    for user, mine in expected.items():
        record = record_of(engine.store, user)
        assert record.items.texts() == [item for _, item in mine]
        assert record.total == len(mine)
    if state_type == "float32":
        assert_states_are_those_of_their_events(engine)
    else:
        # Each state that is written adds an error of its own, in the third digit.
        assert_states_are_those_of_their_events(engine, 0.1)


def test_an_event_with_a_known_id_counts_once(models):
    engine = Engine(models["2Mamba4Rec"], MemoryStore())
    event = Event("i1", id="a")
    (first,) = visit(engine, Visit("u", [event, event, Event("i1")]))
    (second,) = visit(engine, Visit("u", [event]))
    assert (first.taken, first.repeated, second.taken, second.repeated, second.events) == (2, 1, 0, 1, 2)
    # Sixty-four newer ids later it is forgotten, as the documents say.
    visit(engine, Visit("u", [Event("i2", id=f"{n}") for n in range(64)]))
    assert visit(engine, Visit("u", [event]))[0].taken == 1


def test_a_call_of_many_events_that_is_sent_again_counts_once(models):
    engine = Engine(models["2Mamba4Rec"], MemoryStore())
    events = [Event(f"i{n % 20}", id=f"{n}") for n in range(100)]
    for taken in (100, 0, 0):
        (found,) = visit(engine, Visit("u", events))
        assert (found.taken, found.repeated, found.events) == (taken, 100 - taken, 100)
    visit(engine, Visit("u", [Event("i1", id="a")]))
    assert len(record_of(engine.store, "u").event_ids) == 64


def test_visits_of_one_user_are_done_one_after_the_other(models):
    engine = Engine(models["2Mamba4Rec"], MemoryStore())
    recommender = models["2Mamba4Rec"].recommender
    items = ["i1", "i2", "i3"]
    found = visit(engine, *(Visit("u", [Event(item)], k=4) for item in items))
    for count, one in enumerate(found, 1):
        assert_same(one.recommended, recommender.recommend(items[:count], 4))


def test_an_unknown_user_gets_what_is_popular(models):
    for name in ("2Mamba4Rec", "SASRec"):
        engine = Engine(models[name], MemoryStore())
        (found,) = visit(engine, Visit("nobody", k=3))
        assert found.recommended.source == "popularity" and len(found.recommended) == 3
        (found,) = visit(engine, Visit("nobody", [Event("unknown")], k=3))
        assert found.recommended.source == "popularity" and found.skipped == 1
        (error,) = engine.visit([Visit("nobody", candidates=["i1"])])
        assert isinstance(error, UserError) and "has no event of a known item" in str(error)
        assert len(engine.store) == 0


@pytest.mark.parametrize("count", [1, 3, 9])
def test_whose_events_the_model_does_not_know_gets_what_is_popular(models, count):
    """After another model took them, which has other items."""
    engine = Engine(models["2Mamba4Rec"], MemoryStore())
    visit(engine, Visit("u", [Event(f"i{n}") for n in range(count)]))
    engine.served = untrained("2Mamba4Rec", 6, letter="j")
    found, wrong = engine.visit([Visit("u", k=3), Visit("u", candidates=["j1"])])
    assert found.recommended.source == "popularity" and len(found.recommended) == 3
    assert isinstance(wrong, UserError) and "has no event of a known item" in str(wrong)
    found, stranger = visit(engine, Visit("u", [Event("j1")], k=5), Visit("nobody", k=3))
    assert_same(found.recommended, engine.served.recommender.recommend(["j1"], 5))
    assert found.recommended.source == "model" and stranger.recommended.source == "popularity"


def test_another_model_builds_its_own_states(models):
    engine = Engine(models["2Mamba4Rec"], MemoryStore())
    visit(engine, *(Visit(f"u{n}", [Event(f"i{(n + j) % 20}") for j in range(4)]) for n in range(20)))
    engine.served = models["other"]
    (found,) = visit(engine, Visit("u3", [Event("i7")], k=5))
    assert_same(found.recommended, models["other"].recommender.recommend(["i3", "i4", "i5", "i6", "i7"], 5))
    assert found.model == models["other"].digest
    for _ in engine.tidy():
        pass
    assert_states_are_those_of_their_events(engine)
    # A model without a step reads the same events.
    engine.served = models["SASRec"]
    (found,) = visit(engine, Visit("u3", k=5))
    assert_same(found.recommended, models["SASRec"].recommender.recommend(["i3", "i4", "i5", "i6", "i7"], 5))


def test_only_the_newest_events_are_kept_but_the_state_has_read_all(models):
    engine = Engine(models["2Mamba4Rec"], MemoryStore(), state_history=5)
    items = [f"i{n % 20}" for n in range(12)]
    for item in items:
        visit(engine, Visit("u", [Event(item)]))
    record = record_of(engine.store, "u")
    assert record.items.texts() == items[-5:] and record.total == 12
    served = models["2Mamba4Rec"]
    expected = served.states.read(Unread(served.catalogue.ids(items)))
    np.testing.assert_allclose(row_of(engine.store, "u", served), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["2Mamba4Rec", "SASRec"])
@pytest.mark.parametrize("history", [3, 40, 100, 10_000])
def test_long_histories_lie_in_chunks(models, name, history):
    """One event after the other, many at once, a late one, and what is left out of the answers."""
    engine, draw = Engine(models[name], MemoryStore(), state_history=history), random.Random(history)
    recommender, items = models[name].recommender, []
    while len(items) < 300:
        new = [f"i{draw.randrange(20)}" for _ in range(draw.choice([1, 1, 1, 1, 50, 5]))]
        (found,) = visit(engine, Visit("u", [Event(item) for item in new], k=20, exclude_seen=draw.random() < 0.2))
        items += new
        assert found.events == len(items)
        record = record_of(engine.store, "u")
        kept = record.items.texts()
        assert kept == items[-len(kept) :] and min(history, len(items)) <= len(kept) < history + 32
        assert len(record.event_ids) == 0
    if name == "2Mamba4Rec":
        expected = models[name].states.read(Unread(models[name].catalogue.ids(items)))
        np.testing.assert_allclose(row_of(engine.store, "u", models[name]), expected, atol=1e-5, rtol=1e-5)
    seen = {item for item, _ in recommender.recommend(kept, 20)} - {
        item for item, _ in recommender.recommend(kept, 20, exclude_seen=True)
    }
    (found,) = visit(engine, Visit("u", k=20, exclude_seen=True))
    assert {item for item, _ in found.recommended} == {f"i{n}" for n in range(20)} - seen
    # A late event stands before all that are kept, and the chunks are written again.
    visit(engine, Visit("u", [Event("i7", 1.0)]))
    late = record_of(engine.store, "u").items.texts()
    assert late == (["i7", *kept][-history:])
    assert not visit(engine, Visit("nobody", forget=True))[0].forgotten
    assert visit(engine, Visit("u", forget=True))[0].forgotten
    assert not engine.store._values


@pytest.mark.parametrize("way", [{}, {"time": "gaps"}, {"time": "query"}, {"time": "query", "query_enters": "output"}])
def test_a_late_event_that_belongs_into_the_head_leaves_the_chunks(way):
    """Those of a sender whose clock was ahead for a moment: all events until then are late."""
    engine = Engine(untrained("2Mamba4Rec", 5, **way), MemoryStore())
    now = time.time()
    happened = [(f"i{n * n % 20}", float(int(now) - 3000 + 7 * n)) for n in range(100)]
    visit(engine, Visit("u", [Event(*event) for event in happened]))
    happened.append(("i1", float(int(now) + 80_000)))
    visit(engine, Visit("u", [Event(*happened[-1])]))
    update, written = engine.store.update, []
    engine.store.update = lambda change: update(lambda get: written.append(found := change(get)) or found)
    for number in range(20):
        events = [(f"i{number}", float(int(now) + number)), ("i3", float(int(now) - 2330 + number))][: 1 + number % 2]
        happened = sorted([*happened, *events], key=lambda event: event[1])
        (found,) = visit(engine, Visit("u", [Event(*event) for event in events], k=20, now=now + 90_000))
        items, times = zip(*happened)
        assert record_of(engine.store, "u").items.texts() == list(items)
        expected = engine.served.recommender.session(items, times=times if way else None)
        assert_same(found.recommended, expected.top(20, **({"now": now + 90_000} if way else {})))
    # One chunk is new, as the head grows; none is written again.
    chunks = [key for found in written for key in found if key not in (b"u", state_key("u"))]
    assert len(chunks) == len(set(chunks)) == 1


def test_an_event_that_has_not_come_yet_is_refused(models):
    engine = Engine(models["2Mamba4Rec"], MemoryStore())
    ahead = [Event("i1"), Event("i2", time.time() + 90_000)]
    wrong, right = engine.visit([Visit("u", ahead), Visit("v", [Event("i1", time.time() + 80_000)])])
    assert isinstance(wrong, UserError) and right.taken == 1 and list(engine.store.users()) == ["v"]
    assert "of user 'u', is more than a day beyond the clock of this machine" in str(wrong)


def test_a_state_is_written_every_few_events_and_read_again(models):
    store = MemoryStore()
    written = []
    for number in range(20):
        # A server that has just begun, each time.
        engine = Engine(models["2Mamba4Rec"], store)
        before = store._values.get(state_key("u"))
        (found,) = visit(engine, Visit("u", [Event(f"i{number}")], k=5))
        expected = models["2Mamba4Rec"].recommender.recommend([f"i{n}" for n in range(number + 1)], 5)
        assert_same(found.recommended, expected)
        if store._values.get(state_key("u")) != before:
            written.append(number + 1)
    assert written == [STATE_EVERY, 2 * STATE_EVERY]


def test_a_store_of_the_former_format_goes_on(models):
    """The value that version 0.2.0 wrote, with its state; a late event, and a state that is damaged."""
    served = models["2Mamba4Rec"]
    items = [f"i{n}" for n in range(12)]
    state = packed_state(served.states.read(Unread(served.catalogue.ids(items))), 0)
    text = b"".join(item.encode() for item in items)
    lengths = struct.pack("<12H", *map(len, items))
    times = struct.pack("<12d", *range(12))
    for damage, new, count in [(b"", Event("i3"), 13), (b"", Event("i3", 0.5), 13), (b"?", Event("i3"), 13)]:
        header = struct.pack(
            "<I16sBQdIIHII", zlib.crc32(state), served.key, 0, 12, time.time(), 12, len(text), 1, 1, len(state)
        )
        body = header + times + lengths + text + b"\1\0" + b"e"
        value = struct.pack("<4sI", b"RSU1", zlib.crc32(body)) + body + state[: len(state) - len(damage)] + damage
        outcomes = []
        engine = Engine(served, MemoryStore(), count=outcomes.append)
        engine.store._values[b"u"] = value
        assert visit(engine, Visit("u", [Event("i1", id="e")]))[0].repeated == 1
        (found,) = visit(engine, Visit("u", [new], k=5))
        history = [*items, "i3"] if new.time is None else ["i0", "i3", *items[1:]]
        assert_same(found.recommended, served.recommender.recommend(history, 5))
        assert found.events == count and engine.store._values[b"u"].startswith(b"RSU2")
        assert_states_are_those_of_their_events(engine)
        assert ("rebuilt" in outcomes) == bool(damage or new.time)


def test_rules(models):
    served = models["2Mamba4Rec"]
    served = Served(served.recommender, served.digest, categories={"red": ["i1", "i2", "i3"], "blue": ["i9"]})
    engine = Engine(served, MemoryStore())
    cases = [
        (Rules(allow=["i1", "i4"]), {"i1", "i4"}),
        (Rules(allow=["i1", "i4"], deny=["i4"]), {"i1"}),
        (Rules(categories=["red"]), {"i1", "i2", "i3"}),
        (Rules(categories=["red", "blue"], deny=["i2"]), {"i1", "i3", "i9"}),
    ]
    for rules, expected in cases:
        for user in ("u", "nobody"):
            events = [Event("i5")] if user == "u" else []
            (found,) = visit(engine, Visit(user, events, k=20, rules=rules))
            assert {item for item, _ in found.recommended} == expected
        for answer in (
            served.recommender.recommend(["i5"], 20, refused=served.refused(rules)),
            served.recommender.similar_items("i5", 20, refused=served.refused(rules)),
        ):
            assert {item for item, _ in answer} == expected
    visits = [Visit(user, k=1, rules=Rules(categories=names)) for user, names in (("u", ["green"]), ("w", []))]
    wrong, empty, right = engine.visit([*visits, Visit("v", k=1)])
    assert "categories: there is no 'green' among the 2" in str(wrong) and right.recommended
    assert "categories: names none" in str(empty)


@pytest.mark.parametrize("name", ["2Mamba4Rec", "cosine"])
def test_recommendations_from_an_index(models, name):
    """Of so few items it finds all, so the answers are those without it."""
    pytest.importorskip("faiss", reason="the extra ann is not installed")
    recommender = models[name].recommender
    assert Served(recommender, models[name].digest, ann_above=20).nearest is None
    engine = Engine(Served(recommender, models[name].digest, ann_above=19), MemoryStore())
    assert engine.served.nearest.recall == 1
    visits = [
        Visit("a", [Event("i1"), Event("i2")], k=5),
        Visit("b", [Event("i1"), Event("i2")], k=20, exclude_seen=True),
        Visit("c", [Event("i1"), Event("i2")], k=5, rules=Rules(deny=["i3", "i4"], allow=["i3", "i5", "i6"])),
        Visit("d", [Event("i1"), Event("i2")], k=5, candidates=["i3"]),
        Visit("nobody", k=5),
    ]
    a, b, c, d, nobody = visit(engine, *visits)
    history = ["i1", "i2"]
    assert_same(a.recommended, recommender.recommend(history, 5))
    assert_same(b.recommended, recommender.recommend(history, 20, exclude_seen=True))
    assert_same(c.recommended, recommender.recommend(history, 5, allow=["i5", "i6"]))
    assert_same(d.recommended, recommender.recommend(history, 5))
    assert d.scores == pytest.approx(recommender.score(history, ["i3"]), abs=1e-5)
    assert nobody.recommended.source == "popularity"


def test_a_user_is_forgotten_when_told_and_when_silent(models, monkeypatch):
    engine = Engine(models["2Mamba4Rec"], MemoryStore(), forget_after=100.0)
    visit(engine, Visit("a", [Event("i1")]), Visit("b", [Event("i1")]))
    assert visit(engine, Visit("a", forget=True))[0].forgotten
    assert not visit(engine, Visit("a", forget=True))[0].forgotten
    assert list(engine.store.users()) == ["b"]
    import recbole_ssm.serving.engine as module

    now = module.time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 101)
    for _ in engine.tidy():
        pass
    assert len(engine.store) == 0


def test_only_events_keep_a_user_from_being_forgotten(models, monkeypatch):
    """Neither a new model, for which a state is written again, nor a call without an event is a sign of life."""
    import recbole_ssm.serving.engine as module

    engine, now = Engine(models["2Mamba4Rec"], MemoryStore(), forget_after=100.0), time.time()
    monkeypatch.setattr(module.time, "time", lambda: now)
    visit(engine, *(Visit(user, [Event("i1")] * 10) for user in ("silent", "asks", "returns")))
    for name in ("other", "2Mamba4Rec", "other"):
        now += 40
        engine.served = models[name]
        visit(engine, Visit("asks", k=3), Visit("returns", [Event("i1")]))
        for _ in engine.tidy():
            pass
    assert list(engine.store.users()) == ["returns"]


def test_a_damaged_record_is_an_error_of_its_user_alone(models):
    engine = Engine(models["2Mamba4Rec"], MemoryStore())
    visit(engine, *(Visit(user, [Event("i1"), Event("i2")]) for user in ("a", "b", "c")))
    values = engine.store._values
    values[b"a"] = values[b"a"][:70] + b"?" + values[b"a"][71:]
    wrong, *right = engine.visit([Visit(user, [Event("i3")], k=3) for user in ("a", "b", "c")])
    assert isinstance(wrong, StoreError) and "the record of user 'a' is damaged" in str(wrong)
    assert_same(right[0].recommended, right[1].recommended)
    assert visit(engine, Visit("a", forget=True), Visit("a", [Event("i1")]))[1].events == 1


def test_a_damaged_state_or_chunk_is_computed_again_or_an_error_where_it_is_needed(models):
    engine = Engine(models["2Mamba4Rec"], MemoryStore())
    values = engine.store._values
    items = [f"i{n % 20}" for n in range(100)]
    visit(engine, *(Visit(user, [Event(item) for item in items]) for user in ("a", "b", "c")))
    values[state_key("a")] = values[state_key("a")][:-1] + b"?"
    del values[state_key("b")]
    found = visit(engine, *(Visit(user, [Event("i3")], k=3) for user in ("a", "b", "c")))
    for one in found:
        assert_same(one.recommended, found[2].recommended)
    assert_states_are_those_of_their_events(engine)
    for broken in (values[chunk_key("a", 1)][:-1] + b"?", b"", None):
        values[chunk_key("a", 1)] = broken
        if broken is None:
            del values[chunk_key("a", 1)]
        assert visit(engine, Visit("a", [Event("i3")], k=3))[0].recommended
        for asked in (Visit("a", k=3, exclude_seen=True), Visit("a", [Event("i3", 1.0)])):
            (wrong,) = engine.visit([asked])
            assert isinstance(wrong, StoreError) and "the record of user 'a' is damaged (older events" in str(wrong)
    # Nothing is left of one whose head does not say what there is.
    values[b"a"] = b"RSU2"
    assert visit(engine, Visit("a", forget=True))[0].forgotten
    assert not [key for key in values if key.startswith(b"a")]


@pytest.mark.parametrize("name", ["2Mamba4Rec", "SASRec"])
def test_older_events_are_read_only_for_an_answer(models, name):
    engine = Engine(models[name], MemoryStore())
    visit(engine, Visit("u", [Event(f"i{n % 20}") for n in range(100)]))
    del engine.store._values[chunk_key("u", 0)]
    (found,) = visit(engine, Visit("u", [Event("i3")], exclude_seen=True))
    assert found.events == 101
    (wrong,) = engine.visit([Visit("u", k=3, exclude_seen=True)])
    assert isinstance(wrong, StoreError) and "older events are missing" in str(wrong)


def test_what_became_of_each_state_is_counted(models):
    """``first`` as long as none was written, ``rebuilt`` where one was lost, given up or is of another model."""
    counted = []
    engine = Engine(models["2Mamba4Rec"], MemoryStore(), count=counted.append)

    def counts(*events):
        counted.clear()
        visit(engine, Visit("u", events, k=3))
        return counted

    assert counts(Event("i1")) == ["first"] and counts(Event("i1"), Event("i2")) == ["first"]
    assert counts(*[Event("i3")] * 9) == ["first"] and counts(Event("i4")) == ["stored"]
    assert counts(Event("i5", 1.0)) == ["rebuilt"] and counts() == ["stored"]
    engine.served = models["other"]
    assert counts() == ["rebuilt"] and counts() == ["stored"]
    del engine.store._values[state_key("u")]
    assert counts() == ["rebuilt"] and counts() == ["stored"]
    visit(engine, Visit("u", forget=True))
    assert counts(*[Event("i3")] * 9) == ["first"]


def test_a_store_that_fails_takes_nothing(models, monkeypatch):
    engine = Engine(models["2Mamba4Rec"], MemoryStore())
    visit(engine, Visit("a", [Event("i1")]))

    def fail(change):
        engine.store.read(change)
        raise StoreError("state: is full")

    monkeypatch.setattr(engine.store, "update", fail)
    found = engine.visit([Visit("a", [Event("i2")]), Visit("b", [Event("i2")])])
    assert all(isinstance(one, StoreError) for one in found)
    assert record_of(engine.store, "a").total == 1


def test_a_full_store_forgets_whom_it_is_told_to_beside_others(models, monkeypatch):
    engine = Engine(models["2Mamba4Rec"], MemoryStore())
    visit(engine, Visit("a", [Event("i1")]), Visit("b", [Event("i1")]))
    update = engine.store.update

    def full(change):
        if any(value is not None for value in engine.store.read(change).values()):
            raise StoreError(errno.ENOSPC, "state: is full")
        update(change)

    monkeypatch.setattr(engine.store, "update", full)
    found = engine.visit([Visit("a", [Event("i2")]), Visit("b", forget=True), Visit("c", forget=True)])
    assert isinstance(found[0], StoreError) and [one.forgotten for one in found[1:]] == [True, False]
    assert list(engine.store.users()) == ["a"] and record_of(engine.store, "a").total == 1


def test_a_change_that_is_made_twice_counts_once(models, monkeypatch):
    """Where another server wrote meanwhile, a Redis store calls again with newer values."""
    engine = Engine(models["2Mamba4Rec"], MemoryStore())
    update = engine.store.update

    def twice(change):
        change(lambda keys: dict.fromkeys(keys))
        other = Record()
        other.append("i9", 1.0)
        engine.store._values.update(other.writings("a", 10))
        update(change)

    monkeypatch.setattr(engine.store, "update", twice)
    visit(engine, Visit("a", [Event("i2", 2.0)]))
    assert record_of(engine.store, "a").items.texts() == ["i9", "i2"]
    assert_states_are_those_of_their_events(engine)


WAYS = {
    "gaps": {"time": "gaps"},
    "query": {"time": "query"},
    "calendar": {"time": "query", "query_calendar": True},
    "output": {"time": "query", "query_enters": "output", "query_calendar": True},
    "step": {"time": "query", "gap_enters": "step"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("history", [1, 40, 10_000])
def test_a_state_of_a_model_of_times_says_what_a_session_says(way, history):
    """One event after the other, several at once, late ones, and moments of asking that leave nothing behind."""
    served = untrained("2Mamba4Rec", 5, num_layers=2, **WAYS[way])
    counted = []
    engine = Engine(served, MemoryStore(), state_history=history, count=counted.append)
    draw = random.Random(history)
    happened: list = []
    while len(happened) < 60:
        newest = happened[-1][1] if happened else 1000
        # An event that comes late: where all that is kept is newer, the state cannot be that of all events.
        late = history > 60 and draw.random() < 0.3
        begin = draw.randrange(1000, newest + 1) if late else newest
        new = sorted(begin + draw.choice([0, 0, 30, 5000]) for _ in range(draw.choice([1, 1, 1, 1, 12])))
        events = [(f"i{draw.randrange(20)}", moment) for moment in new]
        happened = sorted([*happened, *events], key=lambda event: event[1])
        visit(engine, Visit("u", [Event(item, float(moment)) for item, moment in events], k=draw.choice([0, 5])))
        items, times = zip(*happened)
        for now in (0, times[-1] + draw.choice([0, 40, 900_000])):
            (found,) = visit(engine, Visit("u", k=5, now=float(now), candidates=["i3"]))
            expected = served.recommender.session(items, times=times)
            assert_same(found.recommended, expected.top(5, now=now))
            assert found.scores[0] == pytest.approx(dict(expected.top(20, now=now))["i3"], abs=1e-5)
    # Only what is late is computed again.
    assert ("rebuilt" in counted) == (history > 60) and counted.count("stored") > len(counted) / 2
    engine.served = untrained("2Mamba4Rec", 6, letter="j", **WAYS[way])
    (found,) = visit(engine, Visit("u", k=5, now=5e5))
    assert found.recommended.source == "popularity"


@pytest.mark.parametrize("way", ["query", "output"])
def test_items_that_a_model_of_times_does_not_know_are_passed_over(way):
    """The newest event, and the one before, are of items that the former model alone knew."""
    former, served = untrained("Mamba4Rec", 7, **WAYS[way]), untrained("Mamba4Rec", 8, **WAYS[way])
    known = [item for item in served.catalogue.items if item not in ("i4", "i5")]
    served = Served(Recommender(served.recommender.model, CONFIG | {"model": "Mamba4Rec"}, known), "8" * 64)
    engine = Engine(former, MemoryStore())
    happened = [(f"i{n % 6}", 1000 + 70 * n * n) for n in range(12)]
    visit(engine, Visit("u", [Event(item, float(moment)) for item, moment in happened]))
    engine.served = served
    for event in [("i2", 99_000), ("i7", 99_500)]:
        kept = [(item, moment) for item, moment in happened if item not in ("i4", "i5")]
        items, times = zip(*kept)
        for _ in range(2):
            (found,) = visit(engine, Visit("u", k=5, now=1e5))
            assert_same(found.recommended, served.recommender.session(items, times=times).top(5, now=100_000))
        visit(engine, Visit("u", [Event(event[0], float(event[1]))]))
        happened.append(event)


@pytest.mark.parametrize("way", ["gaps", "query", "output"])
def test_a_gap_is_counted_from_an_older_event_where_all_newer_ones_are_unknown(way):
    """After another model came: 70 events of an item that it does not know, and then one that it knows."""
    former, served = untrained("Mamba4Rec", 7, **WAYS[way]), untrained("Mamba4Rec", 8, **WAYS[way])
    known = [item for item in served.catalogue.items if item != "i4"]
    served = Served(Recommender(served.recommender.model, CONFIG | {"model": "Mamba4Rec"}, known), "8" * 64)
    engine = Engine(former, MemoryStore())
    happened = [(f"i{n % 3}", 1000 + 70 * n * n) for n in range(50)]
    happened += [("i4", happened[-1][1] + 600 * n) for n in range(1, 71)]
    visit(engine, *(Visit("u", [Event(item, float(moment))]) for item, moment in happened))
    engine.served = served
    later = happened[-1][1]
    for event in [None, None, ("i2", later + 50), ("i7", later + 9000)]:
        if event is not None:
            happened.append(event)
            visit(engine, Visit("u", [Event(event[0], float(event[1]))]))
        items, times = zip(*((item, moment) for item, moment in happened if item != "i4"))
        (found,) = visit(engine, Visit("u", k=5, now=later + 1e5))
        assert_same(found.recommended, served.recommender.session(items, times=times).top(5, now=later + 100_000))


def test_more_events_than_are_kept_and_none_of_them_known(models):
    """Of a model without a state first, and then of one that knows none of the items."""
    engine = Engine(models["SASRec"], MemoryStore(), state_history=40)
    for number in range(12):
        visit(engine, Visit("u", [Event(f"i{number}")] * 10), Visit("other", [Event("i1")]))
    engine.served = untrained("Mamba4Rec", 6, letter="j")
    for _ in range(2):
        found = visit(engine, Visit("u", k=3), Visit("other", [Event("j1")], k=3))
        assert [one.recommended.source for one in found] == ["popularity", "model"]
    assert list(engine.tidy())


@pytest.mark.parametrize("name", ["2Mamba4Rec", "SASRec"])
def test_fractions_of_a_second_are_rounded_down_before_1970_too(name):
    options = {"train_neg_sample_args": None} if name == "SASRec" else {}
    engine = Engine(untrained(name, 5, time="query", **options), MemoryStore())
    items, times = ["i1", "i2"], [-10.0, -0.5]
    events = [Event(item, time) for item, time in zip(items, times)]
    (found,) = visit(engine, Visit("u", events, k=20, now=-0.25))
    assert_same(found.recommended, engine.served.recommender.recommend(items, 20, times=times, now=-0.25))


def test_a_model_of_times_without_a_state_is_told_when_events_were_and_when_it_is_asked():
    served = untrained("SASRec", 5, train_neg_sample_args=None, time="query")
    assert served.recommender.reads_times
    engine = Engine(served, MemoryStore())
    items, times = ["i1", "i2", "i3"], [100, 5000, 5100]
    visit(engine, *(Visit("u", [Event(item, float(moment))]) for item, moment in zip(items, times)))
    for now in (5200, 900_000):
        (found,) = visit(engine, Visit("u", k=5, now=float(now)))
        assert_same(found.recommended, served.recommender.recommend(items, 5, times=times, now=now))
