"""``save_async``: everything is pickled, planned and copied in the call; the file is written by a thread."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import threading
import traceback
from collections.abc import Callable
from typing import Any, Literal

import torch

from .. import backends
from ..backends.protocol import PlannedFile, Snapshot
from ..options import check_above_zero, check_at_least, check_choice, check_flags, whole
from ..progress import Progress
from ..system import host_memory
from ..system.device_room import DeviceRoom
from ..system.file_digest import FileDigest
from . import pending, saving
from .in_flight import Call, Limits, SaveInFlight, register
from .pending import PendingSave
from .stock_saves import StockContent
from .suffixes import check_suffix
from .targets import ObjectTarget, Target, URLTarget


def save_async(
    obj: object,
    path: Any,
    pickle_module: Any = pickle,
    pickle_protocol: int = torch.serialization.DEFAULT_PROTOCOL,
    _use_new_zipfile_serialization: bool = True,
    _disable_byteorder_record: bool = False,
    *,
    durable: bool = True,
    backend: str = "auto",
    progress: Progress = None,
    atomic: bool = True,
    max_in_flight: int = 2,
    max_snapshot_nbytes: int | None = None,
    when_full: Literal["wait", "raise"] = "wait",
    max_device_snapshot_nbytes: int | None = None,
    device_margin_nbytes: int | None = None,
    wait_snapshot: bool = True,
    max_bytes_per_second: float | None = None,
    digest: str | None = None,
) -> PendingSave:
    """Saves ``obj`` as :func:`save` does, but returns as soon as the tensors may be changed.

    What is written is the state at the call, in which ``obj`` is pickled. Saves to one path are committed in the order
    of the calls, together with those of :func:`save`: the last call wins. A call may come from
    a signal handler or a callback while the same thread is inside another save, which it then does not wait for. The
    interpreter's normal exit waits for saves in flight; one that is killed leaves the old file.

    Args:
        obj, pickle_module, pickle_protocol, durable, backend, atomic: as for :func:`save`.
        path: ``str`` or ``os.PathLike``, or a URL as for :func:`save`; an object with ``write`` is refused.
        progress: as for :func:`save`; called in the thread that writes.
        max_in_flight: saves that may be in flight, this one included.
        max_snapshot_nbytes: of host memory that snapshots may take, those of all saves in flight together; None: half
            of the memory that this process may use (the machine's, or what control groups leave of it), and three
            quarters of what is free at most. A state larger than that is written in the call, without a snapshot.
        when_full: what a call does that would exceed these two: ``"wait"`` for earlier saves, or ``"raise"``.
        max_device_snapshot_nbytes: of each device's memory that snapshots may take; 0: none; None: what is free, less
            the margin. Storages on a device with room are copied there, others to pinned host memory.
        device_margin_nbytes: of each device's memory that stays free; None: a sixteenth of it.
        wait_snapshot: False returns when copies on devices are queued on their current streams. Later work on these
            streams comes after them; before anything else, call :meth:`PendingSave.wait_snapshot`.
        max_bytes_per_second: of writing; None: as fast as it goes.
        digest: as for :func:`save`; the sum is :attr:`PendingSave.digest`.

    Returns:
        What to ask for the result.

    Raises:
        OSError: the error of an earlier ``save_async`` to ``path`` that was never checked; this save has not been
            started.
        SnapshotLimitError: the limits are met and ``when_full`` is "raise".
        TypeError, ValueError: an option is of a wrong type, such as ``max_snapshot_nbytes="8GiB"``, or too small; names
            it.
        Exception: for bad arguments and objects that cannot be pickled, what :func:`save` raises. Errors of writing
            are the :class:`PendingSave`'s.

    Example:
        >>> pending = sio.save_async(model.state_dict(), "model.pt")
        >>> pending.result(timeout=60)  # None: the file is there; or the save's error is raised
        >>> pending.done()
        True
    """
    return save_hashed_async(
        saving.wanted_digest(digest),
        obj,
        path,
        pickle_module,
        pickle_protocol,
        _use_new_zipfile_serialization,
        _disable_byteorder_record,
        durable=durable,
        backend=backend,
        progress=progress,
        atomic=atomic,
        max_in_flight=max_in_flight,
        max_snapshot_nbytes=max_snapshot_nbytes,
        when_full=when_full,
        max_device_snapshot_nbytes=max_device_snapshot_nbytes,
        device_margin_nbytes=device_margin_nbytes,
        wait_snapshot=wait_snapshot,
        max_bytes_per_second=max_bytes_per_second,
    )


def save_hashed_async(
    digest: FileDigest | None,
    obj: object,
    path: Any,
    pickle_module: Any = pickle,
    pickle_protocol: int = torch.serialization.DEFAULT_PROTOCOL,
    use_new_zipfile_serialization: bool = True,
    disable_byteorder_record: bool = False,
    *,
    durable: bool = True,
    backend: str = "auto",
    progress: Progress = None,
    atomic: bool = True,
    max_in_flight: int = 2,
    max_snapshot_nbytes: int | None = None,
    when_full: Literal["wait", "raise"] = "wait",
    max_device_snapshot_nbytes: int | None = None,
    device_margin_nbytes: int | None = None,
    wait_snapshot: bool = True,
    max_bytes_per_second: float | None = None,
) -> PendingSave:
    """:func:`save_async`, with a digest that says itself what becomes of it; None: none is wanted."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"save_async writes to a path, after the call has returned; got {type(path).__name__}")
    check_suffix(path)
    check_flags(durable=durable, atomic=atomic, wait_snapshot=wait_snapshot)
    limits = _limits(max_in_flight, max_snapshot_nbytes, when_full)
    check_at_least(0, max_device_snapshot_nbytes=max_device_snapshot_nbytes, device_margin_nbytes=device_margin_nbytes)
    check_above_zero(max_bytes_per_second=max_bytes_per_second)
    room = DeviceRoom(max_device_snapshot_nbytes, device_margin_nbytes)
    with Call() as call:
        planned = saving.plan(
            obj,
            path,
            pickle_module,
            pickle_protocol,
            use_new_zipfile_serialization,
            disable_byteorder_record,
            backend=backend,
            progress=progress,
        )
        # A URL without its password.
        shown = planned.target.given if isinstance(planned.target, URLTarget) else os.fspath(path)
        assert not isinstance(planned.target, ObjectTarget), "it was given as a path"
        save = SaveInFlight(shown, planned.target.identity, call, digest)
        write = functools.partial(
            _write,
            save,
            target=planned.target,
            durable=durable,
            progress=progress,
            atomic=atomic,
            bytes_per_second=max_bytes_per_second,
        )
        _start(save, planned, write, limits, room, durable=durable, atomic=atomic, wait_snapshot=wait_snapshot)
        return PendingSave(save)


def _start(
    save: SaveInFlight,
    planned: saving.PlannedSave,
    write: Callable[..., None],
    limits: Limits,
    room: DeviceRoom,
    *,
    durable: bool,
    atomic: bool,
    wait_snapshot: bool,
) -> None:
    """Returns with the snapshot taken and ``write`` in a thread, or with everything written where neither can be."""
    try:
        pending.raise_uncollected(save.file)
        content = planned.content
        if isinstance(content, StockContent):  # torch's own code reads the tensors while it writes
            register.admit(save, 0, {}, limits)
            register.wait_for_predecessor(save)
            saving.write(content, planned.target, durable, None, atomic=atomic, digest=save.digest)
            planned.target.close()
            pending.finish(save, None)
            return
        snapshot = _take_snapshot(save, content, limits, room)
        if snapshot is None:
            write(content, in_call=True)
            return
        if wait_snapshot:
            snapshot.wait()
        _start_thread(write, snapshot, f"save_async {save.path}")
    except BaseException:
        # A signal's exception can come up when the thread is already there: it is the thread that ends the save then.
        if save.claim():
            planned.target.close()
            pending.finish(save, None)
        raise


def _start_thread(write: Callable[..., None], snapshot: Snapshot, name: str) -> None:
    """Runs ``write`` in a thread that the interpreter's exit waits for; in the call where there can be none."""
    if not pending.exit_has_begun():
        try:
            # No daemon, also where a daemon calls.
            threading.Thread(target=write, args=(snapshot,), name=name, daemon=False).start()
            return
        except RuntimeError:  # no more threads
            pass
    write(snapshot, in_call=True)


def _take_snapshot(save: SaveInFlight, planned: PlannedFile, limits: Limits, room: DeviceRoom) -> Snapshot | None:
    """None, and ``save`` in flight without, where the state is larger than all snapshots may be, or no memory is to be
    had: it has to be written in the call."""
    devices = planned.device_nbytes
    on_devices = bool(devices) and room.is_there_for(devices, register.device_nbytes)
    nbytes = planned.snapshot_nbytes(on_devices=on_devices)
    if nbytes > limits.max_snapshot_nbytes and limits.when_full == "wait":
        register.admit(save, 0, {}, limits)
        return None
    register.admit(save, nbytes, devices if on_devices else {}, limits)
    try:
        snapshot = planned.snapshot(on_devices=on_devices, max_nbytes=limits.max_snapshot_nbytes)
        if snapshot is None:  # a device had less room than it seemed
            nbytes = planned.snapshot_nbytes(on_devices=False)
            # It cannot wait for memory here: a later save to the path may hold it, and wait for this one.
            if register.resize(save, nbytes, limits):
                snapshot = planned.snapshot(on_devices=False, max_nbytes=limits.max_snapshot_nbytes)
    except MemoryError:  # the host had less, and the writing needs some
        snapshot = None
        backends.release_buffers()
        register.resize(save, 0, limits)
    save.snapshot = snapshot
    return snapshot


def _write(
    save: SaveInFlight,
    source: PlannedFile | Snapshot,
    *,
    target: Target,
    durable: bool,
    progress: Progress,
    atomic: bool,
    bytes_per_second: float | None,
    in_call: bool = False,
) -> None:
    """Ends ``save``, with the error that came up if there was one."""
    if not save.claim():
        return
    error: BaseException | None = None
    try:
        with contextlib.nullcontext() if in_call else save.call:
            register.wait_for_predecessor(save)
            save.wait_snapshot()
            saving.write(source, target, durable, progress, bytes_per_second, atomic=atomic, digest=save.digest)
    except BaseException as e:
        error = e
        traceback.clear_frames(e.__traceback__)  # they hold the tensors, and the error may be kept for long
    finally:
        target.close()
    if in_call and error is not None and not isinstance(error, Exception):  # a signal's
        pending.finish(save, None)
        raise error
    pending.finish(save, error)
    del error


def _limits(max_in_flight: int, max_snapshot_nbytes: int | None, when_full: Literal["wait", "raise"]) -> Limits:
    if max_in_flight is None:
        raise TypeError("max_in_flight must be a number, got None")
    check_at_least(1, max_in_flight=max_in_flight)
    check_at_least(0, max_snapshot_nbytes=max_snapshot_nbytes)
    check_choice("when_full", when_full, ("wait", "raise"))
    if max_snapshot_nbytes is None:
        snapshots_nbytes = backends.snapshot_memory_nbytes()
        free_nbytes = host_memory.available_nbytes() * 3 // 4  # what else the process does goes on taking memory
        max_snapshot_nbytes = min(host_memory.limit_nbytes() // 2, snapshots_nbytes + free_nbytes)
    return Limits(whole(max_in_flight), whole(max_snapshot_nbytes), when_full)
