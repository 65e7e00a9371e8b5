"""Who writes which bytes: what one rank alone holds is its own, replicas are cut so that all write alike. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# Whole below this. Small tensors that every rank holds are not always the same on every rank (the state of a random
# number generator, of 5,056 bytes): one rank's must not be mixed with another's.
_CUT_FROM_NBYTES = 16 << 10
# Cuts are at multiples of it in the file: a block that two ranks write is a page that goes back and forth between them.
_BLOCK_NBYTES = 4096


class Shard(NamedTuple):
    """Elements of a tensor that one or more ranks hold."""

    numel: int
    itemsize: int
    file_offset: int  #: of its first byte
    holders: tuple[int, ...]  #: ranks, ascending


class Range(NamedTuple):
    """What one rank writes of a shard."""

    rank: int
    begin: int  #: elements of the shard, row-major
    end: int


def assign_ranges(shards: Sequence[Shard], num_ranks: int) -> list[list[Range]]:
    """The ranges of each shard: without overlap, without a gap, each of a rank that holds the shard."""
    loads = [0] * num_ranks
    ranges: list[list[Range]] = [[] for _ in shards]
    replicated: dict[tuple[int, ...], list[int]] = {}
    for index, shard in enumerate(shards):
        if len(shard.holders) == 1:
            ranges[index].append(Range(shard.holders[0], 0, shard.numel))
            loads[shard.holders[0]] += shard.numel * shard.itemsize
        elif shard.numel:
            replicated.setdefault(shard.holders, []).append(index)
        else:
            ranges[index].append(Range(shard.holders[0], 0, 0))
    # Few holders first: the others have more ways to even it out.
    for holders, members in sorted(replicated.items(), key=lambda group: (len(group[0]), group[0])):
        _deal(shards, holders, members, loads, ranges)
    return ranges


def _deal(
    shards: Sequence[Shard],
    holders: tuple[int, ...],
    members: list[int],
    loads: list[int],
    ranges: list[list[Range]],
) -> None:
    """Deals out the shards that ``holders`` alone hold, in the order of ``members``.

    The first holder takes ranges until it has its quota, then the next goes on where that one stopped. The quotas
    bring the holders' loads to one level. A range rarely ends just where a quota does: what it leaves over, or has too
    much, is added to the next holder's quota, and the last takes all that is left.
    """
    total = sum(shards[index].numel * shards[index].itemsize for index in members)
    quotas = _quotas([loads[rank] for rank in holders], total)
    turn = 0  # of which holder
    for index in members:
        shard, begin = shards[index], 0
        while begin < shard.numel:
            is_last = turn == len(holders) - 1
            end = shard.numel if is_last else _end_of_range(shard, begin, quotas[turn])
            if end > begin:
                ranges[index].append(Range(holders[turn], begin, end))
                nbytes = (end - begin) * shard.itemsize
                loads[holders[turn]] += nbytes
                quotas[turn] -= nbytes
                begin = end
            has_enough = begin < shard.numel or quotas[turn] <= 0
            if has_enough and not is_last:
                quotas[turn + 1] += quotas[turn]
                turn += 1


def _end_of_range(shard: Shard, begin: int, quota: int) -> int:
    """Where a range ends that begins at element ``begin`` and should have ``quota`` bytes; at ``begin`` where it is
    better to take none."""
    nbytes = (shard.numel - begin) * shard.itemsize
    if nbytes <= quota:
        return shard.numel
    if nbytes <= _CUT_FROM_NBYTES:  # all or nothing, whichever is nearer to the quota
        return shard.numel if nbytes <= 2 * quota else begin
    start = shard.file_offset + begin * shard.itemsize
    cut = (start + quota) // _BLOCK_NBYTES * _BLOCK_NBYTES
    return begin + max(cut - start, 0) // shard.itemsize


def _quotas(loads: list[int], total: int) -> list[int]:
    """What each gets of ``total`` so that the smallest loads rise to one level."""
    ascending = sorted(range(len(loads)), key=loads.__getitem__)
    level, left = loads[ascending[0]], total
    count = len(ascending)
    for num_filled, index in enumerate(ascending):
        if num_filled and (loads[index] - level) * num_filled >= left:
            count = num_filled
            break
        left -= (loads[index] - level) * num_filled
        level = loads[index]
    quotas = [0] * len(loads)
    for place, index in enumerate(ascending[:count]):
        quotas[index] = level - loads[index] + left // count + (place < left % count)
    return quotas
