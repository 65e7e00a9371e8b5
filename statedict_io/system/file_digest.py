"""The SHA-256 of a file, of its bytes as they are written."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

#: of the file beside another one that holds its sum
SUFFIX = ".sha256"
_PIECE_NBYTES = 1 << 20


class FileDigest:
    """Of one save; each attempt to write its file begins with :meth:`begin`.

    Args:
        has_sidecar: it is also wanted in a file beside the saved one.
    """

    def __init__(self, *, has_sidecar: bool = True) -> None:
        import hashlib  # OpenSSL's, which uses what the CPU has

        self.has_sidecar = has_sidecar
        self._new = hashlib.sha256
        self.begin()

    def begin(self) -> None:
        self._hash: Any = self._new()
        self._sum: bytes | None = None

    def update(self, data: bytes | bytearray | memoryview) -> None:
        self._hash.update(data)

    def update_zeros(self, nbytes: int) -> None:
        zeros = bytes(min(nbytes, _PIECE_NBYTES))
        while nbytes:
            self._hash.update(zeros[:nbytes])
            nbytes -= min(nbytes, len(zeros))

    def give(self, sum_of_file: bytes | bytearray) -> None:
        """What somebody else has computed."""
        self._sum = bytes(sum_of_file)

    def update_from(self, fd: int) -> None:
        """With all that comes from a descriptor."""
        while data := os.read(fd, _PIECE_NBYTES):
            self._hash.update(data)

    def teed(self, write: Callable[[memoryview], Any]) -> Callable[[memoryview], Any]:
        """``write``, hashing what it is given."""

        def hash_and_write(data: memoryview) -> Any:
            self._hash.update(data)
            return write(data)

        return hash_and_write

    def hexdigest(self) -> str:
        return (self._hash.digest() if self._sum is None else self._sum).hex()
