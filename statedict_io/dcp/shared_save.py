"""The coordinator's side of one save: the frame of the file, and what it is written into, which becomes the target."""

from __future__ import annotations

import functools
import threading
import uuid
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.serialization

from ..backends import reproduction
from ..backends.strips import bytes_of, preallocate
from ..installed import torch_format
from ..names.nested_state import nested
from ..pickles.pickling import PickledObject, PythonStorageTable
from ..writing.in_place import InPlace
from ..writing.places import OpenFile
from ..writing.replacement import Replacement
from ..writing.sidecar import Sidecar
from ..writing.targets import FileTarget
from .archive_frame import ArchiveFrame
from .call_watch import when_call_has_ended
from .global_plan import GlobalState
from .orders import PartsOrder, Written
from .structure import pickle_structure

_saves: weakref.WeakValueDictionary[str, SharedSave] = weakref.WeakValueDictionary()  #: of this process, by key


class SharedSave(ABC):
    """A place in the file for every byte. :meth:`finish` makes it the target; otherwise what has been written vanishes.

    DCP tells a storage when a save has succeeded, never that it has failed. Of a rank that fails in its writer the
    coordinator hears by a :class:`FailureNotice`; after all other failures, such as a rank that is killed, what has
    been written vanishes when DCP's call has ended (:mod:`.call_watch`).

    Args:
        archive_name: prefix of all record names.
        state: of all ranks.
        unpickle: what an opaque value is, given its name and what ``torch.save`` has made of it.
    """

    def __init__(self, archive_name: str, state: GlobalState, *, unpickle: Callable[[str, bytes], Any]) -> None:
        self._unpickle = unpickle
        self._archive_name = archive_name
        self._state = state
        self._alignment = torch_format.storage_alignment()
        self.compute_crc32 = torch_format.compute_crc32()
        # Without opaque values all is known now. With them, data.pkl is known when they are: it follows the storages.
        values = [(name, state.tensors.get(name)) for name in state.names]
        self._pickled = pickle_structure(nested(values, state.paths))
        self._first_frame = self._frame(self._pickled.data_pkl, [])
        self.work = state.assign(self._first_frame)
        self.key = str(uuid.uuid4())
        self._over = threading.Event()

    @property
    def paths(self) -> list[str]:
        """Of what the ranks write into; where one does not work, the next may. None where it is no file."""
        return []

    def parts_order(self, rank: int) -> PartsOrder | None:
        """What it writes into, where that is no file."""
        del rank
        return None

    def finish(self, written: Sequence[Written]) -> None:
        """Completes the file and puts it in the target's place.

        Args:
            written: by each rank.
        """
        try:
            frame = self._frame_with_opaque(written) if self._state.opaque else self._first_frame
            crcs = [0] * len(frame.storages())
            starts: dict[int, dict[int, bytes]] = {}
            for work, part in zip(self.work, written, strict=True):
                for key, crc in zip(work.keys, part.crcs, strict=True):
                    crcs[key] ^= crc
                for place, offset, data in part.starts:
                    starts.setdefault(work.keys[place], {})[offset] = data
            whole = {key: b"".join(pieces[at] for at in sorted(pieces)) for key, pieces in starts.items()}
            first_bytes = {key: data for key, data in whole.items() if len(data) == 8}
            self._complete(frame, crcs, first_bytes, written)
        finally:
            self.abandon()

    @abstractmethod
    def abandon(self) -> None:
        """Removes what was written, where it is not the target by now. From any thread, and again."""

    @abstractmethod
    def _complete(
        self, frame: ArchiveFrame, crcs: Sequence[int], first_bytes: Mapping[int, bytes], written: Sequence[Written]
    ) -> None:
        """Writes what the ranks have not; the target is replaced on return. Arguments as of
        :meth:`~statedict_io.dcp.archive_frame.ArchiveFrame.pieces`."""

    def _watch(self, abandon: Callable[[], None]) -> None:
        """Has what is being written abandoned where nobody else does it; ``abandon`` must not refer to this object."""
        _saves[self.key] = self
        weakref.finalize(self, abandon)  # also when the interpreter ends
        # Where the call cannot be watched, it lives until the writer does another save or is gone.
        when_call_has_ended(abandon, unless=self._over)

    def _frame(self, data_pkl: bytes, inner: Sequence[torch.UntypedStorage]) -> ArchiveFrame:
        pickled = PickledObject(data_pkl, PythonStorageTable())
        records = reproduction.records(pickled, self._alignment)
        head, tail = records.head, records.tail
        if self._state.opaque:
            nbytes_of = len(self._pickled.entries)
            tail = (
                [
                    (f"data/{nbytes_of + i}", bytes(bytes_of(storage, 0, storage.nbytes())))
                    for i, storage in enumerate(inner)
                ]
                + [head[0]]
                + tail
            )
            head = head[1:]
        nbytes = [entry.nbytes for entry in self._pickled.entries]
        return ArchiveFrame(self._archive_name, head, nbytes, tail, self._alignment)

    def _frame_with_opaque(self, written: Sequence[Written]) -> ArchiveFrame:
        opaque = {name: self._unpickle(name, data) for part in written for name, data in part.opaque.items()}
        tensors = self._state.tensors
        values = [(name, tensors[name] if name in tensors else opaque[name]) for name in self._state.names]
        pickled = pickle_structure(nested(values, self._state.paths), self._pickled.entries)
        return self._frame(pickled.data_pkl, pickled.storages)


class SharedFile(SharedSave):
    """A temporary with its blocks reserved.

    Args:
        target: what to replace.
        state: of all ranks.
        durable: fsync the file and its directory.
        atomic: False writes into the target itself, of which a failed save leaves a part.
        unpickle: as of :class:`SharedSave`.
    """

    def __init__(
        self,
        target: FileTarget,
        state: GlobalState,
        *,
        durable: bool,
        atomic: bool,
        unpickle: Callable[[str, bytes], Any],
    ) -> None:
        super().__init__(target.archive_name, state, unpickle=unpickle)
        sidecar = Sidecar(target, durable=durable, is_wanted=False)
        self._file: OpenFile
        if atomic:
            self._file = Replacement(target, durable=durable, is_shared=True)
            self._commit: Callable[[], None] = functools.partial(self._file.commit, before=sidecar.remove)
        else:
            sidecar.remove()
            self._file = InPlace(target, durable=durable)
            self._commit = self._file.commit
        self._file.__enter__()
        try:
            preallocate(self._file.fd, self._first_frame.nbytes)
        except OSError as e:
            self._file.__exit__(type(e), e, None)
            raise
        self._watch(functools.partial(_abandon, self._file, self._over))

    @property
    def paths(self) -> list[str]:
        return self._file.paths

    def abandon(self) -> None:
        _abandon(self._file, self._over)

    def _complete(
        self, frame: ArchiveFrame, crcs: Sequence[int], first_bytes: Mapping[int, bytes], written: Sequence[Written]
    ) -> None:
        del written
        try:
            frame.write(self._file.fd, crcs, first_bytes, compute_crc32=self.compute_crc32)
            self._commit()
        except OSError as e:
            self._file.__exit__(type(e), e, None)
            raise


class FailureNotice:
    """Travels with a rank's exception, and abandons the save ``key`` when it arrives: when DCP unpickles the exception
    in the coordinator's process."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __reduce__(self) -> tuple[Any, ...]:
        return _abandon_save, (self._key,)


def _abandon_save(key: str) -> None:
    save = _saves.get(key)
    if save is not None:
        save.abandon()


def _abandon(file: OpenFile, over: threading.Event) -> None:
    over.set()
    file.abandon()
    file.target.close()
