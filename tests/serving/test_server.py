"""The server: its calls, what it refuses, and that no acknowledged event is lost or counted twice."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np
import pytest

from recbole_ssm import load_recommender, run_recbole_ssm
from recbole_ssm.cli import main
from recbole_ssm.commands.serve import command_parser, load_served, server_of
from recbole_ssm.errors import UserError
from recbole_ssm.serving.states import Unread
from recbole_ssm.serving.store import MemoryStore
from recbole_ssm.serving.stores import open_store
from tests.conftest import REPOSITORY
from tests.serving.conftest import record_of, row_of
from tests.serving.test_engine import untrained

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("lmdb", reason="the extra serve is not installed")
pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from recbole_ssm.serving import server as serving
from recbole_ssm.serving.hot import Hot
from recbole_ssm.serving.service import Limits, Server

TOKEN = "a-secret"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of two runs, ``first`` and ``second``, on items with titles and categories."""
    folder = tmp_path_factory.mktemp("trained")
    data = folder / "data" / "shop"
    data.mkdir(parents=True)
    rows = [f"u{u}\ti{(u + j) % 20}\t{j}" for u in range(30) for j in range(8)]
    (data / "shop.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(rows) + "\n")
    lines = [f"i{i}\tThe title, {i}\t{'odd, small' if i % 2 else 'even'}\n" for i in range(20)]
    (data / "shop.item").write_text("item_id:token\ttitle:token_seq\tcategories:token_seq\n" + "".join(lines))
    models = folder / "models"
    models.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed, name in enumerate(("first", "second")):
            options = {
                "data_path": str(folder / "data"), "checkpoint_dir": str(folder / f"saved{seed}"), "epochs": 1,
                "seed": seed, "show_progress": False, "state": "WARNING",
            }  # fmt: skip
            result = run_recbole_ssm("2Mamba4Rec", "shop", config_dict=options)
            shutil.copytree(Path(result["checkpoint"]).parent, models / name)
    return models


def made(runs, *options, token=None):
    """A server of the first run."""
    if token:
        Path("token").write_text(token + "\n")
        options = (*options, "--token_file=token")
    return server_of(command_parser().parse_args([str(runs / "first"), "--device=cpu", *options]))


class Client:
    """Calls a server on this machine."""

    def __init__(self, port, token=None):
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self._headers = {"content-type": "application/json"}
        if token:
            self._headers["authorization"] = f"Bearer {token}"

    def __call__(self, method, path, body=None, headers=None):
        content = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        self._connection.request(method, path, content, {**self._headers, **(headers or {})})
        response = self._connection.getresponse()
        text = response.read().decode()
        return response.status, json.loads(text) if "json" in response.headers["content-type"] else text

    def get(self, path):
        return self("GET", path)

    def post(self, path, body):
        return self("POST", path, body)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@contextlib.contextmanager
def started(make):
    """A server in a forked child, as its process id and port; it is killed in the end if it still runs."""
    port = free_port()
    child = os.fork()
    if child == 0:
        try:
            serving.run(make(), serving.listen("127.0.0.1", port))
        finally:
            os._exit(0)
    try:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.01)
        yield child, port
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.fixture(scope="module")
def shared(runs, tmp_path_factory):
    """A client of a server with a token, a folder of models and titles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("server"))
        with started(lambda: made(runs, "--state=state", f"--models={runs}", token=TOKEN)) as (_, port):
            yield Client(port, TOKEN), port


@pytest.fixture
def client(shared):
    return shared[0]


# --- calls ---


def test_from_an_event_to_a_recommendation(client, runs):
    recommender = load_recommender(runs / "first", device="cpu")
    for count, item in enumerate(["i3", "i4", "i5"], 1):
        status, found = client.post("/v1/events?recommend=5", {"user": "u", "item": item})
        assert status == 200 and (found["taken"], found["events"]) == (1, count)
    expected = recommender.recommend(["i3", "i4", "i5"], 5)
    assert [(one["item"], one["title"]) for one in found["items"]] == [(i, f"The title, {i[1:]}") for i, _ in expected]
    assert [one["score"] for one in found["items"]] == pytest.approx([score for _, score in expected], abs=1e-5)
    assert found["source"] == "model" and len(found["model"]) == 64
    status, again = client.get("/v1/users/u/recommendations?k=5")
    assert status == 200 and again["items"] == found["items"]
    _, others = client.get("/v1/users/u/recommendations?k=20&exclude_seen=true&category=odd&deny=i7")
    assert {one["item"] for one in others["items"]} == {f"i{n}" for n in range(1, 20, 2)} - {"i3", "i5", "i7"}
    assert client("DELETE", "/v1/users/u") == (200, {"forgotten": True})
    _, popular = client.get("/v1/users/u/recommendations?k=3")
    assert popular["source"] == "popularity" and popular["events"] == 0


def test_many_events_at_once(client):
    events = [{"user": f"m{n % 3}", "item": f"i{n}", "time": n, "id": f"{n}"} for n in range(9)]
    events.append({"user": "m0", "item": "no such item"})
    for taken in (3, 0):
        status, found = client.post("/v1/events?recommend=2", {"events": events})
        assert status == 200 and [one["user"] for one in found["users"]] == ["m0", "m1", "m2"]
        assert [(one["taken"], one["repeated"]) for one in found["users"]] == [(taken, 3 - taken)] * 3
        assert [one["skipped"] for one in found["users"]] == [1, 0, 0]
        assert all(len(one["items"]) == 2 for one in found["users"])


def test_a_user_whose_events_cannot_be_taken_is_told_beside_the_others(runs):
    """One whose record is damaged, and one whose record another version wrote; the others' events are taken once."""

    def make():
        server = made(runs)
        server.store._values.update({b"damaged": b"RSU2", b"strange": b"RSU9" + bytes(80)})
        return server

    with started(make) as (_, port):
        client = Client(port)
        events = [{"user": user, "item": "i1"} for user in ("damaged", "good", "strange", "good")]
        status, found = client.post("/v1/events?recommend=2", {"events": events})
        damaged, good, strange = found["users"]
        assert status == 207 and found["model"] == good["model"] and len(good["items"]) == 2
        assert (good["user"], good["taken"], good["events"]) == ("good", 2, 2)
        assert damaged["status"] == 500 and "the record of user 'damaged' is damaged" in damaged["error"]
        assert strange["status"] == 422 and "another version of recbole_ssm" in strange["error"]
        assert [sorted(one) for one in (damaged, strange)] == [["error", "status", "user"]] * 2
        # Where nothing at all is taken, the call has failed, as one of a single event has.
        for one in (damaged, strange):
            event = {"user": one["user"], "item": "i1"}
            for body in (event, {"events": [event]}):
                assert client.post("/v1/events", body) == (one["status"], {"error": one["error"]})
        assert client.post("/v1/events", {"events": events[2:]})[1]["users"][1]["events"] == 3
        assert 'recbole_ssm_events_total{outcome="taken"} 3.0' in client.get("/metrics")[1]


