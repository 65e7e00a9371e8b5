"""What the caller of ``save_async`` holds, and what becomes of errors that nobody asks for.

No error is lost: one that nobody asked for is raised by the next ``save_async`` to the path, or by ``wait_all``, or
printed when the interpreter exits.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import traceback
from types import TracebackType

from ..errors import StateDictIOError
from .in_flight import SaveInFlight, own_saves, register


class PendingSave:
    """A save that :func:`~statedict_io.save_async` started.

    Every method may be called from any thread of the process that started it. Where that thread is the one that writes
    this save, in a progress callback, asking for its result raises :class:`StateDictIOError`. As a context manager it
    waits for the save at the end of the block, and raises its error unless the block raised one.
    """

    def __init__(self, save: SaveInFlight) -> None:
        self._save = save

    @property
    def path(self) -> str:
        """As given to :func:`~statedict_io.save_async`."""
        return self._save.path

    @property
    def digest(self) -> str | None:
        """The file's SHA-256 in hex, where ``digest="sha256"`` asked for it and the save has ended well; else None."""
        save = self._save
        if save.digest is None or not self.done() or save.error is not None:
            return None
        return save.digest.hexdigest()

    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        return self._save.process == os.getpid() and self._save.has_ended

    def result(self, timeout: float | None = None) -> None:
        """Waits until the file is there, and durable if that was asked for. If a later call to the same path was
        committed first, that call's file is there, as durable as it asked for.

        Args:
            timeout: in seconds; None: as long as it takes.

        Raises:
            TimeoutError: the file is not there after ``timeout`` seconds; the save goes on.
            Exception: the save's error; the old file is whole, unless ``atomic=False``.
        """
        if (error := self.exception(timeout)) is not None:
            raise error

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Waits as :meth:`result` does, and returns the save's error or None.

        Args:
            timeout: in seconds; None: as long as it takes.

        Raises:
            TimeoutError: the save has not ended after ``timeout`` seconds; it goes on.
        """
        self._check_process()
        if not self._wait(timeout):
            raise TimeoutError(f"the save to {self.path!r} has not ended after {timeout} s")
        register.collect(self._save)
        return self._save.error

    def snapshot_done(self) -> bool:
        """Whether the state has been copied; False only after ``save_async(wait_snapshot=False)``."""
        self._check_process()
        snapshot = self._save.snapshot
        return snapshot is None or snapshot.done()

    def wait_snapshot(self) -> None:
        """Returns when the state has been copied: from then on the tensors may be changed on any stream.

        Raises:
            RuntimeError: what the device reports.
        """
        self._check_process()
        self._save.wait_snapshot()

    def __enter__(self) -> PendingSave:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.result()
        else:
            self._wait(None)  # the body's error comes first; this save's is reported later if there is one

    def __repr__(self) -> str:
        error = self._save.error
        state = "in flight" if not self.done() else "done" if error is None else f"failed: {error!r}"
        return f"<PendingSave {self.path!r}: {state}>"

    def _wait(self, timeout: float | None) -> bool:
        if not self._save.has_ended and self._save in own_saves():
            raise StateDictIOError(
                f"the save to {self.path!r} cannot end while the thread that makes it waits for it: ask in "
                "another thread, or after the callback or signal handler has returned"
            )
        return register.wait(lambda: self._save.has_ended, timeout)

    def _check_process(self) -> None:
        if self._save.process != os.getpid():
            raise StateDictIOError(
                f"the save to {self.path!r} belongs to process {self._save.process}, of which this is a forked child"
            )


def ended_well(save: PendingSave) -> bool:
    """Waits for the save's end; whether the file is there. Its error stays to be asked for, or reported."""
    save._check_process()
    save._wait(None)
    return save._save.error is None


def finish(save: SaveInFlight, error: BaseException | None) -> None:
    """Ends the save. ``error`` is its own; None also where the call raises it."""
    register.finish(save, error)
    if _exit_has_been_reported:
        _report_uncollected()


def raise_if_failed(save: PendingSave) -> None:
    """Raises the error of the save, or of an earlier one to the same file, if nobody has asked for it."""
    raise_uncollected(save._save.file)


def raise_uncollected(file: str) -> None:
    """Raises the error of an earlier save to the same file if nobody has asked for it."""
    failed = register.take_uncollected(file)
    if failed is None or failed.error is None:
        return
    if hasattr(failed.error, "add_note"):
        failed.error.add_note(
            f"This is the error of an earlier save_async to {failed.path!r}, which nobody had asked for. "
            "The call that raised it has not started a save: call again."
        )
    raise failed.error


def wait_all(timeout: float | None = None) -> None:
    """Waits for every save in flight. Called by a signal handler, a progress callback or the like, it does not wait for
    the save that this thread is in the middle of.

    Args:
        timeout: in seconds, of all together; None: as long as it takes.

    Raises:
        TimeoutError: some are still in flight; they go on.
        Exception: the error of the first save that failed and was never checked. Errors of others are raised by the
            next call, or reported at exit.
    """
    if not register.wait_until_empty(timeout):
        raise TimeoutError(f"{len(register.in_flight) - len(own_saves())} saves have not ended after {timeout} s")
    failed = register.take_uncollected()
    if failed is not None and failed.error is not None:
        raise failed.error


def exit_has_begun() -> bool:
    """Whether threads that are started now would not be waited for."""
    return _exit_has_begun


_exit_has_begun = _exit_has_been_reported = False


def _at_exit() -> None:
    global _exit_has_begun
    _exit_has_begun = True
    register.wait_until_empty(None)
    _report_uncollected()


def _at_last() -> None:
    global _exit_has_been_reported
    _at_exit()
    _exit_has_been_reported = True


def _report_uncollected() -> None:
    while (failed := register.take_uncollected()) is not None:
        when = time.strftime("%H:%M:%S")
        print(f"statedict_io: {when}: an asynchronous save failed, and nobody asked for its error", file=sys.stderr)
        if failed.error is not None:
            traceback.print_exception(type(failed.error), failed.error, failed.error.__traceback__)


# The threads that write are no daemons, so exit waits for them anyway. Processes of multiprocessing leave by os._exit
# and run no atexit functions, but these.
if hasattr(threading, "_register_atexit"):
    threading._register_atexit(_at_exit)
atexit.register(_at_last)
