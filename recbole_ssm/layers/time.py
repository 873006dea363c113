"""When events were, as vectors: the gap before an event, and the wait behind it.

    gap_t  = time_t - time_{t-1}               none before the first event of a history
    wait_t = time_{t+1} - time_t               behind the newest event: the moment of asking - time_t
    n      = a gap or a wait in units of the data's resolution, from 0 to the longest gap of training
    bucket(n) = floor(2 log2(n + 1))           one of 64
    u_t    = item_t + E[bucket(gap_t)] + F[bucket(wait_t)]      what a model reads of an event

With ``query_enters: output`` the wait does not enter at the events. It is a gate on the vector y that is read, so that
the state which a model carries does not depend on it (feature-wise scale and shift, Perez et al. 2018, arXiv
1709.07871)::

    y (1 + G[bucket(wait)]) + F[bucket(wait)]

With ``gap_enters: step`` E falls away, and n of the gap before an event makes the mixer's state decay
(:mod:`recbole_ssm.layers.mamba2`).

``query_calendar`` adds an embedding of the hour and one of the weekday of asking, in UTC, wherever F stands.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

BUCKETS = 64
HOUR = 3600
# 1970 began on one; Monday is 0.
THURSDAY = 3
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
        first = torch.zeros(len(times_L) + 1, dtype=torch.bool, device=times_L.device).index_fill(0, cu_seqlens, True)
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
        calendar: whether hour and weekday of asking are read with the wait.
        gap_decays: whether a mixer's state decays by the gap, in place of an embedding at the input.
    """

    scale: Tensor
    limits: Tensor

    def __init__(
        self,
        d_model: int,
        origin: int,
        resolution: int,
        longest: int,
        *,
        asks: bool,
        at_output: bool = False,
        calendar: bool = False,
        gap_decays: bool = False,
    ) -> None:
        super().__init__()
        self.asks, self.gap_decays = asks, gap_decays
        """Whether it must know when it is asked, and whether mixers want :meth:`elapsed`."""
        self.asks_at_input = asks and not at_output
        # Row 0 is of the first event of a history, which has no gap.
        self.gap = None if gap_decays else nn.Embedding(BUCKETS + 1, d_model)
        of_asking = []
        if asks:
            self.wait = nn.Embedding(BUCKETS, d_model)
            of_asking.append("wait")
        if asks and at_output:
            self.gate = nn.Embedding(BUCKETS, d_model)
        if asks and calendar:
            self.hour, self.weekday = nn.Embedding(24, d_model), nn.Embedding(7, d_model)
            of_asking += ["hour", "weekday"]
        # The names of the tables, because another one may take the place of each.
        self._at_input = (() if self.gap is None else ("gap",)) + (tuple(of_asking) if self.asks_at_input else ())
        self._at_output = () if self.asks_at_input else tuple(of_asking)
        # They are kept with the weights, because a model means its buckets by them wherever it runs.
        self.register_buffer("scale", torch.tensor([origin, resolution, longest]))
        self.register_buffer("limits", torch.tensor(LIMITS), persistent=False)

    def forward(self, clock: Clock) -> Tensor | int:
        """What the times add to the vectors of events: ``[..., d_model]``, or 0 where nothing is read at the input."""
        rows = self._rows(clock)
        if self.gap is None:
            next(rows)
        return sum(getattr(self, name)(row) for name, row in zip(self._at_input, rows))

    def elapsed(self, clock: Clock) -> Tensor:
        """The gap before each event ``[...]`` in units of the resolution, a whole number from 0 to the longest; 0 for
        the first event of a history.
        """
        return self._counts(clock)[1][0]

    def read_out(self, y: Tensor, clock: Clock) -> Tensor:
        """The vectors ``[..., d_model]`` that answer when they are asked at ``clock.after``."""
        return self.gated(y, list(self._rows(clock))[1:]) if self._at_output else y

    def gated(self, y: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """:meth:`read_out` of ``query_enters: output``, for the rows of waits, hours and weekdays ``[...]``."""
        return y * (1 + self.gate(rows[0])) + sum(getattr(self, name)(row) for name, row in zip(self._at_output, rows))

    def _rows(self, clock: Clock) -> Iterator[Tensor]:
        """The rows of gaps, waits, hours and weekdays, one after the other as they are needed."""
        units, counts = self._counts(clock)
        gap, wait = torch.bucketize(counts, self.limits, right=True)
        yield (gap + 1).masked_fill(clock.before == NEVER, 0)
        yield wait
        # Rounded down as the data are, because nothing else was trained.
        origin, unit, _ = self.scale
        moment = origin + units[1:].amax(0) * unit.clamp(min=1)
        yield moment // HOUR % 24
        yield (moment // (24 * HOUR) + THURSDAY) % 7

    def _counts(self, clock: Clock) -> tuple[Tensor, Tensor]:
        """The three times in units of the resolution since the origin ``[3, ...]``, and gap and wait in such units
        ``[2, ...]``.
        """
        origin, unit, longest = self.scale
        times = torch.stack([torch.where(clock.before == NEVER, clock.at, clock.before), clock.at, clock.after])
        # A damaged file may hold anything as the unit.
        units = (times - origin) // unit.clamp(min=1)
        # A time that runs backwards counts as none.
        return units, units.diff(dim=0).clamp(min=0).minimum(longest)

    def rows_of(self, before: int, at: int, after: int) -> tuple[int, int, int, int]:
        """The rows of one event, as many have them.

        In Python it takes a tenth of the time that dozens of operations on tensors of one number take.
        """
        origin, unit, longest = self.scale.tolist()
        unit = max(unit, 1)
        previous, own, next_one = ((time - origin) // unit for time in (at if before == NEVER else before, at, after))
        units = own - previous, next_one - own
        gap, wait = (bisect.bisect_right(LIMITS, min(max(count, 0), longest)) for count in units)
        moment = origin + max(own, next_one) * unit
        weekday = (moment // (24 * HOUR) + THURSDAY) % 7
        return (0 if before == NEVER else gap + 1), wait, moment // HOUR % 24, weekday

    def input_tables(self) -> list[Tensor]:
        """The weights whose rows add up to what the times add to an event, in the order of :meth:`rows_of`."""
        return [getattr(self, name).weight for name in self._at_input]

    def extra_repr(self) -> str:
        """What the buckets stand for; nothing before they have numbers."""
        if self.scale.is_meta:
            return ""
        _, resolution, longest = self.scale.tolist()
        gap = "gap in the step" if self.gap_decays else "gap"
        wait = ", wait at the input" if self.asks_at_input else ", wait at the output" if self.asks else ""
        return f"{gap}{wait}; resolution {resolution:,} s, longest gap {longest * resolution:,} s"
