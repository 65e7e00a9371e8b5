"""Tables and numbers for people: rich on a terminal, plain text for anything else."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def printable(text: str) -> str:
    """Names come from files: nothing in them may steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nbytes_text(nbytes: int) -> str:
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def print_table(title: str, columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> None:
    """``columns``: (heading, whether it is aligned right)."""
    rows = [[printable(cell) for cell in row] for row in rows]
    table = _rich_table(title, columns, rows)
    if table is not None:
        from rich.console import Console

        Console().print(table)
        return
    print(title)
    widths = [max(len(row[i]) for row in [[heading for heading, _ in columns], *rows]) for i in range(len(columns))]
    for row in [[heading for heading, _ in columns], *rows]:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, (_, right) in zip(row, widths, columns, strict=True)
        ]
        print("  ".join(cells).rstrip())


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
