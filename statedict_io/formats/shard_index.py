"""``*.index.json``: in which file of a folder each tensor is, as transformers and huggingface_hub write it."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import corrupt
from ..untrusted.limits import MAX_HEADER_METADATA_NBYTES, MAX_SHARD_NAME_NBYTES, SPARE_NBYTES, shown
from .json_text import JSONText, Pairs

SUFFIX = ".index.json"
_WEIGHT_MAP = "weight_map"
_METADATA = "metadata"
# What a name takes here, beside its characters.
_NAME_NBYTES = 200


class ShardIndex(NamedTuple):
    shards: list[str]  #: names of files beside the index, in the order in which they first come
    shard_of: dict[str, int]  #: name of a tensor -> index in ``shards``
    metadata: dict[str, str]  #: those of its entries that are texts


def parse(text: bytes, path: str) -> ShardIndex | None:
    """None: it is JSON, or begins like it, but no such index.

    Args:
        text: the whole file.

    Raises:
        CorruptCheckpointError: it is damaged, gives a name twice, or a shard that is not a file beside it.
    """
    try:
        return _parsed(JSONText(text), len(text))
    except ValueError as e:
        raise corrupt(path, f"its list of shards is not sound: {e}") from None


def _parsed(text: JSONText, nbytes: int) -> ShardIndex | None:
    found: ShardIndex | None = None
    metadata: dict[str, str] = {}
    if not text.take(b"{"):
        return None
    if not text.take(b"}"):
        while True:
            key = text.name()
            if key != _WEIGHT_MAP:
                value = text.value(MAX_HEADER_METADATA_NBYTES)
                if key == _METADATA and isinstance(value, Pairs):
                    metadata = {name: entry for name, entry in value if isinstance(entry, str)}
            elif found is not None:
                raise text.error(f"{_WEIGHT_MAP!r} is there twice")
            else:
                found = _weight_map(text, SPARE_NBYTES + nbytes)
            if text.take(b"}"):
                break
            text.expect(b",")
    text.expect_end()
    return None if found is None else found._replace(metadata=metadata)


def _weight_map(text: JSONText, room: int) -> ShardIndex:
    numbers: dict[str, int] = {}
    shard_of: dict[str, int] = {}
    text.expect(b"{")
    while not (not shard_of and text.take(b"}")):
        name = text.name()
        shard = text.string(MAX_SHARD_NAME_NBYTES)
        if shard not in numbers:
            _check_shard(text, shard)
        if shard_of.setdefault(name, numbers.setdefault(shard, len(numbers))) != numbers[shard]:
            raise text.error(f"tensor {shown(name)!r} is in two shards")
        room -= _NAME_NBYTES + len(name) * (1 if name.isascii() else 4)
        if room < 0:
            raise text.error("more names than a file of its size has")
        if text.take(b"}"):
            break
        text.expect(b",")
    return ShardIndex([*numbers], shard_of, {})


def _check_shard(text: JSONText, shard: str) -> None:
    """Whatever a system takes for a separator: the index may have come from another one."""
    if shard in ("", ".", "..") or any(mark in shard for mark in ("/", "\\", "\0", ":")):
        raise text.error(f"{shown(shard)!r} is not the name of a file beside it")
