"""Text that comes from files, made safe to show."""

from __future__ import annotations


def escaped(text: str, encoding: str | None = None) -> str:
    """``text`` on one line and without anything that steers a terminal: control characters, marks that turn the
    direction of writing, and lone surrogates become escapes.

    Args:
        text: such as the name of a tensor or a file.
        encoding: of the stream that it goes to; what that cannot express becomes an escape too.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding) if encoding else shown
