"""Tables as files, written piece by piece, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from recbole_ssm.errors import UserError
from recbole_ssm.files import check_writable, whole


def check_table(option: str, path: Path, kinds: tuple[str, ...] = (".parquet", ".csv")) -> None:
    """Before long work: that a table can be written to a file.

    Raises:
        UserError: it cannot, or its name ends in none of ``kinds``.
    """
    if path.suffix.lower() not in kinds:
        raise UserError(f"{option}: {path} must end in {' or '.join(kinds)}")
    try:
        check_writable(path)
    except UserError as error:
        raise UserError(f"{option}: {error}") from error


def write_table(path: Path, pieces: Iterable[pa.Table]) -> int:
    """Write pieces of one table, of which there is one at least; how many rows they have.

    Args:
        path: ends in ``.parquet`` or ``.csv``; a former file of that name stays until all is written.
        pieces: tables of one schema.
    """
    remaining = iter(pieces)
    first = next(remaining)
    rows = first.num_rows
    with whole(path) as temporary, _writer(path, temporary, first.schema) as writer:
        writer.write_table(first)
        for piece in remaining:
            writer.write_table(piece)
            rows += piece.num_rows
    return rows


def _writer(path: Path, temporary: Path, schema: pa.Schema) -> Any:
    if path.suffix.lower() == ".parquet":
        return pa.parquet.ParquetWriter(temporary, schema)
    return pa.csv.CSVWriter(temporary, schema, write_options=pa.csv.WriteOptions(quoting_style="needed"))
