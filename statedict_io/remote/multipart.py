"""An object that is sent in parts, in any order, by any thread of any process: what a store has to offer for that.

``multipart_stores`` says which stores have it. The object appears whole, by :meth:`MultipartUpload.complete`, or not at
all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class PartLimits:
    """What a store takes."""

    least_nbytes: int  #: of a part other than the last
    most_nbytes: int  #: of a part
    max_num_parts: int  #: their numbers are 1 to this


@dataclass(frozen=True)
class SentPart:
    """A part that the store has taken. Can be pickled: the process that completes needs those of all others."""

    number: int
    nbytes: int
    etag: str  #: the store's name for its content
    crc32: int | None  #: of its bytes; None where the store takes none


class MultipartUpload(Protocol):
    """Of one object, which may exist: the old one stays until the completion.

    All methods raise an OSError with the URL. Requests that may have failed by bad luck are repeated, each by itself,
    with growing waits.
    """

    limits: PartLimits

    @property
    def ticket(self) -> Any:
        """What another process needs to send parts of this upload, by ``multipart_stores.join``. Can be pickled."""

    def put_part(self, number: int, data: memoryview) -> SentPart:
        """Returns when the store has the part. Any thread, several at once; again with the same number replaces it.

        Args:
            number: from 1 on; their order is that of the bytes in the object, gaps are allowed.
            data: contiguous bytes, which must not change meanwhile. They are not copied.

        Raises:
            OSError: ECANCELED if :meth:`stop` or :meth:`abort` was called meanwhile.
        """

    def complete(self, parts: Iterable[SentPart], *, replace: bool = True) -> None:
        """The object is there on return. Where the answer is lost, the store is asked whether it is.

        Args:
            parts: all of them, in any order.
            replace: False where an object of that name must stay.

        Raises:
            FileExistsError: it must stay, and there is one. Only stores without conditional requests may miss one that
                appears at the same moment.
            OSError: the object is not there, or nobody can tell; :meth:`abort` is still to be called.
        """

    def stop(self) -> None:
        """Makes the repetitions of this process end; parts that are being sent are sent."""

    def abort(self) -> None:
        """Discards all parts. The object is what it was before. Waits for the parts that this process is sending: one
        that arrives afterwards would stay in the store, and be paid for. Other processes must have ended theirs.
        """
