"""What the tests of stores and of servers share."""

import os
import shutil
import socket
import socketserver
import subprocess
import threading
import time
from functools import partial

import numpy as np
import pytest

from recbole_ssm.serving.record import checksum, state_key, unpacked_state, whole_record
from recbole_ssm.serving.states import Unread


@pytest.fixture(scope="session")
def redis_address(tmp_path_factory):
    """A real Redis server of this test's own."""
    pytest.importorskip("redis", reason="the package redis is not installed")
    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server on this machine")
    folder = tmp_path_factory.mktemp("redis")
    place = folder / "socket"
    command = ["redis-server", "--port", "0", "--unixsocket", str(place), "--dir", str(folder), "--save", ""]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        until = time.monotonic() + 10
        while not place.exists() and time.monotonic() < until:
            time.sleep(0.01)
        yield f"unix://{place}"
        server.terminate()


@pytest.fixture
def losing(redis_address):
    """A way to the Redis server on which an answer can be lost: its address, and an event that loses the next answer to
    EXEC, with the connection, after the server has done what it says.
    """
    lose, way = threading.Event(), socketserver.ThreadingUnixStreamServer
    place = redis_address.removeprefix("unix://")

    class Between(socketserver.BaseRequestHandler):
        def handle(self):
            with socket.socket(socket.AF_UNIX) as server:
                server.connect(place)
                while sent := self.request.recv(1 << 20):
                    server.sendall(sent)
                    answer = server.recv(1 << 20)
                    if b"EXEC\r\n" in sent and lose.is_set():
                        lose.clear()
                        return
                    self.request.sendall(answer)

    with way(f"{place}.losing", Between) as found:
        found.daemon_threads = True
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"unix://{place}.losing", lose
        found.shutdown()
    os.unlink(f"{place}.losing")


def record_of(store, user):
    """All that is kept of a user but the state."""
    return store.read(partial(whole_record, user))


def row_of(store, user, served, tolerance=1e-5):
    """The state of a user as a server that begins now has it: the stored one, and the events that it has not read."""
    record = record_of(store, user)
    ids = served.catalogue.ids(record.items.texts())
    row = served.states.start()
    unread = record.total - record.read
    assert unread < 8
    if record.digest:
        state = store.read(lambda get: get([state_key(user)]))[state_key(user)]
        assert record.digest == served.key and checksum(state) == record.state_sum
        row = unpacked_state(state, record.state_type)
        if record.total == len(ids):
            expected = served.states.read(Unread(ids[: record.read]))
            np.testing.assert_allclose(row, expected, atol=tolerance, rtol=tolerance)
    else:
        assert record.read == 0
    return served.states.step([row], [Unread(ids[-unread:])], [True])[0] if unread else row
