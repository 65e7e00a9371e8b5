"""How the object that many ranks write is cut into parts, and which rank sends which: pure arithmetic.

A part is the unit of sending: of 5 MiB at least, except the last, and whole in one rank's memory. Cuts are where one
rank's bytes end and another's begin, as far as the parts get large enough; a part with bytes of several ranks is sent
by one that has many of them. No cut is between two payloads: what lies there is for whoever sends that part.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_MAX_NUM_PARTS = 9000


class Extent(NamedTuple):
    """Where in the file a range of one rank lies: gapless if ``nbytes`` fill it, else in rows among those of others."""

    begin: int
    end: int
    rank: int
    nbytes: int


class Gap(NamedTuple):
    """Bytes between two payloads."""

    begin: int
    end: int


def cut(extents: Sequence[Extent], gaps: Sequence[Gap], end: int, *, least_nbytes: int, nbytes: int) -> array[int]:
    """
    Args:
        extents: of all ranges, in file order.
        gaps: in file order, without overlap.
        end: of what is cut; what is behind it is sent afterwards.
        least_nbytes: of a part.
        nbytes: of a part, where nothing else decides.

    Returns:
        Offsets from 0 to ``end``, between which the parts are; [0] where there is too little for a part.
    """
    least_nbytes = max(least_nbytes, -(-end // _MAX_NUM_PARTS))
    nbytes = max(nbytes, least_nbytes * 3 // 2)
    cuts = array("q", [0])
    borders = [*_borders(extents, gaps, end), end]
    place = 0
    while end - cuts[-1] >= least_nbytes:
        begin = cuts[-1]
        while borders[place] <= begin:
            place += 1
        last = _last_border(borders, place, begin, least_nbytes, nbytes)
        if last is not None:
            cuts.append(last)
            continue
        # One rank's bytes reach further: whole parts of them, as equal as can be.
        left = borders[bisect.bisect_left(borders, begin + least_nbytes)] - begin
        num_parts = max(min(round(left / nbytes), left // least_nbytes), 1)
        cuts.append(begin + left if num_parts == 1 else _outside(gaps, begin + left // num_parts))
    if len(cuts) > 1:
        cuts[-1] = end
    return cuts


def _last_border(borders: Sequence[int], place: int, begin: int, least_nbytes: int, nbytes: int) -> int | None:
    """Where a part ends that begins at ``begin``, if that is a border: the last one before it is large, or the first
    one behind which a rank has a part for itself."""
    found = None
    while place < len(borders) and borders[place] <= begin + nbytes:
        if borders[place] >= begin + least_nbytes:
            found = borders[place]
            following = borders[place + 1] if place + 1 < len(borders) else found
            if following - found >= least_nbytes:
                break
        place += 1
    return found


def _borders(extents: Sequence[Extent], gaps: Sequence[Gap], end: int) -> Iterator[int]:
    """Where the bytes of another rank begin."""
    before = 0  #: where the bytes so far end
    rank: int | None = None
    for extent in extents:
        is_gapless = extent.nbytes == extent.end - extent.begin
        if (extent.rank != rank or not is_gapless) and before <= extent.begin and 0 < extent.begin < end:
            yield _outside(gaps, extent.begin)
        rank = extent.rank if is_gapless and before <= extent.begin else None
        before = max(before, extent.end)


def _outside(gaps: Sequence[Gap], offset: int) -> int:
    """``offset``, or the end of the gap that it is in."""
    place = bisect.bisect_right(gaps, offset, key=lambda gap: gap.begin) - 1
    if place >= 0 and gaps[place].begin < offset < gaps[place].end:
        return gaps[place].end
    return offset


def owners(cuts: Sequence[int], extents: Sequence[Extent], num_ranks: int) -> array[int]:
    """Who sends each part: of the ranks that have at least half as much of it as any other, the one that has the least
    to send so far."""
    shares: list[dict[int, int]] = [{} for _ in range(len(cuts) - 1)]
    for extent in extents:
        density = extent.nbytes / max(extent.end - extent.begin, 1)
        part = bisect.bisect_right(cuts, extent.begin) - 1
        while part < len(shares) and cuts[part] < extent.end:
            overlap = min(extent.end, cuts[part + 1]) - max(extent.begin, cuts[part])
            shares[part][extent.rank] = shares[part].get(extent.rank, 0) + int(overlap * density)
            part += 1
    loads = [0] * num_ranks
    found = array("i")
    for part, share in enumerate(shares):
        most = max(share.values(), default=0)
        candidates = [rank for rank, nbytes in share.items() if 2 * nbytes >= most] or range(num_ranks)
        owner = min(candidates, key=lambda rank: (loads[rank], rank))
        loads[owner] += cuts[part + 1] - cuts[part]
        found.append(owner)
    return found
