"""The format that the installed torch writes: its settings, and the small records that it adds to an archive.

Not a table of versions: the records are those of a small archive that the installed ``torch.save`` has written.
"""

from __future__ import annotations

import functools
import io
import sys
import zipfile
from typing import Any, NamedTuple

import torch
import torch.serialization

from .proofs import in_clean_thread
from .stock import setting, torch_save

_FORMAT_RECORDS = (".format_version", ".storage_alignment", "byteorder")


def storage_alignment() -> int:
    """Of payload offsets, bytes; torch before 2.7 had no setting."""
    return setting("save", "storage_alignment", 64)


def compute_crc32() -> bool:
    """Whether records get their checksums; else 0."""
    return torch.serialization.get_crc32_options()


def skip_data() -> bool:
    return bool(getattr(getattr(torch.serialization, "_serialization_tls", None), "skip_data", False))


@functools.lru_cache
def format_records(
    alignment: int, disable_byteorder_record: bool
) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
    """What lies between ``data.pkl`` and the storages, and what after them. Shared: not to be changed."""
    small = sample().records
    byteorder = ("byteorder", sys.byteorder.encode())
    head = []
    for name in small:
        if name == ".storage_alignment":
            head.append((name, str(alignment).encode()))
        elif name == "byteorder":
            head.extend([] if disable_byteorder_record else [byteorder])
        elif name in _FORMAT_RECORDS:
            head.append((name, small[name]))
    # torch adds a missing byteorder when it closes the archive.
    tail = [("version", small["version"])]
    if disable_byteorder_record:
        tail.append(byteorder)
    return head, tail


def sample_object() -> Any:
    return {"five": torch.arange(1, 6, dtype=torch.uint8, device="cpu"), "none": torch.empty(0, device="cpu")}


class Sample(NamedTuple):
    """What the installed ``torch.save`` makes of :func:`sample_object`."""

    archive: bytes
    records: dict[str, bytes]  #: by name, in file order
    alignment: int  #: the settings that it was made under: torch 2.9 has none of a thread's own
    compute_crc32: bool


@functools.cache
def sample() -> Sample:
    def save() -> tuple[bytes, int, bool]:
        buffer = io.BytesIO()
        torch_save(sample_object(), buffer)
        return buffer.getvalue(), storage_alignment(), compute_crc32()

    archive, alignment, has_crc32 = in_clean_thread(save)
    records = {}
    with zipfile.ZipFile(io.BytesIO(archive)) as content:
        for info in content.infolist():
            if not has_crc32:
                info.CRC = None  # type: ignore[assignment]  # not to be compared
            records[info.filename.partition("/")[2]] = content.read(info)
    return Sample(archive, records, alignment, has_crc32)
