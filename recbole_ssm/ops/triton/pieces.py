"""Few long sequences, cut into pieces that a GPU walks along at once.

To the kernels a piece is a sequence. What they need to know of the pieces before is the state
at each start, and that takes two small kernels: one finds, for all pieces at once, what each
adds to a state that passes it, and by how much that state decays on the way; the other joins
these along each sequence ("reduce, then scan"). The backward does the same from the end, with
the gradient of the state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_ssm.ops.library import Values
from recbole_ssm.ops.triton.launch import cdiv, empty_float32, launch, processors

PIECE = 128
"""Positions of a piece."""
_JOINED = 128
"""Numbers of a state that a program carries from piece to piece."""


def worthwhile(S: int, rows: int, warps: int, processors: int) -> bool:
    """Whether S sequences of so many rows in all are cut, where ``warps`` walk along each of them.

    A multiprocessor has four schedulers, each of which wants a warp: where walks leave some
    without, and sequences are several pieces long, the second pass over them is worth it.
    """
    return S * warps < 4 * processors and rows >= 4 * PIECE * S


def cut(offsets: Tensor | None, S: int, L: int, rows: int, device: torch.device) -> Values:
    """Where the pieces lie, found on the device: the CPU knows no more than that so many suffice.

    Returns:
        ``pieces``: their number, of which the last ones may be empty; ``bounds`` [pieces + 1]
        of them as packed sequences; ``first`` [S + 1], each sequence's first piece; ``of_piece``
        [pieces + 1], the number of each piece's sequence.
    """
    if offsets is None:
        offsets = torch.arange(S + 1, device=device) * L
    # wrong bounds too must not lead beyond the batch, or to more pieces
    offsets = offsets.clamp(0, rows).cummax(0).values
    pieces = rows // PIECE + S
    first = F.pad(((offsets.diff() + PIECE - 1) // PIECE).cumsum(0), (1, 0))
    piece = torch.arange(pieces + 1, device=device)
    of_piece = torch.searchsorted(first[1:], piece, right=True)
    bounds = (offsets[of_piece] + (piece - first[of_piece]) * PIECE).minimum(offsets[-1])
    return {"pieces": pieces, "bounds": bounds, "first": first, "of_piece": of_piece}


def choose(values: Values, warps: int) -> None:
    """Note in ``values`` how many pieces the sequences are cut into, 0 for none, and where these lie."""
    if "pieces" not in values:
        x, offsets, S, L, rows = (values[name] for name in ("x", "offsets", "S", "L", "rows"))
        few_and_long = worthwhile(S, rows, warps, processors(x))
        values |= cut(offsets, S, L, rows, x.device) if few_and_long else {"pieces": 0}


def in_pieces(values: Values, cells: int, run: Callable[[Values], None], reverse: bool = False) -> Values:
    """What kernels are given of the pieces, as sequences with a state, of ``cells`` numbers, at their start.

    In a backward they have the gradient of the state at their end too. The final state of the
    whole sequences, or the gradient of their first one, is written. ``run`` starts the kernel
    that finds what pieces add, in a direction that is ``reverse`` or not.
    """
    if not values["pieces"]:
        return values
    own = values | {"S": values["pieces"], "offsets": values["bounds"], "final": None, "gstate": None}

    def join(backward: bool, before: Tensor | None, after: Tensor | None, **given: Any) -> Tensor:
        x, columns = values["x"], values["dt"].shape[-1]
        states, steps = empty_float32(x, own["S"], cells), empty_float32(x, own["S"], columns)
        run(own | {"BACKWARD": backward, "added": states, "steps": steps, **given})
        joined = {"states": states, "steps": steps, "state": before, "final": after, "REVERSE": reverse != backward}
        sizes = {"cells": cells, "columns": columns, "alike": cells // max(values["A"].numel(), 1), "BLOCK": _JOINED}
        launch("common.join", (values["S"], cdiv(cells, _JOINED)), values | joined | sizes)
        return states

    own["state"] = join(False, values.get("state"), values.get("final"), z=None, sz=0)
    if "gy" in values:
        incoming = {"x": values["gy"], "sx": values["sgy"], "B": values["C"], "sB": values["sC"]}
        own["gfinal"] = join(True, values["gfinal"], values["gstate"], **incoming)
    return own
