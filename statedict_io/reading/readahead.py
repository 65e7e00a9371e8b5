"""Storages for the unpickler, read in parallel ahead of it."""

from __future__ import annotations

import torch

from ..errors import CorruptCheckpointError
from ..progress import ProgressCallback
from ..untrusted.limits import MAX_RECORDS_AT_ONCE
from .payloads import StoredPayloads

#: read at once where the storages will not stay: host memory is then needed for no more than this
WINDOW_NBYTES = 64 << 20
# Compressed records may be a thousand times as large as what the file has of them: no more of them ahead than this.
_INFLATED_NBYTES = 64 << 20


class ReadAhead:
    """Hands out the storages of an archive, each to be taken once, in the expected order if possible.

    Args:
        records: of an archive that stays open.
        stay: the storages stay in host memory: all are read at once. Else a window is, whenever the next is asked for.
        device: all storages go there: they are read onto it at once, where that can be done.
        verify: check CRCs while reading.
        progress: over all storages.
    """

    def __init__(
        self,
        records: StoredPayloads,
        *,
        stay: bool,
        verify: bool,
        progress: ProgressCallback | None,
        device: torch.device | None = None,
    ) -> None:
        self._records = records
        self._window_nbytes: int | None = None if stay else WINDOW_NBYTES
        self._device = device
        self._verify = verify
        self._progress = progress
        self._order = records.storages()
        self._position = {index: position for position, index in enumerate(self._order)}
        self._window_end = 0  #: the position that follows what was read last
        self._ready: dict[str, torch.UntypedStorage] = {}
        self._read: set[int] = set()
        self._nbytes_done = 0
        self._nbytes_total = sum(records.entries[index].nbytes for index in self._order)

    def take(self, name: str, nbytes: int) -> torch.UntypedStorage:
        """See :class:`~statedict_io.pickles.persistent_ids.StorageFeed`."""
        storage = self._ready.pop(name, None)
        if storage is None:
            self._fill(self._records.sized(name, nbytes))
            return self._ready.pop(name)
        if storage.nbytes() != nbytes:
            self._records.sized(name, nbytes)
        return storage

    def unread(self) -> list[int]:
        """The records that nobody asked for."""
        return [index for index in self._order if index not in self._read]

    def _fill(self, index: int) -> None:
        if self._ready and self._position.get(index) != self._window_end:
            # Not the expected order: what was read for nothing must not pile up.
            self._ready.clear()
            self._window_nbytes = 0
            self._device = None
        window = self._window(index)
        self._window_end = self._position.get(window[-1], -1) + 1
        parts = [window]
        if self._verify:
            parts = [[i for i in window if self._records.has_crc(i) == checked] for checked in (True, False)]
        for part in filter(None, parts):
            verify = self._verify and self._records.has_crc(part[0])
            try:
                storages = self._load(part, verify)
                if storages is None:
                    return self._fill(index)  # a window for torch to move
            except CorruptCheckpointError as e:
                raise self._records.explained(e) from None
            self._ready.update(zip((self._records.entries[i].name for i in part), storages, strict=True))
            self._read.update(part)
            if self._progress is not None:
                self._nbytes_done += sum(self._records.entries[i].nbytes for i in part)

    def _load(self, part: list[int], verify: bool) -> list[torch.UntypedStorage] | None:
        """None, once, where the device cannot be read onto."""
        archive, progress = self._records.archive, self._reporter()
        if self._device is None:
            return archive.load_storages(part, verify=verify, progress=progress)
        storages = archive.load_storages_onto(self._device, part, verify=verify, progress=progress)
        if storages is None:
            self._device = None
        return storages

    def _window(self, index: int) -> list[int]:
        window = [index]
        if index not in self._position or index in self._read:
            return window
        entries = self._records.entries
        nbytes = entries[index].nbytes
        inflated = 0
        for following in self._order[self._position[index] + 1 :]:
            entry = entries[following]
            nbytes += entry.nbytes
            if len(window) >= MAX_RECORDS_AT_ONCE:
                break
            if self._window_nbytes is not None and self._device is None and nbytes > self._window_nbytes:
                break
            if following in self._read:
                continue
            if entry.compressed:
                inflated += entry.nbytes
                if inflated > _INFLATED_NBYTES:
                    break
            window.append(following)
        return window

    def _reporter(self) -> ProgressCallback | None:
        if self._progress is None:
            return None
        progress, before, total = self._progress, self._nbytes_done, self._nbytes_total
        return lambda done, _: progress(min(before + done, total), total)
