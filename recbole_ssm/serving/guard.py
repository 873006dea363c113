"""What stands before the server's calls: the token, the bounds of bodies, and the clock."""

from __future__ import annotations

import asyncio
import hmac
import json
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any
from urllib.parse import quote, unquote_to_bytes

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/health/live", "/health/ready")
"""These need no token."""
DISCARDED = 16
"""A body that is too large is read to its end if it is at most so many times too large."""


class Guard:
    """Refuses calls without the token, paths that are no UTF-8, and bodies that are too large or too slow.

    Args:
        app: what answers the others.
        token: of every caller, as ``Authorization: Bearer TOKEN``; None asks for none.
        most_bytes: of a body.
        body_within: seconds in which a body must be there.
        observe: told the route, the status and the seconds of each call.
    """

    def __init__(
        self,
        app: App,
        *,
        token: str | None,
        most_bytes: int,
        body_within: float,
        observe: Callable[[str, int, float], None],
    ) -> None:
        self._app, self._observe = app, observe
        self._token = f"Bearer {token}".encode() if token else None
        self._most_bytes, self._body_within = most_bytes, body_within

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        # As it was sent: an id is one part of the path, in which %2F is no slash.
        raw: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
        scope["path"] = raw.decode("latin-1")
        refusal = self._refusal(scope, raw)
        body = b""
        if refusal is None:
            try:
                body = await _within(self._body_within, self._body(receive))
            except asyncio.TimeoutError:
                refusal = 408, f"the body was not there within {self._body_within:g} seconds"
            except OverflowError:
                refusal = self._too_large()
            except ConnectionError:
                return
        try:
            if refusal is None:
                await self._app(scope, replayed(body, receive), watched)
            else:
                await _refuse(*refusal, watched)
        finally:
            # Behind a defect, FastAPI raises once more when it has answered.
            route = getattr(scope.get("route"), "path", "none")
            self._observe(route, status, time.perf_counter() - begin)

    def _refusal(self, scope: Scope, raw: bytes) -> tuple[int, str] | None:
        """Status and reason why a call is not even read."""
        if b"%" in raw or not raw.isascii():
            try:
                unquote_to_bytes(raw).decode()
            except UnicodeDecodeError:
                return 400, "the path is no UTF-8"
        headers = dict(scope["headers"])
        if self._token is not None and scope["path"] not in OPEN_PATHS:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._token):
                return 401, "a bearer token is needed: Authorization: Bearer TOKEN"
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > DISCARDED * self._most_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> tuple[int, str]:
        return 413, f"the body is larger than {self._most_bytes:,} bytes; send it in parts"

    async def _body(self, receive: Receive) -> bytes:
        """All of a body. One that is too large is read and discarded, so that its sender comes to read the answer.

        Raises:
            OverflowError: it is too large.
            ConnectionError: the client is gone.
        """
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            part = message.get("body", b"")
            size += len(part)
            if size <= self._most_bytes:
                parts.append(part)
            ended = not message.get("more_body")
            if size > self._most_bytes * (1 if ended else DISCARDED):
                raise OverflowError
            if ended:
                return b"".join(parts)


async def _within(seconds: float, waiting: Coroutine[Any, Any, bytes]) -> bytes:
    """What is waited for, if it comes within so many seconds.

    Raises:
        asyncio.TimeoutError: it does not.
    """
    if sys.version_info < (3, 11):
        return await asyncio.wait_for(waiting, seconds)
    # Without a task of its own, which costs more than the rest of this module.
    async with asyncio.timeout(seconds):
        return await waiting


def replayed(body: bytes, receive: Receive) -> Receive:
    """A body that was read already, as it is received."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


async def _refuse(status: int, reason: str, send: Send) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": reason}).encode()})
