"""The rows of a model's keys as its YAML files declare them in comments; :mod:`recbole_ssm.keys` shows the form."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from recbole_ssm.keys import KEYS, Key
from recbole_ssm.kinds import FLAG, OPTIONS, Choice, Either, Kind, KindError, Many, Number, Range, Text

_LINE = re.compile(r"^(\w+):.*?\s#\s*\(([^)]*)\)\s*(.*)$", re.MULTILINE)
_RANGE = re.compile(r"\s*Range in `*([\[(].*[\])])`*\.?\s*$")


def rows(defaults: Mapping[str, Any], *texts: str) -> dict[str, Key]:
    """The rows of a model's keys: the table's, and what the comments of its YAML files say.

    Args:
        defaults: each key's default.
        texts: the model's YAML files; a later one wins.
    """
    said = {name: (kind, about) for text in texts for name, kind, about in _LINE.findall(text)}
    found = {name: key for name, key in KEYS.items() if key.scope != "model"}
    for name, default in defaults.items():
        if name in found:
            continue
        kind, about = said.get(name, ("", ""))
        about, limits = _RANGE.sub("", about), _RANGE.search(about)
        key = KEYS.get(name)
        if key is None or limits:
            accepted = _kind_of(name, kind, about, limits[1] if limits else "", default)
            key = replace(key, kind=accepted) if key else Key(accepted, "model", empty=default in (None, "None"))
        found[name] = replace(key, about=about)
    return found


def _kind_of(name: str, kind: str, about: str, limits: str, default: Any) -> Kind:
    """What a line of YAML says: its type, its range or choices, and else the size of its default."""
    parts = limits.split(" or ") if limits else []
    within = next((part for part in parts if Range.read(part) and kind.startswith(("int", "float", "list"))), "")
    choices = [choice for part in parts if part != within for choice in _choices(part)]
    # An empty default has no type, and a comment may be missing.
    own_type = "" if default is None else type(default).__name__
    kinds: list[Kind] = [Choice(*choices)] if choices else []
    for word in (kind or own_type or "str").split(" or "):
        if not choices or word in ("int", "float"):
            kinds.append(_single_kind(name, word, about, within, default))
    accepted = kinds[0] if len(kinds) == 1 else Either(*kinds)
    try:
        accepted.take(default)
    except KindError:
        if default not in (None, "", "None"):
            # RecBole's own files have some types that are not those of their defaults.
            return Either(accepted, _single_kind(name, own_type, "0", "", default))
    return accepted


def _single_kind(name: str, word: str, about: str, within: str, default: Any) -> Kind:
    if word.startswith("list"):
        of = word.removeprefix("list").removeprefix(" of ").strip()
        if not of:
            return Many(Either(Number(within or "(-inf, inf)"), Text()))
        first = default[0] if isinstance(default, list) and default else None
        length = len(default) if of == "float" and isinstance(default, list) else None
        return Many(_single_kind(name, of, about, within, first), length=length, least=1)
    if word in ("int", "float"):
        small = default if isinstance(default, (int, float)) else -1
        if not within and "dropout" in name:
            within = "[0, 1)"
        if not within and small >= 0:
            positive = word == "int" and small > 0 and not re.search(r"\b0\b", about)
            within = "[1, inf)" if positive else "[0, inf)"
        most = math.inf if within == "" or word != "int" else max(1000, 1000 * small)
        return Number(within or "(-inf, inf)", whole=word == "int", most=most)
    if word == "dict":
        return OPTIONS
    return FLAG if word == "bool" else Text()


def _choices(text: str) -> list[Any]:
    """``['BPR', 'CE']`` or, as some of RecBole's files have it, ``[BPR, CE]``."""
    try:
        return list(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return [choice.strip(" '\"") for choice in text.strip("[]()").split(",")]