def test_histories_scores_and_similar_items(client, runs):
    recommender = load_recommender(runs / "first", device="cpu")
    body = {"histories": [["i1", "i2"], [], ["no such item", "i9"]], "k": 3}
    status, found = client.post("/v1/recommend", body)
    assert status == 200 and [one["source"] for one in found["answers"]] == ["model", "popularity", "model"]
    assert [one["skipped"] for one in found["answers"]] == [0, 0, 1]
    assert [one["item"] for one in found["answers"][0]["items"]] == [
        i for i, _ in recommender.recommend(["i1", "i2"], 3)
    ]
    status, found = client.post(
        "/v1/recommend", {"histories": [["i1"]], "categories": ["even"], "deny": ["i2"], "k": 20}
    )
    assert {one["item"] for one in found["answers"][0]["items"]} == {f"i{n}" for n in range(0, 20, 2)} - {"i2"}

    status, found = client.post("/v1/score", {"history": ["i1", "i2"], "items": ["i3", "i8"]})
    expected = recommender.score(["i1", "i2"], ["i3", "i8"])
    assert status == 200 and [one["score"] for one in found["items"]] == pytest.approx(expected)
    client.post("/v1/events", {"events": [{"user": "s", "item": item} for item in ("i1", "i2")]})
    _, found = client.post("/v1/score", {"user": "s", "items": ["i3", "i8"]})
    assert [one["score"] for one in found["items"]] == pytest.approx(expected, abs=1e-5)

    status, found = client.get("/v1/items/i3/similar?k=4")
    assert status == 200 and [one["item"] for one in found["items"]] == [
        i for i, _ in recommender.similar_items("i3", 4)
    ]
    _, found = client.get("/v1/items?search=TITLE,%201&k=3")
    assert [one["item"] for one in found["items"]] == ["i1", "i10", "i11"] or len(found["items"]) == 3


