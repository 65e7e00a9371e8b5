"""Files of SHA-256 sums, as ``sha256sum`` writes them and reads them with ``-c``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

MAX_NBYTES = 16 << 20
_ALONE = re.compile(r"\s*[0-9a-fA-F]{64}\s*")
# A name with a line break or a backslash in it is escaped, and the line then begins with a backslash.
_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)")
_TAGGED_LINE = re.compile(r"(\\?)SHA256 \((.+)\) = ([0-9a-fA-F]{64})")
_ESCAPES = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}


def lines(sums: Iterable[tuple[str, str]]) -> bytes:
    """
    Args:
        sums: names of files in the directory of the sums, each with its sum in hex.
    """
    return "".join(_line(name, hexdigest) for name, hexdigest in sums).encode(errors="surrogateescape")


def _line(name: str, hexdigest: str) -> str:
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if escaped == name else chr(92)}{hexdigest}  {escaped}\n"


def decoded(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


def alone(text: str) -> str | None:
    """The sum, in lower case, where there is nothing else."""
    return text.strip().lower() if _ALONE.fullmatch(text) else None


def named(text: str) -> Iterator[tuple[str, str]]:
    """(name, sum in lower case) of each line that has them; others are skipped."""
    return (found for line in text.splitlines() if (found := _of_line(line)) is not None)


def is_all_about(text: str, is_one: Callable[[str], bool]) -> bool:
    """Whether there are sums, and nothing else than those of files for whose names ``is_one`` holds."""
    found = [_of_line(line) for line in text.splitlines() if line.strip()]
    return alone(text) is not None or (bool(found) and all(sum_ is not None and is_one(sum_[0]) for sum_ in found))


def _of_line(line: str) -> tuple[str, str] | None:
    match = _LINE.fullmatch(line)
    if match is not None:
        escaped, sha256, name = match.groups()
    else:
        match = _TAGGED_LINE.fullmatch(line)
        if match is None:
            return None
        escaped, name, sha256 = match.groups()
    if escaped:
        name = re.sub(r"\\[\\nr]", lambda mark: _ESCAPES[mark[0]], name)
    return name.removeprefix("./"), sha256.lower()
