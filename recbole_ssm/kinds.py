"""What a config key may hold: kinds of values that take, convert or refuse them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from recbole_ssm.errors import did_you_mean, shown

LARGEST = 2**31 - 1
"""The largest whole number for a key that names no bound of its own."""


class KindError(ValueError):
    """A value is not accepted; the text goes on from ``key: ``.

    Within a mapping the entry's name is put before it, unless ``named`` says that the text has one.
    """

    def __init__(self, text: str, named: bool = False) -> None:
        super().__init__(text)
        self.named = named


class Kind:
    """What a value may be; ``str`` of it describes that after "must be"."""

    def take(self, value: Any) -> Any:
        """The value as the configuration keeps it; lists come out of tuples.

        Raises:
            KindError: it is not accepted.
        """
        raise NotImplementedError

    def refuse(self, value: Any) -> KindError:
        """The error of a value of another type."""
        return KindError(f"must be {self}, got {shown(value)}")


class Flag(Kind):
    """True or False."""

    def __str__(self) -> str:
        return "True or False"

    def take(self, value: Any) -> Any:
        """See :meth:`Kind.take`."""
        if not isinstance(value, bool):
            raise self.refuse(value)
        return value


_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|-?inf"
_INTERVAL = re.compile(rf"\s*([\[(])\s*({_NUMBER})\s*,\s*({_NUMBER})\s*([\])])\s*", re.IGNORECASE)


class Range(NamedTuple):
    """An interval of numbers."""

    low: float
    high: float
    has_low: bool
    """Whether ``low`` belongs to it."""
    has_high: bool

    @classmethod
    def read(cls, text: str) -> Range | None:
        """``"[0, 1)"`` as a range; None where the text is no interval."""
        found = _INTERVAL.fullmatch(text)
        if found is None or float(found[2]) > float(found[3]):
            return None
        return cls(float(found[2]), float(found[3]), found[1] == "[", found[4] == "]")

    def __contains__(self, number: object) -> bool:
        assert isinstance(number, (int, float))
        above = number > self.low or (self.has_low and number == self.low)
        return above and (number < self.high or (self.has_high and number == self.high))

    def __str__(self) -> str:
        low, high = ("-inf" if end == -math.inf else f"{end:.12g}" for end in (self.low, self.high))
        return f"{'[' if self.has_low else '('}{low}, {high}{']' if self.has_high else ')'}"


@dataclass(frozen=True)
class Number(Kind):
    """A finite number within a range; a whole one if ``whole``."""

    within: str = "(-inf, inf)"
    whole: bool = False
    most: float = math.inf
    """What is larger is taken for a mistake, such as a number in the place of another."""

    @cached_property
    def range(self) -> Range:
        """The range of ``within``."""
        found = Range.read(self.within)
        assert found is not None, self.within
        return found

    @property
    def bound(self) -> str:
        """The range in words, after "must"."""
        low, high, closed, _ = self.range
        if high < math.inf:
            return f"lie in {self.range}"
        if low == -math.inf:
            return "be finite"
        return "be 0 or more" if closed and low == 0 else f"be {'at least' if closed else 'above'} {low:.12g}"

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return kind if self.range.low == -math.inf else f"{kind} in {self.range}"

    def take(self, value: Any) -> Any:
        """See :meth:`Kind.take`."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            raise KindError(f"must be {'a whole number' if self.whole else 'a number'}, got {shown(value)}")
        if value not in self.range:
            finite = " and finite" if value == math.inf and "finite" not in self.bound else ""
            raise KindError(f"must {self.bound}{finite}, got {shown(value)}")
        if value > min(self.most, LARGEST) and isinstance(value, int) and self.range.high == math.inf:
            raise KindError(f"must be at most {min(self.most, LARGEST)}, got {shown(value)}")
        return value


@dataclass(frozen=True)
class Text(Kind):
    """Text that is not empty and fits a pattern."""

    says: str = "text"
    pattern: str = r"(?s).+"

    def __str__(self) -> str:
        return self.says

    def take(self, value: Any) -> Any:
        """See :meth:`Kind.take`."""
        if not isinstance(value, str) or not re.fullmatch(self.pattern, value) or "\0" in value:
            raise self.refuse(value)
        return value


