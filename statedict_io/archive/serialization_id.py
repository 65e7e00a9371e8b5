"""torch's ``.data/serialization_id``: 20 decimal digits from the records' names, 20 from the CRCs (docs/format.md,
"Serialization id")."""

from __future__ import annotations

from collections.abc import Sequence

from .layout import DESCRIPTOR_SIGNATURE
from .names_hash import hash_combine, names_hash


class SerializationId:
    """Folds what ``.data/serialization_id`` is made of, in write order."""

    def __init__(self) -> None:
        self._crcs = 0

    def fold_write_start(self, written: bytes | memoryview) -> None:
        """A name or payload. torch takes any write of 8 bytes or more that starts like a data descriptor for one."""
        if len(written) >= 8 and written[:4] == DESCRIPTOR_SIGNATURE:
            self.fold_crc(int.from_bytes(written[4:8], "little"))

    def fold_crc(self, crc: int) -> None:
        self._crcs = hash_combine(self._crcs, crc)

    def digits(self, names: Sequence[str]) -> bytes:
        return b"%020d%020d" % (names_hash(names), self._crcs)
