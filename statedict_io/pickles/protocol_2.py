"""A pickle stream of a later protocol in the words of protocol 2, which torch's restricted unpickler knows.

Nothing is unpickled. What protocol 2 has no word for stays as it is, and is refused by whoever reads the stream.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_MAX_NAME_CHARACTERS = 1000  # of a global's module or name


class _Held(NamedTuple):
    """A string that was pushed last, or last but one: it may be half the name of a global, which then replaces it."""

    text: str
    puts: tuple[int, ...]  #: memo indices that it is to be put at
    again: int | None  #: it came from the memo, from this index


def in_protocol_2(stream: bytes) -> bytes:
    """The same pickle in protocol 2.

    Raises:
        pickle.UnpicklingError, ValueError: the stream is no pickle.
    """
    translation = _Translation()
    ops = pickletools.genops(stream)
    name, argument, begin = _next(ops)
    while name != "STOP":
        following, next_argument, end = _next(ops)
        special = _SPECIAL.get(name)
        if special is not None:
            special(translation, argument)
        else:
            translation.copy(stream[begin:end])
        name, argument, begin = following, next_argument, end
    translation.copy(b".")
    return bytes(translation.out)


def _next(ops: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]) -> tuple[str, Any, int]:
    opcode, argument, position = next(ops)
    assert position is not None  # of a stream in memory
    return opcode.name, argument, position


class _Translation:
    def __init__(self) -> None:
        self.out = bytearray()
        self._held: list[_Held] = []
        self._memo_size = 0
        self._strings: dict[int, str] = {}  #: what the memo has of strings
        self._written: set[int] = set()  #: those of them that are in the memo of the new stream too

    def copy(self, opcode: bytes) -> None:
        if self._held:
            self._flush()
        self.out += opcode

    def protocol(self, number: int) -> None:
        self.out += b"\x80\x02"

    def frame(self, nbytes: int) -> None:
        pass

    def string(self, text: str) -> None:
        self._hold(_Held(text, (), None))

    def data(self, data: bytes) -> None:
        """As protocol 2 pickles bytes."""
        text = data.decode("latin-1").encode()
        self.copy(b"c_codecs\nencode\nX" + len(text).to_bytes(4, "little") + text + b"X\x06\0\0\0latin1\x86R")

    def get(self, index: int) -> None:
        text = self._strings.get(index)
        if text is None:
            self.copy(b"j" + index.to_bytes(4, "little"))
        else:
            self._hold(_Held(text, (), index))

    def memoize(self, _: None) -> None:
        self.put(self._memo_size)

    def put(self, index: int) -> None:
        self._memo_size += 1
        if self._strings.pop(index, None) is not None:
            self._written.discard(index)
        if self._held:
            held = self._held.pop()
            self._held.append(held._replace(puts=(*held.puts, index)))
            self._strings[index] = held.text
        else:
            self.out += _put_at(index)

    def stack_global(self, _: None) -> None:
        if len(self._held) != 2:
            raise pickle.UnpicklingError("the name of a global is not a string")
        texts = [held.text for held in self._held]
        if any(len(text) > _MAX_NAME_CHARACTERS or "\n" in text for text in texts):
            raise pickle.UnpicklingError("a global with an impossible name")
        self._held.clear()  # where the memo has them, they are written when they are asked for
        self.out += b"c%b\n%b\n" % tuple(text.encode("utf-8", "surrogatepass") for text in texts)

    def _hold(self, held: _Held) -> None:
        if len(self._held) == 2:
            self._write(self._held.pop(0))
        self._held.append(held)

    def _flush(self) -> None:
        for held in self._held:
            self._write(held)
        self._held.clear()

    def _write(self, held: _Held) -> None:
        if held.again in self._written:
            assert held.again is not None
            self.out += b"j" + held.again.to_bytes(4, "little")
        else:
            data = held.text.encode("utf-8", "surrogatepass")
            self.out += b"X" + len(data).to_bytes(4, "little") + data
            if held.again is not None and self._strings.get(held.again) == held.text:
                self.out += _put_at(held.again)
                self._written.add(held.again)
        for index in held.puts:
            self.out += _put_at(index)
            self._written.add(index)


def _put_at(index: int) -> bytes:
    return b"r" + index.to_bytes(4, "little")


_SPECIAL: dict[str, Callable[[_Translation, Any], None]] = {
    "PROTO": _Translation.protocol,
    "FRAME": _Translation.frame,
    "MEMOIZE": _Translation.memoize,
    "STACK_GLOBAL": _Translation.stack_global,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Translation.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Translation.get),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _Translation.string),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), _Translation.data),
}
