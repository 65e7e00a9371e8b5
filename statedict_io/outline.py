"""Which tensors live in which record, read off ``data.pkl`` without unpickling it.

A pickle stream is a program; this follows it with placeholders. Nothing is imported, called or built: a global is its
name, a call the pair of function and arguments. It serves error messages, where the file may be hostile and torch's
unpickler may refuse it: what it does not understand it leaves out.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import Any

#: containers visited, and characters in all names: shared containers can be nested to have billions of paths
_MAX_VISITED = 2_000_000
_MAX_CHARACTERS = 64 << 20


@dataclass(eq=False)
class _Global:
    name: str


@dataclass(eq=False)
class _Call:
    """What calling ``function`` with ``arguments`` would give, and what would be put into it afterwards."""

    function: Any
    arguments: Any
    items: dict[Any, Any] = field(default_factory=dict)
    state: Any = None


@dataclass(eq=False)
class _Reference:
    """A persistent id."""

    saved_id: Any


_MARK = object()


def tensors_by_record(data_pkl: bytes) -> dict[str, list[str]]:
    """Dotted names of the tensors in each record (``data/0``), best effort; {} where the stream cannot be followed."""
    try:
        return _collect(_follow(data_pkl))
    except Exception:  # damaged streams can fail anywhere
        return {}


def _follow(data_pkl: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def pop_mark() -> list[Any]:
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def set_items(target: Any, items: list[Any]) -> None:
        into = target.items if isinstance(target, _Call) else target
        if isinstance(into, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                into[_hashable(key)] = value

    argument: Any
    for opcode, argument, _ in pickletools.genops(data_pkl):
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            pop_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "STOP":
            return stack.pop()
        elif name in ("GLOBAL", "INST"):
            found = _Global(argument.replace(" ", "."))
            stack.append(_Call(found, tuple(pop_mark())) if name == "INST" else found)
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_Global(f"{module}.{attribute}"))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            stack.append(_Call(stack.pop(), arguments))
        elif name == "NEWOBJ_EX":
            stack.pop()
            arguments = stack.pop()
            stack.append(_Call(stack.pop(), arguments))
        elif name == "OBJ":
            function, *rest = pop_mark()
            stack.append(_Call(function, tuple(rest)))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], _Call):
                stack[-1].state = state
        elif name in ("PERSID", "BINPERSID"):
            stack.append(_Reference(argument if name == "PERSID" else stack.pop()))
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("DICT", "LIST", "TUPLE", "FROZENSET"):
            items = pop_mark()
            if name == "DICT":
                stack.append({})
                set_items(stack[-1], items)
            else:
                stack.append(items if name == "LIST" else tuple(items))
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "SETITEM":
            items = stack[-2:]
            del stack[-2:]
            set_items(stack[-1], items)
        elif name == "SETITEMS":
            items = pop_mark()
            set_items(stack[-1], items)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else pop_mark()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
            elif isinstance(stack[-1], _Call):
                stack[-1].items.update(enumerate(items, len(stack[-1].items)))
        elif name in ("NEWTRUE", "NEWFALSE", "NONE"):
            stack.append({"NEWTRUE": True, "NEWFALSE": False, "NONE": None}[name])
        elif name in ("PROTO", "FRAME", "READONLY_BUFFER"):
            pass
        else:
            stack.append(argument)
    return None


def _hashable(key: Any) -> Any:
    return key if isinstance(key, (str, int, float, bytes, bool, type(None))) else id(key)


def _collect(root: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    pending: list[tuple[str, Any, tuple[int, ...]]] = [("", root, ())]
    visited = characters = 0
    while pending:
        name, value, inside = pending.pop()
        visited += 1
        characters += len(name)
        if visited > _MAX_VISITED or characters > _MAX_CHARACTERS:
            break
        if isinstance(value, _Reference):
            saved_id = value.saved_id
            if isinstance(saved_id, tuple) and len(saved_id) >= 3 and saved_id[0] in ("storage", b"storage"):
                names = found.setdefault(f"data/{saved_id[2]}", [])
                if name not in names[-1:]:
                    names.append(name)
            continue
        if id(value) in inside:
            continue
        inside = (*inside[-64:], id(value))
        if isinstance(value, dict):
            parts = [(_join(name, key), item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            parts = [(_join(name, index), item) for index, item in enumerate(value)]
        elif isinstance(value, _Call):
            # What a call is made of has the name of the call; what is put into it is named by its key.
            parts = [(name, item) for item in _flat(value.arguments)]
            parts += [(_join(name, key), item) for key, item in value.items.items()]
            if value.state is not None:
                parts += [(name, item) for item in _flat(value.state)]
        else:
            continue
        pending.extend((part_name, item, inside) for part_name, item in reversed(parts))
    return found


def _flat(value: Any) -> list[Any]:
    """The items of a tuple of tuples that hold more than numbers and strings."""
    if not isinstance(value, tuple):
        return [value]
    return [part for item in value for part in (_flat(item) if isinstance(item, tuple) and len(item) < 64 else [item])]


def _join(name: str, key: Any) -> str:
    return f"{name}.{key}" if name else str(key)
