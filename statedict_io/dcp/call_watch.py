"""Notices that DCP's call has ended: ``dcp.save`` tells a storage that a save has succeeded, never that it has failed.

The end is looked for every 20 ms, in a thread, because nothing announces it: an object of the call's own is no sign, as
a kept exception keeps the call's frames and all that is in them. Only the stack of the calling thread tells whether a
frame still runs, and Python calls nobody when one has ended, unless every call in that thread is traced.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_WATCH_SECONDS = 0.02
_DCP = "torch.distributed.checkpoint"


def when_call_has_ended(act: Callable[[], None], *, unless: threading.Event) -> None:
    """Has ``act`` called, in another thread, once the call into DCP that this thread is inside of has returned or
    raised; not where ``unless`` is set before.

    Nothing is called where this thread is in no such call, or where no thread is to be had.
    """
    of_dcp = [frame for frame in _frames(sys._getframe()) if str(frame.f_globals.get("__name__")).startswith(_DCP)]
    if not of_dcp:
        return
    call = of_dcp[-1]  # the outermost
    caller = threading.get_ident()

    def watch() -> None:
        while not unless.wait(_WATCH_SECONDS):
            if not _is_inside(caller, call):
                act()
                return

    with contextlib.suppress(RuntimeError):  # no more threads
        threading.Thread(target=watch, name="statedict_io.dcp", daemon=True).start()


def _is_inside(thread: int, call: FrameType) -> bool:
    """Whether ``call`` is on the stack of a thread; False of one that is gone."""
    return any(frame is call for frame in _frames(sys._current_frames().get(thread)))


def _frames(innermost: FrameType | None) -> Iterator[FrameType]:
    frame = innermost
    while frame is not None:
        yield frame
        frame = frame.f_back
