"""JSON from front to back, a piece at a time: nothing is made that the reader did not ask for.

``json.loads`` makes objects of up to a hundred times the text's size before anybody can look at them.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, NoReturn

from ..untrusted.limits import MAX_HEADER_NAME_NBYTES, shown

_SPACE = re.compile(rb"[ \t\n\r]*")
_PLAIN_NAME = re.compile(rb'[ \t\n\r]*"([^"\\\x00-\x1f]{0,%d})"[ \t\n\r]*:' % MAX_HEADER_NAME_NBYTES)


class Pairs(list[tuple[str, Any]]):
    """A JSON object, in which a key can be twice."""


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _float(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{shown(text)} is out of range")
    return number


def _integer(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text) if len(text) <= 20 else _float(text)


_DECODER = json.JSONDecoder(
    object_pairs_hook=Pairs, parse_constant=_no_constant, parse_float=_float, parse_int=_integer
)


class JSONText:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def error(self, problem: str) -> ValueError:
        return ValueError(f"{problem}, at byte {self.at} of the JSON")

    def take(self, token: bytes) -> bool:
        """Whether ``token`` comes next, which is then behind us; so is the space before it."""
        space = _SPACE.match(self._data, self.at)
        assert space is not None
        self.at = space.end()
        if not self._data.startswith(token, self.at):
            return False
        self.at += len(token)
        return True

    def match(self, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        """What comes next, if it is of that form; it is then behind us."""
        found = pattern.match(self._data, self.at)
        if found is not None:
            self.at = found.end()
        return found

    def expect(self, token: bytes) -> None:
        if not self.take(token):
            raise self.error(f"no {token.decode()!r} where one belongs")

    def expect_end(self) -> None:
        self.take(b"")
        if self.at != len(self._data):
            raise self.error("more text behind the end")

    def name(self) -> str:
        """A string, and the colon behind it."""
        plain = self.match(_PLAIN_NAME)
        if plain is not None:
            return plain[1].decode()
        name = self.string(MAX_HEADER_NAME_NBYTES)
        self.expect(b":")
        return name

    def string(self, max_nbytes: int) -> str:
        self.expect(b'"')
        begin = end = self.at
        limit = begin + max_nbytes + 1
        while True:
            end = self._data.find(b'"', end, limit)
            if end < 0:
                raise self.error(f"a string without an end, or of more than {max_nbytes} bytes")
            run = end
            while run > begin and self._data[run - 1] == ord("\\"):
                run -= 1
            if (end - run) % 2 == 0:
                break
            end += 1
        self.at = end + 1
        found: str = json.loads(self._data[begin - 1 : end + 1])
        found.encode()  # half of a pair of surrogates is no text
        return found

    def value(self, max_nbytes: int) -> Any:
        """What comes next, objects as :class:`Pairs`."""
        self.take(b"")
        window = self._data[self.at : self.at + max_nbytes]
        try:
            # What is cut off at the window's end is not of this value, or makes it too long.
            text, _ = codecs.utf_8_decode(window, "strict", False)
            found, end = _DECODER.raw_decode(text)
            read = text[:end].encode()
            if b"\\u" in read:
                json.dumps(found, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as e:
            problem = e.msg if isinstance(e, json.JSONDecodeError) else str(e)
            raise self.error(f"no value, or one of more than {max_nbytes} bytes ({problem})") from None
        self.at += len(read)
        return found
