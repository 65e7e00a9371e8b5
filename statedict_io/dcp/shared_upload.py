"""The coordinator's side of one save to an object of a store: who sends which part, the last parts, the completion."""

from __future__ import annotations

import bisect
import functools
import secrets
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..remote import multipart_stores
from ..remote.multipart import MultipartUpload, SentPart
from ..remote.part_sizes import PartSizes, part_sizes
from ..remote.stores import note_discard_failed
from ..writing.sidecar import StoredSidecar
from ..writing.targets import URLTarget
from .archive_frame import ArchiveFrame
from .exchange import TOKEN_NBYTES, Address
from .global_plan import GlobalState
from .orders import PartsOrder, Written
from .own_parts import CRCPlace, OwnParts
from .parts import Extent, Gap, cut, owners
from .shared_save import SharedSave
from .strips import position_of

_MAX_NUM_LAST_PARTS = 1000  #: of 10,000; ``parts`` leaves them


class SharedUpload(SharedSave):
    """An upload of which each rank sends parts. What is behind the storages is the coordinator's to send, in the end:
    it depends on all CRCs, and on values that are no tensors. So is an object whose storages are too few for a part:
    its ranks return their bytes.

    Args:
        target: what to replace.
        state: of all ranks.
        addresses: of all ranks; None of one that is alone.
        own_address: the coordinator's.
        replace: False where an object of that name must stay.
        unpickle: as of :class:`SharedSave`.
    """

    def __init__(
        self,
        target: URLTarget,
        state: GlobalState,
        addresses: list[Address | None],
        own_address: Address | None,
        *,
        replace: bool,
        unpickle: Callable[[str, bytes], Any],
    ) -> None:
        super().__init__(target.archive_name, state, unpickle=unpickle)
        self._place = target.place
        self._sidecar = StoredSidecar(target, is_wanted=False)
        self._addresses = addresses
        self._deputies = _deputies(addresses, own_address)
        self._replace = replace
        self._token = secrets.token_bytes(TOKEN_NBYTES)
        frame = self._first_frame
        between = list(frame.between_storages(compute_crc32=self.compute_crc32))
        extents = sorted(self._extents())
        gaps = [Gap(each.offset, each.offset + len(each.data)) for each in between]
        limits = multipart_stores.limits_of(self._place)
        self._sizes = part_sizes(self._place.fs, frame.storages_end // len(self.work), limits)
        self._cuts = cut(
            extents, gaps, frame.storages_end, least_nbytes=limits.least_nbytes, nbytes=self._sizes.part_nbytes
        )
        self._owners = owners(self._cuts, extents, len(self.work))
        self._known: list[dict[int, list[tuple[int, bytes]]]] = [{} for _ in self.work]  # by rank
        self._crcs: list[dict[int, CRCPlace]] = [{} for _ in self.work]
        if self._owners:
            for each in between:
                part, offset = self._part_at(each.offset)
                self._known[self._owners[part - 1]].setdefault(part, []).append((offset, each.data))
                if each.key is not None:
                    record = frame.storage(each.key)
                    part, offset = self._part_at(each.crc_offset)
                    place = CRCPlace(part, offset, record.nbytes)
                    self._crcs[self._owners[part - 1]][record.payload_offset] = place
        self._senders = self._found_senders(extents) if self._owners else [set() for _ in self.work]
        self._upload: MultipartUpload | None = None
        if self._owners:
            self._begin()

    def parts_order(self, rank: int) -> PartsOrder:
        return PartsOrder(
            rank=rank,
            ticket=None if self._upload is None else self._upload.ticket,
            cuts=self._cuts,
            owners=self._owners,
            known=self._known[rank],
            crcs=self._crcs[rank],
            senders=sorted(self._senders[rank]),
            addresses=self._addresses,
            token=self._token,
            is_deputy=rank in self._deputies,
        )

    def abandon(self) -> None:
        _abandon(self._upload, self._place.url, self._over)

    def _begin(self) -> MultipartUpload:
        self._upload = multipart_stores.begin(self._place)
        self._watch(functools.partial(_abandon, self._upload, self._place.url, self._over))
        return self._upload

    def _part_at(self, offset: int) -> tuple[int, int]:
        """(part, offset in it)"""
        part = bisect.bisect_right(self._cuts, offset)
        return part, offset - self._cuts[part - 1]

    def _found_senders(self, extents: Sequence[Extent]) -> list[set[int]]:
        """By rank: others that may have bytes of its parts, or of records whose CRC is in them."""
        found: list[set[int]] = [set() for _ in self.work]
        for extent in extents:
            first, _ = self._part_at(extent.begin)
            last, _ = self._part_at(extent.end - 1)
            for owner in self._owners[first - 1 : last]:
                found[owner].add(extent.rank)
        crc_owners = {record: owner for owner, crcs in enumerate(self._crcs) for record in crcs}
        for rank, work in enumerate(self.work):
            for record in work.ranges[::3]:
                if record in crc_owners:
                    found[crc_owners[record]].add(rank)
        for rank, senders in enumerate(found):
            senders.discard(rank)
        return found

    def _extents(self) -> Iterator[Extent]:
        for rank, work in enumerate(self.work):
            for index, item in enumerate(work.items):
                payload_offset, begin, end = work.ranges[3 * index : 3 * index + 3]
                data = item.tensor_data
                assert data is not None
                itemsize = data.properties.dtype.itemsize
                first, last = (
                    payload_offset + itemsize * position_of(data.size, data.chunk.offsets, data.chunk.sizes, element)
                    for element in (begin, end - 1)
                )
                yield Extent(first, last + itemsize, rank, (end - begin) * itemsize)

    def _complete(
        self, frame: ArchiveFrame, crcs: Sequence[int], first_bytes: Mapping[int, bytes], written: Sequence[Written]
    ) -> None:
        try:
            self._send_rest(frame, frame.pieces(crcs, first_bytes, compute_crc32=self.compute_crc32), written)
        except BaseException as e:
            if self._upload is not None:
                try:
                    self._upload.abort()
                except Exception as failure:
                    note_discard_failed(e, failure, self._place.url)
            raise

    def _send_rest(self, frame: ArchiveFrame, pieces: Iterator[tuple[int, bytes]], written: Sequence[Written]) -> None:
        begin = self._cuts[-1]
        if not begin:
            pieces = _with_rows(pieces, frame.storages_end, written)
            if frame.nbytes <= self._sizes.at_once_nbytes:
                whole = b"".join(data for _, data in pieces)
                self._sidecar.remove()
                multipart_stores.put(self._place, memoryview(whole), replace=self._replace)
                return
        upload = self._upload or self._begin()
        sent = [part for of_rank in written for part in of_rank.parts]
        rest = (data for offset, data in pieces if offset >= begin)
        sent += _send(upload, rest, frame.nbytes - begin, len(self._cuts), self._sizes)
        self._sidecar.remove()
        upload.complete(sent, replace=self._replace)


def _deputies(addresses: Sequence[Address | None], own: Address | None) -> set[int]:
    """The first other rank, and the first one on another machine: it outlives the coordinator's."""
    others = [(rank, each) for rank, each in enumerate(addresses) if each is not None and each != own]
    elsewhere = [rank for rank, each in others if own is not None and each.host != own.host]
    return {ranks[0] for ranks in ([rank for rank, _ in others], elsewhere) if ranks}


def _with_rows(
    pieces: Iterable[tuple[int, bytes]], storages_end: int, written: Sequence[Written]
) -> Iterator[tuple[int, bytes]]:
    """All bytes of the file in order: those of the storages, which the ranks have returned, at its beginning."""
    storages = bytearray(storages_end)
    for of_rank in written:
        for rows, data in of_rank.rows:
            for row in range(rows.num_rows):
                at = rows.offset + row * rows.pitch
                storages[at : at + rows.row_nbytes] = data[row * rows.row_nbytes : (row + 1) * rows.row_nbytes]
    is_given = False
    for offset, data in pieces:
        if offset < storages_end:
            storages[offset : offset + len(data)] = data
            continue
        if not is_given:
            yield 0, bytes(storages)
            is_given = True
        yield offset, data


def _send(
    upload: MultipartUpload, data: Iterable[bytes], nbytes: int, first_part: int, of_rank: PartSizes
) -> list[SentPart]:
    """Bytes in their order, as parts from ``first_part`` on.

    Raises:
        OSError: what the store reported.
    """
    step = max(of_rank.part_nbytes, -(-nbytes // _MAX_NUM_LAST_PARTS))
    sizes = {first_part + i: min(step, nbytes - begin) for i, begin in enumerate(range(0, nbytes, step))}
    own = OwnParts(upload, sizes, {}, {}, connections=of_rank.connections)
    try:
        part, filled = first_part, 0
        for each in data:
            left = memoryview(each)
            while left:
                piece = left[: sizes[part] - filled]
                own.buffer(part)[filled : filled + len(piece)] = piece
                own.put(part, len(piece))
                filled += len(piece)
                if filled == sizes[part]:
                    part, filled = part + 1, 0
                left = left[len(piece) :]
        return own.finish(lambda: None)
    except BaseException as e:
        own.fail(e)
        raise
    finally:
        own.close()


def _abandon(upload: MultipartUpload | None, url: str, over: threading.Event) -> None:
    """The first call discards what was sent, unless that has become the object."""
    over.set()
    if upload is None:
        return
    try:
        upload.abort()
    except Exception as e:
        warnings.warn(f"{url}: what was uploaded could not be discarded: {e}", stacklevel=2)
