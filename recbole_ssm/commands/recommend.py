"""Write what to recommend to many users: rows of user_id, item_id, rank, score, source and, where it is known, title.

Source is ``model``, or ``popularity`` for a user without an event of a known item.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from recbole_ssm.arguments import at_least, names
from recbole_ssm.commands.histories import ALL_EVENTS, Histories, histories_of, read_items
from recbole_ssm.commands.items import titles_of
from recbole_ssm.commands.options import add_arguments, add_now, graphs_asked, parse
from recbole_ssm.commands.tables import check_table, write_table
from recbole_ssm.data.lines import progress
from recbole_ssm.errors import ArgumentParser, UserError
from recbole_ssm.serving import recommender_of
from recbole_ssm.serving.catalogue import Recommendations
from recbole_ssm.starting import configure_data
from recbole_ssm.trainer import checkpoint

if TYPE_CHECKING:
    import pandas as pd

USERS_AT_ONCE = 1024
"""Of so many users the rows are written at once."""


def recommend_users(
    model_file: str | Path,
    users: str | Path | Iterable[str] | Histories = "all",
    k: int = 10,
    **options: Any,
) -> pd.DataFrame:
    """The next items of many users.

    Args:
        model_file: a checkpoint, or the folder of a run.
        users: ``all``, ids, or a file; see :func:`recbole_ssm.commands.histories.histories_of`.
        k: how many items for each.
        **options: as of :func:`write_recommendations`.

    Returns:
        The rows, by users and ranks: user_id, item_id, rank (from 1), score, source (``model`` or
        ``popularity``) and, where the data set has titles, title.

    Raises:
        UserError: something given is wrong.
    """
    return pa.concat_tables(_tables(model_file, users, k, **options)).to_pandas()


def write_recommendations(
    out: str | Path,
    model_file: str | Path,
    users: str | Path | Iterable[str] | Histories = "all",
    k: int = 10,
    **options: Any,
) -> int:
    """Write the rows of :func:`recommend_users` to a file, piece by piece, whole or not at all.

    Args:
        out: a file that ends in ``.parquet`` or ``.csv``.
        model_file: a checkpoint, or the folder of a run.
        users: as of :func:`recommend_users`.
        k: how many items for each.
        **options: ``exclude_seen``, ``allow``, ``deny``, ``now`` and ``skip_unknown`` as of
            :class:`recbole_ssm.serving.Recommender`, but unknown items of histories are skipped
            unless ``skip_unknown=False``; ``title_field``, the column of the .item file that holds
            the titles; ``model``, the class of the model, where it is one of your own; ``device``;
            ``config_dict`` and ``command_line``, options of the data set that are to be others than
            in the run, such as ``data_path``.

    Returns:
        How many rows were written.

    Raises:
        UserError: something given is wrong.
    """
    check_table("out", Path(out))
    return write_table(Path(out), _tables(model_file, users, k, **options))


def _tables(
    model_file: str | Path,
    users: str | Path | Iterable[str] | Histories,
    k: int,
    *,
    model: str | type | None = None,
    device: str | None = None,
    config_dict: Mapping[str, Any] | None = None,
    command_line: Iterable[str] = (),
    skip_unknown: bool = True,
    title_field: str | None = None,
    told: list[str] | None = None,
    **choice: Any,
) -> Iterator[pa.Table]:
    """The rows, those of so many users at a time; what they are of is added to ``told``, in words."""
    path, saved = checkpoint.find_best(Path(model_file))
    command_line = list(command_line)
    recommender = recommender_of(path, saved, device, model=model, cuda_graphs=graphs_asked(command_line))
    data_options = {**ALL_EVENTS, **(config_dict or {})}
    config = configure_data((path, saved), model, config_dict=data_options, command_line=command_line)
    # What training alone needs is not kept.
    del saved
    histories = histories_of(users, config)
    if recommender.reads_times and len(histories.items) and histories.seconds is None:
        raise UserError(
            "this model reads the times of events, and these events have none; give a file of events with a column of "
            "times, --users=EVENTS.csv"
        )
    titles = titles_of(config, recommender.items, title_field)
    if told is not None:
        with_titles = "with" if titles else "without"
        run = f"run {path.parent}" if path.name == checkpoint.BEST else f"checkpoint {path}"
        told.append(f"{with_titles} titles, for {len(histories.users):,} users ({run}, data set {config['dataset']})")

    choice |= {"times": histories.times, "skip_unknown": skip_unknown, "called": histories.called}
    answers = recommender.stream(iter(histories), k, **choice)
    asked = iter(histories.users)
    popular = skipped = few = 0
    with progress("Recommend", len(histories.users), "user") as bar:
        # An empty piece comes where there are no users: a table has its columns all the same.
        while (piece := list(islice(zip(asked, answers), USERS_AT_ONCE))) or not bar.n:
            yield _table(piece, titles)
            if not piece:
                break
            popular += sum(answer.source == "popularity" for _, answer in piece)
            skipped += sum(answer.skipped for _, answer in piece)
            few += sum(len(answer) < k for _, answer in piece)
            bar.update(len(piece))
    if histories.strangers:
        getLogger().warning(
            f"{histories.strangers:,} users are not in data set {config['dataset']} and are answered by popularity; "
            "give their events: --users=EVENTS.csv"
        )
    if popular := popular - histories.strangers:
        getLogger().warning(f"{popular:,} users have no event of a known item; they are answered by popularity")
    if skipped:
        getLogger().warning(f"{skipped:,} events are of items that the checkpoint does not know; they do not count")
    if few:
        known = f"{len(recommender.items) - 1:,} items"
        getLogger().warning(f"--k={k}: {few:,} users have fewer rows, because no more of the {known} are left")


SCHEMA = pa.schema(
    {
        "user_id": pa.string(),
        "item_id": pa.string(),
        "rank": pa.int32(),
        "score": pa.float64(),
        "source": pa.dictionary(pa.int8(), pa.string()),
    }
)


def _table(answers: Iterable[tuple[str, Recommendations]], titles: Mapping[str, str] | None) -> pa.Table:
    """The rows of users and what is recommended to each."""
    rows = [
        (user, item, rank, score, answer.source)
        for user, answer in answers
        for rank, (item, score) in enumerate(answer, 1)
    ]
    columns = list(zip(*rows)) or [()] * len(SCHEMA)
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, SCHEMA)], schema=SCHEMA)
    if titles is not None:
        table = table.append_column("title", pa.array([titles[item] for item in columns[1]], pa.string()))
    return table


def _lines(rows: pd.DataFrame) -> str:
    """Answers as aligned columns; the user's only where there are several."""
    several = ["user_id"] if rows["user_id"].nunique() > 1 else []
    shown = [*several, *(column for column in ("rank", "item_id", "title", "score") if column in rows)]
    text: str = rows[shown].to_string(index=False, float_format="{:.4f}".format)
    return text


