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


class Refused:
    """Stands for a global that torch's restricted unpickler refuses, or for an object that needs some."""

    __slots__ = ("names",)

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names  #: of the refused globals, with their modules

    def __repr__(self) -> str:
        return f"<refused: {', '.join(self.names)}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise pickle.PicklingError(f"{', '.join(self.names)}: refused, not there")


_GLOBAL = "GLOBAL"
# What is done to an object on the stack, and could be done to a refused one.
_ACTIONS = {"REDUCE", "NEWOBJ", "BUILD", "APPEND", "APPENDS", "SETITEM", "SETITEMS"}


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
        #: position of an opcode -> its name, and where it ends
        self._opcodes: dict[int, tuple[str, Any, int]] = {}
        previous: tuple[str, Any, int] | None = None  # with its own position
        for opcode, argument, position in pickletools.genops(stream):
            assert position is not None  # of a stream in memory
            if previous is not None:
                self._opcodes[previous[2]] = (previous[0], previous[1], position)
                previous = None
            if opcode.name == _GLOBAL or opcode.name in _ACTIONS:
                previous = (opcode.name, argument, position)
        self.read = self._read

    def _read(self, nbytes: int) -> bytes:
        if nbytes == 1:
            while (found := self._opcodes.get(self._file.tell())) is not None and self._is_set_aside(*found[:2]):
                self._file.seek(found[2])
        return self._file.read(nbytes)

    def _is_set_aside(self, opcode: str, argument: Any) -> bool:
        """Does the opcode's work if it concerns something refused."""
        if opcode == _GLOBAL:
            module, _, name = argument.partition(" ")
            if _is_allowed(module, name):
                return False
            self.stack.append(Refused((f"{module}.{name}",)))
            return True
        if opcode in ("APPENDS", "SETITEMS"):
            if not isinstance(self.metastack[-1][-1], Refused):
                return False
            self.pop_mark()  # type: ignore[attr-defined]
            return True
        operands = 2 if opcode == "SETITEM" else 1
        target = self.stack[-1 - operands]
        if opcode in ("APPEND", "SETITEM"):
            if not isinstance(target, Refused):
                return False
            del self.stack[-operands:]
            return True
        # REDUCE, NEWOBJ, BUILD: a call with something refused is not made either.
        names = tuple(dict.fromkeys(name for part in (target, *_parts(self.stack[-1])) for name in _names(part)))
        if not names:
            return False
        del self.stack[-2:]
        self.stack.append(Refused(names))
        return True


def _parts(arguments: Any) -> tuple[Any, ...]:
    return arguments if type(arguments) is tuple else (arguments,)


def _names(part: Any) -> tuple[str, ...]:
    return part.names if isinstance(part, Refused) else ()


def _is_allowed(module: str, name: str) -> bool:
    """As torch's unpickler says when it meets it."""
    stream = b"c" + module.encode() + b"\n" + name.encode() + b"\n."
    try:
        torch._weights_only_unpickler.Unpickler(io.BytesIO(stream)).load()
    except pickle.UnpicklingError:
        return False
    return True
