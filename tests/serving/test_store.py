"""Stores and records: what was written is there, all of it or nothing, and what is damaged is known as such."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_ssm.errors import UserError
from recbole_ssm.serving.record import (
    DamagedError,
    Record,
    chunk_key,
    decoded,
    packed_state,
    state_key,
    unpacked_state,
    whole_record,
)
from recbole_ssm.serving.store import StoreError
from recbole_ssm.serving.stores import open_store

lmdb = pytest.importorskip("lmdb", reason="the extra serve is not installed")


@pytest.fixture(params=["memory", "folder", "batched", "redis"])
def store(request, tmp_path):
    if request.param == "memory":
        found = open_store(None)
    elif request.param == "redis":
        found = open_store(request.getfixturevalue("redis_address"))
        found._client.flushall()
    else:
        durability = "batched" if request.param == "batched" else "each"
        found = open_store(str(tmp_path / "state"), durability=durability)
    yield found
    found.close()


def put(store, **values):
    store.update(lambda get: {key.encode(): value for key, value in values.items()})


def values_of(store, *keys):
    return store.read(lambda get: list(get([key.encode() for key in keys]).values()))


def test_what_is_written_is_read(store):
    put(store, a=b"1", b=b"\0" * 20_000)
    assert values_of(store, "a", "nobody", "b") == [b"1", None, b"\0" * 20_000]
    store.update(lambda get: {b"a": None, b"c": get([b"a"])[b"a"] + b"2"})
    assert values_of(store, "a", "c") == [None, b"12"]
    assert sorted(store.users()) == ["b", "c"] and len(store) == 2
    assert store.nbytes > 0
    store.sync()


def test_the_parts_of_a_user_are_no_users(store):
    names = ["a", "a\0", "aa", "z"]
    parts = {key: b"x" for name in names for key in (state_key(name), chunk_key(name, 0), chunk_key(name, 255))}
    store.update(lambda get: {**parts, **{name.encode(): b"y" for name in names}})
    assert sorted(store.users()) == names and len(store) == 4
    assert sorted(store.parts("a")) == sorted([state_key("a"), chunk_key("a", 0), chunk_key("a", 255)])
    assert store.parts("nobody") == []
    store.update(lambda get: {key: None for key in store.parts("a")})
    assert store.parts("a") == [] and len(store.parts("aa")) == 3
    assert store.read(lambda get: get([chunk_key("z", 255), state_key("a")])) == {
        chunk_key("z", 255): b"x", state_key("a"): None,
    }  # fmt: skip


@pytest.mark.parametrize("user", ["a/b", "..", "\n", "%2F", "🦉", "a\0b", "é" * 250, " ", "*"])
def test_a_user_may_be_named_anything(store, user):
    store.update(lambda get: {user.encode(): b"x", state_key(user): b"s", chunk_key(user, 2**32 - 1): b"c"})
    assert list(store.users()) == [user]
    assert values_of(store, user, "b") == [b"x", None]
    assert len(store.parts(user)) == 2


def test_a_change_that_fails_changes_nothing(store):
    put(store, a=b"1")

    def change(get):
        raise KeyError("no")

    with pytest.raises(KeyError):
        store.update(change)
    assert values_of(store, "a") == [b"1"]
    put(store, a=b"2")


def test_more_users_than_are_read_at_once(store):
    names = {f"user {number}": b"x" for number in range(700)}
    put(store, **names)
    assert sorted(store.users()) == sorted(names)


def test_two_servers_share_a_redis(redis_address):
    """Each adds to the same numbers at the same time; no addition is lost."""
    stores = [open_store(redis_address), open_store(redis_address)]
    stores[0]._client.flushall()

    def add(get):
        return {b"a": str(int(get([b"a"])[b"a"] or 0) + 1).encode()}

    def add_with_another_between(get):
        found = add(get)
        if not done:
            done.append(True)
            stores[1].update(add)
        return found

    done = []
    stores[0].update(add_with_another_between)
    assert values_of(stores[1], "a") == [b"2"]


@pytest.mark.parametrize("another", [False, True])
def test_an_update_whose_answer_is_lost_is_written_once(redis_address, losing, another):
    """Even where another server writes on before this one looks what became of its update."""
    address, lose = losing
    stores = [open_store(address), open_store(redis_address)]
    stores[0]._client.flushall()
    calls = []

    def add(get):
        calls.append(get([b"a"])[b"a"])
        return {b"a": (calls[-1] or b"") + b"1"}

    stores[0].update(add)
    lose.set()
    if another:
        begin = stores[0]._client.connection_pool.get_connection

        def get_connection(*names):
            if not lose.is_set():
                put(stores[1], a=b"112")
            return begin(*names)

        stores[0]._client.connection_pool.get_connection = get_connection
    stores[0].update(add)
    assert not lose.is_set() and calls == [None, b"1"]
    assert values_of(stores[1], "a") == [b"112" if another else b"11"]
    stores[0]._client.connection_pool.disconnect()


def test_what_a_redis_gives_was_there_at_one_moment(redis_address):
    stores = [open_store(redis_address), open_store(redis_address)]
    stores[0]._client.flushall()
    put(stores[0], a=b"1", b=b"1")

    def read(get):
        first = get([b"a"])[b"a"]
        if first == b"1":
            put(stores[1], a=b"2", b=b"2")
        return first, get([b"b"])[b"b"]

    assert stores[0].read(read) == (b"2", b"2")


def test_a_name_that_a_redis_gives_twice_is_one_user(redis_address, monkeypatch):
    found = open_store(redis_address)
    found._client.flushall()
    names = [found.PREFIX + name for name in (b"a", b"b", b"a", b"b")]
    monkeypatch.setattr(type(found._client), "scan_iter", lambda *_, **__: iter(names))
    assert list(found.users()) == ["a", "b"] and len(open_store(redis_address)) == 2


def test_a_redis_is_counted_once_and_then_with_each_user_who_comes_or_goes(redis_address, losing, monkeypatch):
    """Those of a former version, who are there before anything was counted, too."""
    address, lose = losing
    found = open_store(redis_address)
    found._client.flushall()
    found._client.mset({found.PREFIX + name: b"1" for name in (b"a", b"b", b"c")})
    found = open_store(address)
    monkeypatch.setattr(found._client, "scan_iter", lambda **_: 1 / 0)

    def change(**values):
        keys = [key.encode() for key in values]
        found.update(lambda get: get(keys) and {**dict(zip(keys, values.values())), state_key("a"): b"s"})
        return len(found), len(stores[1])

    stores = [found, open_store(redis_address)]
    assert len(found) == 3 and change(a=b"2") == (3, 3)
    lose.set()
    assert change(a=b"3", d=b"1", e=b"1") == (5, 5) and not lose.is_set()
    assert change(b=None, nobody=None) == (4, 4) and change(b=None, c=None, f=b"1") == (4, 4)
    found._client.connection_pool.disconnect()


def test_a_full_redis_takes_nothing_but_forgets_whom_it_is_told_to(redis_address, caplog):
    """And a caller is told what the server says, not what others write in the same transaction."""
    found = open_store(redis_address)
    found._client.flushall()
    found = open_store(redis_address)
    put(found, alice=bytes(1 << 21), bob=b"1", carol=b"1")
    found._client.config_set("maxmemory", int(found.nbytes) - (1 << 20))
    try:
        for change in ({b"bob": b"private"}, {b"bob": None, b"dave": b"private"}):
            with pytest.raises(StoreError, match=r"full \(.*not allowed when used.*delete users or raise") as caught:
                found.update(lambda get, change=change: get(list(change)) and change)
            assert caught.value.full and "private" not in caught.value.strerror
        assert "private" in caplog.text and values_of(found, "bob") == [b"1"]
        found.update(lambda get: get([b"alice"]) and {b"alice": None, state_key("alice"): None})
        assert sorted(found.users()) == ["bob", "carol"] and len(found) == 2
        found.update(lambda get: {})
    finally:
        found._client.config_set("maxmemory", 0)
    put(found, dave=b"1")
    assert len(found) == len(open_store(redis_address)) == 3


def test_no_redis_server_is_one_line():
    pytest.importorskip("redis")
    with pytest.raises(UserError, match=r"state .*: no Redis server answers"):
        open_store("redis://127.0.0.1:1/0")


def test_a_redis_server_that_goes_is_a_store_error(redis_address):
    redis = pytest.importorskip("redis")
    found = open_store(redis_address)
    found._client.connection_pool.disconnect()
    found._client = redis.Redis.from_url("redis://127.0.0.1:1/0")
    works = (lambda: values_of(found, "a"), lambda: put(found, a=b"1"), lambda: list(found.users()))
    for work in (*works, lambda: len(found), lambda: found.nbytes):
        with pytest.raises(StoreError, match="the Redis server failed"):
            work()


# --- folders ---


def test_a_folder_outlives_its_process(tmp_path):
    found = open_store(str(tmp_path / "state"))
    put(found, a=b"1")
    found.close()
    assert values_of(open_store(str(tmp_path / "state")), "a") == [b"1"]


def test_a_full_folder_takes_nothing_and_goes_on(tmp_path):
    found = open_store(str(tmp_path / "state"), most_bytes=1 << 18)
    put(found, a=b"1")
    with pytest.raises(StoreError, match=r"is full; delete users or raise --state_bytes") as caught:
        put(found, b=b"2", c=bytes(1 << 18))
    assert caught.value.full
    assert values_of(found, "a", "b", "c") == [b"1", None, None]
    put(found, a=None, d=b"4")
    assert list(found.users()) == ["d"]


FILL = """
import lmdb
environment = lmdb.open("state", map_size=1 << 26, max_dbs=1)
with environment.begin(write=True) as transaction:
    for number in range({begin}, {begin} + 20):
        transaction.put(b"u%d" % number, bytes(100_000))
