"""Parameter groups by the names of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from recbole_ssm.errors import UserError, did_you_mean


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]], options: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Groups for an optimiser: one for each pattern, and a last one for the parameters that are left.

    Args:
        named_parameters: as a model's ``named_parameters()`` gives them.
        options: shell patterns of names, such as ``"item_embedding*"``, each with the options of its group. A parameter
            belongs to the first pattern that fits.

    Raises:
        UserError: no parameter is left for a pattern, or the options are no mapping of mappings.
    """
    if not isinstance(options, Mapping) or not all(isinstance(own, Mapping) for own in options.values()):
        raise UserError(f"must look like {{'item_embedding*': {{'weight_decay': 0.1}}}}, got {options!r}")
    left = dict(named_parameters)
    names = list(left)
    groups: list[dict[str, Any]] = []
    for pattern, own in options.items():
        fitting = [name for name in left if fnmatchcase(name, pattern)]
        if not fitting:
            raise UserError(f"'{pattern}' fits no parameter that is left{did_you_mean(pattern, names)}")
        groups.append({"params": [left.pop(name) for name in fitting], **own})
    return [*groups, {"params": list(left.values())}] if left else groups
