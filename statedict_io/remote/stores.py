"""The fsspec file system behind a URL, and its errors in one shape: an OSError that names the URL.

fsspec is imported when the first URL is used, inside the functions of this package that need it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import StateDictIOError

_PASSWORD = re.compile(r"(://[^/@:]*):[^/@]*@")

_NUMBER_OF_TYPE = (
    (FileNotFoundError, errno.ENOENT),
    (PermissionError, errno.EACCES),
    (FileExistsError, errno.EEXIST),
    (IsADirectoryError, errno.EISDIR),
    (NotADirectoryError, errno.ENOTDIR),
    (TimeoutError, errno.ETIMEDOUT),
    (ConnectionError, errno.ECONNABORTED),
    (NotImplementedError, errno.EOPNOTSUPP),
)
_NUMBER_OF_STATUS = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 408: errno.ETIMEDOUT}


@dataclass(frozen=True)
class Place:
    """Where a URL leads. Nothing has been asked of the store yet."""

    url: str  #: as errors show it: without a password
    fs: Any  #: an ``fsspec.AbstractFileSystem``
    path: str  #: in it

    @property
    def file_name(self) -> str:
        return self.path[self.path.rfind("/") + 1 :]

    @property
    def identity(self) -> str:
        """Equal for URLs of one object, however they are spelled."""
        return f"{type(self.fs).__name__}:{self.fs.unstrip_protocol(self.path)}"

    @property
    def local_path(self) -> str | None:
        """For ``file://`` and its like the path, which needs no fsspec."""
        from fsspec.implementations.local import LocalFileSystem

        return self.path if isinstance(self.fs, LocalFileSystem) else None


def locate(url: str) -> Place:
    """Raises:
    ImportError: fsspec, or what it needs for the scheme, is not installed.
    ValueError: no such scheme.
    """
    shown = _PASSWORD.sub(r"\1:***@", url)
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ImportError(f"{shown}: URLs need fsspec: pip install 'statedict-io[remote]'") from None
    try:
        fs, path = url_to_fs(url)
    except ImportError as e:
        raise ImportError(f"{shown}: {e} (fsspec has the scheme, the package that serves it is missing)") from e
    except ValueError as e:
        raise ValueError(
            f"{shown}: {e}; fsspec.available_protocols() lists those it knows, "
            "and a file of this name is written with os.path.join('.', name)"
        ) from e
    except Exception as e:
        raise as_oserror(e, shown) from e
    return Place(shown, fs, path)


@contextlib.contextmanager
def naming_errors(url: str, apart_from: type[Exception] = StateDictIOError) -> Iterator[None]:
    """Around calls of a store, and nothing else: stores raise what they like.

    Args:
        apart_from: is raised as it is, as is a :class:`~statedict_io.StateDictIOError`.
    """
    try:
        yield
    except (StateDictIOError, apart_from):
        raise
    except Exception as e:
        raise as_oserror(e, url) from e


def as_oserror(error: Exception, url: str) -> OSError:
    """``error`` with an errno, and ``url`` as its ``filename``."""
    number = _number_of(error)
    said = (error.strerror if isinstance(error, OSError) else None) or str(error).strip()
    if not said or said.strip("/'\"") in url:
        said = os.strerror(number)
    if not isinstance(error, (OSError, NotImplementedError)):
        said = f"{type(error).__name__}: {said}"
    return OSError(number, said, url)


def note_discard_failed(error: BaseException | None, failure: Exception, url: str) -> None:
    """Adds to ``error``, for which an upload to ``url`` is given up, that parts of it stay in the store."""
    left = f"what was uploaded could not be discarded: {as_oserror(failure, url).strerror}"
    if isinstance(error, OSError) and error.filename == url:
        error.strerror = f"{error.strerror}; {left}"
        error.args = (error.errno, error.strerror)  # what it is made of again in another process
    elif error is not None and hasattr(error, "add_note"):
        error.add_note(f"{url}: {left}")


def _number_of(error: Exception) -> int:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    for kind, number in _NUMBER_OF_TYPE:
        if isinstance(error, kind):
            return number
    for attribute in ("status_code", "status", "code"):
        status = getattr(error, attribute, None)
        if isinstance(status, int) and status in _NUMBER_OF_STATUS:
            return _NUMBER_OF_STATUS[status]
    # botocore's NoCredentialsError and its like, which come before there is an answer.
    return errno.EACCES if "Credential" in type(error).__name__ else errno.EIO
