"""Whether tensors are in objects that flat names do not enter, such as sets."""

from __future__ import annotations

import copyreg
import itertools
import pickle
import types
from collections.abc import Iterable
from typing import Any

import torch

from ..errors import StateDictIOError
from ..untrusted.limits import MAX_SEARCHED_KNOWN, max_searched_parts

# None of these leads to a tensor. A storage is pickled with all its bytes, a class or function by its name.
_ENDS = (
    str, bytes, bytearray, int, float, complex, type(None), type, types.FunctionType, types.BuiltinFunctionType,
    torch.dtype, torch.device, torch.Size, torch.UntypedStorage, torch.TypedStorage, pickle.PickleBuffer,
)  # fmt: skip
_CONTAINERS = (list, tuple, set, frozenset)
# An object of fewer parts is searched again where it is met again.
_WORTH_KNOWING = 8


class TensorSearch:
    """Searches one object after the other, with a limit on the parts of all of them together.

    Args:
        kinds: what is searched for.
        nbytes: of the file that the objects are from; they live as long as this.
    """

    def __init__(self, kinds: tuple[type, ...], nbytes: int) -> None:
        self._kinds = kinds
        self._max_visited = max_searched_parts(nbytes)
        self._visited = 0
        self._known: dict[int, bool] = {}

    def is_in(self, value: Any) -> bool:
        """Whether there is one in what ``value`` would be pickled as.

        Raises:
            StateDictIOError: the objects have many more parts than a file of that size needs.
        """
        if isinstance(value, _ENDS):
            return False
        known = self._known.get(id(value))
        if known is not None:
            return known
        before = self._visited
        found = self._searched(value)
        if self._visited - before >= _WORTH_KNOWING and len(self._known) < MAX_SEARCHED_KNOWN:
            self._known[id(value)] = found
        return found

    def _searched(self, value: Any) -> bool:
        levels = [iter((value,))]
        seen: dict[int, Any] = {}  # with the objects: some are made by pickling, and their addresses used again
        while levels:
            for part in levels[-1]:
                self._visited += 1
                if self._visited > self._max_visited:
                    raise StateDictIOError(
                        f"its objects have more than {self._max_visited} parts, because they share them; load it with "
                        "statedict_io.load"
                    )
                if isinstance(part, self._kinds):
                    return True
                if isinstance(part, _ENDS) or id(part) in seen:
                    continue
                if len(seen) < MAX_SEARCHED_KNOWN:
                    seen[id(part)] = part
                levels.append(iter(_parts_of(part)))
                break
            else:
                levels.pop()
        return False


def _parts_of(value: Any) -> Iterable[Any]:
    if type(value) in _CONTAINERS:
        return value
    if type(value) is dict:
        return itertools.chain.from_iterable(value.items())
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        reduction = value.__reduce_ex__(pickle.HIGHEST_PROTOCOL) if reduce is None else reduce(value)
    except Exception:  # what cannot be pickled was not unpickled either
        return ()
    if not isinstance(reduction, tuple):
        return ()
    # The function and its arguments, the state, the entries of a list, those of a mapping.
    whole, (entries, items) = reduction[:3], (*reduction[3:5], None, None)[:2]
    return itertools.chain(whole, entries or (), itertools.chain.from_iterable(items or ()))