class Choice(Kind):
    """One of some values."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.values))}" if len(self.values) > 1 else repr(self.values[0])

    def take(self, value: Any) -> Any:
        """See :meth:`Kind.take`."""
        # True == 1, and neither may stand for the other.
        if not any(type(value) is type(known) and value == known for known in self.values):
            hint = did_you_mean(value, map(str, self.values)) if isinstance(value, str) else ""
            raise KindError(f"{shown(value)} is not {self}{hint}")
        return value


@dataclass(frozen=True)
class Only(Kind):
    """One value alone; ``says`` gives the reason."""

    value: Any
    says: str

    def __str__(self) -> str:
        return self.says

    def take(self, value: Any) -> Any:
        """See :meth:`Kind.take`."""
        if type(value) is not type(self.value) or value != self.value:
            raise self.refuse(value)
        return value


class Either(Kind):
    """What any of several kinds accepts."""

    def __init__(self, *kinds: Kind) -> None:
        self.kinds = kinds

    def __str__(self) -> str:
        return " or ".join(dict.fromkeys(map(str, self.kinds)))

    def take(self, value: Any) -> Any:
        """See :meth:`Kind.take`."""
        for kind in self.kinds:
            try:
                return kind.take(value)
            except KindError:
                continue
        raise self.refuse(value)


@dataclass(frozen=True)
class Many(Kind):
    """A list of values of one kind, or a text of them with commas between; with ``or_one``, a single value may stand
    without its list.
    """

    of: Kind
    or_one: bool = False
    length: int | None = None
    """How many there are; None: at least ``least``."""
    least: int = 0

    def __str__(self) -> str:
        if self.or_one:
            return f"{self.of} or a list of such"
        count = f" of {self.length}" if self.length else ""
        return f"a list{count} in which each entry is {self.of}"

    def take(self, value: Any) -> Any:
        """See :meth:`Kind.take`."""
        if isinstance(value, str) and "," in value and isinstance(self.of, Text):
            value = [part.strip() for part in value.split(",")]
        if not isinstance(value, (list, tuple)):
            try:
                if self.or_one:
                    return self.of.take(value)
            except KindError:
                pass
            raise self.refuse(value)
        if len(value) != self.length if self.length else len(value) < self.least:
            raise self.refuse(value)
        return [self.of.take(entry) for entry in value]


@dataclass(frozen=True)
class Table(Kind):
    """A mapping from text, such as the names of columns, to values of one kind."""

    of: Kind
    example: str
    length: int | None = None
    needs: str = ""
    """The entry that must be there."""

    def __str__(self) -> str:
        return f"a mapping such as {self.example}"

    def take(self, value: Any) -> Any:
        """See :meth:`Kind.take`."""
        names = isinstance(value, Mapping) and all(isinstance(name, str) and name for name in value)
        if not names or (self.length is not None and len(value) != self.length):
            raise self.refuse(value)
        if self.needs and self.needs not in value:
            raise KindError(f"needs the entry '{self.needs}', got {shown(value)}", named=True)
        return {name: _inside(name, self.of, entry) for name, entry in value.items()}


@dataclass(frozen=True)
class Fields(Kind):
    """A mapping whose entries have names of their own; any other is kept as it is if it is ``open`` to them."""

    known: Mapping[str, Kind]
    example: str = ""
    needs: tuple[str, ...] = ()
    """Entries that must be there."""
    open: bool = False

    def __str__(self) -> str:
        return f"a mapping such as {self.example or '{' + repr(next(iter(self.known))) + ': ...}'}"

    def take(self, value: Any) -> Any:
        """See :meth:`Kind.take`."""
        if not isinstance(value, Mapping):
            raise self.refuse(value)
        for name in value:
            if not isinstance(name, str) or (name not in self.known and not self.open):
                hint = did_you_mean(str(name), self.known) if isinstance(name, str) else ""
                raise KindError(f"there is no such entry {shown(name)}{hint or '; known are ' + ', '.join(self.known)}")
        for name in self.needs:
            if name not in value:
                raise KindError(f"needs the entry '{name}', got {shown(value)}", named=True)
        return {name: _inside(name, self.known[name], v) if name in self.known else v for name, v in value.items()}


def _inside(name: str, kind: Kind, value: Any) -> Any:
    try:
        return kind.take(value)
    except KindError as error:
        raise KindError(str(error) if error.named else f"{name} {error}", named=True) from None


@dataclass(frozen=True)
class Filter(Kind):
    """Intervals as RecBole filters by them, ``"[5,inf)"`` or several with semicolons between them."""

    or_tokens: bool = False
    """Whether a list of tokens is accepted too."""

    def __str__(self) -> str:
        return f"an interval such as '[5,inf)'{' or a list of tokens' if self.or_tokens else ''}"

    def take(self, value: Any) -> Any:
        """See :meth:`Kind.take`; the command line's ``(5,10)`` is a tuple, and becomes text again."""
        if self.or_tokens and isinstance(value, list):
            return [Text("a token").take(entry) for entry in value]
        text = str(value) if isinstance(value, (tuple, list)) else value
        if not isinstance(text, str):
            raise self.refuse(value)
        for part in text.split(";"):
            if Range.read(part) is None:
                read = "intervals read [3,inf) or (0,1];[3,4)"
                tokens = ", and a list is of tokens" if self.or_tokens else ""
                raise KindError(f"{shown(part)} is no interval, in {shown(value)}; {read}{tokens}")
        return text if isinstance(value, tuple) else value


