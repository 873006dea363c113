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
from recbole_ssm.keys import shown
from recbole_ssm.trainer import checkpoint
from recbole_ssm.trainer.checkpoint import load_weights

compat.install()

from recbole.data.interaction import Interaction  # noqa: E402

from recbole_ssm.graphs import score_by_graphs  # noqa: E402
from recbole_ssm.model.registry import build_model, class_of  # noqa: E402
from recbole_ssm.serving.catalogue import Catalogue, Recommendations  # noqa: E402
from recbole_ssm.serving.session import Session  # noqa: E402


class Recommender:
    """Next items for histories that need not have been in the training data.

    Args:
        model: a trained sequential model; it is put in evaluation mode.
        config: the configuration it was built with.
        items: the token of each item id; id 0 is padding.
        cuda_graphs: on a GPU, score as a CUDA graph for each number of histories
            (:mod:`recbole_ssm.graphs`); a model of ours that reads the last position.

    Raises:
        UserError: CUDA graphs for another model.
    """

    def __init__(self, model: Any, config: Any, items: Sequence[str], *, cuda_graphs: bool = False) -> None:
        if cuda_graphs:
            score_by_graphs(model)
        self.model = model.eval()
        self.catalogue = Catalogue(items)
        self.items = self.catalogue.items
        self._list_field = config["ITEM_ID_FIELD"] + config["LIST_SUFFIX"]
        self._length_field = config["ITEM_LIST_LENGTH_FIELD"]
        self._max_length = config["MAX_ITEM_LIST_LENGTH"]
        self._device = config["device"]
        self._name = config["model"]

    def recommend(self, history: Sequence[str], k: int = 10, *, exclude_seen: bool = False) -> Recommendations:
        """The k items most likely to come next.

        Args:
            history: item tokens, oldest first; the newest MAX_ITEM_LIST_LENGTH of them are
                used.
            k: how many items; fewer come back where the catalogue is smaller.
            exclude_seen: leave out the items of the history; RecBole's evaluation does not.

        Returns:
            ``[(item token, score), ...]``, best first.

        Raises:
            UserError: the history is empty or holds an unknown token, k is below 1, or the
                model needs more than items.
        """
        return self.recommend_many([history], k, exclude_seen=exclude_seen)[0]

    @torch.inference_mode()
    def recommend_many(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        *,
        exclude_seen: bool = False,
    ) -> list[Recommendations]:
        """:meth:`recommend` for several histories at once, in their order."""
        if isinstance(histories, (str, bytes)):
            raise UserError(f"histories: must be a list of histories, got {shown(histories)}")
        ids = [self._history(history) for history in histories]
        if not ids:
            return []
        return self.catalogue.best(self.scores(ids), k, ids if exclude_seen else None)

    def session(self, history: Sequence[str] = ()) -> Session:
        """A user whose events come one by one: ``update(item)`` takes one, ``top(k)`` recommends.

        Args:
            history: item tokens so far, oldest first; all of them are read.

        Raises:
            UserError: the history holds an unknown token, or the model carries no state.
        """
        if not getattr(self.model, "carries_state", False):
            raise UserError(f"session: {self._name} carries no state from event to event; use recommend(history)")
        return Session(self.model, self.catalogue, self.catalogue.ids(history))

    @torch.inference_mode()
    def scores(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """Scores ``[B, V]`` of all items for histories of item ids; padding scores minus
        infinity.
        """
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
        ids = self.catalogue.ids(history)
        if not ids:
            raise UserError(f"history: must be a list of one item token or more, got {shown(history)}")
        return ids


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
    path, saved = checkpoint.find_best(Path(path))
    try:
        name, catalogue = saved.info["model"], saved.info["catalogue"]
        config = dict(saved.info["config"], model=name)
        items, sizes = catalogue["items"], catalogue["sizes"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {path}: its header is incomplete ({error})") from error
    config["device"] = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    outline = DatasetOutline(sizes, name, catalogue.get("titles"))
    built = build_model(config, outline, config["device"], class_of(saved.info, path, model))
    load_weights(built, saved, path)
    return Recommender(built, config, items, cuda_graphs=cuda_graphs)
