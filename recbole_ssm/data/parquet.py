"""A Parquet file as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from recbole_ssm.data.archives import File
from recbole_ssm.data.lines import BadLines, progress
from recbole_ssm.data.tables import BYTES, LONGEST_ROW, ROWS, Rows, cell_of, distinct
from recbole_ssm.data.times import decimals
from recbole_ssm.errors import UserError, excerpt


@dataclass
class Parquet:
    """A Parquet file."""

    file: File

    @contextmanager
    def _open(self) -> Iterator[pyarrow.parquet.ParquetFile]:
        try:
            with self.file.open() as (file, _, _):
                yield pyarrow.parquet.ParquetFile(file)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.file}: no readable Parquet file ({error})") from error

    def columns(self) -> tuple[str, ...]:
        """The names of its columns."""
        with self._open() as parquet:
            return distinct(tuple(parquet.schema_arrow.names), str(self.file))

    def kinds(self) -> dict[str, str]:
        """The columns that hold lists, which become ``token_seq``, or objects: ``token``."""
        with self._open() as parquet:
            nested = [field for field in parquet.schema_arrow if pa.types.is_nested(field.type)]
        objects = (pa.StructType, pa.MapType)
        return {field.name: "token" if isinstance(field.type, objects) else "token_seq" for field in nested}

    def rows(self, fields: Mapping[str, str], bad: BadLines) -> Iterator[Rows]:
        """All rows, counted from 1; ``fields`` is ``{field: column}``."""
        start, rows = 1, ROWS
        with self._open() as parquet, progress(f"Read {self.file.name}", parquet.metadata.num_rows, "rows") as bar:
            for number in range(parquet.num_row_groups):
                group = parquet.metadata.row_group(number)
                if group.total_byte_size > LONGEST_ROW * max(group.num_rows, 1):
                    raise UserError(f"{self.file}: rows of more than {LONGEST_ROW >> 20} MB; is it a table of events?")
                rows = min(rows, max(BYTES * group.num_rows // max(group.total_byte_size, 1), 1))
            for batch in parquet.iter_batches(rows, columns=list(dict.fromkeys(fields.values()))):
                cells = pa.table({name: self._cells(batch, column) for name, column in fields.items()})
                yield Rows(cells, np.arange(start, start + len(batch)), partial(_shown, cells))
                start += len(batch)
                bar.update(len(batch))

    def _cells(self, batch: pa.RecordBatch, name: str) -> pa.StringArray:
        column = batch.column(name)
        try:
            # That text is UTF-8, which Arrow takes on trust.
            column.validate(full=True)
            return _strings(column)
        except (pa.ArrowException, UnicodeDecodeError, OverflowError) as error:
            raise UserError(
                f"{self.file}: column {excerpt(name)} ({column.type}) cannot be read as text ({error}); write it as "
                "strings in UTF-8"
            ) from error


def _strings(column: pa.Array) -> pa.StringArray:
    """A column of Parquet as text; dates and times as seconds since 1970; lists with spaces; null and NaN as ""."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        return _decimals(column.cast(pa.int64()), {"s": 0, "ms": 3, "us": 6, "ns": 9}[kind.unit])
    if pa.types.is_date(kind):
        days = column.cast(pa.date32()).cast(pa.int32()).cast(pa.int64())
        return _decimals(pc.multiply(days, 86_400), 0)
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
    if pa.types.is_nested(column.type) or pa.types.is_floating(column.type):
        values = column.to_pylist()
        if pa.types.is_map(column.type):
            values = [pairs and dict(pairs) for pairs in values]
        return pa.array(list(map(cell_of, values)), pa.string())
    if pa.types.is_decimal(kind):
        return pc.replace_substring_regex(column.cast(pa.string()), r"\.0+$", "").fill_null("")
    return column.cast(pa.string()).fill_null("")


def _decimals(ticks: pa.Array, digits: int) -> pa.StringArray:
    text = decimals(ticks.fill_null(0).to_numpy(), digits)
    return pc.if_else(ticks.is_valid(), text, "")


def _shown(cells: pa.Table) -> list[bytes]:
    return [
        "\t".join(row).replace("\n", " ").encode() for row in zip(*(column.to_pylist() for column in cells.columns))
    ]
