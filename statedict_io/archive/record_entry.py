"""What the central directory says of a record."""

from __future__ import annotations

from typing import NamedTuple


class RecordEntry(NamedTuple):
    """A record as the central directory describes it."""

    name: str  #: without the archive name: ``data/0``; of a record outside the archive's folder its full name
    header_offset: int  #: of its local header in the file
    nbytes: int  #: of the payload, uncompressed
    stored_nbytes: int  #: in the file; equal to ``nbytes`` unless compressed
    crc32: int  #: as recorded; 0 also where the writer had CRCs off
    compressed: bool  #: deflate