@pytest.mark.parametrize("user", ["hot", "hot/b", "hot é %2F", "🦉 hot"])
def test_the_short_way_of_plain_calls_gives_the_same_answers(client, user):
    """``now`` takes a call the whole way, and means nothing to this model."""
    place = f"/v1/users/{quote(user, safe='')}/recommendations"
    for number, options in enumerate(["", "recommend=4", "recommend=20&exclude_seen=true", "exclude_seen=false"]):
        body = {"user": user, "item": "i1", "id": f"{number}"}
        status, short = client.post(f"/v1/events?{options}", body)
        assert status == 200 and short.pop("taken") == 1 and short.pop("repeated") == 0
        status, whole = client.post(f"/v1/events?{options}&now=1", body)
        assert status == 200 and whole.pop("taken") == 0 and whole.pop("repeated") == 1
        assert whole == short
        options = options.replace("recommend", "k")
        assert client.get(f"{place}?{options}") == client.get(f"{place}?{options}&now=1")
    for wrong in ("recommend=0", "recommend=1001", "recommend=x", "exclude_seen=perhaps", "recommend=01e"):
        assert client.post(f"/v1/events?{wrong}", {"user": user, "item": "i1"})[0] == 422
    assert client.get(place)[1]["events"] == 4


def test_the_short_way_passes_the_application_by(runs, monkeypatch):
    whole = serving.FastAPI.__call__

    async def without_calls(app, scope, receive, send):
        assert not scope.get("path", "").startswith("/v1"), "this call took the whole way"
        await whole(app, scope, receive, send)

    monkeypatch.setattr(serving.FastAPI, "__call__", without_calls)
    with started(lambda: made(runs)) as (_, port):
        client = Client(port)
        for options, expected in (("", 200), ("?recommend=3&exclude_seen=true", 200), ("?now=1", 500)):
            assert client.post(f"/v1/events{options}", {"user": "u", "item": "i1"})[0] == expected
            options = options.replace("recommend", "k")
            assert Client(port).get(f"/v1/users/u/recommendations{options}")[0] == expected
            client = Client(port)


def test_what_is_no_call_of_http_is_handed_on():
    reached = []

    async def app(scope, receive, send):
        reached.append(scope["type"])

    for scope in ({"type": "lifespan"}, {"type": "websocket", "path": "/v1/events", "headers": []}):
        asyncio.run(Hot(app, None)(scope, None, None))
    assert reached == ["lifespan", "websocket"]


def test_a_model_without_states_has_no_index_and_the_log_says_so(runs, monkeypatch, caplog):
    monkeypatch.setattr("recbole_ssm.model.ssm.SSMRecommender.carries_state", False)
    load_served(runs / "first", device="cpu")
    assert "--ann_above" not in caplog.text
    load_served(runs / "first", device="cpu", ann_above=5)
    (line,) = [record.message for record in caplog.records if "--ann_above" in record.message]
    assert "only models that carry a state use an index" in line


def test_a_defect_is_told_to_the_log_and_not_to_the_caller(runs, monkeypatch):
    monkeypatch.setattr("recbole_ssm.serving.engine.Engine.visit", lambda *_: 1 / 0)
    with started(lambda: made(runs)) as (_, port):
        for options in ("", "?now=1"):
            status, found = Client(port).post(f"/v1/events{options}", {"user": "u", "item": "i1"})
            assert (status, found) == (500, {"error": "a defect of the server; its log says more"})
        _, text = Client(port).get("/metrics")
        assert 'recbole_ssm_call_seconds_count{route="/v1/events",status="500"} 2.0' in text


