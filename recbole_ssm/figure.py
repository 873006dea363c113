"""Plots as files; Matplotlib is optional."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recbole_ssm.errors import UserError, require
from recbole_ssm.files import check_writable, whole


def check_drawable(path: Path) -> Any:
    """Matplotlib's class of figures, with which a plot can be drawn to ``path``.

    Raises:
        UserError: the name does not end in .png, .svg or .pdf, its folder is missing or cannot be written to, or
            Matplotlib is not installed.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"{path.name}: a plot must end in .png, .svg or .pdf")
    check_writable(path)
    message = f"{path.name}: plots need Matplotlib; run: pip install matplotlib"
    return require("matplotlib.figure", message).Figure


@contextmanager
def figure(path: Path, size: tuple[float, float] = (7, 4)) -> Iterator[Any]:
    """A Matplotlib figure to draw on. It is written to ``path`` when the context ends without an error.

    No display is needed.

    Args:
        path: its ending says the format.
        size: width and height in inches.

    Raises:
        UserError: as :func:`check_drawable`.
    """
    drawn = check_drawable(path)(figsize=size, layout="constrained")
    yield drawn
    with whole(path) as temporary:
        drawn.savefig(temporary, dpi=150)
