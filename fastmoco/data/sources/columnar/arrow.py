"""An Arrow file as record batches that stay on disk: a row is read alone, wherever it is."""

from __future__ import annotations

from typing import Any

from fastmoco.config import ConfigError


class ArrowGroups:
    """G record batches of a mapped file, of the stream format (`datasets`) or the file format.

    Raises `ConfigError` for no Arrow file, a part of one, or one whose batches are compressed.
    """

    def __init__(self, path: str) -> None:
        import pyarrow as pa

        try:
            mapped = pa.memory_map(path)
            try:
                self._table = pa.ipc.open_stream(mapped).read_all()
            except pa.ArrowInvalid:
                mapped.seek(0)
                self._table = pa.ipc.open_file(mapped).read_all()
            mapped.seek(0)
            whole = mapped.read_buffer()
        except (OSError, pa.ArrowException) as error:
            why = str(error).partition("\n")[0].rstrip(".")
            raise ConfigError(f"{path} is no Arrow file, or not all of one: {why}.") from error
        self.schema = self._table.schema
        batches = self._table.to_batches()
        inside = range(whole.address, whole.address + whole.size + 1)
        buffers = (b for batch in batches for c in batch.columns for b in c.buffers() if b)
        if any(buffer.size and buffer.address not in inside for buffer in buffers):
            raise ConfigError(
                f"{path} holds compressed batches, which cannot be read row by row: write it "
                "without compression, or as Parquet."
            )
        self._batches = batches
        self.rows = [batch.num_rows for batch in batches]
        """(G,): rows of each batch."""

    def read(self, group: int, column: str) -> Any:
        """A column of a batch, a pyarrow ChunkedArray on the mapped pages."""
        import pyarrow as pa

        return pa.chunked_array([self._batches[group].column(column)])
