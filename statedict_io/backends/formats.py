"""The records of the installed torch's format, and the proof that a backend reproduces it.

Not a table of versions: the proof compares a small archive with what the installed ``torch.save`` writes. A torch
whose format differs in one byte makes every
save go to that ``torch.save``.
"""

from __future__ import annotations

import functools
import io
import pickle
import sys
import zipfile
from typing import Any

import torch
import torch.serialization

from ..installed import setting, torch_save
from ..pickling import PickledObject, pickle_object
from ..proofs import FORMAT, in_clean_thread, proof
from .protocol import Backend, Contents

_FORMAT_RECORDS = (".format_version", ".storage_alignment", "byteorder")


def storage_alignment() -> int:
    """Of payload offsets, bytes; torch before 2.7 had no setting."""
    return setting("save", "storage_alignment", 64)


def compute_crc32() -> bool:
    """Whether records get their checksums; else 0."""
    return torch.serialization.get_crc32_options()


def skip_data() -> bool:
    return bool(getattr(getattr(torch.serialization, "_serialization_tls", None), "skip_data", False))


def contents(pickled: PickledObject, alignment: int, *, disable_byteorder_record: bool = False) -> Contents:
    """What the installed torch would put into the archive, under its current settings."""
    head, tail = _format_records(alignment, disable_byteorder_record)
    return Contents([("data.pkl", pickled.data_pkl), *head], pickled.table, [*tail], skip_data())


@functools.lru_cache
def _format_records(
    alignment: int, disable_byteorder_record: bool
) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
    """What lies between ``data.pkl`` and the storages, and what after them. Shared: not to be changed."""
    sample, _ = _sample()
    byteorder = ("byteorder", sys.byteorder.encode())
    head = []
    for name in sample:
        if name == ".storage_alignment":
            head.append((name, str(alignment).encode()))
        elif name == "byteorder":
            head.extend([] if disable_byteorder_record else [byteorder])
        elif name in _FORMAT_RECORDS:
            head.append((name, sample[name]))
    # torch adds a missing byteorder when it closes the archive.
    tail = [("version", sample["version"])]
    if disable_byteorder_record:
        tail.append(byteorder)
    return head, tail


def _sample_object() -> Any:
    return {"five": torch.arange(1, 6, dtype=torch.uint8, device="cpu"), "none": torch.empty(0, device="cpu")}


@functools.cache
def _sample() -> tuple[dict[str, bytes], bytes]:
    """Small records by name in file order, and the whole archive."""

    def save() -> bytes:
        buffer = io.BytesIO()
        torch_save(_sample_object(), buffer)
        return buffer.getvalue()

    whole = in_clean_thread(save)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}, whole


@proof(FORMAT)
def reproduced_by(backend: Backend) -> bool:
    """Whether ``backend`` writes the bytes of the installed torch's format."""
    _, expected = _sample()
    protocol = torch.serialization.DEFAULT_PROTOCOL
    pickled = pickle_object(_sample_object(), pickle, protocol, backend.native_tables())
    alignment = storage_alignment()
    planned = backend.plan(
        "archive",
        contents(pickled, alignment),
        alignment=alignment,
        compute_crc32=compute_crc32(),
    )
    ours = bytearray()
    planned.write_stream(ours.extend, progress=None)
    return ours == expected