def test_health_metrics_and_the_page(client):
    assert client.get("/health/live") == (200, {"status": "live"})
    assert client.get("/health/ready") == (200, {"status": "ready"})
    client.post("/v1/events?recommend=1", {"user": "m", "item": "i1"})
    status, text = client.get("/metrics")
    assert status == 200
    for line in (
        'recbole_ssm_call_seconds_count{route="/v1/events",status="200"}',
        *(f'recbole_ssm_part_seconds_count{{part="{part}"}}' for part in ("store", "step", "score", "top_k")),
        'recbole_ssm_events_total{outcome="taken"}',
        'recbole_ssm_states_total{outcome="first"}',
        "recbole_ssm_users ",
        "recbole_ssm_store_bytes ",
    ):
        assert line in text
    status, page = client.get("/")
    assert status == 200 and "What comes next?" in page
    assert "http://" not in page and "https://" not in page
    status, openapi = client.get("/openapi.json")
    assert status == 200 and "/v1/users/{user}/recommendations" in openapi["paths"]


def test_the_call_of_the_page_suits_a_model_that_reads_times(tmp_path):
    served = untrained("2Mamba4Rec", 5, time="query")
    with started(lambda: Server(load=None, place=tmp_path, served=served, store=MemoryStore())) as (_, port):
        client = Client(port)
        (names,) = re.findall(r'call\("v1/recommend", \{ (.*) \}\)', client.get("/")[1])
        now = time.time()
        body = {"histories": [["i1", "i2"]], "times": [[now - 9.5, now]], "exclude_seen": True}
        assert {name.partition(":")[0] for name in names.split(", ")} == set(body)
        status, found = client.post("/v1/recommend", body)
        assert status == 200 and found["answers"][0]["source"] == "model"


def test_nobody_waits_for_a_store_that_takes_its_time_to_be_counted(runs):
    def page():
        file, until = Path("answered"), time.monotonic() + 5
        while not file.exists() and time.monotonic() < until:
            time.sleep(0.001)
        return b"nobody waited" if file.exists() else b"all waited"

    def make():
        server = made(runs)
        server.metrics.page = page
        return server

    with started(make) as (_, port), concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = Client(port)
        asked._connection.connect()
        found = pool.submit(asked.get, "/metrics")
        time.sleep(0.1)
        assert Client(port).get("/health/live") == (200, {"status": "live"})
        Path("answered").touch()
        assert found.result() == (200, "nobody waited")


USERS = ["a/b", "a/recommendations", "🦉", "a b", "%41", "a?b#c", "\n", "..a", "é" * 250, "a\0b", "ε", '"', "\\"]


@pytest.mark.parametrize("user", USERS)
def test_ids_are_any_text(client, user):
    status, found = client.post("/v1/events", {"user": user, "item": "i1", "id": user})
    assert status == 200 and found["user"] == user and found["taken"] == 1
    path = f"/v1/users/{quote(user, safe='')}"
    status, found = client.get(f"{path}/recommendations?k=1")
    assert status == 200 and found["user"] == user and found["source"] == "model" and found["events"] == 1
    assert client("DELETE", path) == (200, {"forgotten": True})


# --- refusals ---

LONG = "x" * 501


