"""A trained model as a function from raw item tokens to raw item tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_ssm import compat
from recbole_ssm.data.outline import DatasetOutline
from recbole_ssm.errors import UserError
from recbole_ssm.trainer import checkpoint
from recbole_ssm.trainer.checkpoint import load_weights

compat.install()

from recbole.data.interaction import Interaction  # noqa: E402

from recbole_ssm.graphs import score_by_graphs  # noqa: E402
from recbole_ssm.model import get_model  # noqa: E402
from recbole_ssm.serving.session import Session  # noqa: E402


class Recommender:
    """Next items for histories that need not have been in the training data.

    Args:
        model: a trained sequential model; it is put in evaluation mode.
        config: the configuration it was built with.
        items: the token of each item id; id 0 is padding.
        cuda_graphs: on a GPU, score as a CUDA graph for each number of histories (:mod:`recbole_ssm.graphs`); a model
            of ours that reads the last position.

    Raises:
        UserError: CUDA graphs for another model.
    """

    def __init__(self, model: Any, config: Any, items: Sequence[str], *, cuda_graphs: bool = False) -> None:
        if cuda_graphs:
            score_by_graphs(model)
        self.model = model.eval()
        self.items = list(items)
        self._ids = {token: index for index, token in enumerate(self.items) if index}
        self._list_field = config["ITEM_ID_FIELD"] + config["LIST_SUFFIX"]
        self._length_field = config["ITEM_LIST_LENGTH_FIELD"]
        self._max_length = config["MAX_ITEM_LIST_LENGTH"]
        self._device = config["device"]
        self._name = config["model"]

    def recommend(self, history: Sequence[str], k: int = 10, *, exclude_seen: bool = False) -> list[tuple[str, float]]:
        """The k items most likely to come next.

        Args:
            history: item tokens, oldest first; the newest MAX_ITEM_LIST_LENGTH of them are used.
            k: how many items; fewer come back where the catalogue is smaller.
            exclude_seen: leave out the items of the history; RecBole's evaluation does not.

        Returns:
            ``[(item token, score), ...]``, best first.

        Raises:
            UserError: the history is empty or holds an unknown token, k is below 1, or the model needs more than items.
        """
        return self.recommend_many([history], k, exclude_seen=exclude_seen)[0]

    @torch.inference_mode()
    def recommend_many(
        self, histories: Sequence[Sequence[str]], k: int = 10, *, exclude_seen: bool = False
    ) -> list[list[tuple[str, float]]]:
        """:meth:`recommend` for several histories at once, in their order."""
        ids = [self._history(history) for history in histories]
        return self.best(self.scores(ids), k, ids if exclude_seen else None) if ids else []

    def session(self, history: Sequence[str] = ()) -> Session:
        """A user whose events come one by one: ``update(item)`` takes one, ``top(k)`` recommends.

        Args:
            history: item tokens so far, oldest first; all of them are read.

        Raises:
            UserError: the history holds an unknown token, or the model carries no state.
        """
        if not getattr(self.model, "carries_state", False):
            raise UserError(f"session: {self._name} carries no state from event to event; use recommend(history)")
        return Session(self, self.to_ids(history))

    def best(
        self, scores: Tensor, k: int, excluded: Sequence[Sequence[int]] | None = None
    ) -> list[list[tuple[str, float]]]:
        """The k best of scores ``[B, V]``, which are written into, as tokens; without padding and the excluded ids."""
        if k < 1:
            raise UserError(f"k: must be at least 1, got {k}")
        scores = scores[:, : len(self.items)]
        scores[:, 0] = -torch.inf
        for row, seen in enumerate(excluded or ()):
            scores[row, seen] = -torch.inf
        best = scores.topk(min(k, len(self.items) - 1))
        return [
            [(self.items[item], score) for item, score in zip(items, row) if score > -torch.inf]
            for items, row in zip(best.indices.tolist(), best.values.tolist())
        ]

    @torch.inference_mode()
    def scores(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """Scores ``[B, V]`` of all items for histories of item ids; padding scores minus infinity."""
        recent = [list(history)[-self._max_length :] for history in histories]
        # padded to the full length, as RecBole's loaders do: some models count on it
        padded = torch.tensor([ids + [0] * (self._max_length - len(ids)) for ids in recent])
        lengths = torch.tensor([len(ids) for ids in recent])
        rows = Interaction({self._list_field: padded, self._length_field: lengths}).to(self._device)
        try:
            scores: Tensor = self.model.full_sort_predict(rows)
        except KeyError as error:
            raise UserError(
                f"{self._name} needs {error} beside the items; recommend() serves models of items alone"
            ) from error
        scores = scores.view(len(recent), -1)[:, : len(self.items)].clone()
        scores[:, 0] = -torch.inf
        return scores

    def _history(self, history: Sequence[str]) -> list[int]:
        if isinstance(history, str) or not len(history):
            raise UserError(f"history: must be a list of one item token or more, got {history!r}")
        return self.to_ids(history)

    def to_ids(self, history: Sequence[str]) -> list[int]:
        """Item ids of tokens.

        Raises:
            UserError: a token is not in the catalogue.
        """
        try:
            return [self._ids[str(token)] for token in history]
        except KeyError as error:
            token = str(error.args[0])
            raise UserError(f"history: item '{token}' is not in the catalogue of {len(self._ids)} items") from None


class _SavedConfig(dict[str, Any]):
    """A configuration as RecBole's models read it: an absent key is None."""

    def __missing__(self, key: str) -> None:
        return None


def load_recommender(
    path: str | Path, device: str | torch.device | None = None, *, cuda_graphs: bool = False
) -> Recommender:
    """A recommender from a checkpoint file alone: no data set, and whatever machine it was trained on.

    Args:
        path: a ``.safetensors`` checkpoint that this package wrote.
        device: where to run; None takes a GPU if there is one.
        cuda_graphs: as of :class:`Recommender`.

    Raises:
        UserError: the file is missing, damaged or of another kind, or the model needs more than items.
    """
    path = Path(path)
    saved = checkpoint.read(path)
    try:
        name, catalogue = saved.info["model"], saved.info["catalogue"]
        config = _SavedConfig(saved.info["config"])
        items, sizes = catalogue["items"], catalogue["sizes"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {path}: its header is incomplete ({error})") from error
    config["device"] = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = get_model(name)(config, DatasetOutline(sizes, name, catalogue.get("titles")))
    load_weights(model, saved, path)
    return Recommender(model.to(config["device"]), config, items, cuda_graphs=cuda_graphs)
