"""Figures of data sets whose right answers are known, and of real ones where they are at hand."""

import hashlib
import json
import os
import random
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest

from recbole_ssm.cli import main
from recbole_ssm.data import create_dataset
from recbole_ssm.errors import UserError
from recbole_ssm.quick_start import configure
from tests.conftest import REPOSITORY

HEADER = "user_id:token\titem_id:token\ttimestamp:float\n"


def look(tmp_path, text, *options, name="made"):
    folder = tmp_path / "data" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.inter").write_text(text)
    assert (
        main(["inspect", name, f"--data_path={tmp_path / 'data'}", f"--json={tmp_path / 'found.json'}", *options]) == 0
    )
    return json.loads((tmp_path / "found.json").read_text())


def test_the_toy():
    assert main(["inspect", "toy", f"--data_path={REPOSITORY / 'dataset'}", "--json=toy.json"]) == 0
    found = json.loads(Path("toy.json").read_text())
    assert (found["users"], found["items"]) == (60, 20)
    assert found["sparsity"] == pytest.approx(1 - found["interactions"] / 1200)


def test_figures(tmp_path, capsys):
    rows = [
        ("a", "2", 10),
        ("a", "10", 10),
        ("b", "2", 9),
        ("a", "2", 30),
        ("b", "3", 8),
        ("b", "9", 12),
        ("c", "3", 40),
    ]
    found = look(tmp_path, HEADER + "".join(f"{u}\t{i}\t{978300000 + t}\n" for u, i, t in rows))
    assert (found["users"], found["items"], found["interactions"]) == (3, 4, 7)
    assert found["sparsity"] == 1 - 7 / 12
    length = found["length"]
    assert (length["min"], length["median"], length["max"]) == (1, 3, 3) and length["mean"] == 7 / 3
    assert [(bin["from"], bin["to"], bin["users"]) for bin in length["histogram"]] == [(1, 1, 1), (2, 3, 2)]
    assert found["repeated_pairs"] == 1
    assert found["ties"] == {"events": 1, "share": 1 / 4, "targets": 0.0}
    assert (
        found["time"] | {"unit": "seconds", "from": "2000-12-31 22:00:08", "to": "2000-12-31 22:00:40"} == found["time"]
    )
    # a: 2, 10, 2 falls; b by time: 3, 2, 9 falls
    # a history of 3 is sorted by chance in 1 of 6 orders, and in 1 of 3 where two of its items are one
    assert found["order"].pop("sorted_by_chance") == pytest.approx((1 / 3 + 1 / 6) / 2)
    assert found["order"].pop("deviations") == pytest.approx(-(1 / 2) / (2 / 9 + 5 / 36) ** 0.5)
    assert found["order"] == {"back_in_time": 1, "sorted_by_item": 0.0, "histories": 2}
    # tests 30 (after it: nothing that trains) and 12 (after it: nothing); 10 and 8 train
    assert found["split"]["LS"] == {"targets": 2, "after_targets": 0.0, "median_future": 0.0}
    out = capsys.readouterr().out
    assert "made: 3 users, 4 items, 7 interactions, sparsity 41.6667%" in out
    assert "           2-3            2 ####" in out
    assert "line 6: timestamp goes back to 978300008 for user_id 'b'" in out


def test_leave_one_out_leaks_and_a_split_by_time_does_not(tmp_path, capsys):
    early = "".join(f"e{u}\ti{t}\t{978300000 + t}\n" for u in range(2) for t in range(4))
    late = "".join(f"l{u}\ti{t}\t{978400000 + t}\n" for u in range(2) for t in range(6))
    found = look(tmp_path, HEADER + early + late)
    # training events: 2 * 2 early, 2 * 4 late; both early targets lie before the late ones, the late targets after all
    assert found["split"]["LS"] == {"targets": 4, "after_targets": 0.5, "median_future": 4 / 12}
    out = capsys.readouterr().out
    assert "50.0% of the 4 test events are older than some that train the model" in out
    assert out.splitlines()[-1].split(maxsplit=1) == ["verdict", "fit to train"]
    found = look(tmp_path, HEADER + early + late, "--split={'GTS': [3, 1, 1]}")
    split = found["split"]["GTS"]
    assert split["events"] == [12, 4, 4] and split["validation_after"] == 978400001
    assert (split["test_after"], split["new_users"], split["new_items"]) == (978400003, 0.0, 1.0)
    assert not any("leave-one-out" in warning for warning in found["warnings"])


def test_a_file_sorted_by_item_is_suspected(tmp_path):
    rows = "".join(
        f"u{u}\t{(u * 7 + 5 * t) % 90 + 100 * t}\t{978300000 + t * 60}\n" for u in range(30) for t in range(5)
    )
    found = look(tmp_path, HEADER + rows)
    assert found["order"]["sorted_by_item"] == 1.0
    assert any("hardly the order of time" in warning for warning in found["warnings"])


