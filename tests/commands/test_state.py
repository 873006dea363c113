"""Events into a store and out of it."""

import json
from functools import partial
from pathlib import Path

import pytest

from recbole_ssm import load_recommender, run_recbole_ssm
from recbole_ssm.cli import main
from recbole_ssm.serving.record import whole_record
from recbole_ssm.serving.store import open_store
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
    ]
    Path("users.txt").write_text("u1\nu2\n")
    for options, line in cases:
        assert main(["state", str(checkpoint), "--device=cpu", *options]) == 2
        assert line in capsys.readouterr().err


def test_the_store_answers_as_recommend_does(checkpoint):
    Path("log.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"u,i{n},{n}\n" for n in range(5)))
    assert main(["state", str(checkpoint), "--device=cpu", "--state=s", "--import=log.csv"]) == 0
    from recbole_ssm.commands.serve import load_served
    from recbole_ssm.serving.engine import Engine
    from recbole_ssm.serving.visits import Visit

    store = open_store("s")
    (found,) = Engine(load_served(checkpoint, device="cpu"), store).visit([Visit("u", k=3)])
    expected = load_recommender(checkpoint, device="cpu").recommend([f"i{n}" for n in range(5)], 3)
    assert [item for item, _ in found.recommended] == [item for item, _ in expected]
    store.close()
