"""The load client against a real server, by one process and by two."""

import argparse
import itertools
import json
import random
import re

import pytest

from recbole_ssm.bench import serve
from recbole_ssm.cli import main

pytest.importorskip("lmdb", reason="the package lmdb is not installed")


@pytest.mark.parametrize("workers", [1, 2])
def test_rows(tmp_path, monkeypatch, workers):
    monkeypatch.chdir(tmp_path)
    sizes = ["--items=300", "--users=60", "--events=12", f"--workers={workers}"]
    assert main(["bench", "serve", *sizes, "--seconds=1", "--connections=2", "--json=rows.json", "--folder=."]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["users"] for row in rows] == ["any", "few"]
    for row in rows:
        assert row["failed"] == 0 and row["calls"] > 0 and row["workers"] == workers
        assert row["server_cpu_ms"] >= 0 and row["p50_ms"] <= row["p90_ms"]
        assert all(row[f"{part}_ms"] > 0 for part in ("store", "step", "score", "top_k"))
    # The store is gone with the server.
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]


OPTIONS = argparse.Namespace(
    items=9,
    k=10,
    exclude_seen=0,
    model="M",
    users=10**6,
    workers=1,
    durability="each",
    state_type="float32",
    seconds=1.0,
)


def test_no_two_loads_take_the_same_users():
    """Else whoever a load takes would have been there in its warm-up and in the rows before."""
    draw = random.Random(0)
    loads = [itertools.islice(serve._Client(OPTIONS, 1, OPTIONS.users, draw).bodies(), 100) for _ in range(3)]
    users = [re.search(rb"user (\d+)", body).group(1) for load in loads for body in load]
    assert len(set(users)) > 290


def test_answers_that_fail_are_counted_apart(monkeypatch):
    """None at all is a row that says so."""
    client = serve._Client(OPTIONS, 1, 9, random.Random(0))
    connection = serve._Connection(client, iter([]), 0.0, None)
    connection.connection_made(argparse.Namespace(close=lambda: None))
    for status in (b"200 OK", b"503 Service Unavailable", b"500 Internal Server Error"):
        connection.data_received(b"HTTP/1.1 " + status + b"\r\ncontent-length: 2\r\n\r\n{}")
    assert len(client.latencies) == 1 and client.failed == 2

    async def refused(self, connections, seconds):
        self.latencies, self.failed = [], 7
        return seconds

    async def parts(self):
        return dict.fromkeys(serve.PARTS, 0.0)

    monkeypatch.setattr(serve._Client, "load", refused)
    monkeypatch.setattr(serve._Client, "parts", parts)
    row = serve._row(OPTIONS, None, 1, "any", 2, random.Random(0))
    assert (row["calls"], row["failed"], row["note"]) == (0, 7, "failed: no call was answered")