@pytest.mark.parametrize(
    ("status", "method", "path", "body", "line"),
    [
        (422, "POST", "/v1/events", {"user": "u"}, "item: Field required"),
        (422, "POST", "/v1/events", {"user": "", "item": "i1"}, "user"),
        (422, "POST", "/v1/events", {"user": LONG, "item": "i1"}, "user"),
        (422, "POST", "/v1/events", {"user": "é" * 251, "item": "i1"}, "an id has at most 500 bytes"),
        (422, "POST", "/v1/events", {"user": "u", "item": "i1", "time": 1e300}, "time"),
        *(
            (422, "POST", path, body, "must be seconds since 1970, got 978300760000.0, which is beyond the year 5000")
            for path, body in (
                ("/v1/events", {"user": "u", "item": "i1", "time": 978300760000}),
                ("/v1/events", {"events": [{"user": "u", "item": "i1", "time": 978300760000}]}),
                ("/v1/recommend", {"histories": [["i1"]], "times": [[978300760000]]}),
                ("/v1/score", {"user": "u", "items": ["i1"], "now": 978300760000}),
                ("/v1/events?now=978300760000", {"user": "u", "item": "i1"}),
            )
        ),
        (422, "POST", "/v1/events", {"user": "u", "item": "i1", "time": 9e10}, "is more than a day beyond the clock"),
        (422, "POST", "/v1/events", {"user": "u", "item": "i1", "tme": 1}, "tme"),
        (422, "POST", "/v1/events", {"user": "u", "item": "i1", "time": False}, "time"),
        (422, "POST", "/v1/events", {"user": "u", "item": 1}, "item"),
        (422, "GET", "/v1/users/u/recommendations?" + "deny=i1&" * 101, None, "deny"),
        (422, "POST", "/v1/events", {"user": "\ud800", "item": "i1"}, "user"),
        (422, "POST", "/v1/events", b'{"user": "u", "item": "i1", "time": NaN}', "time"),
        (422, "POST", "/v1/events", b"{", "JSON"),
        (400, "POST", "/v1/events", b"\xff", ""),
        (400, "POST", "/v1/events", b"[" * 100_000, ""),
        (422, "POST", "/v1/events", {"events": []}, "events"),
        (422, "POST", "/v1/events", {"events": [{"user": "u", "item": "i"}] * 1001}, "events"),
        (422, "POST", "/v1/events?recommend=0", {"user": "u", "item": "i1"}, "recommend"),
        (422, "POST", "/v1/events?recommend=9999", {"user": "u", "item": "i1"}, "recommend"),
        (422, "GET", "/v1/users/u/recommendations?k=x", None, "k: "),
        (422, "GET", "/v1/users/u/recommendations?category=none", None, "categories: there is no 'none'"),
        (422, "GET", "/v1/users/u/recommendations?allow=none", None, "allow: none of its items"),
        (422, "GET", f"/v1/users/{LONG}/recommendations", None, "user"),
        (400, "GET", "/v1/users/%ff/recommendations", None, "the path is no UTF-8"),
        (422, "GET", "/v1/items/none/similar", None, "item: item 'none' is not in the catalogue"),
        (422, "POST", "/v1/score", {"items": ["i1"]}, "give either user or history"),
        (422, "POST", "/v1/score", {"items": ["i1"], "user": "nobody"}, "user 'nobody': has no event"),
        (422, "POST", "/v1/score", {"items": ["none"], "history": ["i1"]}, "items: item 'none' is not"),
        (422, "POST", "/v1/score", {"items": ["i1"], "user": "u", "times": [1]}, "times: belong to history"),
        (422, "POST", "/v1/recommend", {"histories": [["i1"]], "categories": []}, "categories: names none"),
        (404, "GET", "/v1/none", None, "Not Found"),
        (405, "GET", "/v1/events", None, "Method Not Allowed"),
        (413, "POST", "/v1/events", b"x" * (1 << 20) + b"x", "the body is larger than 1,048,576 bytes"),
        (422, "POST", "/v1/model", {"name": "../first"}, "name: there is no '../first' in the folder of models"),
        (422, "POST", "/v1/model", {"name": "/etc"}, "name: there is no"),
        (422, "POST", "/v1/model", {"name": "."}, "name: there is no"),
        (422, "POST", "/v1/model", {"name": "a\0b"}, "name: there is no"),
        (422, "POST", "/v1/model", {"name": "link"}, "name: there is no"),
        (422, "POST", "/v1/model", {"name": "é" * 250}, "name: there is no"),
    ],
)
def test_what_is_wrong_is_one_line_of_json(shared, runs, status, method, path, body, line):
    if not (runs / "link").exists():
        (runs / "link").symlink_to("/etc", target_is_directory=True)
    found = Client(shared[1], TOKEN)(method, path, body)
    assert found[0] == status and set(found[1]) == {"error"}
    assert line in found[1]["error"] and "\n" not in found[1]["error"] and "Traceback" not in found[1]["error"]


def test_without_the_token_only_health_and_the_page_answer(shared):
    for client in (Client(shared[1]), Client(shared[1], "another")):
        for path in ("/v1/users/u/recommendations", "/metrics", "/openapi.json", "/none"):
            status, found = client.get(path)
            assert status == 401 and "bearer token" in found["error"]
        for path in ("/health/live", "/health/ready", "/"):
            assert client.get(path)[0] == 200


def test_a_method_that_is_not_allowed_comes_with_those_that_are(shared):
    connection = http.client.HTTPConnection("127.0.0.1", shared[1], timeout=30)
    connection.request("PUT", "/v1/events", headers={"authorization": f"Bearer {TOKEN}"})
    response = connection.getresponse()
    assert (response.status, response.headers["allow"]) == (405, "POST")


