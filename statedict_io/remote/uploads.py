"""An object of a store, written from front to back, and sent as the store can: in parts, at once or in turn."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from ..progress import ProgressCallback
from . import multipart_stores
from .front_to_back import FrontToBackUpload
from .parallel_upload import ParallelUpload
from .stores import Place


class Upload(Protocol):
    """Used by one thread, as a context manager: leaving it without :meth:`commit` discards what was written.

    All methods raise an OSError with the URL for what the store reports.
    """

    def write(self, data: memoryview) -> None:
        """Takes all of it; ``data`` may change afterwards."""

    def flush(self) -> None:
        """After the last :meth:`write`, where there may be something to do before :meth:`commit`: as much as possible
        is in the store on return, and there is no object yet."""

    def commit(self) -> None:
        """The object is there on return, whole; until then the old one is."""

    def __enter__(self) -> Upload: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def open_upload(place: Place, nbytes: int | None, progress: ProgressCallback | None = None) -> Upload:
    """
    Args:
        place: of the object, which may exist.
        nbytes: how much will be written; None where nobody knows.
        progress: called by :meth:`Upload.write` and :meth:`Upload.commit` with (bytes that the store has acknowledged,
            ``nbytes``), where ``nbytes`` is known. Stores that acknowledge nothing before the end: that were handed to
            the file system.

    Raises:
        OSError: what the store reported, with the URL.
    """

    def report(bytes_done: int) -> None:
        if progress is not None and nbytes is not None:
            progress(bytes_done, nbytes)

    kind = ParallelUpload if multipart_stores.takes_parts(place) else FrontToBackUpload
    return kind(place, nbytes, report)
