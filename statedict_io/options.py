"""Checks of the options that a call is given: a wrong one is named before anything is done."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Sequence
from typing import Any


class _NoWord(TypeError, ValueError):
    """What is no text is of a wrong type, and none of the words either."""


def check_flags(**options: Any) -> None:
    """
    Raises:
        TypeError: one is neither true nor false, as ``"no"`` and None are not.
    """
    for name, value in options.items():
        number = value.item() if hasattr(value, "item") else value  # as NumPy and torch hold them
        if not isinstance(number, int):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """
    Raises:
        ValueError: it is none of the ``choices``; a TypeError too where it is no text.
    """
    if isinstance(value, str) and value in choices:
        return
    *others, last = map(repr, choices)
    known = f"{', '.join(others)} or {last}" if others else last
    error = ValueError if isinstance(value, str) else _NoWord
    raise error(f"{name} must be {known}, got {value!r}")


def check_at_least(least: int, **options: Any) -> None:
    """Of numbers, or None where that means something.

    Raises:
        TypeError: one is no number, such as the text ``"8GiB"``.
        ValueError: one is too small.
    """
    for name, number in options.items():
        if number is not None:
            _check_number(name, number)
            if not number >= least:
                raise ValueError(f"{name} must be at least {least}, got {number!r}")


def check_above_zero(**options: Any) -> None:
    """As :func:`check_at_least`."""
    for name, number in options.items():
        if number is not None:
            _check_number(name, number)
            if not number > 0:
                raise ValueError(f"{name} must be above 0, got {number!r}")


def whole(number: Any) -> int:
    """A number of bytes or of saves, such as ``8e9`` or infinity, as an integer."""
    return int(min(number, sys.maxsize))


def _check_number(name: str, number: Any) -> None:
    if not isinstance(number, numbers.Real):
        unit = " of bytes" if "bytes" in name else ""
        raise TypeError(f"{name} must be a number{unit}, got {number!r}")