def test_a_body_in_pieces_is_bounded_too(shared):
    client = Client(shared[1], TOKEN)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        assert client("POST", "/v1/events", iter([b"x" * (1 << 19)] * 3))[0] == 413


def test_unknown_items_are_refused_where_that_is_wanted(runs):
    with started(lambda: made(runs, "--refuse_unknown")) as (_, port):
        client = Client(port)
        body = {"events": [{"user": "u", "item": "i1"}, {"user": "u", "item": "none"}]}
        for path, sent in (("/v1/events", body), ("/v1/recommend", {"histories": [["i1", "none"]]})):
            status, found = client.post(path, sent)
            assert status == 422 and found["error"].startswith("item: item 'none' is not in the catalogue")
        assert client.get("/v1/users/u/recommendations")[1]["events"] == 0
        # There is no token, so nobody may choose the model.
        status, found = client.post("/v1/model", {"name": "second"})
        assert status == 403 and "--models and a token" in found["error"]


def test_a_slow_body_and_a_full_store_have_their_answers(runs, monkeypatch):
    def make():
        server = made(runs, "--state=small", f"--state_bytes={1 << 20}")
        server.limits = Limits(body_seconds=0.2)
        return server

    with started(make) as (_, port):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST /v1/events HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        client = Client(port)
        bodies = [{"events": [{"user": f"u{n}", "item": "i1"}] * 9} for n in range(60)]
        statuses = [client.post("/v1/events", body)[0] for body in bodies]
        assert set(statuses) == {200, 507} and statuses == sorted(statuses)
        assert client.get("/v1/users/u0/recommendations")[1]["events"] == 9
        _, refused = client.get("/v1/users/u59/recommendations")
        assert refused["events"] == 0
        assert client("DELETE", "/v1/users/u0")[0] in (200, 507)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--models=none"], "--models: there is no folder none"),
        (["--token_file=none"], "--token_file: none cannot be read"),
        (["--durability=never"], "recbole-ssm serve: argument --durability"),
        (["--category_field=colour"], "--category_field: "),
        (["--state=redis://127.0.0.1:1/0"], "state redis://127.0.0.1:1/0: no Redis server answers"),
        (["--port=99999"], "--port: cannot listen on 127.0.0.1, port 99999"),
    ],
)
def test_mistakes_of_the_command_are_one_line(runs, options, line, capsys):
    assert main(["serve", str(runs / "first"), "--device=cpu", *options]) == 2
    error = capsys.readouterr().err
    assert f"recbole_ssm: error: {line}" in error and "Traceback" not in error


def test_a_token_is_one_word(runs, monkeypatch):
    monkeypatch.setenv("RECBOLE_SSM_TOKEN", "two words")
    with pytest.raises(UserError, match="RECBOLE_SSM_TOKEN: must hold one word"):
        made(runs)


# --- whatever happens ---


def load(port, users, stop, acknowledged):
    """Send events of some users, one after the other, until the server is gone; count those that were acknowledged."""
    client = Client(port)
    with contextlib.suppress(OSError, http.client.HTTPException):
        while not stop.is_set():
            for user in users:
                number = acknowledged.get(user, 0)
                body = {"user": user, "item": f"i{(len(user) + 7 * number) % 20}", "time": number, "id": str(number)}
                status, found = client.post("/v1/events?recommend=3", body)
                assert status == 200 and found["taken"] + found["repeated"] == 1
                acknowledged[user] = number + 1


def kill_under_load(runs, durability, moments):
    acknowledged: dict = {}
    options = ("--state=state", f"--durability={durability}")
    served = load_served(runs / "first", device="cpu")
    for moment in moments:
        with started(lambda: made(runs, *options)) as (child, port), concurrent.futures.ThreadPoolExecutor(4) as pool:
            stop = threading.Event()
            users = [[f"u{n}" for n in range(first, 12, 4)] for first in range(4)]
            waiting = [pool.submit(load, port, mine, stop, acknowledged) for mine in users]
            before, until = sum(acknowledged.values()), time.monotonic() + 20
            while sum(list(acknowledged.values())) == before and time.monotonic() < until:
                time.sleep(0.001)
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            stop.set()
            for one in waiting:
                one.result()
        store = open_store("state")
        for user, count in acknowledged.items():
            record = record_of(store, user)
            # One more may have been written, whose answer did not come; sent again, it is known by its id.
            assert record.total in (count, count + 1)
            expected = [f"i{(len(user) + 7 * number) % 20}" for number in range(record.total)]
            assert record.items.texts() == expected
            row = served.states.read(Unread(served.catalogue.ids(expected)))
            np.testing.assert_allclose(row_of(store, user, served), row, atol=1e-5, rtol=1e-5)
        store.close()
    assert sum(acknowledged.values()) > len(moments)


