"""RecBole's SequentialRecommender over packed histories: what a model inherits that can encode them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor

from recbole_ssm.config import Configurable
from recbole_ssm.data.gaps import reads_times, time_scale
from recbole_ssm.data.loader import PackedBatch
from recbole_ssm.errors import UserError
from recbole_ssm.graphs import GraphedModel
from recbole_ssm.layers import Clock, Recipe, TimeEncoding
from recbole_ssm.layers.weights import in_kernels_too
from recbole_ssm.model.loss import NextItemLoss
from recbole_ssm.ops.packing import cu_seqlens_of
from recbole_ssm.ops.plain import plain_operators


class PackedRecommender(Configurable, SequentialRecommender):
    """A model that encodes histories laid end to end; scores are products with the item embeddings.

    They are dot products, or cosines where the key ``score`` says so, over ``temperature``. A subclass defines
    ``item_embedding``, :meth:`encode` and ``loss``. RecBole's rows are packed before anything is computed, so padding
    costs nothing and cannot influence a score.

    One that reads times calls :meth:`read_times` where it defines its layers, and starts from
    :meth:`embed`.
    """

    item_embedding: torch.nn.Embedding
    loss: NextItemLoss
    graphed: GraphedModel | None = None
    """What answers in place of the methods: see :func:`recbole_ssm.graphs.replay_graphs`."""

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        # Settings of former versions do not hold these.
        self.cosine = config["score"] == "cosine"
        self.temperature: float = config["temperature"] or 1.0
        self.time_encoding: TimeEncoding | None = None
        self._time_fields = f"{config['TIME_FIELD']}{config['LIST_SUFFIX']}", config["TIME_FIELD"]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: all but ``graphed``, which reads the weights of this very model."""
        return {name: value for name, value in vars(self).items() if name != "graphed"}

    @property
    def fixed_shapes(self) -> bool:
        """Whether the kernels of a training step follow from the shapes of its batch, so that a CUDA graph can hold
        them; where they do not, values are read in the midst of it.
        """
        return True

    @staticmethod
    def check_options(options: Mapping[str, Any], find_model: Callable[[str], type]) -> None:
        """What a recipe asks for must go together."""
        if options.get("label_smoothing") and options["loss_type"] != "CE":
            raise UserError(
                f"label_smoothing: spreads a target over all items, and loss_type: {options['loss_type']} does not see "
                "them; take loss_type: CE"
            )
        if options.get("gated_residual") and options["norm_position"] != "pre":
            raise UserError("gated_residual: is of blocks whose norms come first; take norm_position: pre")

    @staticmethod
    def all_positions_refusal(config: Any) -> str | None:
        """A causal model can learn from all positions."""
        return None

    @staticmethod
    def window_and_context(max_length: int, window: int | None) -> tuple[int, int]:
        """Targets and context of a training window, where a history is too long to be one.

        For a recurrent model: the context is as long as RecBole's, and so is the window by
        default.
        """
        return window or max_length, max_length

    # --- times ---

    def read_times(self, config: Any, dataset: Any, width: int) -> None:
        """Read gaps and waits into the vectors of events, which are ``width`` wide, where the key ``time`` says so."""
        if reads_times(config["time"]):
            ways = {
                "asks": config["time"] == "query",
                "at_output": config["query_enters"] == "output",
                "calendar": bool(config["query_calendar"]),
                "gap_decays": config["gap_enters"] == "step",
            }
            self.time_encoding = TimeEncoding(width, *time_scale(dataset), **ways)

    @in_kernels_too
    def embed(self, items_L: Tensor, clock: Clock | None = None) -> Tensor:
        """What events are before any layer, ``[..., width]``: the embeddings of their items and, if it reads times,
        of their times.

        Raises:
            UserError: the model reads times, and there are none.
        """
        items: Tensor = self.item_embedding(items_L)
        if self.time_encoding is None:
            return items
        if clock is None:
            raise UserError("time: this model reads the times of events; give them with the items")
        return items + self.time_encoding(clock)

    def histories_of(self, interaction: Any) -> tuple[Any, ...]:
        """What :meth:`forward` takes of RecBole's rows.

        The moment of asking is the time of the row itself, which is the target's.
        """
        item_seq, item_seq_len = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        if self.time_encoding is None:
            return item_seq, item_seq_len
        times, now = (interaction[field] for field in self._time_fields)
        return item_seq, item_seq_len, Clock.of_rows(times, now, item_seq_len)

    def read_out(self, output: Tensor, clock: Clock | None) -> Tensor:
        """The vectors that answer, of what was encoded at events with this clock."""
        if self.time_encoding is None or clock is None:
            return output
        return self.time_encoding.read_out(output, clock)

    # --- histories, losses and scores ---

    def encode(
        self, items_L: Tensor, cu_seqlens: Tensor, clock: Clock | None = None, *, last_only: bool = False
    ) -> Tensor:
        """Outputs for packed histories.

        Args:
            items_L: item ids of all histories, end to end ``[total]``.
            cu_seqlens: bounds of the histories ``[S + 1]``.
            clock: the times of the events ``[total]``; a model without times has none.
            last_only: give the last position of each history only.

        Returns:
            ``[total, hidden_size]``, or ``[S, hidden_size]`` with ``last_only``.
        """
        raise NotImplementedError

    def forward(self, item_seq: Tensor, item_seq_len: Tensor, clock: Clock | None = None) -> Tensor:
        """Right-padded histories ``[B, L]``, their lengths ``[B]`` and the times of their events ``[B, L]`` -> one
        vector for each ``[B, hidden_size]``.
        """
        output = self.encode(*pack(item_seq, item_seq_len, clock), last_only=True)
        return self.read_out(output, clock and clock.newest(item_seq_len))

    def encode_padded(self, item_seq: Tensor, clock: Clock | None = None) -> Tensor:
        """Outputs ``[B, L, hidden_size]`` for right-padded histories ``[B, L]``, where a model has such a form. It is
        called by :meth:`forward_padded` alone, whose operators keep the padding out.
        """
        raise NotImplementedError

    def forward_padded(self, item_seq: Tensor, item_seq_len: Tensor, clock: Clock | None = None) -> Tensor:
        """As :meth:`forward`, in plain operators whose shapes no length changes, which an ONNX graph is made of."""
        real = torch.arange(item_seq.shape[1], device=item_seq.device) < item_seq_len[:, None]  # [B, L]
        with plain_operators(real):
            output = self.read_padded(self.encode_padded(item_seq, clock), real)
        return self.read_out(output, clock and clock.newest(item_seq_len))

    def read_padded(self, output: Tensor, real: Tensor) -> Tensor:
        """The vectors ``[B, hidden_size]`` that are read of outputs ``[B, L, hidden_size]``: those of the last events.

        ``real`` is False at the padding.
        """
        newest = (real.sum(1) - 1).clamp(min=0)[:, None, None].expand(-1, 1, output.shape[2])
        return output.gather(1, newest)[:, 0]

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Mean loss over the targets of a batch: RecBole's rows, or a
        :class:`~recbole_ssm.data.loader.PackedBatch`.
        """
        if isinstance(interaction, PackedBatch):
            items, cu_seqlens, at, target, negative, times, now = interaction
            clock = () if times is None or now is None else (Clock.of_packed(times, now, cu_seqlens),)
            output = self.encode(items, cu_seqlens, *clock)[at]  # [n, hidden_size]
            output = self.read_out(output, clock[0].take(at) if clock else None)
        else:
            output = self.forward(*self.histories_of(interaction))
            target = interaction[self.POS_ITEM_ID]
            negative = interaction[self.NEG_ITEM_ID] if self.loss.loss_type == "BPR" else None
        loss: Tensor = self.loss(self.query_vectors(output), self.item_vectors(), target, negative)
        return loss

    def predict(self, interaction: Any) -> Tensor:
        """Scores ``[B]`` of one item a row."""
        output = self.forward(*self.histories_of(interaction))
        return (self.query_vectors(output) * self.item_vectors()[interaction[self.ITEM_ID]]).sum(-1)

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores ``[B, V]`` of all items."""
        if self.graphed is not None:
            scores: Tensor = self.graphed.scores(*self.histories_of(interaction))
            return scores
        output, items = self.factors(interaction)
        return output @ items.T

    def factors(self, interaction: Any) -> tuple[Tensor, Tensor]:
        """What the scores are products of: vectors of the rows ``[B, hidden_size]`` and of all items
        ``[V, hidden_size]``. Evaluation counts ranks by them, unless a subclass has a ``full_sort_predict`` of its own.
        """
        return self.query_vectors(self.forward(*self.histories_of(interaction))), self.item_vectors()

    def query_vectors(self, output: Tensor) -> Tensor:
        """Outputs ``[..., hidden_size]`` as vectors whose products with :meth:`item_vectors` are the scores."""
        if self.cosine:
            output = F.normalize(output, dim=-1)
        return output if self.temperature == 1 else output / self.temperature

    def item_vectors(self) -> Tensor:
        """The vectors of all items ``[V, hidden_size]``: their embeddings, of length 1 where scores are cosines."""
        items = self.item_embedding.weight
        if not self.cosine:
            return items
        length = items.norm(dim=-1, keepdim=True)
        # Padding may be zeros, whose gradient would be without bound.
        return items / torch.where(length > 0, length, 1.0)

    def fixed_shape_scores(self, item_seq: Tensor, item_seq_len: Tensor, clock: Clock | None = None) -> Tensor:
        """Scores ``[B, V]`` of all items for histories ``[B, L]``, in shapes that do not depend on their lengths.

        A CUDA graph demands such shapes. Padding is computed too, which pays for few users.
        """
        flat = () if clock is None else (Clock(*(column.flatten() for column in clock)),)
        output = self.encode(*split_padding(item_seq, item_seq_len), *flat, last_only=True)[::2]
        output = self.read_out(output, clock and clock.newest(item_seq_len))
        return self.query_vectors(output) @ self.item_vectors().T


