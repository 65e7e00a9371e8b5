"""What is read of a record."""

from __future__ import annotations

from typing import NamedTuple


class RowsOfRecord(NamedTuple):
    """Arguments of :meth:`~statedict_io.backends.protocol.OpenArchive.read_range`."""

    record: int
    offset: int
    destination: memoryview
    num_rows: int = 1
    pitch: int = 0
