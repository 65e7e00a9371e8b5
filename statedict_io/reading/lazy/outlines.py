"""The outline of a lazy file: what was saved, unpickled as ``load`` does it, but with as little data as it can do with.

Three ways are tried, the cheapest first, because only the code that makes a tensor knows what it needs:

1. Every plain tensor is a :class:`DeferredTensor`, made when it is asked for. Parameters, sparse tensors and functions
   that the user allowed want a tensor at once.
2. All tensors are made, without data. Quantized and nested tensors, and DTensor, cannot be.
3. All are made with their data.

Sparse tensors are validated, where torch does that, when they get their data.
"""

from __future__ import annotations

import contextlib
import pickle
from typing import Any

from ...pickles.persistent_ids import StorageFeed
from .lazy_file import LazyFile
from .placeholders import DataFeed

#: What making a tensor raises where it cannot do without its data.
WANTS_DATA = (RuntimeError, ValueError, TypeError)
# The same where it cannot do with a tensor that is deferred; torch's restricted unpickler wraps some of them. Neither
# has OSError: the disk's, or the TimeoutError of a signal's handler.
_WANTS_A_TENSOR = (*WANTS_DATA, AttributeError, LookupError, pickle.UnpicklingError)


class Outline:
    """What was saved in ``file``. Values that are refused are :class:`~statedict_io.pickles.set_aside.Refused`.

    Raises:
        pickle.UnpicklingError: all of it is refused.
        Exception: what ``torch.load`` raises for what it will not unpickle.
    """

    def __init__(self, file: LazyFile, *, weights_only: bool) -> None:
        self._file = file
        self._weights_only = weights_only
        self._sets_aside = False
        self.is_lazy = True  #: whether plain tensors are deferred, or without data
        self.root: Any = file.unpickle_most(self._cheapest) if weights_only else self._cheapest()

    def made_with(self, feed: StorageFeed) -> Any:
        """The root once more, made of other storages."""
        return self._unpickle(feed=feed)

    def _cheapest(self, *, sets_aside: bool = False) -> Any:
        self._sets_aside = sets_aside
        self.is_lazy = True
        # Each error is gone before the next way is tried, and with it what its frames had unpickled.
        with contextlib.suppress(*_WANTS_A_TENSOR):
            return self._unpickle(defers=True)
        with contextlib.suppress(*WANTS_DATA):
            return self._unpickle()
        self.is_lazy = False
        return self._unpickle(feed=DataFeed(self._file.records))

    def _unpickle(self, **options: Any) -> Any:
        return self._file.unpickle(weights_only=self._weights_only, sets_aside=self._sets_aside, **options)
