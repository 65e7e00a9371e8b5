"""torch's format before 1.6: five pickles one behind the other, then the storages, each behind its number of elements.

The pickles are the format's number, its version, what machine wrote it, the object, and the keys of the storages in the
order in which they follow. `torch.serialization._legacy_save` writes it.
"""

from __future__ import annotations

import contextlib
import pickletools
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple, cast

import torch
import torch.serialization

from ..archive.payload_ranges import PayloadRange, RangeEntries
from ..errors import CorruptCheckpointError, FileKindError, corrupt
from ..formats import kinds
from ..pickles.hash_bounds import check_pickle
from ..pickles.persistent_ids import storage_types
from ..pickles.restricted import unpickled
from ..pickles.traced_pickle import TracedPickle
from ..untrusted.limits import SPARE_NBYTES, shown
from .opened_bytes import OpenedBytes

_NUM_PICKLES = 5
_VERSION = 1001
_COUNT_NBYTES = 8
_MAX_ALIGNMENT = 16
_TAR_MEMBERS = {"storages", "tensors", "pickle"}


class LegacyFile(NamedTuple):
    """What is there, as far as it can be told without unpickling the object."""

    object_pickle: bytes
    keys: list[str]  #: of the storages, in the order of the file
    data_offset: int  #: of the first storage, with its count


class StoredStorage(NamedTuple):
    """What the object says of a storage."""

    nbytes: int
    itemsize: int


def parse(opened: OpenedBytes) -> LegacyFile:
    """
    Raises:
        CorruptCheckpointError: the file is not in this format, or damaged before the storages.
    """
    try:
        with opened.stream() as stream:
            clipped = _Clipped(stream, opened.nbytes)
            ends = [_pickle_end(clipped) for _ in range(_NUM_PICKLES)]
        begins = [0, *ends]
        pickles = [opened.read_at(begin, end - begin) for begin, end in zip(begins, ends, strict=False)]
        number, version, _, _, keys = (
            None if at in (2, 3) else _plain(each, opened) for at, each in enumerate(pickles)
        )
    except CorruptCheckpointError:
        raise
    except Exception as e:  # whatever a damaged stream leads to
        raise corrupt(opened.name, f"the file, in torch's legacy format, ends too early or is damaged ({e})") from None
    if number != torch.serialization.MAGIC_NUMBER or version != _VERSION:
        raise corrupt(opened.name, f"a file in torch's legacy format of version {shown(str(version))}")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise corrupt(opened.name, "its list of storages is not sound")
    return LegacyFile(pickles[3], keys, ends[-1])


def _plain(stream: bytes, opened: OpenedBytes) -> Any:
    check_pickle(stream, opened.name)
    return unpickled(stream, {})


class _Clipped:
    """A stream of which no more is asked for than it has."""

    def __init__(self, stream: BinaryIO, nbytes: int) -> None:
        self._stream, self._nbytes = stream, nbytes
        self.tell = stream.tell
        self.readline = stream.readline

    def read(self, nbytes: int) -> bytes:
        return self._stream.read(min(nbytes, max(self._nbytes - self._stream.tell(), 0)))


def _pickle_end(stream: _Clipped) -> int:
    for _ in pickletools.genops(cast(Any, stream)):
        pass
    return int(stream.tell())


def entries(opened: OpenedBytes, file: LegacyFile, storages: Mapping[str, StoredStorage]) -> RangeEntries:
    """Where the storages lie, in the order of the file.

    Args:
        storages: by key, what the object says of each.

    Raises:
        CorruptCheckpointError: the file says otherwise, or ends too early.
    """
    missing = [key for key in storages if key not in set(file.keys)]
    if missing:
        raise corrupt(opened.name, f"it has no storage {shown(missing[0])!r}, which its object asks for")
    ranges = []
    at = file.data_offset
    for key in file.keys:
        said = storages.get(key)
        if said is None:
            raise corrupt(opened.name, f"storage {shown(key)!r} is nothing's")
        count = opened.read_at(at, _COUNT_NBYTES)
        if len(count) < _COUNT_NBYTES or at + _COUNT_NBYTES + said.nbytes > opened.nbytes:
            raise corrupt(opened.name, f"the file ends too early: storage {shown(key)!r} has {said.nbytes} bytes")
        numel = int.from_bytes(count, "little")
        if numel * said.itemsize != said.nbytes:
            raise corrupt(
                opened.name, f"storage {shown(key)!r} has {numel} elements, its object says {said.nbytes} bytes"
            )
        ranges.append(PayloadRange(at + _COUNT_NBYTES, said.nbytes, min(said.itemsize, _MAX_ALIGNMENT)))
        at += _COUNT_NBYTES + said.nbytes
    return RangeEntries(ranges, file.keys)


def said_without_unpickling(file: LegacyFile) -> dict[str, StoredStorage]:
    """What the object says of its storages, by key.

    Raises:
        ValueError: that cannot be told.
    """
    trace = _SavedIds(file.object_pickle)
    try:
        trace.follow()
        return dict(map(_said, trace.found))
    except Exception:
        raise ValueError("its object cannot be followed") from None


def dtype_of(storage_type: Any) -> torch.dtype:
    """That the number of elements counts: bytes of storages without a type, whose files ``torch.load`` cannot read."""
    dtype: torch.dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
    return dtype


class _SavedIds(TracedPickle):
    def __init__(self, stream: bytes) -> None:
        super().__init__(stream, SPARE_NBYTES + len(stream))
        self.found: list[Any] = []

    def _refer(self, saved_id: Any) -> None:
        if saved_id[0] in ("storage", b"storage"):
            self.found.append(saved_id[1:5])
        super()._refer(saved_id)


def _said(saved_id: Any) -> tuple[str, StoredStorage]:
    storage_type, key, _, numel = saved_id
    key = torch.serialization._maybe_decode_ascii(key)  # of a file that Python 2 wrote
    module, _, name = storage_type.name.rpartition(".")
    itemsize = torch._utils._element_size(dtype_of(storage_types()[f"{module} {name}"]))
    return key, StoredStorage(numel * itemsize, itemsize)


def tar_members(opened: OpenedBytes) -> dict[str, int]:
    """The members of a tar archive that torch before 0.1.10 wrote, with their sizes in bytes.

    Raises:
        FileKindError: it is another one.
        CorruptCheckpointError: it ends too early.
    """
    import tarfile

    members: dict[str, int] = {}
    with contextlib.suppress(tarfile.TarError), opened.stream() as stream, tarfile.open(fileobj=stream) as tar:
        for member in tar:
            if member.offset_data + member.size > opened.nbytes:
                raise corrupt(opened.name, f"the file ends too early, in {shown(member.name)!r}")
            members[member.name] = member.size
    if not members.keys() >= _TAR_MEMBERS:
        raise FileKindError(f"{opened.name}: {kinds.TAR}")
    return members
