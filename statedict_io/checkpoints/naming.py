"""Names of checkpoints: a pattern makes one of a step, and reads the step back."""

from __future__ import annotations

import operator
import re
import string
from typing import Any

from ..writing.suffixes import check_suffix

DEFAULT = "step-{step:08d}.pt"
_SAMPLES = (0, 7, 12_345_678, 10**12)


class Pattern:
    """A format string with one field ``{step}``, of a name in a directory.

    Raises:
        ValueError: names made of it could not be told from others, or would be hidden or elsewhere.
        FileKindError: they would promise another format.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            parts = list(string.Formatter().parse(text))
            fields = [field for _, field, _, conversion in parts if field is not None]
            converted = any(conversion for _, _, _, conversion in parts)
            if fields != ["step"] or converted:
                raise ValueError("it needs one field, {step} or such as {step:08d}")
            named = [self.name_of(step) for step in _SAMPLES]
        except (ValueError, IndexError, KeyError, TypeError) as e:
            raise ValueError(f"pattern {text!r}: {e}") from None
        if any(c in named[0] for c in "/\\\0"):
            raise ValueError(f"pattern {text!r}: it names a file in the directory, without a slash")
        if text.startswith("."):
            raise ValueError(f"pattern {text!r}: names that begin with a dot are those of temporary files")
        if text.endswith(".json"):
            raise ValueError(f"pattern {text!r}: .json is what lies beside a checkpoint")
        check_suffix(text)
        self._known = re.compile(
            "".join(re.escape(literal) + ("([0-9]+)" if field else "") for literal, field, _, _ in parts)
        )
        if [self.step_of(name) for name in named] != list(_SAMPLES):
            raise ValueError(f"pattern {text!r}: the step has to be written in decimal digits, such as {{step:08d}}")

    def name_of(self, step: int) -> str:
        return self.text.format(step=step)

    def step_of(self, name: str) -> int | None:
        """None where the pattern does not make this name, also where it would spell the step in another way."""
        found = self._known.fullmatch(name)
        if found is None:
            return None
        step = int(found[1])
        return step if self.name_of(step) == name else None


def checked_step(step: Any) -> int:
    """``step`` as an int.

    Raises:
        TypeError, ValueError: it is none, or negative.
    """
    try:
        number = operator.index(step)
    except TypeError:
        raise TypeError(f"step must be a whole number, got {step!r}") from None
    if number < 0:
        raise ValueError(f"step must be at least 0, got {number}")
    return number
