"""Decompression of records that somebody zipped again: torch itself never compresses."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

from .record_entry import RecordEntry

_PIECE_NBYTES = 1 << 20


class Damage(Exception):
    """What is wrong with a record's bytes; the caller knows the path and adds it."""


def inflated(read_stored: Callable[[int, int], bytes], entry: RecordEntry) -> Iterator[bytes]:
    """The payload of a compressed record from front to back, in pieces of at most 1 MiB and never more than the
    directory declares, whatever the stream says.

    Args:
        read_stored: ``read_stored(offset, nbytes)`` gives bytes of the record as it lies in the file.

    Raises:
        Damage: the stream is damaged, or longer or shorter than declared.
    """
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    left = entry.nbytes
    try:
        for offset in range(0, entry.stored_nbytes, _PIECE_NBYTES):
            data = read_stored(offset, min(_PIECE_NBYTES, entry.stored_nbytes - offset))
            while data and not stream.eof:
                # One byte more than is left: enough to see that there is more.
                piece = stream.decompress(data, min(left + 1, _PIECE_NBYTES))
                data = stream.unconsumed_tail
                left -= len(piece)
                if left < 0:
                    raise Damage(f"record '{entry.name}': holds more than the {entry.nbytes} bytes that it declares")
                yield piece
        # Output may wait inside although the input is used up.
        while not stream.eof and (piece := stream.decompress(b"", min(left + 1, _PIECE_NBYTES))):
            left -= len(piece)
            if left < 0:
                raise Damage(f"record '{entry.name}': holds more than the {entry.nbytes} bytes that it declares")
            yield piece
    except zlib.error as e:
        raise Damage(f"record '{entry.name}': cannot be decompressed: {e}") from None
    if not stream.eof or left:
        raise Damage(f"record '{entry.name}': its compressed data ends {left} bytes early")
