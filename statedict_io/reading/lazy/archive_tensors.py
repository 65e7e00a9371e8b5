"""The tensors in an archive of ``torch.save``."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Collection
from typing import Any

import torch

from ...errors import StateDictIOError
from ...pickles.refusals import refusal
from ...progress import ProgressCallback
from ..opened_bytes import OpenedBytes
from ..records import StoredRecords
from ..verification import check_all
from .lazy_file import LazyFile
from .object_tensors import CURE, ObjectTensors
from .outlines import WANTS_DATA, Outline
from .placeholders import DataFeed, is_saved_without_data, lacks_data

_FACTS = (".format_version", ".storage_alignment", "byteorder", "version", ".data/serialization_id")
_MAX_FACT_NBYTES = 4096


class _Feed:
    """See :class:`~statedict_io.pickles.persistent_ids.StorageFeed`."""

    def __init__(self, records: StoredRecords, take: Callable[[str, int], torch.UntypedStorage]) -> None:
        self._records = records
        self._take = take

    def take(self, name: str, nbytes: int) -> torch.UntypedStorage:
        self._records.sized(name, nbytes)
        return self._take(name, nbytes)


class ArchiveTensors(ObjectTensors):
    """See :class:`~.named_tensors.NamedTensors`."""

    def __init__(self, opened: OpenedBytes, *, weights_only: bool, close: Callable[[], None]) -> None:
        self._file = LazyFile(opened)
        try:
            self._outline = Outline(self._file, weights_only=weights_only)
        except pickle.UnpicklingError as e:
            if not weights_only:
                raise
            raise refusal(self._file.path, e, CURE) from None
        super().__init__(self._file.stored, self._outline.root, close=close)

    def facts(self) -> dict[str, Any]:
        records = self._file.records
        indices = [index for index, entry in enumerate(records.entries) if entry.nbytes]
        num_recorded = sum(map(records.has_crc, indices))
        crc = "recorded" if num_recorded == len(indices) else "partly recorded" if num_recorded else "not recorded"
        facts: dict[str, Any] = {
            "kind": "torch",
            "archive_name": records.archive.archive_name,
            "records": len(records.entries),
            "compressed_records": sum(records.entries[index].compressed for index in indices),
            "crc": crc,
        }
        for name in _FACTS:
            if name in records and records.entry(name).nbytes <= _MAX_FACT_NBYTES:
                facts[name.rpartition("/")[2].lstrip(".")] = records.read(name).decode(errors="replace").strip()
        return facts

    def check(self, progress: ProgressCallback | None = None) -> None:
        check_all(self._file.records, progress)

    def made_on(self, take: Callable[[str, int], torch.UntypedStorage]) -> Any:
        if not self._outline.is_lazy or self._file.swaps:
            raise StateDictIOError(
                f"{self.path}: has tensors that cannot be made without their data, or the other byte order; save what "
                "statedict_io.load returns for it"
            )
        return self._outline.made_with(_Feed(self._file.records, take))

    def _record_of(self, placeholder: torch.Tensor) -> int | None:
        return self._file.record_of(placeholder) if self._outline.is_lazy else None

    def _rebuilt(self, name: str) -> torch.Tensor:
        found = self.placeholder(name)
        if not self._outline.is_lazy or is_saved_without_data(found):
            return found
        # Most of a file are plain tensors: their records are left out if that can be.
        of_plain = {self._record_of(self.placeholder(other)) for other in self.names()} - {None}
        if of_plain:
            with contextlib.suppress(*WANTS_DATA):
                again = self._with_data(name, without_data=of_plain)
                if not lacks_data(again):
                    return again
        # Parts of it lie in such records, too, or there are none.
        return self._with_data(name)

    def _with_data(self, name: str, without_data: Collection[int | None] = ()) -> torch.Tensor:
        """The tensor of that name in a structure that is made with data, except for that of some records."""
        feed = DataFeed(self._file.records, without_data)
        again, _, _ = self.flat(self._outline.made_with(feed))
        return again[name]
