"""Unpickling behind torch's restricted unpickler although it refuses some of what is there: that is set aside.

A class or function that the unpickler does not allow becomes a :class:`Refused`, an object that can do nothing, and so
does whatever would be made by calling it. torch's unpickler does all other work, and never sees a refused one as
something to call, to fill or to set the state of.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

import torch
import torch.serialization

from ..untrusted.limits import MAX_REFUSED_NAMES


class Refused:
    """Stands for a global that torch's restricted unpickler refuses, or for an object that needs some."""

    __slots__ = ("names",)

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names  #: of the refused globals, with their modules, or the first of them

    def __repr__(self) -> str:
        return f"<refused: {', '.join(self.names)}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise pickle.PicklingError(f"{', '.join(self.names)}: refused, not there")


_GLOBAL, _APPEND, _SETITEM = "c", "a", "s"
_TO_A_MARK = ("e", "u")  # APPENDS, SETITEMS
# And REDUCE, NEWOBJ, BUILD: what is done to an object on the stack, and could be done to a refused one.
_CONCERNED = (_GLOBAL, _APPEND, _SETITEM, *_TO_A_MARK, "R", "\x81", "b")


class SetsAside:
    """For a subclass of ``torch._weights_only_unpickler.Unpickler``, before it among the bases.

    torch's unpickler is one loop, which reads each opcode with ``read(1)``. Where one follows that concerns a refused
    object, ``read`` does its work on the unpickler's stack and goes on to the next.
    """

    stack: list[Any]
    metastack: list[list[Any]]

    def __init__(self, file: Any, **options: Any) -> None:
        stream = file.read()
        own = io.BytesIO(stream)
        super().__init__(own, **options)  # type: ignore[call-arg]
        self._file = own
        #: for each position in the stream the code of the opcode that begins there, if it is one of these
        self._opcodes = bytearray(len(stream))
        for opcode, _, position in pickletools.genops(stream):
            if opcode.code in _CONCERNED:
                assert position is not None  # of a stream in memory
                self._opcodes[position] = ord(opcode.code)
        del self.read  # of the file: the one below. As an attribute it would be part of a cycle.

    def read(self, nbytes: int) -> bytes:
        if nbytes == 1:
            while (at := self._file.tell()) < len(self._opcodes) and self._opcodes[at]:
                if not self._is_set_aside(chr(self._opcodes[at])):
                    self._file.seek(at)
                    break
        return self._file.read(nbytes)

    def _is_set_aside(self, opcode: str) -> bool:
        """Reads an opcode and does its work if it concerns something refused."""
        self._file.seek(1, io.SEEK_CUR)
        if opcode == _GLOBAL:
            module, name = (self._file.readline()[:-1].decode() for _ in range(2))
            if _is_allowed(module, name):
                return False
            self.stack.append(Refused((f"{module}.{name}",)))
            return True
        if opcode in _TO_A_MARK:
            if not isinstance(self.metastack[-1][-1], Refused):
                return False
            self.pop_mark()  # type: ignore[attr-defined]
            return True
        operands = 2 if opcode == _SETITEM else 1
        target = self.stack[-1 - operands]
        if opcode in (_APPEND, _SETITEM):
            if not isinstance(target, Refused):
                return False
            del self.stack[-operands:]
            return True
        # REDUCE, NEWOBJ, BUILD: a call with something refused is not made either.
        parts = [part for part in (target, *_parts(self.stack[-1])) if isinstance(part, Refused)]
        if not parts:
            return False
        names = dict.fromkeys(name for part in parts for name in part.names)
        del self.stack[-2:]
        found = parts[0] if len(names) == len(parts[0].names) else Refused((*names,)[:MAX_REFUSED_NAMES])
        self.stack.append(found)
        return True


def _parts(arguments: Any) -> tuple[Any, ...]:
    return arguments if type(arguments) is tuple else (arguments,)


def _is_allowed(module: str, name: str) -> bool:
    """As torch's unpickler says when it meets it."""
    stream = b"c" + module.encode() + b"\n" + name.encode() + b"\n."
    try:
        torch._weights_only_unpickler.Unpickler(io.BytesIO(stream)).load()
    except pickle.UnpicklingError:
        return False
    return True
