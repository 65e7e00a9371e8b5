"""Strips put together in memory, whichever backend: of an object that is sent, not of a file."""

from __future__ import annotations

import torch

from ..archive.crc32 import shift, shift_by, shifter
from .checksum import crc32
from .protocol import Strip


def copy_strip(
    destination: memoryview, at: int, pitch: int, storage: torch.UntypedStorage, strip: Strip, *, compute_crc32: bool
) -> tuple[int, bytes]:
    """Copies a strip into memory.

    Args:
        destination: contiguous bytes.
        at: where the first row goes, bytes.
        pitch: from row to row there.
        storage: on any device.
        strip: of which the places in the file count for the CRC only.

    Returns:
        What the strip adds to the CRC of its record, and its first bytes: as ``Backend.write_strips``.
    """
    nbytes = strip.row_nbytes * strip.num_rows
    if nbytes == 0:
        return 0, b""
    rows = (strip.num_rows, strip.row_nbytes)
    source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(
        storage, strip.source_offset, (nbytes,), (1,)
    )
    # Without the interpreter's lock, which a slice assigned to a memoryview keeps.
    torch.frombuffer(destination, dtype=torch.uint8).as_strided(rows, (pitch, 1), at).copy_(source.view(rows))
    lines = [destination[at + row * pitch : at + row * pitch + strip.row_nbytes] for row in range(strip.num_rows)]
    first_bytes = b"".join(bytes(line[:8]) for line in lines[:8])[:8]
    if not compute_crc32:
        return 0, first_bytes
    if strip.num_rows > 1 and pitch == strip.file_pitch == strip.row_nbytes:
        crc = crc32(destination[at : at + nbytes])
    else:
        crc = _crc_of_rows(lines, strip.file_pitch)
    return shift(crc, strip.nbytes_after), first_bytes


def _crc_of_rows(lines: list[memoryview], pitch: int) -> int:
    """What the rows add to the CRC of what ends with the last of them."""
    crc = crc32(lines[0])
    if len(lines) > 1:
        over_pitch = shifter(pitch)
        for line in lines[1:]:
            crc = shift_by(over_pitch, crc) ^ crc32(line)
    return crc
