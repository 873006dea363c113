"""Events into a store and out of it."""

import json
from functools import partial
from pathlib import Path

import pytest

from recbole_ssm import load_recommender, run_recbole_ssm
from recbole_ssm.cli import main
from recbole_ssm.commands.serve import load_served
from recbole_ssm.commands.state import import_events
from recbole_ssm.errors import UserError
from recbole_ssm.serving.engine import Engine
from recbole_ssm.serving.record import PART, whole_record
from recbole_ssm.serving.store import MemoryStore, StoreError
from recbole_ssm.serving.stores import open_store
from recbole_ssm.serving.visits import Visit
from tests.conftest import REPOSITORY

pytest.importorskip("lmdb", reason="the extra serve is not installed")
T = 1_700_000_000.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("trained")
        patch.chdir(folder)
        options = {"data_path": str(REPOSITORY / "dataset"), "show_progress": False, "state": "WARNING", "epochs": 1}
        return folder / run_recbole_ssm("2Mamba4Rec", "toy", config_dict=options)["checkpoint"]


def test_an_event_log_is_replayed_and_comes_back(checkpoint, capsys):
    rows = [("b", "i3", T + 7), ("a", "i9", T + 1), ("b", "i2", T + 6), ("b", "no such", T + 8), ("é", "i1", T)]
    events = [dict(zip(("user_id", "item_id", "timestamp"), row)) for row in rows]
    Path("log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    options = [str(checkpoint), "--device=cpu", "--state=first"]
    assert main(["state", *options, "--import=log.jsonl"]) == 0
    assert "first: 4 events were taken, 1 are of items that the model does not know" in capsys.readouterr().out
    store = open_store("first")
    record = store.read(partial(whole_record, "b"))
    assert record.items.texts() == ["i2", "i3"] and record.total == 2
    store.close()

    assert main(["state", *options, "--export=out.jsonl"]) == 0
    found = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [tuple(event.values()) for event in found][:3] == [
        ("a", "i9", T + 1),
        ("b", "i2", T + 6),
        ("b", "i3", T + 7),
    ]
    # What was written makes the same store again.
    assert main(["state", str(checkpoint), "--device=cpu", "--state=second", "--import=out.jsonl"]) == 0
    store = open_store("second")
    again = store.read(partial(whole_record, "b"))
    assert (again.items, again.times, again.total) == (record.items, record.times, record.total)
    store.close()


def test_mistakes_are_one_line(checkpoint, capsys):
    cases = [
        (["--state=s"], "state: name a store and one file"),
        (["--import=log.jsonl"], "state: name a store and one file"),
        (["--state=s", "--import=none.jsonl"], "there is no file none.jsonl"),
        (["--state=s", "--import=users.txt"], "users.txt: name its columns by --user, --item, --time"),
        (["--state=s", "--export=none/out.jsonl"], "there is no folder"),
        (["--state=sttae", "--export=out.jsonl"], "state sttae: holds no store; name the folder"),
    ]
    Path("users.txt").write_text("u1\nu2\n")
    for options, line in cases:
        assert main(["state", str(checkpoint), "--device=cpu", *options]) == 2
        assert line in capsys.readouterr().err
    assert not Path("sttae").exists() and not Path("out.jsonl").exists()


def written(users):
    """A file of three events of each of some users."""
    file = Path("log.csv")
    rows = [f"u{user:03},i{event},{event}\n" for user in range(users) for event in range(3)]
    file.write_text("user_id,item_id,timestamp\n" + "".join(rows))
    return file


@pytest.mark.parametrize("line", ["u999,{long},9", "{long},i1,9"])
def test_a_file_with_an_id_that_is_too_long_is_refused_as_a_whole(checkpoint, line):
    file = written(users=70)
    file.write_text(file.read_text() + line.format(long="x" * 501) + "\n")
    engine = Engine(load_served(checkpoint, device="cpu"), MemoryStore())
    with pytest.raises(UserError, match=r"--import: the id 'xxx.*has more than 500 bytes"):
        import_events(engine, file)
    assert not engine.store._values


def test_a_file_with_an_event_that_has_not_come_yet_is_refused_as_a_whole(checkpoint):
    Path("log.csv").write_text(f"user_id,item_id,timestamp\nu,i1,{int(T)}\nv,i1,{int(T)}\nv,i2,9999999999\n")
    engine = Engine(load_served(checkpoint, device="cpu"), MemoryStore())
    with pytest.raises(UserError, match="time: 9999999999, of user 'v', is more than a day beyond the clock"):
        import_events(engine, "log.csv")
    assert not engine.store._values


def test_an_import_that_was_cut_short_goes_on_where_it_ended(checkpoint):
    """By a full store, a kill right after a transaction, and a user whose record is damaged."""
    file, store = written(users=200), MemoryStore()
    engine = Engine(load_served(checkpoint, device="cpu"), store)
    update, left = store.update, [1]

    def cut_short(change):
        if not left:
            raise StoreError(28, "state: is full")
        update(change)
        if left.pop() == 2:
            raise KeyboardInterrupt

    store.update = cut_short
    with pytest.raises(UserError, match=r"^state: is full; 64 of 200 users were taken, import log.csv again to go on"):
        import_events(engine, file)
    left.append(2)
    with pytest.raises(KeyboardInterrupt):
        import_events(engine, file)
    store.update = update
    store._values[b"u150"] = b"RSU2"
    with pytest.raises(UserError, match=r"user 'u150' is damaged .*delete the user; 128 of 200 users were taken"):
        import_events(engine, file)
    del store._values[b"u150"]
    assert import_events(engine, file) == (3 * 72, 0)
    assert {store.read(partial(whole_record, user)).total for user in store.users()} == {3} and len(store) == 200
    # What has ended begins at the first user again, and leaves nothing of its own.
    assert import_events(engine, file) == (600, 0)
    assert not [key for key in store._values if key.startswith(PART)]


def test_the_store_answers_as_recommend_does(checkpoint):
    Path("log.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"u,i{n},{n}\n" for n in range(5)))
    assert main(["state", str(checkpoint), "--device=cpu", "--state=s", "--import=log.csv"]) == 0
    store = open_store("s")
    (found,) = Engine(load_served(checkpoint, device="cpu"), store).visit([Visit("u", k=3)])
    expected = load_recommender(checkpoint, device="cpu").recommend([f"i{n}" for n in range(5)], 3)
    assert [item for item, _ in found.recommended] == [item for item, _ in expected]
    store.close()
