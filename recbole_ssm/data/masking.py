"""Items hidden in whole histories, for models that read a history in both directions (``train_mode: masked``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

MASK = 0
"""The id of a hidden item: that of the padding, which packed histories never hold."""


def hide(batch: Any, ratio: float, last_ratio: float) -> Any:
    """Let the targets of a batch be hidden items of its windows.

    As BERT4Rec does it (Sun et al., CIKM 2019, section 3.6; in RecBole's form): each event is hidden with
    probability ``ratio``, but in a share ``last_ratio`` of the windows only the last one, as when the next item is
    asked for. A window in which chance hides nothing has its last event hidden. Chance is NumPy's global one.

    Args:
        batch: a :class:`~recbole_ssm.data.loader.PackedBatch` of windows; every event of a window but the last is an
            input, and every event but the first a target.
        ratio: in (0, 1].
        last_ratio: in [0, 1].

    Returns:
        A batch of these windows with all their events: hidden ones are :data:`MASK`, ``at`` is where they stand, and
        ``target`` what they were.
    """
    inputs, targets, windows = len(batch.items), batch.target, len(batch.cu_seqlens) - 1
    bounds = batch.cu_seqlens + torch.arange(windows + 1)
    last = bounds[1:] - 1
    is_last = torch.zeros(inputs + windows, dtype=torch.bool).index_fill(0, last, True)
    events = batch.items.new_empty(inputs + windows)
    events[~is_last] = batch.items
    events[last] = targets[batch.cu_seqlens[1:] - 1]
    window = torch.repeat_interleave(bounds.diff())
    by_chance, whole = np.random.random(len(events)) < ratio, np.random.random(windows) >= last_ratio
    hidden = torch.from_numpy(by_chance) & torch.from_numpy(whole)[window]
    some = torch.zeros(windows, dtype=torch.bool).index_put((window[hidden],), torch.tensor(True))
    hidden[last[~some]] = True
    at = hidden.nonzero()[:, 0]
    return batch._replace(items=events.masked_fill(hidden, MASK), cu_seqlens=bounds, at=at, target=events[at])
