"""The gate before torch's restricted unpickler: what a pickle has hashed is neither deep nor repeated without end.

Python's hash of a tuple goes through all that is in it, each time anew, on the C stack. A million tuples inside each
other as the key of a dictionary end the process, forty pairs of one and the same pair take it hours, and no
unpickler guards against it. This follows the stream beforehand, at some hundredths of the unpickler's cost.
"""

from __future__ import annotations

import _compat_pickle
from collections.abc import Callable
from typing import Any

import torch

from ..errors import corrupt
from ..untrusted.limits import (
    MAX_EQUAL_HASHES,
    MAX_GLOBAL_CHARACTERS,
    MAX_HASHED_DEPTH,
    MAX_ITERATED_ELEMENTS,
    SPARE_NBYTES,
    max_hash_work,
)
from .tensor_call_pattern import LATE_TENSOR_CALL
from .traced_pickle import STEPS, Call, Global, Reference, TooLarge, TracedPickle


def check_pickle(stream: bytes, path: str, *, written: Callable[[], bytes] | None = None) -> None:
    """Refuses what no ``torch.save`` has written and the unpickler would take for ever over, or crash on.

    Args:
        stream: ``data.pkl``, or its lean form, or DCP's metadata.
        path: of the file, for the message.
        written: reads ``data.pkl`` once more, where the stream is its lean form.

    Raises:
        CorruptCheckpointError: it has keys, elements of sets or arguments of calls beyond the limits. What is
            wrong with a stream otherwise is the unpickler's to say.
    """
    try:
        _Checked(stream, written or (lambda: stream)).follow()
    except _BeyondBounds as e:
        raise corrupt(path, f"its pickle has {e}, which nothing that saves checkpoints writes") from None
    except Exception:  # the unpickler will stop there too
        return


class Gate:
    """:func:`check_pickle` for a pickle that is unpickled several times: the same bytes are followed once."""

    def __init__(self) -> None:
        self._passed: int | None = None  #: the hash of a stream

    def check(self, stream: bytes, path: str, *, written: Callable[[], bytes] | None = None) -> None:
        """As :func:`check_pickle`."""
        stream_hash = hash(stream)
        if stream_hash != self._passed:
            check_pickle(stream, path, written=written)
            self._passed = stream_hash


def _iterates(name: str) -> bool:
    """Whether the restricted unpickler, by itself, calls the function of that name and it goes through its argument.

    Those of Python that torch allows make containers. What the user allows is given what the file has for it.
    """
    return name == "torch.Size" or (not name.startswith("torch.") and _is_allowed(name))


def _is_allowed(name: str) -> bool:
    """By torch, whatever the user allows."""
    module, _, attribute = name.rpartition(".")
    python_3_name = f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{attribute}"
    return python_3_name in torch._weights_only_unpickler._get_allowed_globals()


class _BeyondBounds(Exception):
    pass


_X, _J, _Q = b"XJQ"


