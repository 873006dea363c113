"""Serve a trained model over HTTP, with the state of every user: docs/serving.md shows the calls."""

from __future__ import annotations

import os
import socket
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recbole_ssm.arguments import at_least, parse_options, positive
from recbole_ssm.commands.items import categories_of, titles_of
from recbole_ssm.commands.options import add_arguments, graphs_asked, parse
from recbole_ssm.errors import ArgumentParser, UserError, require
from recbole_ssm.serving import recommender_of
from recbole_ssm.serving.engine import FEWEST
from recbole_ssm.serving.record import STATE_TYPES
from recbole_ssm.serving.served import Served
from recbole_ssm.serving.store import Store
from recbole_ssm.serving.stores import DURABILITIES, open_store
from recbole_ssm.serving.workers import COUNTS, Team, supervise
from recbole_ssm.starting import configure_data
from recbole_ssm.trainer import checkpoint

if TYPE_CHECKING:
    from recbole_ssm.serving.service import Server

INSTALL = "serve: needs FastAPI, uvicorn and prometheus-client; pip install 'recbole-ssm[serve]'"
TOKEN = "RECBOLE_SSM_TOKEN"


def load_served(
    place: str | Path,
    *,
    model: str | type | None = None,
    device: str | None = None,
    category_field: str | None = None,
    ann_above: int | None = None,
    command_line: Sequence[str] = (),
) -> Served:
    """A checkpoint as it is served, with titles and categories where the data set of its run is at hand.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    file = checkpoint.best_file(Path(place))
    saved, digest = checkpoint.read_with_digest(file)
    recommender = recommender_of(file, saved, device, model=model, cuda_graphs=graphs_asked(command_line))
    titles, categories = None, None
    try:
        config = configure_data((file, saved), model, command_line=command_line)
        titles = titles_of(config, recommender.items)
        categories = categories_of(config, category_field)
    except UserError as error:
        # A checkpoint serves without its data set, unless the caller asks for something that only the data has.
        if parse_options(command_line).keys() - {"cuda_graphs"} or category_field:
            raise
        getLogger().warning(f"no titles and no categories: {error}")
    served = Served(recommender, digest, titles, categories, ann_above)
    if found := served.nearest:
        getLogger().warning(
            f"recommendations come from an index: {found.probes} probes find {found.recall:.1%} of the ten best items"
        )
    elif ann_above is not None and served.states is None:
        getLogger().warning("--ann_above: only models that carry a state use an index; this one scores every item")
    return served


def server_of(options: Namespace, command_line: Sequence[str] = ()) -> Server:
    """The server that the options of the command describe.

    Raises:
        UserError: one of them is wrong.
    """
    return _prepared(options, command_line)()


def _prepared(options: Namespace, command_line: Sequence[str]) -> Callable[..., Server]:
    """Load the model; what is returned opens the store and makes the server, which each worker does after the fork."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package, INSTALL)
    from recbole_ssm.serving.service import Limits, Server

    if options.models is not None and not options.models.is_dir():
        raise UserError(f"--models: there is no folder {options.models}")

    def load(place: Path) -> Served:
        return load_served(
            place, model=options.model, device=options.device, category_field=options.category_field,
            ann_above=options.ann_above, command_line=command_line,
        )  # fmt: skip

    token, served = _token(options.token_file), load(options.checkpoint)

    def make(**of_worker: Any) -> Server:
        store, settings = state_options(options)
        return Server(
            load=load,
            place=options.checkpoint,
            served=served,
            store=store,
            models=options.models,
            token=token,
            refuse_unknown=options.refuse_unknown,
            limits=Limits(body_bytes=options.body_bytes),
            options=settings,
            **of_worker,
        )

    return make


def _token(file: Path | None) -> str | None:
    """The token in a file or in the environment; on the command line every user of the machine could read it."""
    try:
        token = file.read_text(encoding="utf-8").strip() if file else os.environ.get(TOKEN)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token_file: {file} cannot be read ({error})") from error
    if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
        where = f"--token_file: {file}" if file else TOKEN
        raise UserError(f"{where}: must hold one word of visible ASCII characters")
    return token


