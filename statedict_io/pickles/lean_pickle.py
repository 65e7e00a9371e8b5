"""A pickle stream in which plain tensors are references to the calls that make them: 2 steps for some 25 (csrc/pickle).

Only the exact words that ``torch.save`` writes are replaced, and only where the unpickler has met, and allowed, each
global in them by then; the function that it allows makes the tensor. References are numbers, and a stream in which any
other persistent id might be one is left as it is. So no file can forge one, and none loads that torch refuses:
tests/test_mutated_pickles.py compares both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class TensorCall(NamedTuple):
    """A call of ``torch._utils._rebuild_tensor_v2`` for a plain tensor, as a pickle stream has it."""

    storage_type: str  #: "torch FloatStorage": module and name
    key: str
    location: str
    numel: int  #: of the storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool


class LeanPickle(NamedTuple):
    """A pickle stream in which the persistent id ``n``, an int, stands for the tensor that ``calls[n]`` makes.

    Where there are calls, no other persistent id is an int.
    """

    stream: bytes
    calls: Sequence[TensorCall]

    @classmethod
    def unchanged(cls, data_pkl: bytes) -> LeanPickle:
        """``data_pkl`` as it is."""
        return cls(data_pkl, ())


#: as :meth:`~statedict_io.backends.protocol.Backend.lean_pickle`
LeanPickling = Callable[[bytes], LeanPickle]
