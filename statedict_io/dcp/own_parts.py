"""The parts of an object that this process sends: put together by several threads in any order, sent when they are
whole.

Memory: the buffers of :func:`num_buffers` parts. So that no rank waits for one that waits for it, all ranks make their
bytes of the parts in the order of the file, and a buffer is for the parts that come first: the first part that is not
sent then always has one, and everybody can do what it lacks.
"""

from __future__ import annotations

import bisect
import errno
import mmap
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..errors import StateDictIOError
from ..remote.multipart import MultipartUpload, SentPart
from ..remote.team import Team
from .exchange import Rows

_CRC_NBYTES = 4
# Of buffers beside those that are being sent: of parts that wait for other ranks.
_WAITING_NBYTES = 48 << 20
_STALL_SECONDS = 1800.0


class CRCPlace(NamedTuple):
    """Where a record's CRC goes."""

    part: int  #: its number
    offset: int  #: in the part
    nbytes: int  #: of the record


def num_buffers(connections: int, part_nbytes: int) -> int:
    return connections + _WAITING_NBYTES // part_nbytes


class OwnParts:
    """From any thread, but for :meth:`finish` and :meth:`close`.

    Args:
        upload: to send them to.
        sizes: of the parts, by number.
        known: part -> (offset in it, bytes) that are there from the start. Where a CRC goes they have zeros.
        crcs: of records, by the offset of their payload.
        connections: parts that are sent at once.
    """

    def __init__(
        self,
        upload: MultipartUpload,
        sizes: Mapping[int, int],
        known: Mapping[int, list[tuple[int, bytes]]],
        crcs: Mapping[int, CRCPlace],
        *,
        connections: int,
    ) -> None:
        self._upload = upload
        self._sizes = dict(sizes)
        self._known = known
        self._crc_places = crcs
        self.nbytes = sum(sizes.values())
        self.nbytes_sent = 0
        self.on_failure: Callable[[], None] = lambda: None
        self._largest = max(sizes.values(), default=1)
        self._num_buffers = num_buffers(connections, self._largest)
        self._team = Team(connections, "statedict_io parts")
        self._changed = self._team.changed
        # Changed and looked at with its lock held.
        self._crcs_so_far = {record: [0, place.nbytes] for record, place in crcs.items()}
        self._crcs: dict[int, list[tuple[int, int]]] = {}  #: part -> (offset in it, CRC), before it has a buffer
        self._num_crcs = dict.fromkeys(sizes, 0)
        for place in crcs.values():
            self._num_crcs[place.part] += 1
        self._unsent = sorted(sizes)
        self._idle: list[mmap.mmap] = []
        self._begun: set[int] = set()
        self._open: dict[int, mmap.mmap] = {}
        self._missing: dict[int, int] = {}  #: bytes, of open parts
        self._sent: list[SentPart] = []
        self._last_change = time.monotonic()
        self._is_closed = False

    def buffer(self, part: int) -> memoryview:
        """Of all its bytes; waits for the memory.

        Raises:
            BaseException: what has failed meanwhile.
        """
        self.begin(part)
        with self._changed:
            if part not in self._missing:
                raise StateDictIOError(f"part {part} was given bytes twice")
            return memoryview(self._open[part])[: self._sizes[part]]

    def begin(self, part: int) -> None:
        """As :meth:`buffer`; for a part that this process may have no bytes of."""
        self._wait(lambda: part in self._begun or bisect.bisect_left(self._unsent, part) < self._num_buffers)
        with self._changed:
            if part not in self._begun:
                self._begun.add(part)
                self._begin(part)

    def put(self, part: int, nbytes: int) -> None:
        """So many of its bytes have been put into its buffer."""
        with self._changed:
            self._fill(part, nbytes)

    def add_crc(self, record: int, crc: int, nbytes: int) -> None:
        """See :meth:`~statedict_io.dcp.exchange.Sink.add_crc`."""
        with self._changed:
            so_far = self._crcs_so_far[record]
            so_far[0] ^= crc
            so_far[1] -= nbytes
            self._note_change()
            if so_far[1] == 0:
                place = self._crc_places[record]
                if place.part in self._open:
                    self._put_crc(place.part, place.offset, so_far[0])
                else:
                    self._crcs.setdefault(place.part, []).append((place.offset, so_far[0]))

    # --- of exchange.Sink

    def rows(self, rows: Rows) -> memoryview:
        last = rows.offset + (rows.num_rows - 1) * rows.pitch + rows.row_nbytes
        if rows.num_rows < 1 or last > self._sizes.get(rows.part, 0):
            raise StateDictIOError(f"a rank has sent rows that part {rows.part} does not have")
        return self.buffer(rows.part)[rows.offset : last]

    def arrived(self, rows: Rows) -> None:
        self.put(rows.part, rows.nbytes)

    def fail(self, error: BaseException) -> BaseException:
        """Ends everything. Returns the first error, which is the one that is to be raised."""
        with self._changed:
            first = self._team.error = self._team.error or error
            if self._is_closed:
                return first
            self._changed.notify_all()
        self._upload.stop()
        self.on_failure()
        return first

    # --- of the thread that saves

    def finish(self, report: Callable[[], None]) -> list[SentPart]:
        """Waits until all are sent, calling ``report`` now and then.

        Raises:
            BaseException: what has failed.
        """
        self._wait(lambda: not self._unsent, report)
        return self._sent

    def close(self) -> None:
        """Returns when nothing is being sent any more."""
        with self._changed:
            self._is_closed = True
        self._team.end()

    def _wait(self, is_so: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> None:
        def is_so_in_time() -> bool:
            if time.monotonic() - self._last_change > _STALL_SECONDS:
                raise TimeoutError(
                    errno.ETIMEDOUT, f"no part has been sent and no rank has sent anything for {_STALL_SECONDS:.0f} s"
                )
            return is_so()

        self._team.wait(is_so_in_time, meanwhile)

    def _note_change(self) -> None:
        self._last_change = time.monotonic()
        self._changed.notify_all()

    def _begin(self, part: int) -> None:
        memory = self._idle.pop() if self._idle else mmap.mmap(-1, self._largest)
        self._open[part] = memory
        self._missing[part] = self._sizes[part]
        filled = -_CRC_NBYTES * self._num_crcs[part]
        for offset, data in self._known.get(part, ()):
            memory[offset : offset + len(data)] = data
            filled += len(data)
        self._fill(part, filled)
        for offset, crc in self._crcs.pop(part, ()):
            self._put_crc(part, offset, crc)

    def _put_crc(self, part: int, offset: int, crc: int) -> None:
        self._open[part][offset : offset + _CRC_NBYTES] = crc.to_bytes(_CRC_NBYTES, "little")
        self._fill(part, _CRC_NBYTES)

    def _fill(self, part: int, nbytes: int) -> None:
        self._missing[part] -= nbytes
        self._note_change()
        if self._missing[part] == 0:
            del self._missing[part]
            self._team.give(lambda: self._send(part))

    def _send(self, part: int) -> None:
        memory = self._open[part]
        try:
            sent = self._upload.put_part(part, memoryview(memory)[: self._sizes[part]])
        except BaseException as e:
            self.fail(e)
            raise
        with self._changed:
            del self._open[part]
            self._idle.append(memory)
            self._sent.append(sent)
            self._unsent.remove(part)
            self.nbytes_sent += self._sizes[part]
            self._note_change()
