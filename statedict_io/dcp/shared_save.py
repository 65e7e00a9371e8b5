"""The coordinator's side of one save: the frame of the file, its temporary, and the commit."""

from __future__ import annotations

import io
import uuid
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.serialization

from ..backends import formats
from ..backends.strips import bytes_of, preallocate
from ..pickling import PickledObject, PythonStorageTable
from ..replacement import Replacement
from ..targets import FileTarget
from .archive_frame import ArchiveFrame
from .global_plan import GlobalState
from .shares import Written
from .structure import nested, pickle_structure

_saves: weakref.WeakValueDictionary[str, SharedSave] = weakref.WeakValueDictionary()


class SharedSave:
    """A temporary with its blocks reserved and a place in it for every byte. It vanishes with this object, unless
    :meth:`finish` has made it the target.

    DCP tells a storage when a save has succeeded, never that it has failed. So nothing holds this object but the plan
    and the results that DCP passes around (see :class:`Lease`): when DCP's call is over, so is this.

    Args:
        target: what to replace.
        state: of all ranks.
        durable: fsync the file and its directory.
    """

    def __init__(self, target: FileTarget, state: GlobalState, *, durable: bool) -> None:
        self._target = target
        self._state = state
        self._alignment = formats.storage_alignment()
        self.compute_crc32: bool = torch.serialization.get_crc32_options()
        # Without opaque values all is known now. With them, data.pkl is known when they are: it follows the storages.
        values = [(name, state.tensors.get(name)) for name in state.names]
        self._pickled = pickle_structure(nested(values, state.paths))
        frame = self._frame(self._pickled.data_pkl, [])
        self.work = state.assign(frame)
        self._frame_if_plain = None if state.opaque else frame
        self.key = str(uuid.uuid4())
        self._replacement = Replacement(target, durable=durable)
        self._replacement.__enter__()
        weakref.finalize(self, self._replacement.__exit__, None, None, None)  # also when the interpreter ends
        try:
            preallocate(self._replacement.fd, frame.nbytes)
        except OSError as e:
            self._replacement.__exit__(type(e), e, None)
            raise
        _saves[self.key] = self

    @property
    def temporary(self) -> str:
        return self._replacement.path

    def finish(self, written: Sequence[Written]) -> None:
        """Completes the file and puts it in the target's place.

        Args:
            written: by each rank.
        """
        try:
            frame = self._frame_if_plain or self._frame_with_opaque(written)
            crcs = [0] * len(frame.storages())
            starts: dict[int, dict[int, bytes]] = {}
            for work, part in zip(self.work, written, strict=True):
                for key, crc in zip(work.keys, part.crcs, strict=True):
                    crcs[key] ^= crc
                for place, offset, data in part.starts:
                    starts.setdefault(work.keys[place], {})[offset] = data
            whole = {key: b"".join(pieces[at] for at in sorted(pieces)) for key, pieces in starts.items()}
            first_bytes = {key: data for key, data in whole.items() if len(data) == 8}
            frame.write(self._replacement.fd, crcs, first_bytes, compute_crc32=self.compute_crc32)
            self._replacement.commit()
        except BaseException as e:
            self._replacement.__exit__(type(e), e, None)
            raise
        self._replacement.__exit__(None, None, None)

    def _frame(self, data_pkl: bytes, inner: Sequence[torch.UntypedStorage]) -> ArchiveFrame:
        pickled = PickledObject(data_pkl, PythonStorageTable())
        contents = formats.contents(pickled, self._alignment)
        head, tail = contents.head, contents.tail
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
        return ArchiveFrame(self._target.archive_name, head, nbytes, tail, self._alignment)

    def _frame_with_opaque(self, written: Sequence[Written]) -> ArchiveFrame:
        opaque = {name: _unpickled(data) for part in written for name, data in part.opaque.items()}
        tensors = self._state.tensors
        values = [(name, tensors[name] if name in tensors else opaque[name]) for name in self._state.names]
        pickled = pickle_structure(nested(values, self._state.paths), self._pickled.entries)
        return self._frame(pickled.data_pkl, pickled.storages)


class Lease:
    """Holds a :class:`SharedSave` for as long as DCP holds the plan or the result that it travels in. In other
    processes, where it arrives pickled, it holds nothing."""

    def __init__(self, save: SharedSave | None) -> None:
        self.save = save

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self.save.key if self.save is not None else "",)


def _arrived(key: str) -> Lease:
    return Lease(_saves.get(key))


def _unpickled(data: bytes) -> Any:
    """A value that a rank of this job pickled for this save: DCP passes its own messages the same way."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
