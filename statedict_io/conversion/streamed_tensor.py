"""A tensor of a checkpoint as a part of another file, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator

from ..reading.lazy.checkpoint import Checkpoint
from ..reading.lazy.strided_reads import memory_of

_BLOCK_NBYTES = 8 << 20  # at least: a read of less is not worth its call


class StreamedTensor:
    """See :class:`~statedict_io.backends.payloads.Streamed`."""

    def __init__(self, checkpoint: Checkpoint, name: str, nbytes: int) -> None:
        self._checkpoint, self._name, self._nbytes = checkpoint, name, nbytes

    def nbytes(self) -> int:
        return self._nbytes

    def pieces(self, piece_nbytes: int) -> Iterator[memoryview]:
        for block in self._checkpoint.blocks(self._name, max(piece_nbytes, _BLOCK_NBYTES)):
            plain = block.resolve_conj().resolve_neg().contiguous()  # has to outlive the view
            yield memory_of(plain)
