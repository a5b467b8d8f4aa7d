"""A Parquet file sorted by a number, of which single keys are read without touching the rest.

The footer is read once, on opening; a lookup then decodes only the row groups whose smallest and
largest key say that they may hold what is asked for: about a millisecond, whatever the file's size.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


class SortedParquet:
    """Lookups by `key`, an integer column by which the file is sorted; may be shared by threads."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key
        self._metadata = pq.read_metadata(path)
        groups = [self._metadata.row_group(i) for i in range(self._metadata.num_row_groups)]
        column = self._metadata.schema.names.index(key)
        statistics = [group.column(column).statistics for group in groups if group.num_rows]
        self._lows = np.array([found.min for found in statistics], np.int64)
        self._highs = np.array([found.max for found in statistics], np.int64)

    def read(self, keys: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of these keys, in the file's order; keys that are not there give none."""
        wanted = np.unique(np.asarray(keys, np.int64))
        first = np.searchsorted(self._highs, wanted, "left")
        after = np.searchsorted(self._lows, wanted, "right")
        groups = sorted(
            {g for low, high in zip(first, after, strict=True) for g in range(low, high)}
        )
        names = None if columns is None else list(dict.fromkeys([self.key, *columns]))
        with pq.ParquetFile(self.path, metadata=self._metadata) as file:
            table = file.read_row_groups(groups, columns=names)
        table = table.filter(pa.array(np.isin(table[self.key].to_numpy(), wanted)))
        return table if columns is None else table.select(list(columns))
