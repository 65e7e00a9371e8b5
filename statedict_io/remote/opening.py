"""What to read for a URL."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from . import s3_client
from .file_object import opened_file
from .ranges import RangedObject
from .stores import Place, locate


@dataclass(frozen=True)
class OpenedURL:
    """What to read instead of a URL: a file that is here, or ranges of an object that is not."""

    url: str
    content: str | RangedObject  #: a path: of the file itself, or of the copy that a caching scheme has made


@contextlib.contextmanager
def open_url(url: str) -> Iterator[OpenedURL]:
    """Open inside the block.

    Raises:
        OSError: what the store reported, with the URL: FileNotFoundError where there is no such object.
        ImportError, ValueError: as :func:`~statedict_io.remote.stores.locate`.
    """
    place = locate(url)
    if place.local_path is not None:
        yield OpenedURL(place.url, place.local_path)
        return
    with _opened(place) as content:
        yield OpenedURL(place.url, content)


def _opened(place: Place) -> contextlib.AbstractContextManager[str | RangedObject]:
    if s3_client.serves(place.fs):
        from .s3_object import S3Object

        return contextlib.nullcontext(S3Object(place))
    return opened_file(place)
