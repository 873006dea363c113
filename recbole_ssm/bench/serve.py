"""Calls a second of a server over loopback, an event and its recommendations in each, and their latencies.

The server is a process of its own, with a store in a folder that holds many users already; the client is this process.
Both eat of the same cores, so the server's processor time a call stands beside the rate. For rows with users ``any``
each call takes one of all users at random, who has mostly not been there since the server began; with ``few`` it takes
one of 1,000. Calls that fail are counted apart. The weights are random, since times do not depend on them; with
``--ann_above`` the vectors of items lie in groups, since the index needs that. The store lies under ``--folder``, whose
disk decides what an fsync costs.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import random
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from recbole_ssm import compat
from recbole_ssm.arguments import add_counts, at_least, one_of, positive, sizes
from recbole_ssm.bench import Row
from recbole_ssm.errors import UserError, require

compat.install()

from recbole_ssm.bench.untrained import untrained_model  # noqa: E402
from recbole_ssm.model import STATE_SPACE  # noqa: E402
from recbole_ssm.serving import Recommender  # noqa: E402
from recbole_ssm.serving.record import STATE_TYPES, Record, Values  # noqa: E402
from recbole_ssm.serving.served import Served  # noqa: E402
from recbole_ssm.serving.states import Unread  # noqa: E402
from recbole_ssm.serving.store import Store  # noqa: E402
from recbole_ssm.serving.stores import DURABILITIES, open_store  # noqa: E402
from recbole_ssm.serving.workers import COUNTS, Team, supervise  # noqa: E402

FEW = 1000
DIFFERENT = 256
"""So many different histories the users share, so that a store is soon filled."""
WARM_UP = 0.5
"""Seconds before a row that are not counted."""
SETTLED_WITHIN, IDLE = 120.0, 0.05
"""A server is waited for, at most so long, until it works less than so many seconds in half a second."""
PARTS = ("store", "step", "score", "top_k")
DIGEST = "1" * 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--model", type=one_of(STATE_SPACE), default="2Mamba4Rec", help="its own default sizes")
    add_counts(
        parser,
        items=(12_101, "of the catalogue"),
        users=(100_000, "in the store"),
        events=(20, "that each user has at first"),
        k=(10, "recommendations a call"),
        server_threads=(1, "of PyTorch in the server"),
        workers=(1, "processes that answer"),
    )
    parser.add_argument("--connections", type=sizes, default="1,8,64", help="calls under way at once")
    parser.add_argument("--seconds", type=positive, default=10.0, help="for each row")
    parser.add_argument("--durability", type=one_of(DURABILITIES), default="each", help="of the store")
    parser.add_argument("--state_type", type=one_of(tuple(STATE_TYPES)), default="float32", help="of the states")
    parser.add_argument("--exclude_seen", type=at_least(0), default=0, help="1 leaves the history out of the answers")
    parser.add_argument("--ann_above", type=at_least(0), metavar="N", help="use a faiss index for more items than N")
    parser.add_argument("--folder", type=Path, help="where the store lies (default: the system's temporary folder)")


def run(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each number of connections and choice of users.

    ``p50_ms``, ``p90_ms`` and ``p99_ms`` are of a call as the client sees it; ``server_cpu_ms`` is processor time of
    the server a call, and ``store_ms`` and the following are the wall time of its parts a call. A row in which no call
    was answered has a ``note`` in place of these.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client", "lmdb"):
        require(package, f"bench serve: needs {package}; pip install 'recbole-ssm[serve]'")
    if options.folder is not None and not options.folder.is_dir():
        raise UserError(f"--folder: there is no folder {options.folder}")
    draw = random.Random(0)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        context = multiprocessing.get_context("spawn")
        reading, writing = context.Pipe(duplex=False)
        server = context.Process(target=_serve, args=(options, folder, writing), daemon=True)
        server.start()
        writing.close()
        try:
            port = reading.recv()
            print(f"store: {options.users:,} users, {_size(folder) / 2**20:,.0f} MiB, durability {options.durability}")
            _settle(psutil.Process(server.pid))
            for users, connections in itertools.product(("any", "few"), options.connections):
                yield _row(options, server.pid, port, users, connections, draw)
        except EOFError as error:
            raise UserError("bench serve: the server did not start; what it printed says why") from error
        finally:
            server.terminate()
            server.join()


def _row(
    options: argparse.Namespace, pid: int | None, port: int, users: str, connections: int, draw: random.Random
) -> Row:
    client = _Client(options, port, options.users if users == "any" else min(FEW, options.users), draw)
    asyncio.run(client.load(connections, WARM_UP))
    process = psutil.Process(pid)
    processes = [process, *process.children()]
    parts, before = asyncio.run(client.parts()), _processor_time(processes)
    seconds = asyncio.run(client.load(connections, options.seconds))
    cpu, after = _processor_time(processes) - before, asyncio.run(client.parts())
    latencies = np.array(client.latencies)
    calls = len(latencies)
    row: Row = {
        "model": options.model,
        "items": options.items,
        "in_store": options.users,
        "workers": options.workers,
        "durability": options.durability,
        "state_type": options.state_type,
        "users": users,
        "connections": connections,
        "calls": calls,
        "failed": client.failed,
    }
    if not calls:
        return {**row, "note": "failed: no call was answered"}
    return {
        **row,
        "calls_per_s": calls / seconds,
        **{f"p{share}_ms": 1000 * float(np.percentile(latencies, share)) for share in (50, 90, 99)},
        "server_cpu_ms": 1000 * cpu / calls,
        **{f"{part}_ms": 1000 * (after[part] - parts[part]) / calls for part in PARTS},
    }


def _settle(process: psutil.Process) -> None:
    """Wait until a server has gone through all users, as it does in the beginning."""
    before, until = -1.0, time.monotonic() + SETTLED_WITHIN
    while time.monotonic() < until:
        now = _processor_time([process, *process.children()])
        if now - before < IDLE:
            return
        before = now
        time.sleep(0.5)


def _processor_time(processes: list[psutil.Process]) -> float:
    """Seconds that processes have worked."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


