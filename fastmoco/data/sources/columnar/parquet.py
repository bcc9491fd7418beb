"""A Parquet file as groups of rows: a group is the least that can be read of one."""

from __future__ import annotations

from typing import Any

from fastmoco.config import ConfigError


class ParquetGroups:
    """G row groups of an open file. Raises `ConfigError` for no Parquet file, or a part of one."""

    def __init__(self, path: str) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        try:
            self._file = parquet.ParquetFile(path, memory_map=False, pre_buffer=False)
        except (OSError, pa.ArrowException) as error:
            why = str(error).partition("\n")[0].rstrip(".")
            raise ConfigError(f"{path} is no Parquet file, or not all of one: {why}.") from error
        self.schema = self._file.schema_arrow
        described = self._file.metadata
        self.rows = [described.row_group(g).num_rows for g in range(described.num_row_groups)]
        """(G,): rows of each group."""

    def read(self, group: int, column: str) -> Any:
        """A column of a group, a pyarrow ChunkedArray. Raises `OSError` or `ArrowException`."""
        return self._file.read_row_group(group, [column], use_threads=False).column(0)
