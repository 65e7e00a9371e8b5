"""A pickle stream followed without running it: values that stand for what unpickling would build.

Nothing is imported, called or hashed: a global is its name, a call the pair of function and arguments, a dictionary the
list of its keys and values. The stream may be hostile.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

from .tensor_call_pattern import TENSOR_CALL


class Global:
    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name  #: "module.attribute"


class Call:
    """What calling a function with arguments would give, and what would be put into it afterwards."""

    __slots__ = ("arguments", "function", "items", "state")

    def __init__(self, function: Any, arguments: Any) -> None:
        self.function = function
        self.arguments = arguments
        self.items: Items | list[Any] | None = None
        self.state: Any = None


class Reference:
    """A persistent id."""

    __slots__ = ("saved_id",)

    def __init__(self, saved_id: Any) -> None:
        self.saved_id = saved_id


class Items(list):  # type: ignore[type-arg]
    """A dictionary: key, value, key, value..."""


class TooLarge(Exception):
    """Following the stream would take more memory than allowed."""


#: what a container, a call, a persistent id or an entry of the memo takes, and an item of a container
_OBJECT_NBYTES = 96
_ITEM_NBYTES = 9


class TracedPickle:
    """Follows one stream.

    Args:
        stream: the pickle.
        max_nbytes: of memory, roughly; None for no limit.

    Subclasses look at what is hashed or printed: :meth:`uses_keys`, :meth:`calls`, :meth:`names`,
    :meth:`goes_through` and :meth:`takes_state` do nothing here.
    """

    #: stands for what was memoized inside a tensor call that was skipped
    skipped: Any = None

    def __init__(self, stream: bytes, max_nbytes: float | None = None) -> None:
        self._stream = stream
        self._at = 0
        self._left = float("inf") if max_nbytes is None else max_nbytes
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  #: the stacks below each mark
        self._memo: dict[int, Any] = {}
        self._num_memoized = 0
        self._result: Any = None
        self._stopped = False
        #: the memo's entries that are kept; None for all
        self._asked_for = None if max_nbytes is None else _asked_for(stream)

    def uses_keys(self, keys: list[Any]) -> None:
        """Keys of a dictionary, or elements of a set."""

    def calls(self, *values: Any) -> None:
        """A function, its arguments, a state: what they hold may be hashed, or printed in an error."""

    def names(self, function: Any) -> None:
        """A global, or what is called."""

    def goes_through(self, function: Any, arguments: Any) -> None:
        """Arguments of a call."""

    def takes_state(self, target: Any, state: Any) -> None:
        """What BUILD hands to an object."""

    def follow(self, *, abridges: bool = False) -> Any:
        """What STOP returns.

        Args:
            abridges: the call that rebuilds a plain tensor becomes its :class:`Reference` at once.

        Raises:
            TooLarge: the limit on memory is reached.
            Exception: any; the stream cannot be followed, and no unpickler can run it further either.
        """
        stream, steps = self._stream, STEPS
        while not self._stopped:
            code = stream[self._at]
            if abridges and code in b"hj":
                found = TENSOR_CALL.match(stream, self._at)
                if found is not None:
                    self._at = found.end()
                    self._pay(_OBJECT_NBYTES)
                    key = _text(found[1][5:])
                    if found[2] is not None:
                        self._put(int.from_bytes(found[2][1:], "little"), key)
                    self._push(Reference(("storage", None, key)))
                    continue
            self._at += 1
            steps[code](self)
        return self._result

    def _pay(self, nbytes: int) -> None:
        self._left -= nbytes
        if self._left < 0:
            raise TooLarge

    def _take(self, nbytes: int) -> bytes:
        begin = self._at
        self._at = begin + nbytes
        if self._at > len(self._stream):
            raise EOFError
        return self._stream[begin : self._at]

    def _number(self, nbytes: int) -> int:
        return int.from_bytes(self._take(nbytes), "little")

    def _line(self) -> bytes:
        begin = self._at
        end = self._stream.index(b"\n", begin)
        self._at = end + 1
        return self._stream[begin:end]

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._outer.pop()
        return items

    def _mark(self) -> None:
        self._pay(_OBJECT_NBYTES)
        self._outer.append(self._stack)
        self._stack = []

    def _pop(self) -> None:
        # The real ones end the scope of a mark when nothing lies above it.
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _global(self) -> Any:
        self._pay(_OBJECT_NBYTES)
        found = Global(f"{self._line().decode()}.{self._line().decode()}")
        self.names(found)
        return found

    def _stack_global(self) -> None:
        attribute, module = self._stack.pop(), self._stack.pop()
        self._pay(_OBJECT_NBYTES)
        self._push(Global(f"{module}.{attribute}" if type(attribute) is type(module) is str else "?"))

    def _put(self, index: int, value: Any) -> None:
        if self._asked_for is None or index < _ALWAYS_KEPT or index in self._asked_for:
            self._pay(_OBJECT_NBYTES)
            self._memo[index] = value

    def _memoize(self) -> None:
        self._put(self._num_memoized, self._stack[-1])
        self._num_memoized += 1

    def _get(self, index: int) -> None:
        # What is missing was put inside a tensor call that was skipped, most likely.
        self._push(self._memo.get(index, self.skipped))

    def _tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError
        self._pay(_OBJECT_NBYTES)
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _items_tuple(self) -> None:
        items = self._pop_mark()
        self._pay(_OBJECT_NBYTES + _ITEM_NBYTES * len(items))
        self._push(tuple(items))

    def _new(self, container: Any) -> None:
        self._pay(_OBJECT_NBYTES)
        self._push(container)

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        self._pay(_ITEM_NBYTES * len(items))
        if isinstance(target, Call):
            target.items = target.items or []
            target = target.items
        if isinstance(target, list):
            target.extend(items)

    def _add(self, items: list[Any]) -> None:
        self.uses_keys(items)
        self._append(items)

    def _frozen_set(self) -> None:
        items = self._pop_mark()
        self._new([])
        self._add(items)

    def _set_items(self, items: list[Any]) -> None:
        self.uses_keys(items[::2])
        target = self._stack[-1]
        self._pay(_ITEM_NBYTES * len(items))
        if isinstance(target, Call):
            if not isinstance(target.items, Items):
                target.items = Items()
            target = target.items
        if isinstance(target, Items):
            target.extend(items[: len(items) // 2 * 2])

    def _set_item(self) -> None:
        items = self._stack[-2:]
        del self._stack[-2:]
        self._set_items(items)

    def _dict(self) -> None:
        items = self._pop_mark()
        self._new(Items())
        self._set_items(items)

    def _call(self, function: Any, *arguments: Any) -> None:
        self.calls(function, *arguments)
        self.names(function)
        self.goes_through(function, arguments[0])
        self._pay(_OBJECT_NBYTES)
        self._push(Call(function, arguments[0]))

    def _reduce(self) -> None:
        arguments = self._stack.pop()
        self._call(self._stack.pop(), arguments)

    def _new_object_with_keywords(self) -> None:
        keywords, arguments = self._stack.pop(), self._stack.pop()
        self._call(self._stack.pop(), arguments, keywords)

    def _object(self) -> None:
        function, *arguments = self._pop_mark()
        self._call(function, tuple(arguments))

    def _instance(self) -> None:
        function = self._global()
        self._call(function, tuple(self._pop_mark()))

    def _build(self) -> None:
        state = self._stack.pop()
        self.calls(state)
        self.takes_state(self._stack[-1], state)
        if isinstance(self._stack[-1], Call):
            self._stack[-1].state = state

    def _refer(self, saved_id: Any) -> None:
        self.calls(saved_id)
        self._pay(_OBJECT_NBYTES)
        self._push(Reference(saved_id))

    def _stop(self) -> None:
        self._result = self._stack.pop()
        self._stopped = True

    def _ends(self) -> None:
        raise ValueError("not an opcode")


#: indices of the memo that take one byte
_ALWAYS_KEPT = 256
# Every place where a get of another index might be: of what a pickler memoizes hardly anything is asked for.
_GETS = re.compile(rb"(?s)(?=j(....))")
_TEXT_GETS = re.compile(rb"g([0-9]+)\n")


def _asked_for(stream: bytes) -> set[int]:
    """Indices of the memo that may be asked for, and some more."""
    binary = {int.from_bytes(found[1], "little") for found in _GETS.finditer(stream)}
    return binary | {int(found[1]) for found in _TEXT_GETS.finditer(stream) if len(found[1]) < 20}


def _decimal(line: bytes) -> Any:
    return {b"00": False, b"01": True}.get(line) if line in (b"00", b"01") else int(line.rstrip(b"L"))


def _quoted(line: bytes) -> str:
    return line.strip()[1:-1].decode("latin-1")


def _counted(length_nbytes: int, decode: Callable[[bytes], Any]) -> Callable[[TracedPickle], None]:
    def push(trace: TracedPickle) -> None:
        nbytes = trace._number(length_nbytes)
        trace._pay(_OBJECT_NBYTES + 2 * nbytes)
        trace._push(decode(trace._take(nbytes)))

    return push


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _long(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


STEPS: list[Callable[[TracedPickle], None]] = [TracedPickle._ends] * 256
for _code, _step in {
    b"(": TracedPickle._mark,
    b".": TracedPickle._stop,
    b"0": TracedPickle._pop,
    b"1": TracedPickle._pop_mark,
    b"2": lambda trace: trace._push(trace._stack[-1]),
    b"N": lambda trace: trace._push(None),
    b"\x88": lambda trace: trace._push(True),
    b"\x89": lambda trace: trace._push(False),
    b"I": lambda trace: trace._push(_decimal(trace._line())),
    b"L": lambda trace: trace._push(_decimal(trace._line())),
    b"J": lambda trace: trace._push(struct.unpack("<i", trace._take(4))[0]),
    b"K": lambda trace: trace._push(trace._number(1)),
    b"M": lambda trace: trace._push(trace._number(2)),
    b"\x8a": _counted(1, _long),
    b"\x8b": _counted(4, _long),
    b"F": lambda trace: trace._push(float(trace._line())),
    b"G": lambda trace: trace._push(struct.unpack(">d", trace._take(8))[0]),
    b"S": lambda trace: trace._push(_quoted(trace._line())),
    b"T": _counted(4, bytes),
    b"U": _counted(1, bytes),
    b"B": _counted(4, bytes),
    b"C": _counted(1, bytes),
    b"\x8e": _counted(8, bytes),
    b"\x96": _counted(8, bytes),
    b"V": lambda trace: trace._push(trace._line().decode("raw-unicode-escape")),
    b"X": _counted(4, _text),
    b"\x8c": _counted(1, _text),
    b"\x8d": _counted(8, _text),
    b"]": lambda trace: trace._new([]),
    b"}": lambda trace: trace._new(Items()),
    b"\x8f": lambda trace: trace._new([]),
    b")": lambda trace: trace._push(()),
    b"l": lambda trace: trace._new(trace._pop_mark()),
    b"d": TracedPickle._dict,
    b"t": TracedPickle._items_tuple,
    b"\x85": lambda trace: trace._tuple(1),
    b"\x86": lambda trace: trace._tuple(2),
    b"\x87": lambda trace: trace._tuple(3),
    b"\x91": TracedPickle._frozen_set,
    b"a": lambda trace: trace._append([trace._stack.pop()]),
    b"e": lambda trace: trace._append(trace._pop_mark()),
    b"\x90": lambda trace: trace._add(trace._pop_mark()),
    b"s": TracedPickle._set_item,
    b"u": lambda trace: trace._set_items(trace._pop_mark()),
    b"c": lambda trace: trace._push(trace._global()),
    b"\x93": TracedPickle._stack_global,
    b"R": TracedPickle._reduce,
    b"\x81": TracedPickle._reduce,
    b"\x92": TracedPickle._new_object_with_keywords,
    b"i": TracedPickle._instance,
    b"o": TracedPickle._object,
    b"b": TracedPickle._build,
    b"P": lambda trace: trace._refer(trace._line().decode()),
    b"Q": lambda trace: trace._refer(trace._stack.pop()),
    b"g": lambda trace: trace._get(int(trace._line())),
    b"h": lambda trace: trace._get(trace._number(1)),
    b"j": lambda trace: trace._get(trace._number(4)),
    b"p": lambda trace: trace._put(int(trace._line()), trace._stack[-1]),
    b"q": lambda trace: trace._put(trace._number(1), trace._stack[-1]),
    b"r": lambda trace: trace._put(trace._number(4), trace._stack[-1]),
    b"\x94": TracedPickle._memoize,
    b"\x80": lambda trace: trace._take(1),
    b"\x95": lambda trace: trace._take(8),
    b"\x98": lambda trace: None,
}.items():
    STEPS[_code[0]] = _step
