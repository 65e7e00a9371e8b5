"""What a URL is."""

from __future__ import annotations

import re

# "s3://...", "simplecache::s3://...". A scheme of one letter is a drive.
_URL = r"(?:[A-Za-z][A-Za-z0-9+.-]+::)*[A-Za-z][A-Za-z0-9+.-]+://"


def is_url(f: object) -> bool:
    """Whether ``f`` names something through fsspec. Only a ``str`` does: a Path has lost one of the slashes."""
    return isinstance(f, str) and "://" in f and re.match(_URL, f) is not None
