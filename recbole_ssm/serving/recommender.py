"""A trained model as a function from raw item tokens to raw item tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_ssm import compat
from recbole_ssm.data.outline import DatasetOutline
from recbole_ssm.errors import UserError, shown
from recbole_ssm.keys import KEYS
from recbole_ssm.trainer import checkpoint
from recbole_ssm.trainer.checkpoint import load_weights
from recbole_ssm.trainer.known_items import counts_of, items_of, texts_in

compat.install()

from recbole.data.interaction import Interaction  # noqa: E402

from recbole_ssm.graphs import replay_graphs  # noqa: E402
from recbole_ssm.model.packed import PackedRecommender  # noqa: E402
from recbole_ssm.model.registry import build_model, class_of  # noqa: E402
from recbole_ssm.serving.asked import Asked, Reader, aligned, by_number  # noqa: E402
from recbole_ssm.serving.catalogue import Catalogue, Ids, Recommendations  # noqa: E402
from recbole_ssm.serving.session import Session  # noqa: E402

MOST_SCORES = 1 << 23
"""So many scores are held at once, 32 MiB of them; but those of one history always are."""
MOST_EVENTS = 1 << 16
"""So many events are encoded at once; but those of one history always are."""


LONGEST = 100_000
"""Histories are padded to MAX_ITEM_LIST_LENGTH; a file that names a larger one could take any memory."""


class Recommender:
    """Next items for histories that need not have been in the training data.

    Its methods share these options:

    - ``allow``: tokens of items; no others are recommended.
    - ``deny``: tokens of items that are never recommended.
    - ``refused``: in place of both, which item ids are never recommended, as of :meth:`Catalogue.refused`.
    - ``exclude``: tokens of items that are not recommended after this history.
    - ``skip_unknown``: leave unknown items of a history out, and count them, in place of an error.
    - ``times``: when the events of a history were, one for each of its items: seconds since 1970,
      datetimes (in UTC unless they say otherwise), or dates of ISO 8601 as text.
    - ``now``: likewise, the moment of asking what comes next. One before the newest event counts
      as the time of that event.

    A model that reads times (key ``time``) needs ``times``, and ``now`` under ``time: query``; any
    other passes over them. A history without a known item is answered by popularity, and the answer says so.

    Args:
        model: a trained sequential model; it is put in evaluation mode.
        config: the configuration it was built with.
        items: the token of each item id; id 0 is padding.
        counts: how often each item was a training target, by id ``[V]``; None where that is not
            known, and an empty history an error.
        cuda_graphs: on a GPU, replay CUDA graphs (:mod:`recbole_ssm.graphs`): for the scores of each
            number of histories, and for an event and the best items of a session; a model of ours
            that reads the last position.

    Raises:
        UserError: CUDA graphs for another model.
    """

    def __init__(
        self,
        model: Any,
        config: Any,
        items: Sequence[str],
        counts: Tensor | None = None,
        *,
        cuda_graphs: bool = False,
    ) -> None:
        if cuda_graphs:
            replay_graphs(model)
        self.model = model.eval()
        self.catalogue = Catalogue(items, counts)
        self.items = self.catalogue.items
        self._reader = Reader(model, self.catalogue)
        self.reads_times = self._reader.reads_times
        self._list_field = config["ITEM_ID_FIELD"] + config["LIST_SUFFIX"]
        self._time_field, self._list_suffix = config["TIME_FIELD"], config["LIST_SUFFIX"]
        self._length_field = config["ITEM_LIST_LENGTH_FIELD"]
        self.max_length = config["MAX_ITEM_LIST_LENGTH"]
        self.device = config["device"]
        self._name = config["model"]

    def recommend(
        self,
        history: Iterable[str],
        k: int = 10,
        *,
        exclude_seen: bool = False,
        exclude: Iterable[str] = (),
        times: Iterable[Any] | None = None,
        now: Any = None,
        **choice: Any,
    ) -> Recommendations:
        """The k items most likely to come next.

        Args:
            history: item tokens, oldest first; the newest MAX_ITEM_LIST_LENGTH of them are
                used.
            k: how many items; fewer come back where the catalogue is smaller.
            exclude_seen: leave out the items of the history; RecBole's evaluation does not.
            exclude: tokens of further items to leave out.
            times: when the events were; see the class.
            now: the moment of asking; see the class.
            **choice: ``allow``, ``deny``, ``refused``, ``skip_unknown``; see the class.

        Returns:
            ``[(item token, score), ...]``, best first.

        Raises:
            UserError: the history holds an unknown token, k is below 1, or the model needs more
                than items.
        """
        options = {"exclude_seen": exclude_seen, "exclude": [exclude], "now": [now], **choice}
        options["times"] = None if times is None else [times]
        return next(self._answers([history], k, lambda part, number: part, **options))

    def recommend_many(self, histories: Iterable[Iterable[str]], k: int = 10, **options: Any) -> list[Recommendations]:
        """:meth:`recommend` for many histories, in their order; ``exclude`` and ``times`` hold those of each history,
        and ``now`` is one moment for all of them or a list of one for each.

        They are scored so many at a time that the scores take 32 MiB.
        """
        return list(self.stream(histories, k, **options))

    def stream(
        self,
        histories: Iterable[Iterable[str]],
        k: int = 10,
        *,
        called: Callable[[str, int], str] = by_number,
        **options: Any,
    ) -> Iterator[Recommendations]:
        """:meth:`recommend_many`, one answer after the other, for histories that may come one after the other too;
        ``called`` says what an error calls the ``history``, ``times`` or ``exclude`` of the history of a number, such
        as ``histories[0]``.
        """
        if isinstance(histories, (str, bytes, Set, Mapping)) or not isinstance(histories, Iterable):
            raise UserError(f"histories: must be a list of histories, got {shown(histories)}")
        return self._answers(histories, k, called, **options)

    @torch.inference_mode()
    def _answers(
        self,
        histories: Iterable[Iterable[str]],
        k: int,
        called: Callable[[str, int], str],
        *,
        exclude_seen: bool = False,
        exclude: Iterable[Iterable[str]] | None = None,
        times: Iterable[Iterable[Any]] | None = None,
        now: Any = None,
        allow: Iterable[str] | None = None,
        deny: Iterable[str] | None = None,
        refused: Tensor | None = None,
        skip_unknown: bool = False,
    ) -> Iterator[Recommendations]:
        refused = self.catalogue.refused(allow, deny) if refused is None else refused
        read = self._reader.histories(histories, times, now, called, skip_unknown)
        numbered = enumerate(aligned(read, "exclude", exclude, otherwise=()))
        while part := list(itertools.islice(numbered, self._rows_at_once())):
            rows = []
            for number, (asked, left_out) in part:
                others, _ = self.catalogue.known(left_out, called("exclude", number), True)
                rows.append((asked, [*others, *(asked.ids if exclude_seen else ())]))
            known = [(asked, outside) for asked, outside in rows if asked.ids]
            scored: Iterator[Recommendations] = iter(())
            if known:
                scores = self._scores(self._batch([asked for asked, _ in known]))
                scored = iter(self.catalogue.best(scores, k, [outside for _, outside in known], refused))
            for asked, outside in rows:
                answer = next(scored) if asked.ids else self.catalogue.popular(k, outside, refused)
                answer.skipped = asked.skipped
                yield answer

    def _rows_at_once(self) -> int:
        return max(1, min(1024, MOST_SCORES // len(self.items), MOST_EVENTS // self.max_length))

    @torch.inference_mode()
    def score(
        self, history: Iterable[str], items: Iterable[str], times: Iterable[Any] | None = None, now: Any = None
    ) -> list[float]:
        """The scores of some items, in their order, after a history.

        Raises:
            UserError: a token is unknown, the history is empty, or the model reads times and there are none.
        """
        asked = self._reader.history(history, times, now)
        if not asked.ids:
            raise UserError("history: must be a list of one item token or more, got none")
        scores = self._scores(self._batch([asked]))
        found: list[float] = scores[0, self.catalogue.ids(items, "items")].tolist()
        return found

    @torch.inference_mode()
    def similar_items(
        self,
        item: str,
        k: int = 10,
        *,
        allow: Iterable[str] | None = None,
        deny: Iterable[str] | None = None,
        refused: Tensor | None = None,
    ) -> Recommendations:
        """The k items whose vectors have the largest cosine with that of an item, which is not among them.

        Args:
            item: its token.
            k: how many.
            allow, deny, refused: see the class.

        Raises:
            UserError: the item is unknown, or the model has no vectors of items.
        """
        (index,) = self.catalogue.ids([item], "item")
        refused = self.catalogue.refused(allow, deny) if refused is None else refused
        vectors = self._table()
        # Products and lengths take two walks through the table and no room; unit vectors would take its room again.
        lengths = vectors.norm(dim=1).clamp_min(1e-12)
        cosines = (vectors @ vectors[index])[None] / (lengths * lengths[index])
        return self.catalogue.best(cosines, k, [[index]], refused)[0]

    def item_vectors(self) -> Tensor:
        """The vectors ``[items, d]`` of all items in the order of ``items[1:]``, on the CPU.

        Raises:
            UserError: the model has none.
        """
        return self._table()[1:].float().cpu()

    @torch.inference_mode()
    def user_vectors(
        self,
        histories: Iterable[Iterable[str]],
        skip_unknown: bool = False,
        times: Iterable[Iterable[Any]] | None = None,
        now: Any = None,
        *,
        called: Callable[[str, int], str] = by_number,
    ) -> Tensor:
        """The vectors ``[B, d]`` of users by their histories, which may come one after the other as in :meth:`stream`,
        on the CPU; a history without a known item has zeros.

        Raises:
            UserError: a history holds an unknown item, the model reads times and there are none, or it makes no vector
                of a history.
        """
        read = self._reader.histories(histories, times, now, called, skip_unknown)
        found = [torch.zeros(0, self._table().shape[1])]
        fields = self._list_field, self._length_field
        while part := list(itertools.islice(read, self._rows_at_once())):
            found.append(torch.zeros(len(part), found[0].shape[1]))
            rows = [number for number, one in enumerate(part) if one.ids]
            if not rows:
                continue
            batch = self._batch([part[number] for number in rows])
            try:
                # Those whose products with the items' are the scores, where the model tells them.
                ours = isinstance(self.model, PackedRecommender)
                vectors = self.model.factors(batch)[0] if ours else self.model.forward(*(batch[f] for f in fields))
                found[-1][rows] = vectors.float().cpu()
            except (TypeError, AttributeError, RuntimeError) as error:
                raise UserError(f"{self._name}: makes no vector of a history of items ({error})") from error
        return torch.cat(found)

    def _table(self) -> Tensor:
        table = getattr(getattr(self.model, "item_embedding", None), "weight", None)
        if table is None:
            raise UserError(f"{self._name}: has no vectors of items")
        table = self.model.item_vectors() if hasattr(self.model, "item_vectors") else table
        found: Tensor = table.detach()[: len(self.items)]
        return found

    def session(self, history: Sequence[str] = (), times: Iterable[Any] | None = None) -> Session:
        """A user whose events come one by one: ``update(item, time)`` takes one, ``top(k, now=...)`` recommends.

        Args:
            history: item tokens so far, oldest first; all of them are read.
            times: when these events were; see the class.

        Raises:
            UserError: the history holds an unknown token, the model reads times and there are none, or it carries no
                state.
        """
        if not getattr(self.model, "carries_state", False):
            raise UserError(f"session: {self._name} carries no state from event to event; use recommend(history)")
        ids, _, seconds = self._reader.events(history, times)
        return Session(self.model, self.catalogue, ids, seconds)

    def scores(
        self,
        histories: Sequence[Ids],
        times: Sequence[Sequence[int]] | None = None,
        now: Sequence[int] | None = None,
    ) -> Tensor:
        """Scores ``[B, V]`` of all items for histories of item ids; padding scores minus infinity.

        Args:
            histories: none of them empty.
            times: of their events in seconds, where the model reads them.
            now: the moment of asking of each.
        """
        given = [list(one) for one in times] if times is not None else [None] * len(histories)
        moments = now if now is not None else [None] * len(histories)
        asked = [Asked(list(ids), 0, seconds, moment) for ids, seconds, moment in zip(histories, given, moments)]
        return self._scores(self._batch(asked))

    @torch.inference_mode()
    def _scores(self, rows: Any) -> Tensor:
        try:
            scores: Tensor = self.model.full_sort_predict(rows)
        except KeyError as error:
            if str(error.args[0]).startswith(self._time_field):
                raise UserError(f"{self._name} reads the times of events; give times beside the items") from error
            raise UserError(
                f"{self._name} needs {error} beside the items; recommend() serves models of items alone"
            ) from error
        scores = scores.view(len(rows), -1)[:, : len(self.items)].clone()
        scores[:, 0] = -torch.inf
        return scores

    def _batch(self, asked: Sequence[Asked]) -> Any:
        """RecBole's rows of some histories, none of them empty; with times where all of them have some."""
        lengths = torch.tensor([min(len(one.ids), self.max_length) for one in asked])
        columns = {self._list_field: self._padded([one.ids for one in asked]), self._length_field: lengths}
        times = [one.times for one in asked if one.times]
        if len(times) == len(asked):
            columns[self._time_field + self._list_suffix] = self._padded(times)
            columns[self._time_field] = torch.tensor([one.now for one in asked])
        return Interaction(columns).to(self.device)

    def _padded(self, rows: Sequence[list[int]]) -> Tensor:
        """The newest numbers of each row, padded to the full length, as RecBole's loaders do: some models count on
        it.
        """
        recent = [row[-self.max_length :] for row in rows]
        return torch.tensor([row + [0] * (self.max_length - len(row)) for row in recent])


