"""A payload that lies in another file: the Python backend writes it piece by piece, never as a whole in memory."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import corrupt
from ..system.descriptors import read_at, read_into


class FileRange:
    """``nbytes`` bytes at ``offset`` of the file behind ``fd``, which must stay open; ``path`` is for messages."""

    def __init__(self, fd: int, offset: int, nbytes: int, path: str) -> None:
        self._fd, self._offset, self._nbytes, self._path = fd, offset, nbytes, path

    def nbytes(self) -> int:
        """As ``torch.UntypedStorage.nbytes``."""
        return self._nbytes

    def read(self) -> bytes:
        data = read_at(self._fd, self._nbytes, self._offset)
        if len(data) == self._nbytes:
            return data
        return b"".join(bytes(piece) for piece in self.pieces(1 << 20))  # one call reads 2 GiB at most

    def pieces(self, piece_nbytes: int) -> Iterator[memoryview]:
        """From front to back; each is valid until the next."""
        buffer = memoryview(bytearray(min(piece_nbytes, self._nbytes)))
        done = 0
        while done < self._nbytes:
            piece = buffer[: self._nbytes - done]
            filled = 0
            while filled < len(piece):
                taken = read_into(self._fd, piece[filled:], self._offset + done + filled)
                if taken == 0:
                    raise corrupt(self._path, "the file became shorter while it was read")
                filled += taken
            yield piece
            done += filled
