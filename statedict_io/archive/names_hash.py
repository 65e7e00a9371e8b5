"""The first half of ``.data/serialization_id``: torch's hash over the names of an archive's records.

torch walks a ``std::unordered_set<std::string>`` and combines ``std::hash`` of each name, so the number depends on the
C++ standard library that torch was built with. Here is libstdc++'s, which the builds for Linux have. Where the
installed torch counts otherwise (libc++ on macOS, Microsoft's on Windows) it is asked to write an archive of empty
records with these names, in memory.
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Sequence

import torch
import torch.serialization

from ..installed.proofs import in_clean_thread, is_shortage

_MASK64 = (1 << 64) - 1
_DIGITS = 20


def names_hash(names: Sequence[str]) -> int:
    """Of all records before the serialization id, in the order in which they are written, without the archive's name.

    Raises:
        ValueError: there are too many.
    """
    return _by_libstdcxx(names) if _torch_counts_like_libstdcxx() else _by_torch(names)


def hash_combine(seed: int, value: int) -> int:
    """``c10::hash_combine``"""
    return seed ^ (value + 0x9E3779B9 + (seed << 6) + (seed >> 2)) & _MASK64


@functools.cache
def _torch_counts_like_libstdcxx() -> bool:
    sample = ["data.pkl", "byteorder", *(f"data/{key}" for key in range(30)), "version"]  # the set grows twice
    try:
        return in_clean_thread(lambda: _by_libstdcxx(sample) == _by_torch(sample))
    except Exception as e:  # a torch that cannot be asked so
        if is_shortage(e):
            raise
        return True


def _by_torch(names: Sequence[str]) -> int:
    # What comes from "version" on torch writes by itself.
    end = names.index("version")
    buffer = io.BytesIO()
    with torch.serialization._open_zipfile_writer(buffer) as writer:
        for name in names[:end]:
            writer.write_record(name, b"", 0)
    buffer.seek(0)
    return int(torch._C.PyTorchFileReader(buffer).get_record(".data/serialization_id")[:_DIGITS])


def _by_libstdcxx(names: Sequence[str]) -> int:
    combined = 0
    for name_hash in _unordered_set_order([_hash_bytes(name.encode()) for name in names]):
        combined = hash_combine(combined, name_hash)
    return combined


def _hash_bytes(data: bytes) -> int:
    """libstdc++'s ``std::hash<std::string>``: 64-bit MurmurHash2 with seed 0xc70f6907 (libsupc++/hash_bytes.cc)."""
    mul = 0xC6A4A7935BD1E995
    value = 0xC70F6907 ^ (len(data) * mul & _MASK64)
    aligned = len(data) & ~7
    for (word,) in struct.iter_unpack("<Q", data[:aligned]):
        word = word * mul & _MASK64
        word = (word ^ word >> 47) * mul & _MASK64
        value = (value ^ word) * mul & _MASK64
    if aligned != len(data):
        value = (value ^ int.from_bytes(data[aligned:], "little")) * mul & _MASK64
    value = (value ^ value >> 47) * mul & _MASK64
    return value ^ value >> 47


# The sizes that a growing libstdc++ hash table goes through from empty (src/c++11/hashtable_c++0x.cc: next prime above
# twice the last).
_BUCKET_COUNTS = (
    13, 29, 59, 127, 257, 541, 1109, 2357, 5087, 10273, 20753, 42043, 85229, 172933, 351061, 712697, 1447153, 2938679,
    5967347, 12117689, 24607243, 49969847,
)  # fmt: skip


def _unordered_set_order(hashes: Sequence[int]) -> list[int]:
    """``hashes`` in the order in which libstdc++ iterates a ``std::unordered_set`` that they were inserted into one by
    one.

    It is one list: the first element of a bucket goes to the front of the list, the next ones to the front of their
    bucket. A rehash
    inserts all anew, in list order.
    """
    order: list[int] = []
    taken = 0
    for count in _BUCKET_COUNTS:
        # A table of `count` buckets takes `count` elements before it grows.
        arriving = hashes[taken:count]
        taken += len(arriving)
        buckets: dict[int, list[int]] = {}
        for value in [*order, *arriving]:
            buckets.setdefault(value % count, []).append(value)
        order = [value for bucket in reversed(buckets.values()) for value in reversed(bucket)]
        if taken == len(hashes):
            return order
    raise ValueError(f"{len(hashes)} records are more than the Python backend can write")