# --- the client ---


class _Client:
    """Keeps some connections busy: as soon as a call is answered, the next begins."""

    def __init__(self, options: argparse.Namespace, port: int, users: int, draw: random.Random) -> None:
        self._port, self._users, self._items, self._draw = port, users, options.items, draw
        self._path = f"/v1/events?recommend={options.k}"
        if options.exclude_seen:
            self._path += "&exclude_seen=true"
        self.latencies: list[float] = []
        self.failed = 0

    def bodies(self) -> Iterator[bytes]:
        """Calls without end."""
        run = time.time_ns()
        for number in itertools.count():
            user, item = self._draw.randrange(self._users), 1 + self._draw.randrange(self._items)
            body = json.dumps({"user": f"user {user}", "item": f"item {item}", "id": f"{run}-{number}"}).encode()
            head = f"POST {self._path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            yield f"{head}content-length: {len(body)}\r\n\r\n".encode() + body

    async def load(self, connections: int, seconds: float) -> float:
        """Call for so many seconds; how many it were."""
        self.latencies, self.failed = [], 0
        bodies, begin = self.bodies(), time.perf_counter()
        loop = asyncio.get_running_loop()
        ended = [loop.create_future() for _ in range(connections)]
        for one in ended:
            make = partial(_Connection, self, bodies, begin + seconds, one)
            await loop.create_connection(make, "127.0.0.1", self._port)
        await asyncio.gather(*ended)
        return time.perf_counter() - begin

    async def parts(self) -> dict[str, float]:
        """The seconds that the server has spent in each part of its work."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
        text = (await reader.read()).decode()
        writer.close()
        sums = dict(
            line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("recbole_ssm_part_seconds_sum")
        )
        return {part: float(sums.get(f'recbole_ssm_part_seconds_sum{{part="{part}"}}', 0)) for part in PARTS}


class _Connection(asyncio.Protocol):
    """One connection of a client; HTTP is read no further than this server's answers need."""

    def __init__(self, client: _Client, bodies: Iterator[bytes], until: float, ended: asyncio.Future[None]) -> None:
        self._client, self._bodies, self._until, self.ended = client, bodies, until, ended
        self._answer = b""
        self._begin = 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._call()

    def _call(self) -> None:
        self._begin = time.perf_counter()
        if self._begin < self._until:
            self._transport.write(next(self._bodies))
        else:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, found, body = self._answer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if len(body) < length:
            return
        if head.startswith(b"HTTP/1.1 200"):
            self._client.latencies.append(time.perf_counter() - self._begin)
        else:
            self._client.failed += 1
        self._answer = b""
        self._call()

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set_result(None)


