"""Which stores take an object in parts, in any order (``multipart``)."""

from __future__ import annotations

import threading
from typing import Any

from .multipart import MultipartUpload, PartLimits
from .stores import Place


def takes_parts(place: Place) -> bool:
    """Whether :func:`begin` can be used there. Nothing is asked of the store."""
    from . import s3_client

    return s3_client.serves(place.fs)


def limits_of(place: Place) -> PartLimits:
    from .s3_multipart import LIMITS

    return LIMITS


def begin(place: Place, stop: threading.Event | None = None) -> MultipartUpload:
    """
    Args:
        place: of the object, which may exist.
        stop: when set, nothing is repeated any more; :meth:`~statedict_io.remote.multipart.MultipartUpload.stop` sets
            it.

    Raises:
        OSError: what the store reported, with the URL.
    """
    from .s3_multipart import S3MultipartUpload

    return S3MultipartUpload.begin(place, stop)


def join(place: Place, ticket: Any) -> MultipartUpload:
    """The upload of another process, for sending parts. Nothing is asked of the store.

    Args:
        place: of the same object.
        ticket: of the :class:`~statedict_io.remote.multipart.MultipartUpload` that was begun.
    """
    from .s3_multipart import S3MultipartUpload

    return S3MultipartUpload.join(place, ticket)


def put(place: Place, data: memoryview, *, replace: bool = True, stop: threading.Event | None = None) -> None:
    """Writes an object by one request. Arguments and errors as of :func:`begin` and
    :meth:`~statedict_io.remote.multipart.MultipartUpload.complete`."""
    from . import s3_multipart

    s3_multipart.put(place, data, replace=replace, stop=stop)
