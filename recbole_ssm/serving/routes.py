"""The calls of the server under /v1."""

# FastAPI evaluates these annotations, so they are not postponed.

import asyncio
import os
import time
from collections.abc import Iterable, Sequence
from logging import getLogger
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BeforeValidator
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from recbole_ssm.errors import UserError
from recbole_ssm.serving import schema
from recbole_ssm.serving.catalogue import Recommendations
from recbole_ssm.serving.engine import Engine
from recbole_ssm.serving.record import LONGEST_ID
from recbole_ssm.serving.served import Rules, Served
from recbole_ssm.serving.service import Server
from recbole_ssm.serving.store import StoreError
from recbole_ssm.serving.visits import Event, Visit, Visited
from recbole_ssm.serving.worker import BusyError

PARTLY, UNPROCESSABLE, BUSY, FULL, FAILED = 207, 422, 503, 507, 500

router = APIRouter(prefix="/v1")
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": schema.Error, "description": "The path or the body is none."},
    401: {"model": schema.Error, "description": "The token is missing or wrong."},
    408: {"model": schema.Error, "description": "The body was too slow."},
    413: {"model": schema.Error, "description": "The body is too large."},
    422: {"model": schema.Error, "description": "A value is none that is taken; the line names it."},
    500: {"model": schema.Error, "description": "A defect, or a damaged record; the line says which."},
    503: {"model": schema.Error, "description": "Too many callers wait. Nothing was taken; try again later."},
    507: {"model": schema.Error, "description": "The store is full. Nothing was taken."},
}
InPath = Annotated[schema.Id, BeforeValidator(unquote), Path(description="Percent-encoded UTF-8.")]
Now = Annotated[schema.Seconds | None, Query(description=schema.NOW)]
Names = Annotated[list[str] | None, Query(max_length=schema.MOST_NAMES)]


def server_of(request: Request) -> Server:
    """The server that a call came to."""
    server: Server = request.app.state.server
    return server


def answer(content: Any, status: int = 200) -> Response:
    """An answer in JSON."""
    return Response(to_json(content), status, media_type="application/json")


def told(error: Exception, call: str) -> tuple[int, str]:
    """The status and the line of an error; what is not made for a caller is logged beside the call and not told."""
    if isinstance(error, UserError):
        return UNPROCESSABLE, str(error)
    if isinstance(error, BusyError):
        return BUSY, str(error)
    if isinstance(error, StoreError):
        getLogger().error(str(error))
        return FULL if error.full else FAILED, error.strerror or str(error)
    getLogger().error(call, exc_info=error)
    return FAILED, "a defect of the server; its log says more"


def failed(error: Exception, call: str) -> Response:
    """The answer to a call that failed."""
    status, line = told(error, call)
    return answer({"error": line}, status)


