"""Tables and numbers for people: rich on a terminal, plain text for anything else."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TextIO

from ..untrusted.escaping import escaped
from ..untrusted.limits import shown


def say(line: str, stream: TextIO | None = None) -> None:
    """Prints one line, to standard output unless another stream is given. Every line of the commands goes through
    here: names in it come from files, and nothing in them may steer the terminal or fail to be encoded."""
    stream = sys.stdout if stream is None else stream
    print(escaped(line, stream.encoding), file=stream)


def complain(line: str) -> None:
    """The same to standard error, after the name of the program."""
    say(f"statedict-io: {line}", sys.stderr)


def nbytes_text(nbytes: int) -> str:
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def print_table(title: str, columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> None:
    """``columns``: (heading, whether it is aligned right). Long cells are cut."""
    title = escaped(title, sys.stdout.encoding)
    rows = [[escaped(shown(cell), sys.stdout.encoding) for cell in row] for row in rows]
    table = _rich_table(title, columns, rows)
    if table is not None:
        from rich.console import Console

        Console().print(table)
        return
    say(title)
    widths = [max(len(row[i]) for row in [[heading for heading, _ in columns], *rows]) for i in range(len(columns))]
    for row in [[heading for heading, _ in columns], *rows]:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, (_, right) in zip(row, widths, columns, strict=True)
        ]
        say("  ".join(cells).rstrip())


def _rich_table(title: str, columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> Any:
    if not sys.stdout.isatty():
        return None
    try:
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return None
    table = Table(title=Text(title))
    for heading, right in columns:
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: brackets in names are no markup
    return table


def bar_wanted() -> bool:
    """Whether a progress bar can be shown."""
    if not sys.stderr.isatty():
        return False
    try:
        import tqdm  # noqa: F401
    except ImportError:
        return False
    return True


def json_number(value: float | None) -> float | str | None:
    """JSON has no NaN."""
    return value if value is None or abs(value) < float("inf") else str(value)
