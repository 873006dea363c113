"""The times of a source exactly as it spells them: numbers, or dates of ISO 8601, down to the nanosecond."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timezone
from decimal import ROUND_FLOOR, Decimal, InvalidOperation
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recbole_ssm.data.atomic import Values, whole_numbers
from recbole_ssm.errors import UserError, excerpt, shown

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
# Digits of a fraction that are kept.
DIGITS = 9
# Seconds since 1970 above which a number is taken for another unit.
LATEST = 10**11
# How dates are often written that are not of ISO 8601. They serve advice, never reading: 01/02/2025 fits two of them.
FORMS = [
    f"{date}{time}"
    for date in (
        "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%Y/%m/%d", "%Y-%m-%d", "%d-%m-%Y", "%m-%d-%Y", "%d.%m.%y", "%d/%m/%y",
        "%m/%d/%y", "%d %b %Y", "%d %B %Y", "%b %d, %Y", "%B %d, %Y", "%d-%b-%Y",
    )
    for time in (
        "", " %H:%M:%S", " %H:%M", " %I:%M:%S %p", " %I:%M %p", " %I:%M%p", ", %H:%M:%S", ", %I:%M:%S %p",
        " %H:%M:%S %z",
    )
]  # fmt: skip
# Those of mails, of web servers' logs, of Twitter and of C.
FORMS += [
    "%a, %d %b %Y %H:%M:%S %z", "%a, %d %b %Y %H:%M:%S GMT", "%d/%b/%Y:%H:%M:%S %z", "%a %b %d %H:%M:%S %z %Y",
    "%a %b %d %H:%M:%S %Y",
]  # fmt: skip
EXAMPLES = "%d.%m.%Y %H:%M:%S or %m/%d/%Y %I:%M %p"
# Cells of a column that tell how its dates are written.
SAMPLE = 1000
# Dates of 1900 to 2099 in digits alone: to the day, as 20230127, or to the hour, the minute or the second.
DIGITS_ALONE = (
    "(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])"
    "(?:(?:[01][0-9]|2[0-3])(?:[0-5][0-9](?:[0-5][0-9])?)?)?"
)


class Moments(Values):
    """Collects a column of times, which are all numbers or all dates; dates become seconds since 1970.

    A date is in UTC unless it says otherwise. Among dates, 20200102 is one too.

    Args:
        form: how dates are written, as of :meth:`datetime.datetime.strptime`; "" knows those of ISO 8601.

    Attributes:
        digits: of the fraction of the times; :meth:`finish` counts in units of ``10 ** -digits``.
    """

    def __init__(self, form: str = "") -> None:
        super().__init__()
        self._form = form
        self._kind = ""
        # Whether all cells so far are numbers that may be dates, as 20230127 is.
        self._perhaps_dates = True
        self.digits = 0

    def parse(self, cells: pa.StringArray, required: bool) -> dict[int, str]:
        """Parse the cells of a block; the faults by row."""
        if self._form:
            return self._parse_dates_of_form(cells)
        if self._kind != "dates":
            try:
                self._parsed = _numbers(cells)
                self._kind = "numbers"
                if self._perhaps_dates:
                    dates = pc.match_substring_regex(cells, f"^{DIGITS_ALONE}$")
                    # Of no cells this is true.
                    self._perhaps_dates = pc.all(dates, min_count=0).as_py()
                return {}
            except pa.ArrowInvalid:
                # A date, a number in another form than Arrow's, or neither.
                pass
        spelt = [cell.strip() for cell in cells.to_pylist()]
        read = {"numbers": [_number(cell) for cell in spelt], "dates": [date_of(cell) for cell in spelt]}
        if not self._kind:
            # What most of the first cells are that are only one of the two.
            only_dates = [date is not None and number is None for number, date in zip(*read.values())]
            only_numbers = [number is not None and date is None for number, date in zip(*read.values())]
            self._kind = "dates" if sum(only_dates) > sum(only_numbers) else "numbers"
        others = read["numbers" if self._kind == "dates" else "dates"]
        numbers = [cell for cell, number in zip(spelt, read["numbers"]) if number is not None]
        self._perhaps_dates &= all(re.fullmatch(DIGITS_ALONE, cell) for cell in numbers)
        unread = sum(cell != "" and (number, date) == (None, None) for cell, number, date in zip(spelt, *read.values()))
        self._parsed = np.zeros((len(cells), 2), dtype=np.int64)
        faults = {}
        for row, (cell, time, other) in enumerate(zip(spelt, read[self._kind], others)):
            if time is not None:
                self._parsed[row] = time
            elif not cell:
                faults[row] = "is empty; fill it in or drop the line"
            elif other is not None:
                faults[row] = f"is {excerpt(cell)} in a column of {self._kind}; correct it or drop the line"
            else:
                # The first fault stops the command, or its like are many.
                forms = "" if faults else forms_of(cell, spelt)
                forms = f"here perhaps {forms}" if forms else f"such as {EXAMPLES}" if 2 * unread > len(spelt) else ""
                advice = f"give --time_format, {forms}," if forms else "correct it"
                faults[row] = (
                    f"is {excerpt(cell)}, which is no finite number and no date of ISO 8601; {advice} or drop the line"
                )
        return faults

    def _parse_dates_of_form(self, cells: pa.StringArray) -> dict[int, str]:
        # Many events have one date.
        distinct = cells.dictionary_encode()
        read = [_date_of_form(cell, self._form) for cell in distinct.dictionary.to_pylist()]
        codes = distinct.indices.to_numpy()
        self._parsed = np.array([time or (0, 0) for time in read], dtype=np.int64).reshape(-1, 2)[codes]
        wrong = np.flatnonzero(np.array([time is None for time in read], dtype=bool)[codes])
        faults: dict[int, str] = {}
        for row in wrong.tolist():
            cell = cells[row].as_py()
            forms = "" if faults else forms_of(cell, distinct.dictionary.to_pylist(), self._form)
            perhaps = f" (here perhaps {forms})" if forms else ""
            faults[row] = (
                f"is {excerpt(cell)}, which is not written as --time_format={self._form}; correct the form{perhaps} or "
                "the line, or drop the line"
            )
        return faults

    def finish(self) -> np.ndarray:
        """[rows] int64: the whole column, in units of ``10 ** -digits``.

        Raises:
            ValueError: the times do not fit into 64 bits with their fractions, or may be seconds and may be dates.
        """
        whole, nanoseconds = super().finish().T
        if len(whole) and self._kind == "numbers" and self._perhaps_dates:
            form = "%Y%m%d%H%M%S"[: len(str(whole[0])) - 2]
            raise ValueError(
                f"holds numbers such as {whole[0]}, which may be dates: give --time_format={form}, or write seconds "
                f"as {whole[0]}.0"
            )
        while self.digits < DIGITS and np.any(nanoseconds % 10 ** (DIGITS - self.digits)):
            self.digits += 1
        unit = 10**self.digits
        if whole.max() >= 2**63 // unit or whole.min() <= -(2**63 // unit):
            raise ValueError("holds fractions beside numbers too large for them; write whole numbers")
        return whole * unit + nanoseconds // 10 ** (DIGITS - self.digits)


def is_time(cell: str) -> bool:
    """Whether a cell spells a number or a date."""
    return _number(cell.strip()) is not None or date_of(cell.strip()) is not None


def date_of(cell: str) -> tuple[int, int] | None:
    """Seconds since 1970 of a date of ISO 8601, and the nanoseconds above them; None for anything else.

    ``UTC`` or ``GMT`` behind a blank is as good as ``Z``; databases write it so.
    """
    compact = re.fullmatch(r"(\d{4})(\d{2})(\d{2})", cell)
    text = "-".join(compact.groups()) if compact else re.sub("Z$| (UTC|GMT)$", "+00:00", cell)
    fraction = ""
    # Python from 3.11 on takes any row of digits for a date with its time.
    if text.isdigit():
        return None
    if split := re.fullmatch(r"(.+:\d{2})[.,](\d+)(.*)", text):
        text, fraction = split[1] + split[3], split[2][:DIGITS]
    try:
        seconds, _ = _since_1970(datetime.fromisoformat(text))
    except (ValueError, OverflowError):
        return None
    return seconds, int(fraction.ljust(DIGITS, "0"))


def second_of(name: str, moment: Any) -> int:
    """The whole second since 1970 of what a caller gives for a time; fractions are rounded down, as data sets' are.

    Args:
        name: of the argument, for the error.
        moment: seconds since 1970, a datetime (in UTC unless it says otherwise), or a date of ISO 8601 as text.

    Raises:
        UserError: it is none of these, or so large that it must count milliseconds.
    """
    if isinstance(moment, np.datetime64):
        moment = moment.astype("datetime64[s]").item()
    found = None
    if isinstance(moment, datetime):
        found = _since_1970(moment)
    elif isinstance(moment, str):
        found = date_of(moment.strip()) or _number(moment.strip())
    elif isinstance(moment, (int, float, np.number)) and not isinstance(moment, bool):
        found = _number(str(moment))
    if found is None:
        raise UserError(
            f"{name}: must be seconds since 1970, a datetime, or a date such as 2001-02-03T04:05, got {shown(moment)}"
        )
    if abs(found[0]) >= LATEST:
        raise UserError(f"{name}: {beyond(moment)}")
    return found[0]


def beyond(moment: Any) -> str:
    """The fault of a time that is not below :data:`LATEST`."""
    return f"must be seconds since 1970, got {shown(moment)}, which is beyond the year 5000"


def check_form(key: str, form: str, cells: Sequence[str] = ()) -> None:
    """Make sure that dates can be read by a form of :meth:`datetime.datetime.strptime`, and nothing of them is lost.

    Args:
        key: the name of the option.
        form: its value.
        cells: some of the dates, which tell what form would do.

    Raises:
        UserError: it has a directive that is none, says no day, or has Python read over AM and PM or a zone's name.
    """
    advice = f"try {forms_of(cells[0], cells) if cells else ''}".strip()
    advice = advice if advice != "try" else f"try {EXAMPLES}"
    said = set(re.findall("%(.)", form.replace("%%", "")))
    if "p" in said and said & set("HcX"):
        raise UserError(f"{key}: {excerpt(form)} has %p, which Python reads over beside %H; use %I with %p")
    if "I" in said and "p" not in said:
        raise UserError(f"{key}: {excerpt(form)} has %I without %p, so 1 and 13 o'clock are one; use %I with %p, or %H")
    if "Z" in said:
        raise UserError(
            f"{key}: {excerpt(form)} has %Z, which Python reads over; write UTC or GMT in its place, or %z for +0100"
        )
    day = datetime(2013, 2, 11, tzinfo=timezone.utc)
    try:
        read = datetime.strptime(day.strftime(form), form)
    except ValueError as error:
        raise UserError(f"{key}: {excerpt(form)} is no form of dates ({error}); {advice}") from error
    if read.date() != day.date():
        raise UserError(f"{key}: {excerpt(form)} does not say year, month and day; {advice}")


def forms_of(cell: str, cells: Sequence[str], given: str = "") -> str:
    """The usual forms by which a date is written, for a message: "" if there is none, and of several all.

    Args:
        cell: the date.
        cells: the column, whose first cells decide between forms that all fit: those that fit most of them stay.
        given: a form that was tried; none that fits fewer cells than it does is named.
    """
    forms = [form for form in FORMS if _date_of_form(cell, form)]
    if not forms:
        return ""
    sample = [cell, *cells[:SAMPLE]]
    fitting = {form: sum(_date_of_form(other, form) is not None for other in sample) for form in forms}
    most = max(fitting.values())
    if given and most <= sum(_date_of_form(other, given) is not None for other in sample):
        return ""
    named = [f"'{form}'" for form in forms if fitting[form] == most]
    return " or ".join(named) + (", whichever is meant" if len(named) > 1 else "")


def _date_of_form(cell: str, form: str) -> tuple[int, int] | None:
    try:
        date = datetime.strptime(cell.strip(), form)
        return _since_1970(date)
    except (ValueError, OverflowError):
        return None


def _since_1970(date: datetime) -> tuple[int, int]:
    """Whole seconds since 1970, and the nanoseconds above them; a date without a zone is in UTC."""
    since = (date if date.tzinfo else date.replace(tzinfo=timezone.utc)) - EPOCH
    return since.days * 86_400 + since.seconds, since.microseconds * 1000


def decimals(ticks: np.ndarray, digits: int) -> pa.StringArray:
    """Whole numbers of units of ``10 ** -digits`` as decimals, without zeros at their end."""
    text = pa.array(np.abs(ticks)).cast(pa.string())
    if digits:
        padded = pc.utf8_lpad(text, digits + 1, "0")
        whole, fraction = pc.utf8_slice_codeunits(padded, 0, -digits), pc.utf8_slice_codeunits(padded, -digits)
        text = pc.replace_substring_regex(pc.binary_join_element_wise(whole, fraction, "."), r"\.?0+$", "")
    return pc.binary_join_element_wise(pa.array(np.where(ticks < 0, "-", "")), text, "")


# Arrow's decimals of 128 bits overflow without a word where a cell has hundreds of digits.
LONGEST = 40


def _numbers(cells: pa.StringArray) -> np.ndarray:
    """[rows, 2] whole numbers and the nanoseconds above them.

    Raises:
        pyarrow.ArrowInvalid: a cell is no decimal number, or too large, or has more digits.
    """
    try:
        whole = whole_numbers(cells)
        nanoseconds = np.zeros(len(cells), dtype=np.int64)
    except pa.ArrowInvalid:
        if (pc.max(pc.utf8_length(cells)).as_py() or 0) > LONGEST:
            raise
        exact = cells.cast(pa.decimal128(30, DIGITS))
        floor = pc.floor(exact)
        whole = floor.cast(pa.int64())
        # The low 64 of the 128 bits hold a number below 10 ** 9.
        nanoseconds = np.frombuffer(pc.subtract(exact, floor).buffers()[1], np.int64)[0 : 2 * len(cells) : 2]
    return np.stack([whole.to_numpy(), nanoseconds], axis=1)


def _number(cell: str) -> tuple[int, int] | None:
    try:
        # Decimal would read 1_0 as 10.
        exact = Decimal("nan" if "_" in cell else cell)
    except InvalidOperation:
        return None
    if not exact.is_finite() or exact.copy_abs() >= 2**63:
        return None
    whole = exact.to_integral_value(ROUND_FLOOR)
    return int(whole), int((exact - whole) * 10**DIGITS)
