"""The tensors of several files that an index names, each opened when something of it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from ...progress import ProgressCallback, over_parts
from ..weight_folders import Shards
from .named_tensors import NamedTensors, Place


class ShardedTensors:
    """See :class:`~.named_tensors.NamedTensors`. The names are those of the index; where a shard turns out to have
    others, what asks for something of it raises CorruptCheckpointError. Errors name the shard.

    Args:
        path: as given.
        shards: what the index names.
        open_shard: opens a file by its path.
        close: closes the index.
    """

    stored_object = None

    def __init__(
        self, path: str, shards: Shards, open_shard: Callable[[str], NamedTensors], close: Callable[[], None]
    ) -> None:
        self.path = path
        self._shards = shards
        self._open_shard = open_shard
        self._close = close
        self._opened: dict[int, NamedTensors] = {}
        self._lock = threading.Lock()
        self._closed = False

    def _shard(self, index: int) -> NamedTensors:
        with self._lock:
            if self._closed:
                raise ValueError(f"{self.path}: the checkpoint is closed")
            found = self._opened.get(index)
            if found is None:
                found = self._open_shard(self._shards.paths[index])
                try:
                    self._shards.check(index, [*found.names(), *found.refused])
                except BaseException:
                    found.close()
                    raise
                self._opened[index] = found
            return found

    def _of(self, name: str) -> NamedTensors:
        return self._shard(self._shards.shard_of[name])

    def _all(self) -> list[NamedTensors]:
        return [self._shard(index) for index in range(len(self._shards.paths))]

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self._all())

    def names(self) -> Collection[str]:
        return self._shards.shard_of.keys()

    def placeholder(self, name: str) -> torch.Tensor:
        return self._of(name).placeholder(name)

    def place(self, name: str) -> Place:
        return self._of(name).place(name)

    def tensor(self, name: str) -> torch.Tensor:
        return self._of(name).tensor(name)

    def is_plain(self, name: str) -> bool:
        return self._of(name).is_plain(name)

    def has_views(self, name: str) -> bool:
        return self._of(name).has_views(name)

    def is_read_whole(self, name: str) -> bool:
        return self._of(name).is_read_whole(name)

    def view(self, name: str, view: torch.Tensor) -> torch.Tensor:
        return self._of(name).view(name, view)

    @property
    def others(self) -> Sequence[str]:
        return [name for shard in self._all() for name in shard.others]

    @property
    def hidden(self) -> Sequence[str]:
        return [sentence for shard in self._all() for sentence in shard.hidden]

    @property
    def refused(self) -> dict[str, tuple[str, ...]]:
        return {name: needs for shard in self._all() for name, needs in shard.refused.items()}

    @property
    def metadata(self) -> dict[str, str]:
        """Of all shards, those of the last where they differ, and of the index."""
        of_shards = {key: value for shard in self._all() for key, value in shard.metadata.items()}
        return {**of_shards, **self._shards.metadata}

    def other_values(self) -> Iterator[tuple[str, Any]]:
        return (item for shard in self._all() for item in shard.other_values())

    def facts(self) -> dict[str, Any]:
        shards = self._all()
        kinds = dict.fromkeys(shard.facts()["kind"] for shard in shards)
        return {"kind": f"shards of {' and '.join(kinds)}" if kinds else "no shards", "shards": len(shards)}

    def check(self, progress: ProgressCallback | None = None) -> None:
        shards = self._all()
        for shard, part in zip(shards, over_parts(progress, [shard.nbytes for shard in shards]), strict=True):
            shard.check(part)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for shard in self._opened.values():
                shard.close()
        self._close()