# --- the server ---


def _serve(options: argparse.Namespace, folder: str, ready: Any) -> None:
    """Fill a store and serve, in a process of its own; the port goes through ``ready``."""
    if options.workers > 1:
        os.environ[COUNTS] = str(Path(folder, "metrics"))
        Path(folder, "metrics").mkdir()
    from recbole_ssm.serving.server import listen_all, run
    from recbole_ssm.serving.service import Server

    torch.set_num_threads(options.server_threads)
    torch.manual_seed(0)
    model = untrained_model(options.model, options.items, torch.device("cpu"))
    if options.ann_above is not None:
        _group(model.item_embedding.weight)
    config = {
        "ITEM_ID_FIELD": "item_id",
        "LIST_SUFFIX": "_list",
        "ITEM_LIST_LENGTH_FIELD": "item_length",
        "TIME_FIELD": "timestamp",
        "MAX_ITEM_LIST_LENGTH": 50,
        "device": torch.device("cpu"),
        "model": options.model,
    }
    recommender = Recommender(model, config, ["[PAD]", *(f"item {number}" for number in range(1, options.items + 1))])
    served = Served(recommender, DIGEST, ann_above=options.ann_above)
    if served.nearest:
        print(f"index: {served.nearest.probes} probes, recall of the ten best {served.nearest.recall:.3f}", flush=True)
    place = str(Path(folder, "state"))
    # Filled in memory's order first; each update of a call is as durable as is asked for.
    store = open_store(place, durability="batched")
    _fill(store, served, options)
    store.close()
    sockets = listen_all("127.0.0.1", 0, options.workers)

    def work(number: int, listening: socket.socket) -> None:
        server = Server(
            load=lambda _: served,
            place=Path(options.model),
            served=served,
            store=open_store(place, durability=options.durability),
            options={"state_type": options.state_type},
            number=number,
        )
        run(server, listening)

    ready.send(sockets[0].getsockname()[1])
    ready.close()
    if options.workers == 1:
        work(0, sockets[0])
    else:
        supervise(work, sockets, Team(options.workers))


def _group(vectors: Tensor) -> None:
    """Let vectors lie in groups of a hundred, as those of trained models do; of random ones, none is near another."""
    with torch.no_grad():
        groups = vectors[torch.randint(0, len(vectors), (len(vectors) // 100 + 1,))]
        vectors.mul_(0.3).add_(groups[torch.randint(0, len(groups), (len(vectors),))])


def _fill(store: Store, served: Served, options: argparse.Namespace) -> None:
    assert served.states is not None
    records = []
    for number in range(min(DIFFERENT, options.users)):
        ids = np.random.default_rng(number).integers(1, options.items + 1, options.events).tolist()
        record = Record(changed=time.time())
        for moment, item in enumerate(ids):
            record.append(f"item {item}", float(moment))
        record.put_state(served.states.read(Unread(ids)), served.key, STATE_TYPES[options.state_type])
        records.append(record)
    for begin in range(0, options.users, 5000):
        part: Values = {}
        for user in range(begin, min(begin + 5000, options.users)):
            part.update(replace(records[user % len(records)]).writings(f"user {user}", options.events))
        store.update(lambda _, part=part: part)  # type: ignore[misc]


def _size(folder: str) -> int:
    return sum(file.stat().st_blocks * 512 for file in Path(folder).rglob("*") if file.is_file())