def load_recommender(
    path: str | Path,
    device: str | torch.device | None = None,
    *,
    cuda_graphs: bool = False,
    model: str | type | None = None,
) -> Recommender:
    """A recommender from a checkpoint file alone: no data set, and whatever machine it was trained on.

    Args:
        path: a ``.safetensors`` checkpoint that this package wrote, or the folder of a run, for
            its best one.
        device: where to run; None takes a GPU if there is one.
        cuda_graphs: as of :class:`Recommender`.
        model: the class of the model, or its path as ``package.module:Class``, where it is one
            of your own.

    Raises:
        UserError: the file is missing, damaged or of another kind, or the model needs more than
            items.
    """
    return recommender_of(*checkpoint.find_best(Path(path)), device, cuda_graphs=cuda_graphs, model=model)


def recommender_of(
    path: Path,
    saved: checkpoint.Checkpoint,
    device: str | torch.device | None = None,
    *,
    cuda_graphs: bool = False,
    model: str | type | None = None,
) -> Recommender:
    """:func:`load_recommender` of a checkpoint that was read from ``path``."""
    try:
        name, sizes = saved.info["model"], saved.info["catalogue"]["sizes"]
        config = {**saved.info["config"], "model": name}
        for key in ("ITEM_ID_FIELD", "TIME_FIELD", "LIST_SUFFIX", "ITEM_LIST_LENGTH_FIELD", "MAX_ITEM_LIST_LENGTH"):
            KEYS[key].take(key, config[key])
        if config["MAX_ITEM_LIST_LENGTH"] > LONGEST:
            raise UserError(
                f"checkpoint {path}: MAX_ITEM_LIST_LENGTH is {config['MAX_ITEM_LIST_LENGTH']:,}, and histories are "
                f"padded to it; up to {LONGEST:,} are served"
            )
        titles = texts_in(saved, path, "titles")
    except (KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path}: its header is incomplete ({error})") from error
    items = items_of(saved, path)
    config["device"] = _device(device)
    outline = DatasetOutline(sizes, name, titles)
    with checkpoint.doubted(saved, path):
        built = build_model(config, outline, config["device"], class_of(saved.info, path, model))
        load_weights(built, saved, path)
        recommender = Recommender(built, config, items, counts_of(saved, path), cuda_graphs=cuda_graphs)
        if not getattr(built, "reads_text", False) and not cuda_graphs:
            # Settings that do not fit may show in the scores alone.
            recommender._scores(recommender._batch([Asked([1], 0, [0], 0)]))
    return recommender


def _device(named: str | torch.device | None) -> torch.device:
    """The device of that name; None takes a GPU if there is one."""
    try:
        device = torch.device(named or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise UserError(f"device: there is no {shown(named)} here; take cpu, cuda or cuda:0") from error
    return device
