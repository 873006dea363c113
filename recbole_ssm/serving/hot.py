"""The two calls that come most often, without FastAPI's layers, which the other calls pass through.

Only plain calls are answered here. A call with further options, or with a mistake, goes on to FastAPI, whose routes in
:mod:`recbole_ssm.serving.routes` answer it, or say what is wrong. They give plain calls the same answers, so one
OpenAPI document describes both ways.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any
from urllib.parse import unquote

from pydantic import ValidationError

from recbole_ssm.serving.guard import App, Receive, Scope, Send, replayed
from recbole_ssm.serving.record import LONGEST_ID
from recbole_ssm.serving.routes import answer, failed, recommend_after_events, router, take
from recbole_ssm.serving.schema import MOST_K, EventBody
from recbole_ssm.serving.service import Server

Work = Awaitable[dict[str, Any]]
ROUTES = {getattr(route, "path", ""): route for route in router.routes}
EVENTS, RECOMMENDATIONS = "/v1/events", "/v1/users/{user}/recommendations"
BEFORE_USER, BEHIND_USER = RECOMMENDATIONS.split("{user}")
JSON = (b"content-type", b"application/json")


class Hot:
    """Serves plain calls of ``POST /v1/events`` and ``GET /v1/users/{user}/recommendations``.

    Args:
        app: what serves all others.
        server: what the calls share.
    """

    def __init__(self, app: App, server: Server) -> None:
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        work, path = None, scope["path"]
        if path == EVENTS and scope["method"] == "POST" and JSON in scope["headers"]:
            body = (await receive())["body"]
            receive = replayed(body, receive)
            work = self._take_event(scope, body)
        elif path.startswith(BEFORE_USER) and path.endswith(BEHIND_USER) and scope["method"] == "GET":
            work = self._recommend(scope, path[len(BEFORE_USER) : -len(BEHIND_USER)])
        if work is None:
            await self._app(scope, receive, send)
            return
        try:
            found = answer(await work)
        except Exception as error:
            found = failed(error, f"{scope['method']} {path}")
        await found(scope, receive, send)

    def _take_event(self, scope: Scope, body: bytes) -> Work | None:
        """The work of one event; None where the call is not as plain as that."""
        options = _options(scope["query_string"], b"recommend", 0)
        if options is None:
            return None
        try:
            event = EventBody.__pydantic_validator__.validate_json(body)
        except ValidationError:
            return None
        scope["route"] = ROUTES[EVENTS]
        return take(self._server, event, *options)

    def _recommend(self, scope: Scope, name: str) -> Work | None:
        """The work of recommending to a user; None likewise."""
        options = _options(scope["query_string"], b"k", 10)
        user = unquote(name)
        if options is None or "/" in name or not name.isascii() or not 0 < len(user.encode()) <= LONGEST_ID:
            return None
        scope["route"] = ROUTES[RECOMMENDATIONS]
        return recommend_after_events(self._server, user, *options)


def _options(query: bytes, name: bytes, default: int) -> tuple[int, bool] | None:
    """How many recommendations a query asks for, and whether without what was seen; None where it is not plain."""
    number, exclude_seen = default, False
    for part in query.split(b"&") if query else ():
        key, _, value = part.partition(b"=")
        if key == name and value.isdigit() and len(value) < 5 and 0 < int(value) <= MOST_K:
            number = int(value)
        elif key == b"exclude_seen" and value in (b"true", b"false"):
            exclude_seen = value == b"true"
        else:
            return None
    return number, exclude_seen