def test_the_share_of_sorted_histories_is_compared_with_chance(tmp_path):
    """Short histories of few items are sorted often by chance, and those of one item always: that is no fault."""
    repeats = "".join(f"u{u}\t{(u if t else u + 1) % 4}\t{978300000 + t}\n" for u in range(60) for t in range(3))
    found = look(
        tmp_path, HEADER + repeats + "".join(f"v{v}\t7\t{978300000 + t}\n" for v in range(99) for t in range(3))
    )
    order = found["order"]
    assert (order["histories"], order["sorted_by_chance"]) == (60, pytest.approx(1 / 3))
    assert order["sorted_by_item"] == 0.25 and not any("in the order of their item" in one for one in found["warnings"])
    draw = random.Random(1)
    histories = [draw.sample(range(97), 5) for _ in range(80)]
    histories = [sorted(items) if u % 4 == 0 else items for u, items in enumerate(histories)]
    rows = [f"u{u}\t{item}\t{978300000 + t}\n" for u, items in enumerate(histories) for t, item in enumerate(items)]
    found = look(tmp_path, HEADER + "".join(rows))
    assert 2 * found["order"]["sorted_by_chance"] < found["order"]["sorted_by_item"] < 0.5
    assert any("would be by chance: either ids were given in the order of time, or" in one for one in found["warnings"])


def test_how_many_targets_are_in_the_history(tmp_path, capsys):
    """Who repeats the newest item hits a part of the targets, whatever a model learns."""
    events = {"a": "1213", "b": "1231", "c": "1233", "d": "12", "e": "1234"}
    rows = [(u, i, 978300000 + t) for u, items in events.items() for t, i in enumerate(items)]
    found = look(tmp_path, HEADER + "".join(f"{u}\t{i}\t{t}\n" for u, i, t in rows))
    assert found["repeats"] == {"targets": 4, "in_history": 0.5, "newest": 0.25} and found["repeated_pairs"] == 3
    assert (
        "50.0% of 4 test targets are in the history before them; 25.0% are the newest item of it"
        in capsys.readouterr().out
    )
    found = look(tmp_path, HEADER + "".join(f"{u}\t{i}\t{t}\n" for u, i, t in rows), "--split={'GTS': [2, 1, 1]}")
    assert found["repeats"] == {"targets": 4, "in_history": 0.5, "newest": 0.25}
    found = look(tmp_path, HEADER + "u\ti\t1\nu\ti\t2\n")
    assert found["repeats"] == {"targets": 0, "in_history": 0.0, "newest": 0.0}


HISTORY = [("a", 0), ("a", 1), ("a", 2)]
STRANGERS = [("b", 10), ("c", 11), ("d", 12), ("a", 20), ("b", 21), ("c", 22)]


@pytest.mark.parametrize(
    ("events", "split", "told"),
    [
        (HISTORY, {"LS": "valid_and_test"}, "  fit to train"),
        (HISTORY[:2], {"LS": "valid_and_test"}, "not fit to train: no user has 3 events"),
        (HISTORY + STRANGERS, {"GTS": [5, 2, 2]}, "  fit to train"),
        (HISTORY + STRANGERS, {"GTS": [1, 1, 1]}, "GTS leaves validation with nothing but first events of users"),
        (STRANGERS, {"GTS": [1, 1, 1]}, "GTS leaves training with nothing but first events"),
    ],
)
def test_a_verdict_is_what_the_loader_does(tmp_path, capsys, events, split, told):
    rows = "".join(f"{user}\ti{time % 5}\t{978300000 + time}\n" for user, time in events)
    (tmp_path / "data" / "made").mkdir(parents=True)
    (tmp_path / "data" / "made" / "made.inter").write_text(HEADER + rows)
    asked = "LS" if "LS" in split else str(split)
    main(["inspect", "made", f"--data_path={tmp_path / 'data'}", f"--split={asked}"])
    assert told in "".join(capsys.readouterr())
    options = {"data_path": str(tmp_path / "data"), "topk": 1, "valid_metric": "NDCG@1", "eval_args": {"split": split}}
    with nullcontext() if "  fit" in told else pytest.raises(UserError):
        create_dataset(configure("GRU4Rec", "made", config_dict=options)).build()


def test_positions_are_no_times(tmp_path):
    found = look(tmp_path, HEADER + "".join(f"u{u}\ti{(u * t) % 7}\t{t}\n" for u in range(5) for t in range(u + 3)))
    assert found["time"]["unit"] == "positions" and found["split"] == {"LS": None}
    assert "the times only count each user's events; they are no clock times" in found["warnings"]


def test_k_core_and_bad_lines(tmp_path):
    rows = "".join(f"u{u}\ti{i}\t{u + i}\n" for u in range(3) for i in range(3)) + "x\ti0\t5\nx\ti1\n"
    found = look(tmp_path, HEADER + rows, "--k_core=3", "--on_bad_lines=skip")
    assert (found["users"], found["items"], found["interactions"], found["skipped_lines"]) == (3, 3, 9, 1)
    assert "1 lines skipped, the first because line 12: 2 columns" in found["warnings"][0]


