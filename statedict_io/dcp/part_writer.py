"""A rank's side of one save to an object: its ranges of its shards, in parts of the object that it sends, and in parts
that other ranks send.

All in the order of the file, see ``own_parts``.
"""

from __future__ import annotations

import bisect
import mmap
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

from ..archive.layout import DESCRIPTOR_SIGNATURE
from ..backends.protocol import Strip
from ..backends.strip_copies import copy_strip
from ..remote.multipart import MultipartUpload
from .exchange import Listener, Peers, Rows, blocks_nbytes
from .orders import PartsOrder, WorkOrder, Written
from .own_parts import OwnParts
from .range_writer import contiguous_ranges, resolved, starts_of
from .strips import position_of, strips_of_at_most, strips_of_range, strips_until

# Copies of tensors that are not contiguous, of one range.
_COPIES_NBYTES = 4 << 20


class PartWriter:
    """Used once, by one thread.

    Args:
        order: with its parts.
        items: of the order's ranges.
        planner: has their tensors.
        upload: to send parts to; None where the object is too small for that.
        listener: of this rank; None where it is alone. It stays open where nothing fails: others may look later.
        connections: parts that are sent at once.
        progress: of the bytes of this rank's parts, called when the store has them.
    """

    def __init__(
        self,
        order: WorkOrder,
        items: list[WriteItem],
        planner: SavePlanner,
        upload: MultipartUpload | None,
        listener: Listener | None,
        *,
        connections: int,
        progress: Callable[[int, int], Any] | None,
    ) -> None:
        assert order.parts is not None
        self._order = order
        self._parts: PartsOrder = order.parts
        self._planner = planner
        self._upload = upload
        self._listener = listener
        self._connections = connections
        self._progress = progress
        self._nbytes_reported = -1
        self._written = Written(0, array("I", bytes(4 * order.num_ranges)))
        self._ranges = [
            _RangeInOrder(index, item, *order.ranges[3 * index : 3 * index + 3]) for index, item in enumerate(items)
        ]
        self._ranges.sort(key=lambda each: each.file_offset)
        self._records: dict[int, _RecordSoFar] = {}
        for each in self._ranges:
            self._records.setdefault(each.payload_offset, _RecordSoFar(each.record_nbytes)).nbytes_left += each.nbytes
        self._scratch = memoryview(b"")

    def write(self) -> Written:
        """Returns when the store has all parts of this rank, and other ranks what is theirs.

        Raises:
            OSError: what the store reported, with the URL; a ConnectionError where another rank has failed.
            BaseException: what the planner or ``progress`` raise.
        """
        if self._upload is None:
            self._collect_rows()
            return self._written
        cuts, parts = self._parts.cuts, self._parts
        sizes = {n: cuts[n] - cuts[n - 1] for n, owner in enumerate(parts.owners, 1) if owner == parts.rank}
        own = OwnParts(self._upload, sizes, parts.known, parts.crcs, connections=self._connections)
        peers = Peers(parts.rank, parts.addresses, parts.token, own.fail)
        own.on_failure = peers.cut_off
        try:
            if self._listener is not None:
                self._listener.serve(parts.token, own)
            for rank in parts.senders:
                peers.watch(rank)
            active: list[_RangeInOrder] = []
            for number, owner in enumerate(parts.owners, 1):
                active = self._make_part(number, owner, active, own, peers)
                self._report(own)
            self._written.parts = own.finish(lambda: self._report(own))
            peers.end()
            if self._listener is not None:
                self._listener.tell_success()
        except BaseException as e:
            first = own.fail(e)  # what this one may have come of
            if self._listener is not None:
                self._listener.close()
            if first is e:
                raise
            raise first from None
        finally:
            own.close()
        return self._written

    def _make_part(
        self, number: int, owner: int, active: list[_RangeInOrder], own: OwnParts, peers: Peers
    ) -> list[_RangeInOrder]:
        """This rank's bytes of a part; ``active`` are the ranges that began before, the result those that go on."""
        begin, end = self._parts.cuts[number - 1 : number + 1]
        active = active + self._begun_before(end)
        if owner == self._parts.rank:
            own.begin(number)
            for each in active:
                for storage, strip in each.until(end, self._planner):
                    at = strip.file_offset - begin
                    self._copy(each, storage, strip, own.buffer(number), at, strip.file_pitch)
                    own.put(number, strip.row_nbytes * strip.num_rows)
        else:
            for each in active:
                for storage, strip in each.until(end, self._planner):
                    for piece in strips_of_at_most(strip, blocks_nbytes(strip.row_nbytes)):
                        nbytes = piece.row_nbytes * piece.num_rows
                        if len(self._scratch) < nbytes:
                            self._scratch = memoryview(mmap.mmap(-1, max(nbytes, 1 << 20)))
                        self._copy(each, storage, piece, self._scratch, 0, piece.row_nbytes)
                        rows = Rows(
                            number, piece.file_offset - begin, piece.row_nbytes, piece.num_rows, piece.file_pitch
                        )
                        peers.send_rows(owner, rows, self._scratch[:nbytes])
        self._tell_crcs(active, own, peers)
        return [each for each in active if not each.is_over]

    def _begun_before(self, offset: int) -> list[_RangeInOrder]:
        count = 0
        while count < len(self._ranges) and self._ranges[count].file_offset < offset:
            count += 1
        begun, self._ranges = self._ranges[:count], self._ranges[count:]
        return begun

    def _copy(
        self,
        of: _RangeInOrder,
        storage: torch.UntypedStorage,
        strip: Strip,
        destination: memoryview,
        at: int,
        pitch: int,
    ) -> None:
        crc, first_bytes = copy_strip(destination, at, pitch, storage, strip, compute_crc32=self._order.compute_crc32)
        nbytes = strip.row_nbytes * strip.num_rows
        self._written.crcs[of.index] ^= crc
        self._written.nbytes += nbytes
        record = self._records[of.payload_offset]
        record.crc ^= crc
        record.nbytes += nbytes
        record.nbytes_left -= nbytes
        in_record = strip.file_offset - of.payload_offset
        if in_record < 8:
            self._written.starts += [(of.index, *start) for start in starts_of(strip, in_record, first_bytes)]

    def _tell_crcs(self, active: list[_RangeInOrder], own: OwnParts, peers: Peers) -> None:
        """Of records of which this rank has made all that it has, to who sends their CRC."""
        if not self._order.compute_crc32:
            return
        for payload_offset in {each.payload_offset for each in active}:
            record = self._records[payload_offset]
            if record.nbytes_left or record.is_told:
                continue
            record.is_told = True
            crc_offset = payload_offset + record.nbytes_of_all + len(DESCRIPTOR_SIGNATURE)
            owner = self._parts.owners[bisect.bisect_right(self._parts.cuts, crc_offset) - 1]
            if owner == self._parts.rank:
                own.add_crc(payload_offset, record.crc, record.nbytes)
            else:
                peers.send_crc(owner, payload_offset, record.crc, record.nbytes)

    def _collect_rows(self) -> None:
        for each in self._ranges:
            for storage, strip in each.until(each.payload_offset + each.record_nbytes, self._planner):
                data = bytearray(strip.row_nbytes * strip.num_rows)
                self._copy(each, storage, strip, memoryview(data), 0, strip.row_nbytes)
                rows = Rows(0, strip.file_offset, strip.row_nbytes, strip.num_rows, strip.file_pitch)
                self._written.rows.append((rows, bytes(data)))

    def _report(self, own: OwnParts) -> None:
        if self._progress is not None and own.nbytes_sent != self._nbytes_reported:
            self._nbytes_reported = own.nbytes_sent
            self._progress(self._nbytes_reported, own.nbytes)