def add_state_arguments(parser: ArgumentParser) -> None:
    """The store, and what is kept of a user."""
    parser.add_argument("--state", metavar="PLACE", help="a folder, or redis://HOST:PORT/N (default: in memory)")
    parser.add_argument("--durability", choices=DURABILITIES, default="each", help="of the folder: see docs/serving.md")
    parser.add_argument("--state_type", choices=sorted(STATE_TYPES), default="float32", help="bf16 takes half the room")
    parser.add_argument("--state_history", type=at_least(FEWEST), default=10_000, help="events that are kept of a user")
    parser.add_argument("--state_bytes", type=at_least(1 << 20), default=1 << 36, help="most bytes of the folder")
    parser.add_argument("--forget_days", type=positive, help="forget who had no event for so long (default: never)")


def state_options(options: Namespace, create: bool = True) -> tuple[Store, dict[str, Any]]:
    """The store that the options name, and those of :class:`~recbole_ssm.serving.engine.Engine` among them."""
    store = open_store(options.state, durability=options.durability, most_bytes=options.state_bytes, create=create)
    return store, {
        "state_history": options.state_history,
        "state_type": options.state_type,
        "forget_after": None if options.forget_days is None else options.forget_days * 86400,
    }


def command_parser() -> ArgumentParser:
    """The options of the command."""
    parser = ArgumentParser("recbole-ssm serve", __doc__)
    add_arguments(parser)
    add_state_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="where to listen")
    parser.add_argument("--port", type=at_least(0), default=8000, help="where to listen; 0 takes a free one")
    parser.add_argument(
        "--workers", type=at_least(1), default=1, help="so many processes answer, of one loaded model (default: 1)"
    )
    parser.add_argument("--models", type=Path, metavar="DIR", help="POST /v1/model serves another one of this folder")
    parser.add_argument(
        "--token_file", type=Path, metavar="FILE", help=f"callers must show this token (default: {TOKEN} if it is set)"
    )
    parser.add_argument("--category_field", help="the column of .item that holds categories")
    parser.add_argument(
        "--ann_above",
        type=at_least(0),
        metavar="N",
        help="use a faiss index for catalogues of more than N items",
    )
    parser.add_argument("--refuse_unknown", action="store_true", help="refuse unknown items (default: count them)")
    parser.add_argument("--body_bytes", type=at_least(1024), default=1 << 20, help="most bytes of a call's body")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command until it is told to end."""
    options, command_line = parse(command_parser(), arguments, flags=("--refuse_unknown",))
    if options.workers > 1:
        _serve_by_workers(options, command_line)
        return
    server = server_of(options, command_line)
    from recbole_ssm.serving.server import listen, run

    listening = listen(options.host, options.port)
    _announce(listening, options)
    run(server, listening)


def _serve_by_workers(options: Namespace, command_line: Sequence[str]) -> None:
    """Load the model once, fork the workers, and keep them at work."""
    if not hasattr(os, "fork"):
        raise UserError("--workers: this system cannot fork processes; start one server a port behind a balancer")
    if options.state is None:
        raise UserError("--workers: processes share no memory store; name a folder or a Redis server by --state")
    if torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu")).type != "cpu":
        raise UserError("--workers: several processes answer from a CPU; add --device=cpu, or leave --workers out")
    # A pool of threads does not live on in a forked process.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[COUNTS] = folder
        make = _prepared(options, command_line)
        # A store that cannot be opened is told here, once.
        state_options(options)[0].close()
        from recbole_ssm.serving.server import listen_all, run

        sockets, team = listen_all(options.host, options.port, options.workers), Team(options.workers)

        def work(number: int, listening: socket.socket) -> None:
            server = make(team=team, number=number)
            server.begin_with_choice()
            run(server, listening)

        _announce(sockets[0], options)
        supervise(work, sockets, team)


def _announce(listening: socket.socket, options: Namespace) -> None:
    host, port = listening.getsockname()[:2]
    by = f" by {options.workers} workers" if options.workers > 1 else ""
    print(f"http://{f'[{host}]' if ':' in host else host}:{port} serves {options.checkpoint}{by}", flush=True)
