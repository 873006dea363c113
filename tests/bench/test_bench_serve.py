"""The load client against a real server, by one process and by two."""

import json

import pytest

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