class _Checked(TracedPickle):
    #: tuples inside a tensor call have two levels and fewer parts than this
    skipped = ((None,) * 160,)

    def __init__(self, stream: bytes, written: Callable[[], bytes]) -> None:
        super().__init__(stream)
        self._written = written
        self._are_small: bool | None = None
        self._work = max_hash_work(len(stream))
        self._equal_hashes: dict[int, int] = {}
        self._known_symbols: set[tuple[Any, ...]] = set()

    def follow(self, *, abridges: bool = False) -> Any:
        del abridges
        stream, steps, match = self._stream, STEPS, LATE_TENSOR_CALL.match
        entry = (None, self.skipped)
        while not self._stopped:
            at = self._at
            # Entries of dictionaries with a string as their key and a plain tensor as their value.
            while stream[at] == _X and not (stream[at + 2] or stream[at + 3] or stream[at + 4]):
                end = at + 5 + stream[at + 1]
                if stream[end] == _J and stream[end + 5] == _Q:  # a tensor call in a lean pickle
                    at = end + 6
                else:
                    found = match(stream, end)
                    if found is None or not self._knows(found.group(1, 2, 3, 5, 6), found[4]):
                        break
                    at = found.end()
                self._stack += entry
            self._at = at + 1
            steps[stream[at]](self)
        return None

    def _knows(self, symbols: tuple[Any, ...], key: bytes | None) -> bool:
        """Whether the memo has globals and strings at the indices in ``symbols``, all of one byte each, and nothing but
        a string at that of a key."""
        if key is not None and type(self._memo.get(int.from_bytes(key, "little"), "")) is not str:
            return False
        if symbols not in self._known_symbols:
            values = [self._memo[index] for index in b"".join(symbols)]
            if not all(type(value) in (Global, str) for value in values):
                return False
            self._known_symbols.add(symbols)
        return True

    def _put(self, index: int, value: Any) -> None:
        if index < 256:
            self._known_symbols.clear()
        super()._put(index, value)

    def uses_keys(self, keys: list[Any]) -> None:
        for key in keys:
            if type(key) is tuple:
                self._walk(key)
            elif type(key) is int and key.bit_length() > 64:
                self._count(key)

    def calls(self, *values: Any) -> None:
        for value in values:
            if isinstance(value, (tuple, list)):
                self._walk(value)

    def names(self, function: Any) -> None:
        if isinstance(function, Global):
            num_characters = len(function.name)
        elif isinstance(function, (str, bytes, tuple, list)):
            num_characters, pending = 0, [function]
            while pending and num_characters <= MAX_GLOBAL_CHARACTERS:
                part = pending.pop()
                if isinstance(part, (str, bytes)):
                    num_characters += len(part)
                elif isinstance(part, (tuple, list)):
                    num_characters += len(part)
                    pending += part[:MAX_GLOBAL_CHARACTERS]
        else:
            return
        if num_characters > MAX_GLOBAL_CHARACTERS:
            raise _BeyondBounds(f"a name of a class or function of more than {MAX_GLOBAL_CHARACTERS} characters")

    def goes_through(self, function: Any, arguments: Any) -> None:
        """A tensor of some bytes can have 2**62 elements, which are each made a tensor."""
        parts: tuple[Any, ...] = (arguments,)
        if isinstance(function, Global) and _iterates(function.name):
            parts += tuple(arguments) if isinstance(arguments, (tuple, list)) and len(arguments) == 1 else ()
        self._check_small(parts)

    def takes_state(self, target: Any, state: Any) -> None:
        function = target.function if isinstance(target, Call) else None
        if not isinstance(function, Global) or function.name.startswith("torch.") or _is_allowed(function.name):
            self._check_small((state,))

    def _check_small(self, parts: tuple[Any, ...]) -> None:
        for part in parts:
            is_torchs = isinstance(part, Call) and isinstance(part.function, Global)
            if (
                part is self.skipped
                or isinstance(part, Reference)
                or (is_torchs and part.function.name.startswith("torch."))
            ) and not self._has_small_tensors_only():
                raise _BeyondBounds("a tensor where arguments or a state belong")

    def _has_small_tensors_only(self) -> bool:
        if self._are_small is None:
            self._are_small = not _Sizes(self._written()).has_large()
        return self._are_small

    def _walk(self, value: tuple[Any, ...] | list[Any]) -> None:
        pending: list[tuple[Any, int]] = [(value, 1)]
        while pending:
            value, depth = pending.pop()
            if depth > MAX_HASHED_DEPTH:
                raise _BeyondBounds(f"keys or arguments of more than {MAX_HASHED_DEPTH} levels")
            self._work -= len(value) + 1
            if self._work < 0:
                raise _BeyondBounds("keys or arguments that repeat their parts beyond the size of the file")
            for part in value:
                if isinstance(part, (tuple, list)):
                    pending.append((part, depth + 1))
                elif type(part) is int and part.bit_length() > 64:
                    self._count(part)

    def _count(self, key: int) -> None:
        found = hash(key)
        self._equal_hashes[found] = self._equal_hashes.get(found, 0) + 1
        if self._equal_hashes[found] > MAX_EQUAL_HASHES:
            raise _BeyondBounds(f"more than {MAX_EQUAL_HASHES} keys with one hash")


class _Sizes(TracedPickle):
    """Whether anything that is called is given sizes of a large tensor."""

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream, SPARE_NBYTES // 2)
        self._found = False
        self._work = max_hash_work(len(stream))

    def has_large(self) -> bool:
        try:
            self.follow()
        except TooLarge:
            return True
        except Exception:  # the unpickler will stop there too
            pass
        return self._found

    def calls(self, *values: Any) -> None:
        for value in values:
            if isinstance(value, (tuple, list)):
                self._look_at(value)
                before: Any = ()
                for part in value:
                    if isinstance(part, (tuple, list)) and len(part) != len(before):
                        self._look_at(part)
                        before = part
                    else:  # strides follow sizes
                        before = ()

    def _look_at(self, sizes: tuple[Any, ...] | list[Any]) -> None:
        self._work -= len(sizes) + 1
        if self._work < 0:
            raise TooLarge
        numel = 1
        for size in sizes:
            if type(size) is int and size > 1:
                numel *= size
                if numel > MAX_ITERATED_ELEMENTS:
                    self._found = self._stopped = True
                    return
