"""Filters against RecBole's own, and the notes on odd files."""

import logging
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from recbole_ssm.data import SequentialDataset, create_dataset
from recbole_ssm.data.atomic import Tokens
from recbole_ssm.data.events import Events, doubled, k_core, oddities, without_repeats
from recbole_ssm.data.lines import BadLines
from recbole_ssm.errors import UserError
from recbole_ssm.quick_start import configure

from recbole.data.dataset import SequentialDataset as RecBoleDataset  # isort: skip  (after RecBole is made usable)

HEADER = "user_id:token\titem_id:token\ttimestamp:float\n"


def tokens(ids):
    encoded = pa.array(ids, pa.string()).dictionary_encode()
    return Tokens(encoded.indices.to_numpy(), encoded.dictionary)


def events(rows):
    users, items, times = zip(*rows)
    return Events(tokens(users), tokens(items), np.array(times, dtype=np.float64))


ROWS = st.lists(
    st.tuples(st.sampled_from("abcdefg"), st.sampled_from("uvwxyz"), st.integers(0, 9)), min_size=1, max_size=60
)


INTERVALS = ["[1,inf)", "[2,inf)", "(2,inf)", "[3,inf)", "[2.5,inf)", "[2,4]", "[1,2];[4,inf)", None]
INTERVALS += ["(-inf,inf)", "(-1,inf)", "[inf,inf)"]
TWO = [(user, item, time) for user in "ab" for time, item in enumerate("uv")]


@example(rows=TWO, users="(-inf,inf)", items="(-1,inf)", keep=None, described=True)
@example(rows=TWO, users="[2,inf)", items="[inf,inf)", keep=None, described=False)
@given(
    rows=ROWS,
    users=st.sampled_from(INTERVALS),
    items=st.sampled_from(INTERVALS),
    keep=st.sampled_from([None, "first", "last"]),
    described=st.booleans(),
)
def test_filters_leave_what_recbole_leaves(tmp_path_factory, rows, users, items, keep, described):
    """Through our data set, through RecBole's own filter, and by the functions that convert uses."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "made").mkdir()
    text = HEADER + "".join(f"{user}\t{item}\t{time}\n" for user, item, time in rows)
    (folder / "made" / "made.inter").write_text(text)
    options = {"data_path": str(folder), "topk": 1, "valid_metric": "NDCG@1", "rm_dup_inter": keep}
    options |= {"user_inter_num_interval": users, "item_inter_num_interval": items}
    if described:
        (folder / "made" / "made.item").write_text("item_id:token\n" + "".join(f"{item}\n" for item in "uvwxyz!"))
        options["load_col"] = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id"]}

    def left():
        try:
            data = create_dataset(configure("GRU4Rec", "made", config_dict=options))
        except UserError as error:
            return str(error).rpartition("/")[2]
        frame = data.inter_feat
        raw = [data.id2token(field, frame[field].to_numpy()) for field in ("user_id", "item_id")]
        return data.item_num, sorted(zip(*raw, frame["timestamp"]))

    ours = left()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequentialDataset, "_filter_by_inter_num", RecBoleDataset._filter_by_inter_num)
        assert ours == left()
    least = {"[1,inf)": 1, "[2,inf)": 2, "(2,inf)": 3, "[3,inf)": 3, "[2.5,inf)": 3, None: 0}
    if users in least and items in least and isinstance(ours, tuple):
        found = events(rows)
        found = found if keep is None else found.take(without_repeats(found, keep))
        found = found.take(k_core(found.users.codes, found.items.codes, least[users], least[items]))
        assert ours[1] == sorted(zip(found.users.objects(), found.items.objects(), found.times))


@given(rows=ROWS, keep=st.sampled_from(["first", "last"]))
def test_repeats_are_found(rows, keep):
    found = events(rows)
    by_time = sorted(range(len(rows)), key=lambda row: rows[row][2])
    chosen = {rows[row][:2]: row for row in (by_time if keep == "last" else by_time[::-1])}
    seen = [row for row in range(len(rows)) if rows[row] in rows[:row]]
    assert without_repeats(found, keep).tolist() == sorted(chosen.values())
    assert doubled(found).tolist() == seen


def test_k_core_of_a_chain_falls_apart_to_the_end():
    """Each round only frees the next link: a filter that stops after one round keeps too much."""
    users = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4])
    items = np.array([0, 1, 1, 2, 2, 3, 3, 4, 4])
    assert len(k_core(users, items, 2, 2)) == 0
    block = np.repeat(np.arange(3), 3)
    grid = np.tile(np.arange(3), 3)
    kept = k_core(np.concatenate([users + 3, block]), np.concatenate([items + 3, grid]), 3, 3)
    assert kept.tolist() == list(range(len(users), len(users) + 9))


def test_order_is_by_first_appearance_then_time_then_row():
    found = events([("b", "x", 3), ("a", "x", 2), ("b", "y", 1), ("a", "y", 2), ("b", "z", 3)])
    assert found.by_user_and_time().tolist() == [2, 0, 4, 1, 3]


def test_a_look_at_events_takes_little_memory():
    draw, rows = np.random.default_rng(0), 300_000
    names = pa.array([str(k) for k in range(1000)])
    users, items = (Tokens(draw.integers(0, 1000, rows).astype(np.int32), names) for _ in range(2))
    found = Events(users, items, draw.integers(0, 1 << 30, rows).astype(np.float64))
    tracemalloc.start()
    list(oddities(found, ("user_id", "item_id", "timestamp"), BadLines("x.inter")))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak / rows < 32  # bytes, beside the 16 of the events themselves


def test_oddities_name_line_value_and_mend():
    bad = BadLines("x.inter", "skip")
    bad.numbers = [3]
    rows = [("u", "7.0", 5), ("u", "8", 4), ("u", "8", 4), ("v", "9.00", 1), ("v", "7.0", 0), ("u", "b1.0", 9)]
    notes = list(oddities(events(rows), ("user_id", "item_id", "timestamp"), bad))
    assert [level for level, _ in notes] == [logging.WARNING, logging.WARNING, logging.DEBUG]
    ids, again, back = (text for _, text in notes)
    assert ids.startswith("x.inter, line 2: item_id is '7.0': 2 ids look like floats")
    assert again.startswith("x.inter, line 5: the same user_id, item_id and timestamp as an earlier line, and 1 such")
    assert back.startswith("x.inter, line 4: timestamp goes back to 4 for user_id 'u', and 2 such lines in all")
    assert not any("\n" in text for _, text in notes)
    assert list(oddities(events([("u", "1", 1), ("v", "1", 0)]), ("u", "i", "t"), bad)) == []


def test_a_run_notes_oddities_and_skips_bad_lines(write_dataset, caplog, tmp_path):
    text = (
        HEADER
        + "".join(f"u{u}\ti{(u + t) % 15}.0\t{t}\n" for u in range(4) for t in range(8))
        + "u1\ti2\nu1\t12.0\t7\n"
    )
    options = write_dataset(text)
    options["config_dict"] |= {"on_bad_lines": "skip", "checkpoint_dir": str(tmp_path / "kept")}
    with caplog.at_level(logging.WARNING):
        data = create_dataset(configure("GRU4Rec", **options))
    assert len(data.inter_feat) == 33
    assert "made.inter: 1 lines skipped, the first because line 34: 2 columns where the header has 3" in caplog.text
    assert (tmp_path / "kept" / "made.inter.skipped").read_text().endswith("\tu1\ti2\n")
    assert "line 35: item_id is '12.0': 1 ids look like floats" in caplog.text