class Split(Kind):
    """``eval_args.split``: the name of one way to split, and what it needs."""

    leave_one_out = ("valid_and_test", "valid_only", "test_only")
    known = ("RS", "LS", "TS", "GTS")

    def __str__(self) -> str:
        return "one entry such as {'LS': 'valid_and_test'}"

    def take(self, value: Any) -> Any:
        """See :meth:`Kind.take`."""
        if not isinstance(value, Mapping) or len(value) != 1:
            raise self.refuse(value)
        (name, how) = next(iter(value.items()))
        if name not in self.known:
            raise KindError(f"there is no split {shown(name)}; known are {', '.join(self.known)}", named=True)
        if name == "LS":
            if how not in self.leave_one_out:
                raise KindError(f"LS must be one of {', '.join(self.leave_one_out)}, got {shown(how)}", named=True)
            return {name: how}
        if name == "GTS":
            # recbole_ssm.data.temporal says what that may be.
            return {name: how}
        try:
            shares: list[float] = Many(Number("[0, inf)"), length=3).take(how)
        except KindError:
            shares = [0.0]
        if not shares[0] > 0:
            text = f"{name} takes three shares, the first above 0, got {shown(how)}"
            raise KindError(f"{text}; try split: {{'{name}': [0.8, 0.1, 0.1]}}", named=True)
        return {name: shares}


class Anything(Kind):
    """Any value that JSON can hold."""

    def __str__(self) -> str:
        return "any value"

    def take(self, value: Any) -> Any:
        """See :meth:`Kind.take`."""
        if not isinstance(value, (bool, int, float, str, list, tuple, Mapping, type(None))):
            raise KindError(f"must be a number, text, True, False, a list or a mapping, got {shown(value)}")
        return value


def whole_number(within: str = "[1, inf)", most: float = math.inf) -> Number:
    """Whole numbers of an interval."""
    return Number(within, whole=True, most=most)


NAME_PATTERN = r"[^\0\n]{1,200}"
FLAG, NAME, COLUMN = Flag(), Text("a name", NAME_PATTERN), Text("the name of a column", NAME_PATTERN)
AT_LEAST_1, LAYERS = whole_number(), whole_number(most=1000)
NOT_NEGATIVE, POSITIVE, PART = Number("[0, inf)"), Number("(0, inf)"), Number("[0, 1)")
COLUMNS = Many(COLUMN)
OPTIONS = Fields({}, "{'name': value}", open=True)
NONE = Choice(None)