"""


def test_a_folder_that_another_process_fills_further_is_read_on():
    """An import with a larger --state_bytes beside a server, whose map of the file is then too small."""
    found = open_store("state", most_bytes=1 << 20)
    works = (
        lambda: values_of(found, "u0") == [bytes(100_000)],
        lambda: put(found, v=b"1") is None,
        lambda: len(found) == 61,
        lambda: "u79" in found.users(),
    )
    for number, work in enumerate(works):
        subprocess.run([sys.executable, "-c", FILL.format(begin=20 * number)], check=True)
        assert work()
    assert len(found) == 81 and found.nbytes > 8_000_000


@pytest.mark.parametrize(
    ("error", "free", "full"),
    [
        (lmdb.DiskError("mdb_txn_commit: No space left on device"), 1 << 30, True),
        # What lmdb says of a write that the end of a disk cut short.
        (lmdb.Error("mdb_txn_commit: Input/output error"), 4096, True),
        (lmdb.Error("mdb_txn_commit: Input/output error"), 1 << 30, False),
    ],
)
def test_a_full_disk_takes_nothing(tmp_path, monkeypatch, error, free, full):
    found = open_store(str(tmp_path / "state"))

    class Failing:
        def begin(self, **options):
            raise error

    monkeypatch.setattr(found, "_env", Failing())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(StoreError, match="the disk is full .*; make room there" if full else "failed") as caught:
        put(found, a=b"1")
    assert caught.value.full == full
    with pytest.raises(StoreError):
        _ = found.nbytes


def test_batched_updates_are_synced_soon(tmp_path, monkeypatch):
    found = open_store(str(tmp_path / "state"), durability="batched")
    synced = []
    sync = found._env.sync
    monkeypatch.setattr(type(found), "sync", lambda self: synced.append(sync(True)))
    put(found, a=b"1")
    until = time.monotonic() + 5
    while not synced and time.monotonic() < until:
        time.sleep(0.001)
    assert synced


def test_after_a_sync_that_failed_nothing_is_acknowledged(tmp_path, monkeypatch):
    found = open_store(str(tmp_path / "state"), durability="batched")

    def fail(self):
        raise lmdb.Error("mdb_env_sync: Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(type(found), "sync", fail)
        put(found, a=b"1")
        until = time.monotonic() + 5
        while not found._failed and time.monotonic() < until:
            time.sleep(0.001)
    with pytest.raises(StoreError, match="could not be synced"):
        put(found, b=b"1")
    found.close()


@pytest.mark.parametrize("damage", ["no lmdb", "short", "a page short"])
def test_a_damaged_folder_is_one_line_or_read_as_damaged(tmp_path, damage):
    found = open_store(str(tmp_path / "state"))
    record = Record(state=bytes(20_000), total=1, digest=b"d" * 16)
    for n in range(40):
        found.update(lambda get, n=n: record.writings(f"user {n}", 10))
    found.close()
    file = tmp_path / "state" / "data.mdb"
    if damage == "no lmdb":
        file.write_bytes(os.urandom(1 << 14))
    else:
        os.truncate(file, file.stat().st_size - (4096 if damage == "a page short" else 1 << 19))
    if damage == "a page short":
        # It may be what lmdb itself leaves, so it is opened; what was there is missed where it is read.
        again = open_store(str(tmp_path / "state"))
        for user in [f"user {n}" for n in range(40)]:
            with contextlib.suppress(StoreError, DamagedError):
                again.read(lambda get, user=user: get([state_key(user)]) and whole_record(user, get))
    else:
        with pytest.raises(UserError, match=r"state .*(cannot be opened|is .* bytes short)"):
            open_store(str(tmp_path / "state"))


# --- records ---

IDS = st.sampled_from(["a", "é", "🦉" * 9, "\0", "x" * 500, "1", "2", "3"])


@given(
    st.lists(st.tuples(IDS, st.floats(-1e9, 1e9)), max_size=30).flatmap(lambda some: st.sampled_from([some, some * 5])),
    st.lists(IDS, max_size=80), st.binary(max_size=9), st.integers(1, 150), st.integers(0, 150), st.integers(1, 4),
)  # fmt: skip
def test_a_record_is_what_it_was(events, event_ids, state, kept, written, at_once):
    record = Record()
    expected, values = [], {}
    for number in range(0, len(events), at_once):
        record.add(*zip(*events[number : number + at_once]))
        for item, moment in events[number : number + at_once]:
            place = sum(other <= moment for other, _ in expected)
            expected.insert(place, (moment, item))
        if number <= written < number + at_once:
            values = {key: value for key, value in record.writings("u", kept).items() if value is not None}
            record = whole_record("u", lambda keys, values=values: {key: values.get(key) for key in keys})
            expected = expected[-len(record.items) :]
    record.event_ids, record.changed = event_ids, 7.5
    record.digest, record.state, record.read, record.state_sum = b"d" * 16, state, 5, 9
    for key, value in record.writings("u", kept).items():
        values[key] = value
    found = whole_record("u", lambda keys: {key: values.get(key) for key in keys})
    if not events:
        assert found is None
        return
    assert kept <= len(found.items) < kept + 32 or len(found.items) == len(expected)
    expected = expected[-len(found.items) :]
    assert found.items.texts() == [item for _, item in expected]
    assert np.frombuffer(found.times).tolist() == [moment for moment, _ in expected]
    assert found.event_ids == event_ids
    assert (found.total, found.changed, found.digest, found.read, found.state_sum) == (
        len(events),
        7.5,
        b"d" * 16,
        5,
        9,
    )
    assert not state or values[state_key("u")] == state
    # Nothing lies there that is not spoken of.
    chunks = {chunk_key("u", number) for number in range(found.first, found.sealed)}
    assert {key for key, value in values.items() if value is not None} - {b"u", state_key("u")} == chunks


def test_damage_is_known():
    record = Record(event_ids=["e"])
    for item in ("a", "b"):
        record.append(item, 1.0)
    value = record.writings("u", 10)[b"u"]
    for place in range(len(value)):
        damaged = bytearray(value)
        damaged[place] ^= 1
        with pytest.raises((DamagedError, UserError)):
            decoded(bytes(damaged))
    for length in range(len(value)):
        with pytest.raises(DamagedError):
            decoded(value[:length])


def test_another_format_is_named():
    with pytest.raises(UserError, match="another version of recbole_ssm wrote this record"):
        decoded(b"RSU9" + Record(total=1).writings("u", 10)[b"u"][4:])


def test_states_in_two_bytes_a_number():
    row = np.random.default_rng(0).normal(size=100).astype(np.float32)
    assert (unpacked_state(packed_state(row, 0), 0) == row).all()
    half = packed_state(row, 1)
    assert len(half) == 200
    np.testing.assert_allclose(unpacked_state(half, 1), row, rtol=2**-8)