@pytest.mark.parametrize("named", ["made", "made/", "made/made.inter"])
def test_a_folder_or_a_file_names_a_data_set_too(tmp_path, capsys, named):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "made.inter").write_text(HEADER + "u\ti\t1\nu\tj\t2\n")
    assert main(["inspect", f"{tmp_path}/{named}"]) == 0
    assert capsys.readouterr().out.startswith("made: 1 users, 2 items, 2 interactions")


def test_the_plot(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    look(tmp_path, HEADER + "u\ti\t1\nu\tj\t2\n", "--plot=lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", "made", f"--data_path={tmp_path / 'data'}", "--plot=x.xyz"]) == 2
    assert "x.xyz: a plot must end in .png" in capsys.readouterr().err


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    (tmp_path / "x.inter").write_text(HEADER + "u\ti\t1\n")
    assert main(["inspect", "x.inter", "--plot=x.png"]) == 2
    assert "x.png: plots need Matplotlib; run: pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "no file dataset/nosuch/nosuch.inter; set --data_path to the folder above nosuch/"),
        (["x.inter", "--time=when"], "x.inter, line 1: no column when:float"),
        (["x.inter", "--k_core=9"], "--k_core: the 9-core is empty"),
        (["x.inter", "--split=TS"], "--split: must be LS or {'GTS': [0.8, 0.1, 0.1]}, got TS"),
        (
            ["x.inter", "--split={'GTS': [1, 0, 1]}"],
            "eval_args: GTS takes three positive shares of the events, got [1, 0",
        ),
        (["x.inter", "--split={'GTS': [1, 1, 1]}"], "eval_args: GTS leaves a part without events"),
        (["x.inter", "--json=."], "recbole-ssm inspect: argument --json: . is a folder; name a file"),
        (["x.inter", "--json=.."], "recbole-ssm inspect: argument --json: .. is a folder; name a file"),
        (
            ["x.inter", "--plot=x.jpeg"],
            "recbole-ssm inspect: argument --plot: x.jpeg: a plot must end in .png, .svg or .pdf",
        ),
        (["x.inter", "--json=no/such.json"], "recbole-ssm inspect: argument --json: there is no folder"),
        (["x.inter", "--jsn=x"], "recbole-ssm inspect: unrecognized arguments: --jsn=x"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, message):
    (tmp_path / "x.inter").write_text(HEADER + "u\ti\t1\nu\tj\t2\n")
    assert main(["inspect", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"recbole_ssm: error: {message}")


# --- real data, where RECBOLE_SSM_DATA names a folder that holds it: ml-1m/ml-1m.inter and so on ----------------

REAL = os.environ.get("RECBOLE_SSM_DATA", "")
PUBLISHED = [
    ("ml-1m", 0, (6040, 3706, 1_000_209)),
    ("ml-1m", 5, (6040, 3416, 999_611)),
    ("amazon-beauty", 5, (22_363, 12_101, 198_502)),
    ("amazon-video-games", 5, (24_303, 10_672, 231_780)),
    ("assistments-2017", 0, (1705, 3162, 941_502)),
    ("ml-100k", 0, (943, 1682, 100_000)),
]


@pytest.mark.parametrize(("name", "k", "counts"), PUBLISHED)
def test_published_counts(name, k, counts):
    if name != "ml-100k" and not (Path(REAL) / name).is_dir():
        pytest.skip("set RECBOLE_SSM_DATA to a folder with this data set")
    assert main(["inspect", name, f"--data_path={REAL or 'dataset'}", f"--k_core={k}", "--json=found.json"]) == 0
    found = json.loads(Path("found.json").read_text())
    assert (found["users"], found["items"], found["interactions"]) == counts


def test_ml_1m_from_its_raw_form(tmp_path):
    """ratings.dat, rebuilt from the atomic file, converts to that very file, byte for byte."""
    if not (Path(REAL) / "ml-1m").is_dir():
        pytest.skip("set RECBOLE_SSM_DATA to a folder with ml-1m")
    atomic = (Path(REAL) / "ml-1m" / "ml-1m.inter").read_bytes()
    raw = atomic.partition(b"\n")[2].replace(b"\t", b"::")
    with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as archive:
        archive.writestr("ml-1m/ratings.dat", raw)
    assert main(["convert", "ml-1m.zip", "--name=ml-1m"]) == 0
    assert main(["convert", "ml-1m.zip", "--name=ml-1m-5", "--k_core=5"]) == 0
    assert (tmp_path / "dataset" / "ml-1m" / "ml-1m.inter").read_bytes() == atomic
    card = json.loads((tmp_path / "dataset" / "ml-1m-5" / "ml-1m-5.card.json").read_text())
    assert card["steps"][-1] == {"step": "5-core", "users": 6040, "items": 3416, "interactions": 999_611}
    assert card["source"][0]["sha256"] == hashlib.sha256((tmp_path / "ml-1m.zip").read_bytes()).hexdigest()
