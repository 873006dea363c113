"""Times as vectors: the buckets are those of the formula, and what cannot be is clamped."""

import math
from datetime import datetime, timezone

import pytest
import torch

from recbole_ssm.layers import Clock, TimeEncoding
from recbole_ssm.layers.time import BUCKETS, NEVER


def encoding(origin=0, resolution=1, longest=10**9, **ways):
    return TimeEncoding(4, origin, resolution, longest, **{"asks": True, "at_output": False, **ways})


def waits(layer, start, ends):
    """The buckets of the times from one moment to others."""
    at = torch.full_like(ends, int(start))
    _, found, *_ = layer._rows(Clock(torch.full_like(ends, NEVER), at, ends))
    return found.tolist()


def test_buckets_are_those_of_the_formula():
    gaps = torch.cat([torch.arange(3000), torch.tensor([86_400, 31_536_000, 2**31 - 1, 2**31, 2**40])])
    found = waits(encoding(longest=2**40), 0, gaps)
    # floor(2 log2(n + 1)) in whole numbers: the largest k with 2^k <= (n + 1)^2.
    expected = [min(((gap + 1) ** 2).bit_length() - 1, BUCKETS - 1) for gap in gaps.tolist()]
    assert found == expected
    assert expected[-5] == math.floor(2 * math.log2(86_401)) and expected[-1] == BUCKETS - 1


def test_times_are_counted_in_the_units_of_the_data():
    """A day begins where the data's days begin, so a moment within a day counts as that day."""
    layer = encoding(origin=18_000, resolution=86_400, longest=7)
    start = torch.tensor(18_000 + 86_400 * 5)
    moments = start + torch.tensor([0, 86_399, 86_400, 3 * 86_400, 7 * 86_400, 700 * 86_400, -86_400])
    assert waits(layer, start, moments) == [0, 0, 2, 4, 6, 6, 0]


def test_a_clock_knows_where_histories_begin_and_end():
    times, now = torch.tensor([5, 6, 9, 1]), torch.tensor([6, 9, 20, 2])
    packed = Clock.of_packed(times, now, torch.tensor([0, 0, 3, 4, 4]))
    assert packed.before.tolist() == [NEVER, 5, 6, NEVER]
    rows = Clock.of_rows(torch.tensor([[5, 6, 9], [1, 0, 0]]), torch.tensor([20, 2]), torch.tensor([3, 1]))
    assert rows.after.tolist() == [[6, 9, 20], [2, 0, 0]]
    for column, row in zip(packed, rows):
        assert torch.equal(column, torch.cat([row[0], row[1, :1]]))
    assert [column.tolist() for column in rows.newest(torch.tensor([3, 1]))] == [[6, NEVER], [9, 1], [20, 2]]
    assert Clock.of_packed(times[:0], now[:0], torch.tensor([0, 0])).before.shape == (0,)


@pytest.mark.parametrize("scale", [(0, 1, 10**7), (18_000, 86_400, 90), (4, 10, 3)])
def test_one_event_in_python_has_the_rows_of_many(scale):
    layer = encoding(*scale, calendar=True)
    generator = torch.Generator().manual_seed(0)
    times = 978_300_000 + torch.randint(0, 10**8, (500, 3), generator=generator)
    times = torch.cat([times, times.sort(1).values, times // 10**4 * 10**4, torch.tensor([[NEVER, 5, 90], [7, 7, 7]])])
    assert [layer.rows_of(*row) for row in times.tolist()] == list(
        zip(*(rows.tolist() for rows in layer._rows(Clock(*times.T))))
    )
    found = sum(table[row] for table, row in zip(layer.input_tables(), layer.rows_of(*times[7].tolist())))
    torch.testing.assert_close(found, layer(Clock(*times[7])))


@pytest.mark.parametrize("at_output", [False, True])
def test_the_calendar_is_that_of_the_moment_of_asking(at_output):
    """Rounded as the data are: a model of days, which all begin at five o'clock, never asks at another hour."""
    moment = datetime(2026, 11, 28, 21, 45, tzinfo=timezone.utc)
    *_, hour, weekday = encoding(calendar=True, at_output=at_output).rows_of(NEVER, 5, int(moment.timestamp()))
    assert (hour, weekday) == (21, moment.weekday())
    *_, hour, weekday = encoding(18_000, 86_400, 9).rows_of(NEVER, 5, int(moment.timestamp()) + 8 * 3600)
    assert (hour, weekday) == (5, (moment.weekday() + 1) % 7)
    layer, y = encoding(calendar=True, at_output=at_output), torch.ones(1, 4)
    # An hour later within one bucket of waits.
    early, late = (Clock(*torch.tensor([[NEVER], [0], [10**9 + later]])) for later in (0, 3600))
    assert torch.equal(layer(early), layer(late)) == at_output
    assert torch.equal(layer.read_out(y, early), layer.read_out(y, late)) != at_output


@pytest.mark.parametrize("ways", [{"asks": False}, {}, {"at_output": True}])
def test_the_moment_of_asking_enters_where_it_should(ways):
    layer = encoding(**ways)
    early, late = (Clock(*torch.tensor([[NEVER], [100], [now]])) for now in (101, 9999))
    y = torch.ones(1, 4)
    at_input = not torch.equal(layer(early), layer(late))
    at_output = not torch.equal(layer.read_out(y, early), layer.read_out(y, late))
    assert (at_input, at_output) == (ways == {}, "at_output" in ways)


def test_a_damaged_scale_is_no_crash():
    layer = encoding()
    layer.scale.zero_()
    assert torch.isfinite(layer(Clock(*torch.tensor([[NEVER, 3], [3, 8], [8, 9]])))).all()
