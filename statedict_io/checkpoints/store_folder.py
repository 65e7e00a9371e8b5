"""A folder of a store: the objects whose names begin with its own. Stores have neither links nor locks."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from ..remote.stores import locate, naming_errors
from .folder import PIECE_NBYTES, Listed

_VERSIONS = ("ETag", "etag", "md5", "md5Hash", "generation", "VersionId", "content_md5", "ino")
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "created", "modified")

#: others make them with the first object
_HAVE_DIRECTORIES = {"arrow_hdfs", "dbfs", "ftp", "hdfs", "sftp", "smb", "ssh", "webhdfs"}


def local_path_of(url: str) -> str | None:
    return locate(url).local_path


class StoreFolder:
    """Used from any thread, as far as its fsspec file system is."""

    is_local = False

    def __init__(self, url: str) -> None:
        self._given = url.rstrip("/")
        place = locate(self._given)
        self.path = place.url
        self.identity = place.identity
        self._fs: Any = place.fs
        self._path = place.path.rstrip("/")

    def listed(self) -> list[Listed]:
        try:
            with naming_errors(self.path):
                self._fs.invalidate_cache(self._path)
                found = self._fs.ls(self._path, detail=True)
        except FileNotFoundError:
            return []
        entries = []
        for entry in found:
            name = str(entry["name"]).rstrip("/").rpartition("/")[2]
            entries.append(Listed(name, "file" if entry.get("type") == "file" else "other", _version(entry)))
        return entries

    def path_of(self, name: str) -> str:
        return f"{self._given}/{name}"

    def shown(self, name: str) -> str:
        return f"{self.path}/{name}"

    def version(self, name: str) -> str | None:
        found = self._info(name)
        return None if found is None else _version(found)

    def nbytes_and_time(self, name: str) -> tuple[int, float | None] | None:
        found = self._info(name)
        return None if found is None else (int(found.get("size") or 0), _time(found))

    def _info(self, name: str) -> dict[str, Any] | None:
        try:
            with naming_errors(self.shown(name)):
                self._fs.invalidate_cache(self._path)
                found: dict[str, Any] = self._fs.info(f"{self._path}/{name}")
        except FileNotFoundError:
            return None
        return found if found.get("type") == "file" else None

    def read(self, name: str, max_nbytes: int) -> bytes | None:
        found = self._info(name)
        if found is None or not (found.get("size") or 0) <= max_nbytes:
            return None
        try:
            with naming_errors(self.shown(name)):
                return bytes(self._fs.cat_file(f"{self._path}/{name}"))
        except FileNotFoundError:
            return None

    def pieces(self, name: str) -> Iterator[bytes]:
        with naming_errors(self.shown(name)), self._fs.open(f"{self._path}/{name}", "rb") as file:
            while piece := file.read(PIECE_NBYTES):
                yield piece

    def write(self, name: str, data: bytes) -> None:
        with naming_errors(self.shown(name)):
            self._fs.pipe_file(f"{self._path}/{name}", data)

    def sync(self, name: str, *, also_name: bool) -> None:
        """How durable an object is, is up to the store."""

    def create(self, *, durable: bool) -> None:
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        if protocols & _HAVE_DIRECTORIES:
            with naming_errors(self.path):
                self._fs.makedirs(self._path, exist_ok=True)

    def remove(self, name: str) -> None:
        try:
            with naming_errors(self.shown(name)):
                self._fs.rm_file(f"{self._path}/{name}")
        except FileNotFoundError:
            pass

    def remove_leftovers(self, names: list[str], *, fresh: str | None) -> None:
        """What was uploaded and not committed has no name."""


def _version(entry: dict[str, Any]) -> str:
    said = [str(entry[key]) for key in (*_VERSIONS, *_TIMES) if entry.get(key) is not None]
    return "/".join([str(entry.get("size")), *said])


def _time(entry: dict[str, Any]) -> float | None:
    for key in _TIMES:
        value = entry.get(key)
        if isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, datetime):
            return value.timestamp()
    return None