def main(arguments: Sequence[str]) -> None:
    """Run the command and say what was written."""
    parser = ArgumentParser("recbole-ssm recommend", __doc__)
    add_arguments(parser)
    parser.add_argument(
        "--users",
        default="all",
        help="all users of the run's data set with all their events (default), ids with commas between them, or a "
        "file: of a user's id in each line, or of events (.inter, .parquet, .csv, .jsonl); ids that are typed are "
        "answered on the screen, unless --out is given",
    )
    parser.add_argument(
        "--history",
        type=names,
        metavar="ITEM,...",
        help="one history in place of users, items oldest first; it is answered on the screen, unless --out is given",
    )
    parser.add_argument("--k", type=at_least(1), default=10, help="items for each user")
    parser.add_argument("--out", type=Path, help="a .parquet or .csv file (default: recommendations.csv)")
    parser.add_argument("--exclude_seen", action="store_true", help="leave out the items of the user's history")
    parser.add_argument(
        "--title_field", help="the column of titles in the .item file (default: title, name, or the only text)"
    )
    parser.add_argument("--allow", type=Path, metavar="FILE", help="an item's id in each line: only these")
    parser.add_argument("--deny", type=Path, metavar="FILE", help="an item's id in each line: none of these")
    add_now(parser)
    parser.add_argument(
        "--refuse_unknown",
        action="store_true",
        help="stop at an event of an unknown item (default: leave it out; in --history it is always an error)",
    )
    options, command_line = parse(parser, arguments, flags=("--exclude_seen", "--refuse_unknown"))
    how: dict[str, Any] = dict(
        exclude_seen=options.exclude_seen,
        allow=read_items("--allow", options.allow),
        deny=read_items("--deny", options.deny),
        # Who types an item means it.
        skip_unknown=not options.refuse_unknown and options.history is None,
        now=options.now,
        title_field=options.title_field,
        model=options.model,
        device=options.device,
        command_line=command_line,
    )
    users = options.users
    if options.history is not None:
        if users != "all":
            raise UserError("--history: is in place of --users; leave one out")
        if not options.history:
            raise UserError("--history: names no item; write their ids with commas between them, oldest first")
        users = Histories.typed(options.history)
    typed = options.history is not None or (users != "all" and not Path(users).is_file())
    if typed and options.out is None:
        print(_lines(recommend_users(options.checkpoint, users, options.k, **how)))
        return
    options.out = options.out or Path("recommendations.csv")
    told: list[str] = []
    rows = write_recommendations(options.out, options.checkpoint, users, options.k, **how, told=told)
    print(f"wrote {options.out}: {rows:,} rows {told[0]}")
