"""From a path or URL to its folder."""

from __future__ import annotations

import os

from ..remote.urls import is_url
from .folder import Folder
from .local_folder import LocalFolder


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """
    Raises:
        TypeError: neither a path nor a URL.
        ImportError, ValueError: as of URLs in :func:`statedict_io.save`.
    """
    given = os.fsdecode(path)
    if is_url(given):
        from .store_folder import StoreFolder, local_path_of  # which only URLs need

        local = local_path_of(given)
        if local is None:
            return StoreFolder(given)
        given = local
    return LocalFolder(given)