def scored(served: Served, pairs: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    """Items of an answer."""
    if not served.titles:
        return [{"item": item, "score": score} for item, score in pairs]
    return [{"item": item, "score": score, "title": served.titles.get(item)} for item, score in pairs]


def recommended(served: Served, found: Recommendations) -> dict[str, Any]:
    """The part of an answer that recommends."""
    return {"source": found.source, "items": scored(served, found)}


@router.post(
    "/events",
    response_model=schema.Taken | schema.TakenMany,
    responses={
        **ERRORS,
        PARTLY: {"model": schema.TakenMany, "description": "Of some users nothing was taken; their entries say why."},
    },
)
async def take_events(
    request: Request,
    body: schema.EventOrEvents,
    recommend: Annotated[schema.K | None, Query(description="So many recommendations are in the answer.")] = None,
    exclude_seen: bool = False,
    now: Now = None,
) -> Response:
    """Take one event (`{"user": ..., "item": ...}`) or many (`{"events": [...]}`), and recommend after them."""
    server, k = server_of(request), recommend or 0
    if isinstance(body, schema.EventBody):
        return answer(await take(server, body, k, exclude_seen, now))
    users = await take_all(server, body.events, k, exclude_seen, now)
    models = [one["model"] for one in users if "error" not in one]
    return answer({"model": models[0], "users": users}, 200 if len(models) == len(users) else PARTLY)


async def take(
    server: Server, event: schema.EventBody, k: int, exclude_seen: bool, now: float | None = None
) -> dict[str, Any]:
    """What became of an event, with k recommendations to its user."""
    (taken,) = await take_all(server, [event], k, exclude_seen, now)
    return taken


async def take_all(
    server: Server, events: Sequence[schema.EventBody], k: int, exclude_seen: bool, now: float | None = None
) -> list[dict[str, Any]]:
    """What became of the events of each user, with k recommendations; the error of one of whom nothing was taken.

    Raises:
        Exception: nothing was taken of any user; it is what became of the first.
    """
    server.refuse(event.item for event in events)
    by_user: dict[str, list[Event]] = {}
    for event in events:
        by_user.setdefault(event.user, []).append(Event(event.item, event.time, event.id))
    found = await server.visit_all(
        [Visit(user, mine, k=k, exclude_seen=exclude_seen, now=now) for user, mine in by_user.items()]
    )
    served = server.engine.served
    return [_taken(served, user, one) for user, one in zip(by_user, found)]


def _taken(served: Served, user: str, found: Visited | Exception) -> dict[str, Any]:
    if isinstance(found, Exception):
        status, line = told(found, f"events of user {user!r}")
        return {"user": user, "status": status, "error": line}
    about = {
        "model": found.model,
        "user": user,
        "taken": found.taken,
        "repeated": found.repeated,
        "skipped": found.skipped,
        "events": found.events,
    }
    return about if found.recommended is None else {**about, **recommended(served, found.recommended)}


@router.get("/users/{user}/recommendations", response_model=schema.UserAnswer, responses=ERRORS)
async def recommend_to_user(
    request: Request,
    user: InPath,
    k: schema.K = 10,
    exclude_seen: bool = False,
    allow: Names = None,
    deny: Names = None,
    category: Names = None,
    now: Now = None,
) -> Response:
    """Recommend to a user after all events; an unknown user gets what is popular."""
    rules = Rules(allow, deny, category) if allow or deny or category else None
    return answer(await recommend_after_events(server_of(request), user, k, exclude_seen, rules, now))


async def recommend_after_events(
    server: Server, user: str, k: int, exclude_seen: bool, rules: Rules | None = None, now: float | None = None
) -> dict[str, Any]:
    """What is recommended to a user."""
    found = await server.visit(Visit(user, k=k, exclude_seen=exclude_seen, rules=rules, now=now))
    assert found.recommended is not None
    about = {"model": found.model, "user": user, "events": found.events}
    return {**about, **recommended(server.engine.served, found.recommended)}


@router.delete("/users/{user}", response_model=schema.Forgotten, responses=ERRORS)
async def forget_user(request: Request, user: InPath) -> Response:
    """Delete all that is kept of a user."""
    found = await server_of(request).visit(Visit(user, forget=True))
    return answer({"forgotten": found.forgotten})


@router.post("/recommend", response_model=schema.Answers, responses=ERRORS)
async def recommend_after(request: Request, body: schema.HistoriesBody) -> Response:
    """Recommend after histories, of which nothing is kept; unknown items are counted, or refused."""
    server = server_of(request)
    server.refuse(item for history in body.histories for item in history)

    def work(engine: Engine) -> Any:
        served = engine.served
        found = served.recommender.recommend_many(
            body.histories,
            body.k,
            exclude_seen=body.exclude_seen,
            skip_unknown=True,
            times=body.times,
            now=time.time() if body.now is None else body.now,
            refused=served.refused(Rules(body.allow, body.deny, body.categories)),
        )
        return {
            "model": served.digest,
            "answers": [{**recommended(served, one), "skipped": one.skipped} for one in found],
        }

    return answer(await server.call(work))


@router.post("/score", response_model=schema.Scores, responses=ERRORS)
async def score(request: Request, body: schema.ScoreBody) -> Response:
    """Score given items after a user's events, or after a history in the body."""
    server = server_of(request)
    if (body.user is None) == (body.history is None):
        raise UserError("give either user or history")
    if body.user is not None and body.times is not None:
        raise UserError("times: belong to history; the events of a user have their own, so leave them out")
    if body.user is not None:
        found = await server.visit(Visit(body.user, candidates=body.items, now=body.now))
        digest, scores = found.model, found.scores or []
    else:
        asked = (body.history or [], body.items, body.times, time.time() if body.now is None else body.now)
        digest, scores = await server.call(
            lambda engine: (engine.served.digest, engine.served.recommender.score(*asked))
        )
    return answer({"model": digest, "items": scored(server.engine.served, zip(body.items, scores))})


@router.get("/items/{item}/similar", response_model=schema.Answer, responses=ERRORS)
async def similar_items(request: Request, item: InPath, k: schema.K = 10, category: Names = None) -> Response:
    """The items whose vectors are most like that of an item."""

    def work(engine: Engine) -> Any:
        served = engine.served
        found = served.recommender.similar_items(item, k, refused=served.refused(Rules(categories=category)))
        return {"model": served.digest, **recommended(served, found)}

    return answer(await server_of(request).call(work))


@router.get("/items", response_model=schema.FoundItems, responses=ERRORS)
async def find_items(
    request: Request,
    search: Annotated[str, Query(max_length=LONGEST_ID)] = "",
    k: schema.K = 10,
) -> Response:
    """Items whose id or title holds a text, in any case of its letters; the page at `/` looks items up so."""
    served = server_of(request).engine.served
    found = await asyncio.to_thread(served.find, search, k)
    items = [{"item": item, "title": served.titles.get(item)} for item in found]
    return answer({"model": served.digest, "items": items})


@router.post(
    "/model",
    response_model=schema.ModelAnswer,
    responses={
        **ERRORS,
        403: {"model": schema.Error, "description": "This server has no token or no folder."},
        503: {"model": schema.Error, "description": "Not every worker serves this model; ask again."},
    },
)
async def serve_model(request: Request, body: schema.ModelBody) -> Response:
    """Serve another model of the folder `--models` from the next call on; no call is lost."""
    server = server_of(request)
    if server.models is None or server.token is None:
        raise HTTPException(403, "start the server with --models and a token, and models can be chosen")
    folder = server.models.resolve()
    place = (folder / body.name).resolve() if "\0" not in body.name else folder
    # Of a name that is too long, pathlib raises an error.
    if place.parent != folder or not os.path.exists(place):
        raise UserError(f"name: there is no {body.name!r} in the folder of models")
    return answer({"model": await server.choose(place), "name": body.name})
