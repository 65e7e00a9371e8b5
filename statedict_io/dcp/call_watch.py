"""Notices that DCP's call has ended: ``dcp.save`` tells a storage that a save has succeeded, never that it has failed.

The end is looked for every 20 ms, in a thread, because nothing announces it: an object of the call's own is no sign, as
a kept exception keeps the call's frames and all that is in them. Only the stack of the calling thread tells whether a
frame still runs, and Python calls nobody when one has ended, unless every call in that thread is traced.
"""

from __future__ import annotations

import contextlib
import itertools
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
    of_dcp = [frame for frame in _frames(sys._getframe()) if _is_of_dcp(frame)]
    if of_dcp:
        call = of_dcp[-1]  # the outermost
        _watch(lambda stack: all(frame is not call for frame in stack), act, unless)


def when_results_are_gathered(act: Callable[[], None], *, unless: threading.Event) -> None:
    """As :func:`when_call_has_ended`, but already when this thread waits for what all ranks have written or failed to
    write. DCP tells nobody when a rank fails between its plan and its writer."""

    def waits(stack: Iterator[FrameType]) -> bool:
        names = [frame.f_code.co_name for frame in stack if _is_of_dcp(frame)]
        return not names or ("gather_object", "all_reduce") in itertools.pairwise(names)

    if any(map(_is_of_dcp, _frames(sys._getframe()))):
        _watch(waits, act, unless)


def _watch(is_so: Callable[[Iterator[FrameType]], bool], act: Callable[[], None], unless: threading.Event) -> None:
    """Calls ``act`` when ``is_so`` of this thread's stack, innermost frame first; empty once the thread is gone."""
    caller = threading.get_ident()

    def watch() -> None:
        while not unless.wait(_WATCH_SECONDS):
            if is_so(_frames(sys._current_frames().get(caller))):
                act()
                return

    with contextlib.suppress(RuntimeError):  # no more threads
        threading.Thread(target=watch, name="statedict_io.dcp", daemon=True).start()


def _is_of_dcp(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith(_DCP)


def _frames(innermost: FrameType | None) -> Iterator[FrameType]:
    frame = innermost
    while frame is not None:
        yield frame
        frame = frame.f_back