class _RecordSoFar:
    """What this rank has made of a record."""

    def __init__(self, nbytes_of_all: int) -> None:
        self.nbytes_of_all = nbytes_of_all  #: what all ranks have
        self.crc = 0
        self.nbytes = 0
        self.nbytes_left = 0
        self.is_told = False


class _RangeInOrder:
    """Strips of a range, as far as they are asked for."""

    def __init__(self, index: int, item: WriteItem, payload_offset: int, begin: int, end: int) -> None:
        assert item.tensor_data is not None
        self.index = index
        self.payload_offset = payload_offset
        data = item.tensor_data
        itemsize = data.properties.dtype.itemsize
        self.nbytes = (end - begin) * itemsize
        self.record_nbytes = data.size.numel() * itemsize
        first = position_of(data.size, data.chunk.offsets, data.chunk.sizes, begin)
        self.file_offset = payload_offset + first * itemsize
        self.is_over = False
        self._item = item
        self._begin, self._end = begin, end
        self._strips: Iterator[tuple[torch.UntypedStorage, Strip]] | None = None
        self._next: list[tuple[torch.UntypedStorage, Strip]] = []

    def until(self, offset: int, planner: SavePlanner) -> Iterator[tuple[torch.UntypedStorage, Strip]]:
        """Those that lie before ``offset`` in the file and have not been given yet."""
        if self._strips is None:
            self._strips = self._all(planner)
        while True:
            if not self._next:
                following = next(self._strips, None)
                if following is None:
                    self.is_over = True
                    return
                self._next.append(following)
            storage, strip = self._next.pop(0)
            taken, left = strips_until(strip, offset)
            self._next = [(storage, each) for each in left] + self._next
            yield from ((storage, each) for each in taken)
            if left:
                return

    def _all(self, planner: SavePlanner) -> Iterator[tuple[torch.UntypedStorage, Strip]]:
        data = self._item.tensor_data
        assert data is not None
        tensor = resolved(planner, self._item)
        for part in contiguous_ranges(tensor, self._begin, self._end, _COPIES_NBYTES):
            storage = part.tensor.untyped_storage()
            for strip in strips_of_range(
                data.size,
                data.chunk.offsets,
                data.chunk.sizes,
                tensor.itemsize,
                part.begin,
                part.end,
                source=0,
                source_offset=(part.tensor.storage_offset() + part.first) * tensor.itemsize,
                payload_offset=self.payload_offset,
            ):
                yield storage, strip
