"""The reference of the config keys: what ``recbole-ssm keys`` prints, and docs/keys.md."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from recbole_ssm.arguments import PROPERTIES, read_yaml
from recbole_ssm.declared import rows
from recbole_ssm.errors import UserError, did_you_mean
from recbole_ssm.keys import KEYS, SCOPES, Key, row
from recbole_ssm.synonyms import ALIASES

EFFECTS = {
    "result": "changes results; a resumed run must keep it",
    "free": "changes results; a resumed run may change it",
    "none": "changes no result; a resumed run may change it",
}
HEAD = """# Config keys

Written by `recbole-ssm keys --markdown`, from the table in `recbole_ssm/keys.py` and the comments of `properties/`.
`recbole-ssm keys KEY` prints one of them.

A key is given on the command line (`--epochs=5`), in a YAML file (`epochs: 5`) or in `config_dict`. Every value is
checked before anything runs. *Free* keys may be changed when a run is resumed; *idle* ones change no result either.
"""


class Entry(NamedTuple):
    """A key as one model has it, or every model."""

    key: Key
    default: Any
    model: str = ""
    """Empty: the key is every model's."""


def print_keys(arguments: list[str]) -> None:
    """Print all keys, or one: keys [KEY | --markdown]."""
    if len(arguments) > 1:
        raise UserError(f"keys: takes one key or --markdown, got {' '.join(arguments)}")
    if not arguments:
        print(overview(), end="")
    elif arguments == ["--markdown"]:
        print(page(), end="")
    else:
        print(describe(arguments[0].removeprefix("--")), end="")


def overview() -> str:
    """Every key with what it accepts, by scope; then the models' own."""
    found = []
    for scope, names in _by_scope().items():
        found.append(f"{scope}: {SCOPES[scope]}")
        found += [f"  {name:30}{key}" for name, key in names.items()]
    for model in _models():
        own = [name for name, entry in _model_entries(model).items() if entry.key.scope == "model"]
        if own:
            found.append(f"{model}\n  {' '.join(own)}")
    return "\n".join(found) + "\n"


def describe(name: str) -> str:
    """One key: what it accepts, its default, and what may be done with it.

    Raises:
        UserError: there is no such key.
    """
    entries = list(_entries(ALIASES.get(name, name)))
    if not entries:
        known = {*KEYS, *(key for model in _models() for key in _model_entries(model))}
        raise UserError(f"keys: there is no key '{name}'{did_you_mean(name, known)}")
    lines = [f"{name}: its name is {ALIASES[name]} now"] if name in ALIASES else []
    for key, default, model in entries:
        lines.append(f"{ALIASES.get(name, name)}{f' of {model}' if model else ''}: {key.about}".rstrip(": "))
        lines.append(f"  accepts   {f'nothing: {key.refused}' if key.refused else key}")
        if not key.refused:
            lines.append(f"  default   {default!r}")
    lines.append(f"  scope     {key.scope}: {SCOPES[key.scope]}")
    lines.append(f"  effect    {EFFECTS[key.effect]}")
    if key.tune is not None:
        lines.append(f"  tuned in  {_search(key)}")
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/keys.md."""
    found = [HEAD]
    defaults = _general_defaults()
    for scope, names in _by_scope().items():
        found.append(f"## {scope.capitalize()}: {SCOPES[scope]}\n")
        found += ["| key | accepts | default | |", "|---|---|---|---|"]
        found += [_table_line(name, Entry(key, defaults.get(name))) for name, key in names.items()]
        found.append("")
    for model in _models(ours=True):
        found.append(f"## {model}\n")
        found += ["| key | accepts | default | |", "|---|---|---|---|"]
        found += [_table_line(name, entry) for name, entry in _model_entries(model).items()]
        found.append("")
    refused = ", ".join(f"`{name}` ({key.refused})" for name, key in KEYS.items() if key.refused)
    found.append(f"## Refused\n\nRecBole has these, and here they may only be empty: {refused}.\n")
    old = ", ".join(f"`{name}` is `{new}` now" for name, new in ALIASES.items())
    found.append(f"## Renamed\n\nOld names still count: {old}.\n")
    return "\n".join(found)


def _by_scope() -> dict[Any, dict[str, Key]]:
    general = {name: key for name, key in KEYS.items() if key.scope != "model" and not key.refused}
    return {
        scope: {name: key for name, key in general.items() if key.scope == scope}
        for scope in SCOPES
        if scope != "model"
    }


def _table_line(name: str, entry: Entry) -> str:
    key = entry.key
    notes = {"free": " *Free.*", "none": " *Idle.*"}.get(key.effect, "")
    tune = f" Tuned in {_search(key)}." if key.tune is not None else ""
    cells = [f"`{name}`", str(key), f"`{entry.default!r}`", f"{key.about}{tune}{notes}"]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _search(key: Key) -> str:
    if isinstance(key.tune, tuple) and hasattr(key.tune, "log"):
        low, high, log = key.tune
        return f"[{low:g}, {high:g}]{' by orders of magnitude' if log else ''}"
    return ", ".join(map(str, key.tune or ()))


def _entries(name: str) -> Iterator[Entry]:
    """A key as every model has it, or as each model that has it."""
    general = row(name)
    if general is not None and general.scope != "model":
        yield Entry(general, _general_defaults().get(name))
        return
    for model in _models():
        entry = _model_entries(model).get(name)
        if entry is not None:
            yield entry


def _recbole() -> Path:
    """RecBole's folder, without an import of it."""
    found = importlib.util.find_spec("recbole")
    if found is None or not found.submodule_search_locations:
        raise UserError("keys: RecBole is not installed; recbole-ssm doctor prints the line that installs it")
    return Path(found.submodule_search_locations[0])


def _general_defaults() -> dict[str, Any]:
    theirs = _recbole() / "properties"
    files = (theirs / "overall.yaml", theirs / "dataset" / "sample.yaml", PROPERTIES / "overall.yaml")
    found: dict[str, Any] = {"repeatable": True}
    for file in files:
        found |= {name: value for name, value in read_yaml(file).items() if name not in found or file is files[2]}
    return found


def _models(ours: bool = False) -> list[str]:
    """Our models, and unless ``ours`` RecBole's sequential ones."""
    own = sorted(path.stem for path in (PROPERTIES / "model").glob("*.yaml"))
    files = (path.stem.lower() for path in (_recbole() / "model" / "sequential_recommender").glob("*.py"))
    sequential = set(files) - {"__init__", "s3rec"}
    theirs = (path.stem for path in (_recbole() / "properties" / "model").glob("*.yaml"))
    return own if ours else own + sorted(name for name in theirs if name.lower() in sequential and name not in own)


def _model_entries(model: str) -> dict[str, Entry]:
    """The keys that stand in a model's YAML files."""
    texts: list[str] = []
    defaults: dict[str, Any] = {}
    for folder in (_recbole() / "properties", PROPERTIES):
        file = folder / "model" / f"{model}.yaml"
        if file.is_file():
            texts.append(file.read_text(encoding="utf-8"))
            defaults |= read_yaml(file)
    known = rows(defaults, *texts)
    return {name: Entry(known[name], default, model) for name, default in defaults.items()}
