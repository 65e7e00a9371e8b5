"""What a forked child does over: one list for the whole package, run in the order of registration.

A lock that another thread of the parent held stays locked in the child for ever, and what that thread was about to undo
stays done.
"""

from __future__ import annotations

import os
from collections.abc import Callable

_actions: list[Callable[[], object]] = []


def in_forked_child(action: Callable[[], object]) -> None:
    """Has ``action`` called in every forked child, in its only thread, before anything else runs there."""
    _actions.append(action)


def _start_anew() -> None:
    for action in _actions:
        action()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
