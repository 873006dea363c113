"""Stores and records: what was written is there, all of it or nothing, and what is damaged is known as such."""

import contextlib
import os
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_ssm.errors import UserError
from recbole_ssm.serving.record import DamagedError, Record, decoded, packed_state, unpacked_state
from recbole_ssm.serving.store import StoreError, open_store

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
    store.update(list(values), lambda old: values)


def test_what_is_written_is_read(store):
    put(store, a=b"1", b=b"\0" * 20_000)
    assert store.get(["a", "nobody", "b"]) == {"a": b"1", "nobody": None, "b": b"\0" * 20_000}
    store.update(["a", "c"], lambda old: {"a": None, "c": (old["a"] or b"") + b"2"})
    assert store.get(["a", "c"]) == {"a": None, "c": b"12"}
    assert sorted(store.users()) == ["b", "c"] and len(store) == 2
    assert store.nbytes > 0
    store.sync()


@pytest.mark.parametrize("user", ["a/b", "..", "\n", "%2F", "🦉", "a\0b", "é" * 250, " ", "*"])
def test_a_user_may_be_named_anything(store, user):
    store.update([user], lambda old: {user: b"x"})
    assert list(store.users()) == [user]
    assert store.get([user, "b"]) == {user: b"x", "b": None}


def test_a_change_that_fails_changes_nothing(store):
    put(store, a=b"1")

    def change(old):
        raise KeyError("no")

    with pytest.raises(KeyError):
        store.update(["a"], change)
    assert store.get(["a"]) == {"a": b"1"}
    put(store, a=b"2")


def test_more_users_than_are_read_at_once(store):
    names = {f"user {number}": b"x" for number in range(700)}
    store.update(list(names), lambda old: names)
    assert sorted(store.users()) == sorted(names)


def test_two_servers_share_a_redis(redis_address):
    """Each adds to the same numbers at the same time; no addition is lost."""
    stores = [open_store(redis_address), open_store(redis_address)]
    stores[0]._client.flushall()

    def add(old):
        return {"a": str(int(old["a"] or 0) + 1).encode()}

    def add_with_another_between(old):
        if not done:
            done.append(True)
            stores[1].update(["a"], add)
        return add(old)

    done = []
    stores[0].update(["a"], add_with_another_between)
    assert stores[1].get(["a"]) == {"a": b"2"}


def test_no_redis_server_is_one_line():
    pytest.importorskip("redis")
    with pytest.raises(UserError, match=r"state .*: no Redis server answers"):
        open_store("redis://127.0.0.1:1/0")


def test_a_redis_server_that_goes_is_a_store_error(redis_address):
    redis = pytest.importorskip("redis")
    found = open_store(redis_address)
    found._client.connection_pool.disconnect()
    found._client = redis.Redis.from_url("redis://127.0.0.1:1/0")
    for work in (lambda: found.get(["a"]), lambda: put(found, a=b"1"), lambda: list(found.users())):
        with pytest.raises(StoreError, match="the Redis server failed"):
            work()


# --- folders ---


def test_a_folder_outlives_its_process(tmp_path):
    found = open_store(str(tmp_path / "state"))
    put(found, a=b"1")
    found.close()
    assert open_store(str(tmp_path / "state")).get(["a"]) == {"a": b"1"}


def test_a_full_folder_takes_nothing_and_goes_on(tmp_path):
    found = open_store(str(tmp_path / "state"), most_bytes=1 << 18)
    put(found, a=b"1")
    with pytest.raises(StoreError, match=r"is full; delete users or raise --state_bytes") as caught:
        put(found, b=b"2", c=bytes(1 << 18))
    assert caught.value.full
    assert found.get(["a", "b", "c"]) == {"a": b"1", "b": None, "c": None}
    put(found, a=None, d=b"4")
    assert list(found.users()) == ["d"]


def test_a_full_disk_takes_nothing(tmp_path, monkeypatch):
    found = open_store(str(tmp_path / "state"))

    def full(*arguments, **options):
        raise lmdb.DiskError("mdb_txn_commit: No space left on device")

    class Full:
        begin = full

    monkeypatch.setattr(found, "_env", Full())
    with pytest.raises(StoreError) as caught:
        put(found, a=b"1")
    assert caught.value.full


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
    value = Record(state=bytes(20_000)).encoded()
    found.update(["a"], lambda old: {f"user {n}": value for n in range(40)})
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
                decoded(again.get([user])[user])
    else:
        with pytest.raises(UserError, match=r"state .*(cannot be opened|is .* bytes short)"):
            open_store(str(tmp_path / "state"))


# --- records ---

IDS = st.sampled_from(["a", "é", "🦉" * 9, "\0", "x" * 500, "1", "2", "3"])


@given(
    st.lists(st.tuples(IDS, st.floats(-1e9, 1e9)), max_size=30), st.lists(IDS, max_size=80), st.binary(max_size=9),
    st.integers(1, 40),
)  # fmt: skip
def test_a_record_is_what_it_was(events, event_ids, state, kept):
    record = Record()
    expected = []
    for item, moment in events:
        (record.append if moment >= record.newest else record.insert)(item, moment)
        place = sum(other <= moment for other, _ in expected)
        expected.insert(place, (moment, item))
    record.keep(kept)
    record.event_ids, record.digest, record.state, record.changed = event_ids, b"d" * 16, state, 7.5
    found = decoded(record.encoded())
    expected = expected[-kept:]
    assert found.items.texts() == [item for _, item in expected]
    assert np.frombuffer(found.times).tolist() == [moment for moment, _ in expected]
    assert found.event_ids == event_ids[-64:]
    assert (found.total, found.state, found.changed) == (len(events), state, 7.5)


def test_damage_is_known():
    record = Record(digest=b"d" * 16, state=b"the state", event_ids=["e"])
    for item in ("a", "b"):
        record.append(item, 1.0)
    value = record.encoded()
    for place in range(len(value)):
        damaged = bytearray(value)
        damaged[place] ^= 1
        if place >= len(value) - len(record.state):
            # The events are whole, so the state can be computed from them.
            found = decoded(bytes(damaged))
            assert found.items.texts() == ["a", "b"] and not found.state and not found.digest
        else:
            with pytest.raises((DamagedError, UserError)):
                decoded(bytes(damaged))
    for length in range(len(value)):
        with pytest.raises(DamagedError):
            decoded(value[:length])


def test_another_format_is_named():
    with pytest.raises(UserError, match="another version of recbole_ssm wrote this record"):
        decoded(b"RSU2" + Record().encoded()[4:])


def test_states_in_two_bytes_a_number():
    row = np.random.default_rng(0).normal(size=100).astype(np.float32)
    assert (unpacked_state(packed_state(row, 0), 0) == row).all()
    half = packed_state(row, 1)
    assert len(half) == 200
    np.testing.assert_allclose(unpacked_state(half, 1), row, rtol=2**-8)
