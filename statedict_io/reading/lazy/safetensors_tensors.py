"""The tensors in a safetensors file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from ...progress import ProgressCallback
from ..opened_bytes import OpenedBytes
from ..safetensors_payloads import open_safetensors
from .named_tensors import Place
from .stored_tensors import StoredTensors


class SafetensorsTensors:
    """See :class:`~.named_tensors.NamedTensors`."""

    stored_object = None
    others: Sequence[str] = ()
    hidden: Sequence[str] = ()

    def __init__(self, opened: OpenedBytes, *, close: Callable[[], None]) -> None:
        self._file = open_safetensors(opened)
        self._stored = StoredTensors(self._file.payloads, swaps=self._file.swaps)
        self._close = close
        self.path = opened.name
        self.metadata = self._file.metadata
        self.refused: dict[str, tuple[str, ...]] = {}
        for name, tensor in self._file.tensors.items():
            try:
                tensor.in_torch()
            except ValueError as e:
                self.refused[name] = (str(e),)
        self._readable = self._file.tensors
        if self.refused:
            self._readable = {name: each for name, each in self._file.tensors.items() if name not in self.refused}

    @property
    def nbytes(self) -> int:
        return self._stored.nbytes

    def names(self) -> Collection[str]:
        return self._readable.keys()

    def placeholder(self, name: str) -> torch.Tensor:
        if name in self.refused:
            raise KeyError(f"{self.path}: {name!r} needs {self.refused[name][0]}")
        return self._file.like(name)

    def place(self, name: str) -> Place:
        self.placeholder(name)
        return Place(self.path, name, self._file.tensors[name].begin)

    def tensor(self, name: str) -> torch.Tensor:
        placeholder = self.placeholder(name)
        return self._stored.tensor(self._file.payloads.index(name), placeholder)

    def is_plain(self, name: str) -> bool:
        return True

    def has_views(self, name: str) -> bool:
        return True

    def is_read_whole(self, name: str) -> bool:
        return False

    def view(self, name: str, view: torch.Tensor) -> torch.Tensor:
        return self._stored.view(self._file.payloads.index(name), view)

    def other_values(self) -> Iterator[tuple[str, Any]]:
        return iter(())

    def facts(self) -> dict[str, Any]:
        return {"kind": "safetensors", "metadata": self.metadata, "checksums": "none"}

    def check(self, progress: ProgressCallback | None = None) -> None:
        """There are no checksums."""

    def close(self) -> None:
        self._stored.close()
        self._close()
