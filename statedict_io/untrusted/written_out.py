"""How much a conversion may write for tensors that share their data, or repeat it with a stride of 0."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from ..errors import StateDictIOError

# Of the file, and what even a small one may be written out to.
_MAX_GROWTH = 4
_ALWAYS_NBYTES = 64 << 20


def check_written_out(path: str, nbytes: int, file_nbytes: int) -> None:
    """To be called before anything is written.

    Args:
        path: of the file, for the message.
        nbytes: of what will be written, each tensor on its own.
        file_nbytes: of the file that they are read from.

    Raises:
        StateDictIOError: it is many times what the file has.
    """
    if nbytes > _MAX_GROWTH * file_nbytes + _ALWAYS_NBYTES:
        raise StateDictIOError(
            f"{path}: written out its tensors have {nbytes} bytes or more, many times the {file_nbytes} of the file, "
            "because they share or repeat their data; clone what is wanted of them and save that"
        )


def untied(records: Iterable[tuple[str, Hashable]]) -> list[str]:
    """The names of tensors whose record one before has too.

    Args:
        records: (name of a tensor, what tells the record that it lives in).
    """
    seen: set[Hashable] = set()
    names = []
    for name, record in records:
        if record in seen:
            names.append(name)
        seen.add(record)
    return names