@pytest.mark.parametrize("durability", ["each", "batched"])
def test_killed_under_load_nothing_is_lost_and_nothing_counts_twice(runs, durability):
    kill_under_load(runs, durability, [0.15])


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["each", "batched"])
def test_killed_at_thirty_moments(runs, durability):
    kill_under_load(runs, durability, np.random.default_rng(0).uniform(0.02, 1.0, 30))


def test_another_model_under_load_and_an_end_that_loses_no_call(runs):
    """Every call is answered, by one model or the other; SIGHUP reads the model again; SIGTERM lets calls end."""
    digests = [load_served(runs / name, device="cpu").digest for name in ("first", "second")]
    options = ("--state=state", f"--models={runs}")
    with started(lambda: made(runs, *options, token=TOKEN)) as (child, port):
        answers: list = []
        stop = threading.Event()

        def ask(first):
            client, number = Client(port, TOKEN), 0
            while not stop.is_set():
                number += 1
                body = {"user": f"u{first}-{number % 5}", "item": f"i{number % 20}", "time": number}
                answers.append(client.post("/v1/events?recommend=2", body))

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(ask, first) for first in range(3)]
            client = Client(port, TOKEN)
            for name, digest in (("second", digests[1]), ("first", digests[0]), ("second", digests[1])):
                time.sleep(0.1)
                assert client.post("/v1/model", {"name": name}) == (200, {"model": digest, "name": name})
            os.kill(child, signal.SIGHUP)
            time.sleep(0.2)
            stop.set()
            for one in waiting:
                one.result()
        assert {status for status, _ in answers} == {200}
        assert {found["model"] for _, found in answers} == set(digests)
        assert client.get("/v1/users/u0-1/recommendations")[1]["model"] == digests[1]

        # The server has begun with this call when it is told to end.
        last = Client(port, TOKEN)
        body = {"events": [{"user": f"last {n}", "item": "i1"} for n in range(1000)]}
        last._connection.request("POST", "/v1/events", json.dumps(body), last._headers)
        time.sleep(0.05)
        os.kill(child, signal.SIGTERM)
        assert last._connection.getresponse().status == 200
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
    store = open_store("state")
    assert sum(user.startswith("last") for user in store.users()) == 1000
    store.close()


def test_two_replicas_share_a_redis(runs, redis_address):
    """Calls of one user through both at once: every event once, and the state that of all of them."""
    option = f"--state={redis_address}"
    with started(lambda: made(runs, option)) as (_, first), started(lambda: made(runs, option)) as (_, second):

        def call(number, port):
            client = Client(port)
            for event in range(20):
                body = {"user": "both", "item": f"i{event}", "id": f"{number}-{event}"}
                status, found = client.post("/v1/events?recommend=1", body)
                assert status == 200 and found["taken"] == 1
                # Sent again, through the other.
                assert Client(first + second - port).post("/v1/events", body)[1]["repeated"] == 1

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for one in [pool.submit(call, number, port) for number, port in enumerate((first, second))]:
                one.result()
    store = open_store(redis_address)
    record = record_of(store, "both")
    assert record.total == 40 and sorted(record.items.texts()) == sorted([f"i{event}" for event in range(20)] * 2)
    served = load_served(runs / "first", device="cpu")
    row = served.states.read(Unread(served.catalogue.ids(record.items.texts())))
    np.testing.assert_allclose(row_of(store, "both", served), row, atol=1e-5, rtol=1e-5)
    store.close()


