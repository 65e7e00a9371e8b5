"""How much a file may make us do: all limits on reading that are ours, each beyond what ``torch.save`` writes.

They keep the promise that reading a file takes time in proportion to its size, and at most its size + 64 MiB of memory
more than ``torch.load`` takes for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: what a reader may take beyond the size of the file, with room for what is not counted
SPARE_NBYTES = 32 << 20

#: levels of tuples in a key of a dictionary, an element of a set, or an argument of a call: Python's pickler gives up
#: at 1000 levels of anything, Python's hash overflows the stack at some 100,000
MAX_HASHED_DEPTH = 1000
#: of a global's name with its module, and of what is called and cannot be: torch's message shows them, and it looks
#: through its messages in time quadratic in a word's length
MAX_GLOBAL_CHARACTERS = 1000
#: integers among the keys that have one hash: those that fit 64 bits cannot be so many
MAX_EQUAL_HASHES = 1000
#: of a tensor that is handed to what goes through it, such as a container: each is made a tensor
MAX_ITERATED_ELEMENTS = 1 << 16

#: containers inside each other, in which tensors are given names
MAX_NAMED_DEPTH = 10_000
#: levels and parts of a key of nested tuples, and characters in it
MAX_KEY_DEPTH = 100
MAX_KEY_PARTS = 1000
MAX_KEY_CHARACTERS = 1 << 16
#: globals that the restricted unpickler refuses, told of for each value
MAX_REFUSED_NAMES = 16
#: damaged records that an error or a report describes, and characters of a name there
MAX_RECORDS_SHOWN = 1000
MAX_SHOWN_CHARACTERS = 200
#: names in a message
_LISTED = 8

#: records read or checksummed in one go
MAX_RECORDS_AT_ONCE = 1 << 15

#: objects in which tensors are searched: those that are remembered
MAX_SEARCHED_KNOWN = 1 << 17

#: of a safetensors header: a name, the metadata in all, the fields of a tensor
MAX_HEADER_NAME_NBYTES = 1 << 16
MAX_HEADER_METADATA_NBYTES = 8 << 20
MAX_HEADER_METADATA_ENTRIES = 1 << 16
MAX_HEADER_ENTRY_NBYTES = 1 << 12
#: of an index of shards, and of a file's name in one
MAX_INDEX_NBYTES = 256 << 20
MAX_SHARD_NAME_NBYTES = 1 << 10


def max_hash_work(pickle_nbytes: int) -> int:
    """Values that may be hashed as parts of keys or handed to calls, for a pickle of that size: each is written with a
    byte at least, and counts once more for every time that it is used again."""
    return (1 << 18) + 8 * pickle_nbytes


def max_named_parts(nbytes: int) -> int:
    """Paths through the containers of a file of that size: a path ends in a value, which takes a byte at least, and
    there are more only where containers are shared."""
    return (1 << 18) + nbytes


def max_named_characters(nbytes: int) -> int:
    """In all names of the parts of a file of that size; each takes time, also where nobody keeps it."""
    return (1 << 20) + 64 * nbytes


def max_searched_parts(nbytes: int) -> int:
    """Parts of objects in which tensors are searched, for a file of that size: an object takes bytes for each, and is
    searched again where it is met again."""
    return 4 * max_named_parts(nbytes)


def listed(names: Sequence[str], show: Callable[[str], str] = str) -> str:
    """The first eight names for a message, and how many more there are. The empty name is that of the whole object."""
    first = ", ".join(show(name) or "the object itself" for name in names[:_LISTED])
    return first if len(names) <= _LISTED else f"{first} and {len(names) - _LISTED} more"


def shown(name: str) -> str:
    """``name`` for an error, cut where it is long."""
    return name if len(name) <= MAX_SHOWN_CHARACTERS else f"{name[:MAX_SHOWN_CHARACTERS]}... ({len(name)} characters)"