def recipe_of(config: Any) -> Recipe:
    """The recipe of a configuration's blocks; settings of former versions have none of these keys."""
    return Recipe(config["norm_position"] == "pre", config["feed_forward"] == "swiglu", bool(config["gated_residual"]))


def pack(item_seq: Tensor, item_seq_len: Tensor, clock: Clock | None = None) -> tuple[Any, ...]:
    """Right-padded ids ``[B, L]`` and lengths ``[B]`` -> packed ids ``[total]`` and their bounds
    ``[B + 1]``; behind them, the packed clock of one ``[B, L]``.
    """
    if len(item_seq) == 1 and item_seq.is_cpu and not torch.compiler.is_compiling():
        # The same without four operations, which take longer than the kernels of a short history.
        length = int(item_seq_len[0])
        packed = [row[0, :length] for row in (item_seq, *(clock or ()))]
        bounds = torch.tensor([0, length], device=item_seq.device)
    else:
        real = torch.arange(item_seq.shape[1], device=item_seq.device) < item_seq_len[:, None]  # [B, L]
        packed, bounds = [row[real] for row in (item_seq, *(clock or ()))], cu_seqlens_of(item_seq_len)
    return (packed[0], bounds, *([Clock(*packed[1:])] if clock else []))


def split_padding(item_seq: Tensor, item_seq_len: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`pack`, in shapes that no length changes: ids ``[B L]`` and bounds ``[2 B + 1]``.

    Row b is sequence 2 b, and its padding, which may be empty, is sequence 2 b + 1.
    """
    B, L = item_seq.shape
    begin = torch.arange(B, device=item_seq.device) * L
    ends = torch.stack([begin + item_seq_len, begin + L], 1)  # [B, 2]
    return item_seq.flatten(), torch.nn.functional.pad(ends.flatten(), (1, 0))
