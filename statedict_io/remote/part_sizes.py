"""How large the parts of an object are, and how many are sent at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .multipart import PartLimits

_MIB = 1 << 20
_UNIT_NBYTES = 64 << 10
#: docs/remote.md has the measurements behind these.
DEFAULT_CONNECTIONS = 16
DEFAULT_PART_NBYTES = 20 * _MIB
_AT_ONCE_NBYTES = 8 * _MIB
_PART_NBYTES_OF_UNKNOWN_SIZE = 64 * _MIB
#: of S3's 10,000
_MAX_NUM_PARTS = 9000


@dataclass(frozen=True)
class PartSizes:
    """All but the last part are of ``part_nbytes``, or the first and the last few are smaller.

    Parts are filled one after the other and sent side by side. First parts that grow have all connections begin soon,
    and come back one after the other; last parts that shrink have them end together.
    """

    connections: int  #: parts at once
    part_nbytes: int  #: of the largest
    at_once_nbytes: int  #: so much is worth one request only
    smallest_nbytes: int | None = None  #: of the first and the last part; None: they are as the others
    num_parts: int = 0  #: where they are smaller

    @property
    def buffers_nbytes(self) -> int:
        """What is held in memory."""
        return self.connections * self.part_nbytes

    def nbytes_of(self, number: int) -> int:
        """Of a part, counted from 1; the last one is what is left."""
        from_end = min(number - 1, self.num_parts - number)
        if self.smallest_nbytes is None or from_end >= self.connections - 1:
            return self.part_nbytes
        grown = (self.part_nbytes - self.smallest_nbytes) * max(from_end, 0) // (self.connections - 1)
        return self.smallest_nbytes + _rounded(grown)


def connections_of(fs: Any) -> int:
    """How many requests about one object may be under way: ``max_concurrency`` of fsspec's configuration, where that is
    set."""
    return int(fs.storage_options.get("max_concurrency", DEFAULT_CONNECTIONS))


def part_sizes(fs: Any, nbytes: int | None, limits: PartLimits) -> PartSizes:
    """
    Args:
        fs: the fsspec file system; ``default_block_size`` of its configuration is the part's size, where that is set.
        nbytes: of the object; None where nobody knows.
        limits: of the store.
    """
    connections = connections_of(fs)
    wanted = fs.storage_options.get("default_block_size")
    most = DEFAULT_PART_NBYTES if wanted is None else max(int(wanted), limits.least_nbytes)
    if nbytes is None:
        part_nbytes = max(_PART_NBYTES_OF_UNKNOWN_SIZE, most)
        return PartSizes(max(connections * most // part_nbytes, 1), part_nbytes, part_nbytes)
    most = max(most, _rounded(nbytes // _MAX_NUM_PARTS))
    at_once_nbytes = _AT_ONCE_NBYTES if wanted is None else max(_AT_ONCE_NBYTES, most)
    if wanted is not None or getattr(fs, "fixed_upload_size", False):
        return PartSizes(connections, most, at_once_nbytes)
    each = -(-nbytes // connections)
    least = min(limits.least_nbytes, most)
    if each < 3 * least:
        return PartSizes(connections, min(max(_rounded(each), least), most), at_once_nbytes)
    # The first and the last part of a connection make up one large and one small one.
    num_rounds = -(-(each - least) // most)
    part_nbytes = _rounded(-(-(each - least) // num_rounds))
    return PartSizes(connections, part_nbytes, at_once_nbytes, least, connections * (num_rounds + 1))


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _UNIT_NBYTES) * _UNIT_NBYTES