DOCS = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_calls_of_the_documents_work(runs):
    """The commands as they stand there, and the calls that the table names."""
    blocks = "".join(re.findall(r"```console\n(.*?)```", DOCS, re.DOTALL))
    # The other lines are what a command answers.
    commands = [shlex.split(line[2:]) for line in blocks.splitlines() if line.startswith("$ ")]
    (serve,) = [words for words in commands if words[:2] == ["recbole-ssm", "serve"]]
    command_parser().parse_args(serve[2:])
    with started(lambda: made(runs, "--state=state")) as (_, port):
        client = Client(port)
        for _, address, _, body in [words for words in commands if words[0] == "curl"]:
            parts = urlsplit(address)
            status, found = client.post(f"{parts.path}?{parts.query}", json.loads(body))
            assert status == 200 and len(found["items"]) == 3
        paths = client.get("/openapi.json")[1]["paths"]
    table = DOCS.split("| call |")[1].split("\n\n")[0]
    named = re.findall(r"`(?:POST |GET |DELETE )?(/(?:v1|health)[^`?]*)[^`]*`", table)
    assert {re.sub(r"\{.*\}", "{id}", path) for path in paths} == set(named)


@pytest.mark.slow
def test_schemathesis_finds_nothing(runs):
    if shutil.which("schemathesis") is None:
        pytest.skip("schemathesis is not installed")
    # It may stand in an environment of its own.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # What a value means decides too: an item may be well-formed and unknown, and is refused then.
    options = ["--max-examples=50", "--phases=examples,coverage,fuzzing", "--exclude-checks=positive_data_acceptance"]
    with started(lambda: made(runs, "--state=state", f"--body_bytes={1 << 26}", f"--models={runs}", token=TOKEN)) as (
        _,
        port,
    ):
        command = [
            "schemathesis",
            "run",
            f"http://127.0.0.1:{port}/openapi.json",
            f"--header=Authorization: Bearer {TOKEN}",
        ]
        found = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, timeout=500)
    assert found.returncode == 0, found.stdout[-9000:]


class Browser:
    """A page in headless Chromium, driven through its pipe: JSON messages that end in a zero byte."""

    def __init__(self, address):
        to_read, self._to = os.pipe()
        from_, to_write = os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir=profile about:blank"
        command = f"exec chromium {flags} 3<&{to_read} 4>&{to_write} 2>/dev/null"
        self.process = subprocess.Popen(["bash", "-c", command], pass_fds=(to_read, to_write))
        os.close(to_read)
        os.close(to_write)
        self._from, self._number, self._session = os.fdopen(from_, "rb", buffering=0), 0, {}
        target = self.call("Target.createTarget", url=address)["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def call(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = b""
            while not answer.endswith(b"\0"):
                part = self._from.read(1)
                assert part, "Chromium has ended"
                answer += part
            found = json.loads(answer[:-1])
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]

    def value(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait_for(self, expression):
        until = time.monotonic() + 20
        while not (found := self.value(expression)):
            assert time.monotonic() < until, f"{expression} never came true; {self.value('document.body.innerText')}"
            time.sleep(0.02)
        return found


@pytest.mark.slow
def test_the_page_in_a_browser(runs):
    """Who types items sees titles, and recommendations that change with each of them."""
    if shutil.which("chromium") is None:
        pytest.skip("there is no chromium on this machine")
    lines = "Array.from(document.querySelectorAll('#items button')).map((one) => one.textContent).join('|')"
    with started(lambda: made(runs)) as (_, port):
        browser = Browser(f"http://127.0.0.1:{port}/")
        try:
            popular = browser.wait_for(lines)
            assert "The title, " in popular and "popularity" in browser.value("document.body.innerText")
            for count, item in enumerate((3, 4), 1):
                browser.value("document.getElementById('search').focus()")
                browser.call("Input.insertText", text=f"title, {item}")
                browser.wait_for(
                    f"document.querySelector('#found button')?.textContent === 'The title, {item} (i{item})'"
                )
                browser.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter")
                browser.wait_for(f"document.querySelectorAll('#history li').length === {count}")
                browser.wait_for("document.body.innerText.includes('from the model')")
            expected = load_recommender(runs / "first", device="cpu").recommend(["i3", "i4"], 10)
            titles = "|".join(f"The title, {i[1:]} ({i})" for i, _ in expected)
            browser.wait_for(f"{lines} === {json.dumps(titles)}")
            # A click on a recommendation takes it into the history.
            browser.value("document.querySelector('#items button').click()")
            browser.wait_for("document.querySelectorAll('#history li').length === 3")
            assert browser.value("document.getElementById('error').textContent") == ""
        finally:
            browser.process.kill()
            browser.process.wait()
