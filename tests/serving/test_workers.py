"""Several processes behind one port: one model, one store, one end."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import mmap
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from recbole_ssm.cli import main
from recbole_ssm.commands.serve import load_served
from recbole_ssm.errors import UserError
from recbole_ssm.serving import workers
from recbole_ssm.serving.store import MemoryStore
from recbole_ssm.serving.stores import open_store
from recbole_ssm.serving.workers import Team
from tests.children import in_child
from tests.serving.conftest import record_of
from tests.serving.test_engine import untrained
from tests.serving.test_server import TOKEN, Client, runs  # noqa: F401

pytest.importorskip("lmdb", reason="the package lmdb is not installed")

from recbole_ssm.serving.service import Server


@contextlib.contextmanager
def command(*options):
    """``recbole-ssm serve`` as a process of its own, and the port on which it answers."""
    words = [sys.executable, "-m", "recbole_ssm", "serve", *options, "--port=0", "--device=cpu"]
    environment = {**os.environ, "RECBOLE_SSM_TOKEN": TOKEN}
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment, text=True) as process:
        try:
            line = process.stdout.readline()
            yield process, int(re.search(r":(\d+) serves .* by 2 workers", line)[1])
        finally:
            process.kill()


def wait_for(true, seconds=30):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_workers_are_one_server(runs):  # noqa: F811
    """Calls under load through a kill, a new model and the end: none is lost, and each event is taken once."""
    digests = [load_served(runs / name, device="cpu").digest for name in ("first", "second")]
    acknowledged: dict = {}
    stop = threading.Event()

    def call(user, port):
        number = 0
        while not stop.is_set():
            # A worker that is killed answers nothing more; the call is sent again, and its id is known.
            with contextlib.suppress(OSError, http.client.HTTPException):
                body = {"user": user, "item": f"i{number % 20}", "id": str(number)}
                status, found = Client(port, TOKEN).post("/v1/events?recommend=2", body)
                assert status == 200 and found["taken"] + found["repeated"] == 1, found
                number += 1
                acknowledged[user] = number
        return number

    with command(str(runs / "first"), "--workers=2", "--state=state", f"--models={runs}") as (process, port):
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            users = [f"u{number}" for number in range(3)]
            waiting = [pool.submit(call, user, port) for user in users]
            wait_for(lambda: len(acknowledged) == 3)
            workers = psutil.Process(process.pid).children()
            assert len(workers) == 2
            workers[0].kill()
            wait_for(lambda: len(psutil.Process(process.pid).children()) == 2 and not workers[0].is_running())
            assert Client(port, TOKEN).post("/v1/model", {"name": "second"})[1]["model"] == digests[1]
            # Connections reach any worker, and all of them serve it.
            found = {Client(port, TOKEN).get("/v1/users/u0/recommendations")[1]["model"] for _ in range(12)}
            assert found == {digests[1]}
            stop.set()
            counts = [one.result() for one in waiting]
        text = Client(port, TOKEN).get("/metrics")[1]
        taken = float(re.search(r'^recbole_ssm_events_total\{outcome="taken"\} (.*)$', text, re.M)[1])
        # What a killed worker took may have been counted or not.
        assert 0 <= sum(counts) - taken <= 2
        assert "recbole_ssm_users 3.0" in text
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert not any(worker.is_running() for worker in workers)
    store = open_store("state")
    for user, count in zip(users, counts):
        assert record_of(store, user).items.texts() == [f"i{number % 20}" for number in range(count)]
    store.close()


def test_a_worker_that_begins_later_serves_what_was_chosen(runs, tmp_path):  # noqa: F811
    """A checkpoint that SIGHUP reads again, two choices at once, and one that is gone when a worker begins."""
    models = tmp_path / "models"
    for name in ("first", "second"):
        shutil.copytree(runs / name, models / name)
    digests = {name: load_served(runs / name, device="cpu").digest for name in ("first", "second")}

    def served(port):
        return {Client(port, TOKEN).get("/v1/users/u0/recommendations")[1]["model"] for _ in range(12)}

    def replace_one(process):
        worker = psutil.Process(process.pid).children()[0]
        worker.kill()
        wait_for(lambda: not worker.is_running() and len(psutil.Process(process.pid).children()) == 2)

    with command(str(models / "first"), "--workers=2", "--state=state", f"--models={models}") as (process, port):
        assert all(Client(port, TOKEN).get("/health/ready")[0] == 200 for _ in range(8))
        shutil.copy(runs / "second" / "best.safetensors", models / "first" / "best.safetensors")
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: served(port) == {digests["second"]})
        replace_one(process)
        assert served(port) == {digests["second"]}

        shutil.copy(runs / "first" / "best.safetensors", models / "first" / "best.safetensors")
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            posts = [
                pool.submit(lambda name=name: Client(port, TOKEN).post("/v1/model", {"name": name}))
                for name in ("first", "second")
            ]
            answers = [one.result() for one in posts]
        assert {status for status, _ in answers} <= {200, 503}
        # Whichever came last, all workers serve it.
        assert len(served(port)) == 1

        assert Client(port, TOKEN).post("/v1/model", {"name": "second"})[0] == 200
        shutil.move(models / "second", models / "hidden")
        replace_one(process)
        # One worker is left, and another cannot begin; nobody serves the former model.
        found = set()
        for _ in range(8):
            client = Client(port, TOKEN)
            client._connection.timeout = 1
            with contextlib.suppress(OSError):
                found.add(client.get("/v1/users/u0/recommendations")[1]["model"])
        assert found <= {digests["second"]}
        shutil.move(models / "hidden", models / "second")
        wait_for(lambda: served(port) == {digests["second"]})


def test_workers_that_find_a_newer_file_all_serve_that_one(tmp_path):
    """A run that still trains puts another file in the place of the one that was chosen, before a worker loads it."""
    place, team, loaded = tmp_path / "model", Team(2), []

    def load(place):
        loaded.append(place)
        return newer

    old, newer = untrained("2Mamba4Rec", 1), untrained("2Mamba4Rec", 2)
    first, second = (
        Server(load=load, place=place, served=old, store=MemoryStore(), team=team, number=number) for number in (0, 1)
    )
    choice = team.choose(place, old.digest)
    second.begin_with_choice()
    assert second.engine.served is newer and second.choice == team.chosen[0] == choice + 1

    async def follow():
        async with first.running(None):
            while first.choice != second.choice:
                await asyncio.sleep(0.001)

    asyncio.run(follow())
    # The first one loads what the second has chosen, and chooses nothing itself.
    assert first.engine.served is newer and loaded == [place] * 2 and team.chosen == (choice + 1, place)
    # A choice that came meanwhile stays.
    team.choose(tmp_path / "other", old.digest)
    assert team.choose(place, old.digest, after=choice + 1) == choice + 1
    assert team.chosen == (choice + 2, tmp_path / "other")


def test_workers_end_with_the_process_that_forked_them(runs):  # noqa: F811
    with command(str(runs / "first"), "--workers=2", "--state=state") as (process, port):
        wait_for(lambda: len(psutil.Process(process.pid).children()) == 2)
        workers = psutil.Process(process.pid).children()
        wait_for(lambda: all(Client(port).get("/health/ready")[0] == 200 for _ in range(4)))
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--workers=0"], "--workers: must be at least 1, got 0"),
        (["--workers=2"], "--workers: processes share no memory store; name a folder or a Redis server by --state"),
    ],
)
def test_mistakes_are_one_line(runs, options, line, capsys):  # noqa: F811
    assert main(["serve", str(runs / "first"), "--device=cpu", *options]) == 2
    assert line in capsys.readouterr().err


def test_workers_that_end_as_soon_as_they_begin_end_the_server(capfd):
    def work(number, listening):
        raise UserError("state: there is no room")

    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
        outcome = in_child(lambda: workers.supervise(work, sockets, Team(2)))
    assert (outcome.kind, outcome.value) == (
        "refused",
        "--workers: they end as soon as they begin; the lines above say why",
    )
    assert "state: there is no room" in capfd.readouterr().err


def test_a_server_that_is_told_to_end_while_its_workers_begin_ends_in_order():
    team, begun = Team(4), mmap.mmap(-1, 4)

    def work(number, listening):
        begun[number] = 1
        if number == 0:
            wait_for(lambda: all(begun[:4]))
            os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)

    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(4)]
        outcome = in_child(lambda: workers.supervise(work, sockets, team))
    assert outcome.kind == "done"


def test_a_server_goes_on_while_one_worker_serves(monkeypatch):
    """However often another one fails to begin, and however young the one is that serves."""
    monkeypatch.setattr(workers, "AGAIN_AFTER", 0.01)
    team, begun = Team(2), mmap.mmap(-1, 1)

    def work(number, listening):
        if number == 0:
            team.note(number, 0)
            time.sleep(60)
        if begun[0] == 0:
            wait_for(lambda: team.serves)
        if begun[0] == 2 * workers.TOO_OFTEN:
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(60)
        begun[0] += 1
        raise UserError("state: there is no room")

    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
        outcome = in_child(lambda: workers.supervise(work, sockets, team))
    assert (outcome.kind, begun[0]) == ("done", 2 * workers.TOO_OFTEN)
