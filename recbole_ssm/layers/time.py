"""When events were, as vectors: the gap before an event, and the wait behind it.

    gap_t  = time_t - time_{t-1}               none before the first event of a history
    wait_t = time_{t+1} - time_t               behind the newest event: the moment of asking - time_t
    n      = a gap or a wait in units of the data's resolution, from 0 to the longest gap of training
    bucket(n) = floor(2 log2(n + 1))           one of 64
    u_t    = item_t + E[bucket(gap_t)] + F[bucket(wait_t)]      what a model reads of an event

With ``query_enters: output`` the wait does not enter at the events. It is a gate on the vector y that is read, so that
the state which a model carries does not depend on it (feature-wise scale and shift, Perez et al. 2018, arXiv
1709.07871)::

    y (1 + G[bucket(wait)]) + S[bucket(wait)]
"""

from __future__ import annotations

import bisect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

BUCKETS = 64
NEVER = torch.iinfo(torch.int64).min
"""Stands for the time before the first event of a history."""
# bucket(n) >= k where n >= LIMITS[k - 1]: the least whole n with (n + 1)^2 >= 2^k. Whole numbers, because a logarithm
# that is rounded otherwise on another machine would put a time into another bucket.
LIMITS = [math.isqrt(2**k - 1) for k in range(1, BUCKETS)]


class Clock(NamedTuple):
    """The times of events in whole seconds, int64, in any shape that all three share; ``[total]`` where histories are
    packed.
    """

    before: Tensor
    """When the event before it was; :data:`NEVER` for the first of a history."""
    at: Tensor
    """When the event was."""
    after: Tensor
    """When the next one was; for the newest of a history, the moment of asking."""

    @classmethod
    def of_packed(cls, times_L: Tensor, now_L: Tensor, cu_seqlens: Tensor) -> Clock:
        """The clock of histories end to end ``[total]``; ``now_L`` says when it was asked what follows each event."""
        before = torch.cat([times_L.new_full((1,), NEVER), times_L])[:-1]
        # The bound behind the last history, and behind every empty one at the end, is no event.
        first = torch.zeros(len(times_L) + 1, dtype=torch.bool, device=times_L.device)
        first[cu_seqlens] = True
        return cls(before.masked_fill(first[:-1], NEVER), times_L, now_L)

    @classmethod
    def of_rows(cls, times_BL: Tensor, now_B: Tensor, lengths_B: Tensor) -> Clock:
        """The clock ``[B, L]`` of right-padded histories, each of which was asked at one moment."""
        before = nn.functional.pad(times_BL[:, :-1], (1, 0), value=NEVER)
        after = nn.functional.pad(times_BL[:, 1:], (0, 1))
        newest = (lengths_B - 1).clamp(min=0)[:, None]
        return cls(before, times_BL, after.scatter(1, newest, now_B[:, None]))

    def take(self, index: Any) -> Clock:
        """The clock of some of the events, as by indexing."""
        return Clock(*(column[index] for column in self))

    def newest(self, lengths_B: Tensor) -> Clock:
        """Of a clock ``[B, L]`` of rows, that of the newest event of each ``[B]``."""
        newest = (lengths_B - 1).clamp(min=0)[:, None]
        return Clock(*(column.gather(1, newest)[:, 0] for column in self))


class TimeEncoding(nn.Module):
    """Embeddings of gaps and waits; see the module's text.

    Args:
        d_model: width of the vectors that events have, and of those that are read.
        origin: a moment at which the data's units begin, in seconds.
        resolution: the data's unit of time in seconds: 1, or 86,400 where times are days.
        longest: the longest gap that training holds, in such units; what is longer counts as this long.
        asks: whether the wait is read too, not only the gap.
        at_output: whether the wait is a gate on what is read, in place of an embedding at the input.
    """

    scale: Tensor
    limits: Tensor

    def __init__(self, d_model: int, origin: int, resolution: int, longest: int, asks: bool, at_output: bool) -> None:
        super().__init__()
        self.asks = asks
        """Whether it must know when it is asked."""
        self.asks_at_input = asks and not at_output
        self.gap = nn.Embedding(BUCKETS + 1, d_model)
        """Row 0 is of the first event of a history, which has none."""
        if self.asks_at_input:
            self.wait = nn.Embedding(BUCKETS, d_model)
        elif asks:
            self.gate, self.shift = nn.Embedding(BUCKETS, d_model), nn.Embedding(BUCKETS, d_model)
        # They are kept with the weights, because a model means its buckets by them wherever it runs.
        self.register_buffer("scale", torch.tensor([origin, resolution, longest]))
        self.register_buffer("limits", torch.tensor(LIMITS), persistent=False)

    def forward(self, clock: Clock) -> Tensor:
        """What the times add to the vectors of events ``[..., d_model]``."""
        first = clock.before == NEVER
        gap = self._bucket(clock.before.where(~first, clock.at), clock.at) + 1
        found: Tensor = self.gap(gap.masked_fill(first, 0))
        return found + self.wait(self._bucket(clock.at, clock.after)) if self.asks_at_input else found

    def read_out(self, y: Tensor, clock: Clock) -> Tensor:
        """The vectors ``[..., d_model]`` that answer when they are asked at ``clock.after``."""
        return self.gated(y, self._bucket(clock.at, clock.after)) if self.asks and not self.asks_at_input else y

    def gated(self, y: Tensor, wait: Tensor) -> Tensor:
        """:meth:`read_out` of ``query_enters: output``, for buckets of waits ``[...]``."""
        return y * (1 + self.gate(wait)) + self.shift(wait)

    def rows_of(self, before: int, at: int, after: int) -> tuple[int, int]:
        """The rows of the gap and of the wait of one event, as :meth:`forward` finds them for many.

        In Python it takes a tenth of the time that a dozen operations on tensors of one number take.
        """
        origin, resolution, longest = self.scale.tolist()
        starts = (at if before == NEVER else before), at
        units = [
            (end - origin) // max(resolution, 1) - (start - origin) // max(resolution, 1)
            for start, end in zip(starts, (at, after))
        ]
        gap, wait = (bisect.bisect_right(LIMITS, min(max(count, 0), longest)) for count in units)
        return (0 if before == NEVER else gap + 1), wait

    def _bucket(self, start: Tensor, end: Tensor) -> Tensor:
        """The buckets of the times between two moments; a time that runs backwards counts as none."""
        origin, resolution, longest = self.scale
        # A damaged file may hold anything.
        unit = resolution.clamp(min=1)
        units = (end - origin) // unit - (start - origin) // unit
        return torch.bucketize(units.clamp(min=0).minimum(longest), self.limits, right=True)

    def extra_repr(self) -> str:
        """What the buckets stand for; nothing before they have numbers."""
        if self.scale.is_meta:
            return ""
        _, resolution, longest = self.scale.tolist()
        wait = ", wait at the input" if self.asks_at_input else ", wait at the output" if self.asks else ""
        return f"gap{wait}; resolution {resolution:,} s, longest gap {longest * resolution:,} s"
