"""A range of bytes that is read at once, into several pieces of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Read:
    """What a source of ranges is asked for.

    Args:
        offset: of the first byte, in the source.
        nbytes: how many.
        buffers: where they go, one behind the other: writable, of bytes. A function is called when the range is about
            to be read, for memory that is needed only then.
        finish: called with the buffers when they are filled, in any thread, before the range counts as read.
        counted_nbytes: what it adds to progress; ``nbytes`` by default.
    """

    __slots__ = ("_buffers", "_finish", "counted_nbytes", "nbytes", "offset")

    def __init__(
        self,
        offset: int,
        nbytes: int,
        buffers: Sequence[memoryview] | Callable[[], Sequence[memoryview]],
        finish: Callable[[Sequence[memoryview]], None] | None = None,
        counted_nbytes: int | None = None,
    ) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self.counted_nbytes = nbytes if counted_nbytes is None else counted_nbytes
        self._buffers = buffers
        self._finish = finish

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    def moved(self, nbytes: int) -> Read:
        """The same of a range that lies so much further back."""
        return Read(self.offset + nbytes, self.nbytes, self._buffers, self._finish, self.counted_nbytes)

    def begin(self) -> Sequence[memoryview]:
        return self._buffers() if callable(self._buffers) else self._buffers

    def finish(self, buffers: Sequence[memoryview]) -> None:
        """``buffers``: that :meth:`begin` gave."""
        if self._finish is not None:
            self._finish(buffers)


class Scatter:
    """Fills pieces of memory, one behind the other, from data that comes in pieces of other sizes.

    Args:
        skip: so many bytes are filled already.
    """

    __slots__ = ("_at", "_buffers", "_index", "nbytes_done")

    def __init__(self, buffers: Sequence[memoryview], skip: int = 0) -> None:
        self._buffers = buffers
        self._index = 0
        self._at = 0  #: in the buffer
        self.nbytes_done = 0
        self.advance(skip)

    def room(self) -> memoryview:
        """What is to be filled next, empty at the end; :meth:`advance` says that it was."""
        return self._buffers[self._index][self._at :] if self._index < len(self._buffers) else memoryview(b"")

    def advance(self, nbytes: int) -> None:
        self.nbytes_done += nbytes
        self._at += nbytes
        while self._index < len(self._buffers) and self._at >= len(self._buffers[self._index]):
            self._at -= len(self._buffers[self._index])
            self._index += 1

    def write(self, data: bytes | memoryview) -> None:
        """Copies no more than there is room for."""
        data = memoryview(data)
        while data and (room := self.room()):
            piece = data[: len(room)]
            room[: len(piece)] = piece
            self.advance(len(piece))
            data = data[len(piece) :]
