"""What the server's calls take and give, as its OpenAPI shows them."""

# Pydantic evaluates these annotations, so they are not postponed.

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, WithJsonSchema

from recbole_ssm.data.times import LATEST, beyond
from recbole_ssm.serving.record import LONGEST_ID

MOST_EVENTS = 1000
"""Events or histories in one call."""
MOST_ITEMS = 10_000
"""Items in a list."""
MOST_NAMES = 100
"""Items or categories in an address."""
MOST_K = 1000
"""Recommendations in an answer."""


def checked_id(text: str) -> str:
    """An id, if it is not too long.

    Raises:
        ValueError: it is.
    """
    if len(text.encode()) > LONGEST_ID:
        raise ValueError(f"an id has at most {LONGEST_ID} bytes of UTF-8")
    return text


def checked_seconds(moment: float) -> float:
    """A time within the bounds of :func:`~recbole_ssm.data.times.second_of`.

    Raises:
        ValueError: it is beyond them.
    """
    if abs(moment) >= LATEST:
        raise ValueError(beyond(moment))
    return moment


Id = Annotated[str, Field(min_length=1, max_length=LONGEST_ID), AfterValidator(checked_id)]
Seconds = Annotated[
    float,
    Field(allow_inf_nan=False),
    AfterValidator(checked_seconds),
    WithJsonSchema({"type": "number", "exclusiveMinimum": -LATEST, "exclusiveMaximum": LATEST}),
]
Items = Annotated[list[Id], Field(max_length=MOST_ITEMS)]
Times = Annotated[list[Seconds], Field(max_length=MOST_ITEMS)]
NOW = "The moment of asking in seconds since 1970, for a model that reads it; by default now."
K = Annotated[int, Field(ge=1, le=MOST_K)]


class Body(BaseModel):
    """A body, in which an unknown name is an error, and so is a text or a truth value in place of a number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class EventBody(Body):
    """A user's event."""

    user: Id
    item: Id
    time: Seconds | None = Field(None, description="Seconds since 1970; by default now.")
    id: Id | None = Field(None, description="An event whose id is among the user's newest 64 is taken once.")


class EventsBody(Body):
    """Events of one user or many, each user's in their order."""

    events: Annotated[list[EventBody], Field(min_length=1, max_length=MOST_EVENTS)]


def one_or_many(body: Any) -> str:
    """Which of the two bodies a call means to send."""
    return MANY if isinstance(body, dict) and "events" in body else ONE


ONE, MANY = "event", "events"
EventOrEvents = Annotated[
    Annotated[EventBody, Tag(ONE)] | Annotated[EventsBody, Tag(MANY)],
    Discriminator(one_or_many),
]


class RulesBody(Body):
    """How many items are recommended, and which."""

    k: K = 10
    exclude_seen: bool = Field(False, description="Leave out the items of the history.")
    allow: Items | None = Field(None, description="Only these items.")
    deny: Items | None = Field(None, description="None of these items.")
    categories: Items | None = Field(None, description="Only items of one of these categories.")


class HistoriesBody(RulesBody):
    """Histories that are not kept."""

    histories: Annotated[list[Items], Field(min_length=1, max_length=MOST_EVENTS)] = Field(
        description="Items, oldest first."
    )
    times: Annotated[list[Times], Field(max_length=MOST_EVENTS)] | None = Field(
        None, description="When the events of each history were, for a model that reads it."
    )
    now: Seconds | None = Field(None, description=NOW)


class ScoreBody(Body):
    """Items to score after a user's history, or one in the body."""

    items: Annotated[list[Id], Field(min_length=1, max_length=MOST_ITEMS)]
    user: Id | None = None
    history: Items | None = None
    times: Times | None = Field(None, description="When the events of the history were, for a model that reads it.")
    now: Seconds | None = Field(None, description=NOW)


class ModelBody(Body):
    """The name of a checkpoint, or of a run's folder, in the folder of models."""

    name: Annotated[str, Field(min_length=1, max_length=255)]


class Error(BaseModel):
    """What went wrong, in one line."""

    error: str


class ScoredItem(BaseModel):
    """An item of an answer."""

    item: str
    score: float
    title: str | None = None


class Answer(BaseModel):
    """What is recommended."""

    model: str = Field(description="The SHA-256 of the checkpoint that answers.")
    source: str = Field(description="`model`, or `popularity` where no event of a known item is known.")
    items: list[ScoredItem] = Field(description="Best first.")


class UserAnswer(Answer):
    """What is recommended to a user."""

    user: str
    events: int = Field(description="Events of the user that were ever taken.")


class Taken(BaseModel):
    """What became of a user's events, and what is recommended where that was asked for."""

    model: str
    user: str
    taken: int
    repeated: int = Field(description="Events whose id was known; they count once.")
    skipped: int = Field(description="Events of items that the model does not know.")
    events: int
    source: str | None = None
    items: list[ScoredItem] | None = None


class NotTaken(BaseModel):
    """Why nothing of a user's events was taken."""

    user: str
    status: int = Field(description="That of a call with the events of this user alone.")
    error: str


class TakenMany(BaseModel):
    """What became of the events of each user, in the order of their first events."""

    model: str
    users: list[Taken | NotTaken]


class Answers(BaseModel):
    """What is recommended after each history; `skipped` counts its unknown items."""

    model: str
    answers: list[Any]


class Scores(BaseModel):
    """The items of the question, in their order."""

    model: str
    items: list[ScoredItem]


class FoundItems(BaseModel):
    """Items whose id or title holds a text."""

    model: str
    items: list[dict[str, str | None]]


class Forgotten(BaseModel):
    """Whether there was a user to forget."""

    forgotten: bool


class Health(BaseModel):
    """How the server is."""

    status: str


class ModelAnswer(BaseModel):
    """The model that is served."""

    model: str
    name: str
