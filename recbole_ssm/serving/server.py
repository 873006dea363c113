"""A trained model over HTTP: the application around the calls of :mod:`recbole_ssm.serving.routes`, and its socket."""

import asyncio
import socket
import sys
from importlib.resources import files
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from recbole_ssm import __version__
from recbole_ssm.errors import UserError
from recbole_ssm.serving import schema
from recbole_ssm.serving.guard import Guard
from recbole_ssm.serving.hot import Hot
from recbole_ssm.serving.routes import BUSY, UNPROCESSABLE, answer, failed, router
from recbole_ssm.serving.service import Server
from recbole_ssm.serving.store import StoreError
from recbole_ssm.serving.worker import BusyError

PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


async def _failed(request: Request, error: Exception) -> Response:
    """One line in JSON; what is not made for a caller is logged and not told."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        # The place begins with query, path or body; an event and many of them are told apart by a name of our own.
        begin = 2 if first["loc"][:2] in (("body", schema.ONE), ("body", schema.MANY)) else 1
        place = ".".join(str(part) for part in first["loc"][begin:]) or "body"
        return answer({"error": f"{place}: {first['msg'].removeprefix('Value error, ')}"}, UNPROCESSABLE)
    if isinstance(error, HTTPException):
        found = answer({"error": str(error.detail)}, error.status_code)
        # A method that is not allowed comes with those that are.
        found.headers.update(error.headers or {})
        return found
    return failed(error, f"{request.method} {request.url.path}")


def create_app(server: Server) -> FastAPI:
    """The application, which any ASGI server runs."""
    about = "Sequential recommendation from a carried state."
    app = FastAPI(
        title="recbole-ssm", version=__version__, description=about, docs_url=None, redoc_url=None,
        redirect_slashes=False, lifespan=server.running,
    )  # fmt: skip
    app.state.server = server
    app.include_router(router)
    for kind in (RequestValidationError, HTTPException, UserError, BusyError, StoreError, Exception):
        app.add_exception_handler(kind, _failed)
    page = files("recbole_ssm.serving").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return Response(page, media_type="text/html", headers={"content-security-policy": PAGE_POLICY})

    @app.get("/health/live", response_model=schema.Health)
    async def is_alive() -> Response:
        """Whether the process answers."""
        return answer({"status": "live"})

    @app.get("/health/ready", response_model=schema.Health, responses={503: {"model": schema.Health}})
    async def is_ready() -> Response:
        """Whether calls are answered: the model is there and the store can be read."""
        try:
            if server.worker is None or not server.worker.alive:
                raise BusyError("the server is about to start or to end")
            await server.call(lambda engine: engine.store.read(lambda get: get([b"ready"])))
        except (BusyError, StoreError) as error:
            return answer({"status": f"not ready: {error}"}, BUSY)
        return answer({"status": "ready"})

    @app.get("/metrics", include_in_schema=False)
    async def show_metrics() -> Response:
        # A store may take its time to answer, and nobody else waits for it.
        return Response(await asyncio.to_thread(server.metrics.page), media_type=CONTENT_TYPE_LATEST)

    return app


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        UserError: the address is taken, or none of this machine.
    """
    return listen_all(host, port, 1)[0]


def listen_all(host: str, port: int, count: int) -> list[socket.socket]:
    """Sockets that listen on one port, each for a process; the kernel spreads the connections among them.

    Raises:
        UserError: as of :func:`listen`.
    """
    about: dict[str, Any] = {"family": socket.AF_INET6 if ":" in host else socket.AF_INET, "backlog": 2048}
    try:
        only = socket.create_server((host, port), **about)
        if count == 1:
            return [only]
        # Sockets that share a port would also share one on which another server listens; this one did not.
        address = only.getsockname()
        only.close()
        return [socket.create_server(address, reuse_port=True, **about) for _ in range(count)]
    except (OSError, OverflowError) as error:
        raise UserError(f"--port: cannot listen on {host}, port {port} ({error}); take another") from error


def run(server: Server, listening: socket.socket) -> None:
    """Answer calls until SIGTERM or SIGINT; calls that have begun are answered then."""
    # The engine's thread and the event loop share one interpreter; neither waits long for the other.
    sys.setswitchinterval(0.0005)
    limits = server.limits
    app: Any = create_app(server)
    guarded = Guard(
        Hot(app, server),
        token=server.token,
        most_bytes=limits.body_bytes,
        body_within=limits.body_seconds,
        observe=server.metrics.observe_call,
    )
    config = uvicorn.Config(
        guarded, lifespan="on", log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=limits.drain_seconds, timeout_keep_alive=75,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listening])
