"""What the tests of stores and of servers share."""

import shutil
import subprocess
import time

import pytest


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
