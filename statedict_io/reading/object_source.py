"""An archive in a file object, as a source for the Python reader."""

from __future__ import annotations

import io
import threading
from typing import Any


class ObjectSource:
    """The archive in a file object, from where it stands on."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._lock = threading.Lock()
        self.name = str(getattr(file, "name", "the file object"))
        self.start = file.tell()
        file.seek(0, io.SEEK_END)
        self.nbytes = file.tell() - self.start
        file.seek(self.start)

    def read_into(self, destination: memoryview, offset: int) -> None:
        with self._lock:
            before = self._file.tell()
            self._file.seek(self.start + offset)
            while destination:
                data = self._file.read(len(destination))
                if not data:
                    raise EOFError
                destination[: len(data)] = data
                destination = destination[len(data) :]
            self._file.seek(before)
