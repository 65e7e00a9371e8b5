"""``save_async``: everything is pickled, planned and copied in the call; the file is written by a thread."""

from __future__ import annotations

import functools
import os
import pickle
import threading
import traceback
from typing import Any, Literal

import torch

from . import host_memory, pending, saving
from .backends.protocol import Archive, Snapshot
from .device_room import DeviceRoom
from .pending import Limits, PendingSave
from .progress import Progress
from .targets import FileTarget, Target


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
    max_in_flight: int = 2,
    max_snapshot_nbytes: int | None = None,
    when_full: Literal["wait", "raise"] = "wait",
    max_device_snapshot_nbytes: int | None = None,
    device_margin_nbytes: int | None = None,
    wait_snapshot: bool = True,
    max_bytes_per_second: float | None = None,
) -> PendingSave:
    """Saves ``obj`` as :func:`save` does, but returns as soon as the tensors may be changed.

    What is written is the state at the call. Saves to one path are committed in the order of the calls, those of
    :func:`save` among them. The interpreter's normal exit waits for saves in flight; one that is killed leaves the old
    file.

    Args:
        obj, pickle_module, pickle_protocol, durable, backend: as for :func:`save`. Pickled in the call.
        path: ``str`` or ``os.PathLike``; an object with ``write`` is refused.
        progress: as for :func:`save`; called in the thread that writes.
        max_in_flight: saves that may be in flight, this one included.
        max_snapshot_nbytes: of host memory that snapshots may take, those of all saves in flight together; None: half
            of the memory that this process may use. A state larger than that is written in the call, without a
            snapshot.
        when_full: what a call does that would exceed these two: ``"wait"`` for earlier saves, or ``"raise"``.
        max_device_snapshot_nbytes: of each device's memory that snapshots may take; 0: none; None: what is free, less
            the margin. Storages on a device with room are copied there, others to pinned host memory.
        device_margin_nbytes: of each device's memory that stays free; None: a sixteenth of it.
        wait_snapshot: False returns when copies on devices are queued on their current streams. Later work on these
            streams comes after them; before anything else, call :meth:`PendingSave.wait_snapshot`.
        max_bytes_per_second: of writing; None: as fast as it goes.

    Returns:
        What to ask for the result.

    Raises:
        OSError: the error of an earlier ``save_async`` to ``path`` that nobody had asked for; this save has not been
            started.
        SnapshotLimitError: the limits are met and ``when_full`` is "raise".
        Exception: for bad arguments and objects that cannot be pickled, what :func:`save` raises. Errors of writing
            are the :class:`PendingSave`'s.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"save_async writes to a path, after the call has returned; got {type(path).__name__}")
    limits = _limits(max_in_flight, max_snapshot_nbytes, when_full)
    _check_at_least(0, max_device_snapshot_nbytes=max_device_snapshot_nbytes, device_margin_nbytes=device_margin_nbytes)
    if max_bytes_per_second is not None and not max_bytes_per_second > 0:
        raise ValueError(f"max_bytes_per_second must be above 0, got {max_bytes_per_second!r}")
    planned = saving.plan(
        obj,
        path,
        pickle_module,
        pickle_protocol,
        _use_new_zipfile_serialization,
        _disable_byteorder_record,
        backend=backend,
        progress=progress,
    )
    given, file = os.fspath(path), _file_of(planned.target)
    pending.raise_uncollected(file)
    if planned.archive is None:  # torch's own code reads the tensors while it writes
        save = pending.admit(given, file, 0, {}, limits)
        try:
            pending.wait_for_predecessor(save)
            planned.write_stock(durable)
        finally:
            pending.withdraw(save)
        return save
    room = DeviceRoom(max_device_snapshot_nbytes, device_margin_nbytes)
    save, snapshot = _take_snapshot(planned.archive, given, file, limits, room)
    write = functools.partial(
        _write, save, target=planned.target, durable=durable, progress=progress, bytes_per_second=max_bytes_per_second
    )
    if snapshot is None:
        write(planned.archive, None, in_call=True)
        return save
    try:
        if wait_snapshot:
            snapshot.wait()
        # No daemon, also where a daemon calls: the interpreter's exit waits for it.
        thread = threading.Thread(target=write, args=(snapshot, snapshot), name=f"save_async {given}", daemon=False)
    except BaseException:
        snapshot.release()
        pending.withdraw(save)
        raise
    try:
        in_call = pending.exit_has_begun()
        if not in_call:
            thread.start()
    except RuntimeError:  # no more threads
        in_call = True
    if in_call:
        write(snapshot, snapshot, in_call=True)
    return save


def _take_snapshot(
    archive: Archive, path: str, file: str, limits: Limits, room: DeviceRoom
) -> tuple[PendingSave, Snapshot | None]:
    """No snapshot where the state is larger than the limit on all of them: it has to be written in the call."""
    devices = archive.device_nbytes
    ways = [True, False] if devices and room.is_there_for(devices, pending.device_nbytes_in_flight) else [False]
    for on_devices in ways:
        nbytes = archive.snapshot_nbytes(on_devices=on_devices)
        if nbytes > limits.max_snapshot_nbytes and limits.when_full == "wait":
            continue
        save = pending.admit(path, file, nbytes, devices if on_devices else {}, limits)
        try:
            snapshot = archive.snapshot(on_devices=on_devices, max_nbytes=limits.max_snapshot_nbytes)
            if snapshot is not None:
                pending.set_snapshot(save, snapshot.done, snapshot.wait)
                return save, snapshot
        except BaseException:
            pending.withdraw(save)
            raise
        pending.withdraw(save)  # a device had less room than it seemed
    return pending.admit(path, file, 0, {}, limits), None


def _write(
    save: PendingSave,
    source: Archive | Snapshot,
    snapshot: Snapshot | None,
    *,
    target: Target,
    durable: bool,
    progress: Progress,
    bytes_per_second: float | None,
    in_call: bool = False,
) -> None:
    """Ends ``save``, with the error that came up if there was one."""
    error: BaseException | None = None
    try:
        pending.wait_for_predecessor(save)
        if snapshot is not None:
            snapshot.wait()
        saving.write(source, target, durable, progress, bytes_per_second)
    except BaseException as e:
        error = e
        traceback.clear_frames(e.__traceback__)  # they hold the tensors, and the error may be kept for long
    # Before anybody hears of the end: who waits for memory, or looks at it, finds it given back.
    if snapshot is not None:
        snapshot.release()
    if in_call and error is not None and not isinstance(error, Exception):  # a signal's
        pending.withdraw(save)
        raise error
    pending.finish(save, error)
    del error


def _file_of(target: Target) -> str:
    return target.path if isinstance(target, FileTarget) else os.path.abspath(str(target.given))


def _limits(max_in_flight: int, max_snapshot_nbytes: int | None, when_full: Literal["wait", "raise"]) -> Limits:
    _check_at_least(1, max_in_flight=max_in_flight)
    _check_at_least(0, max_snapshot_nbytes=max_snapshot_nbytes)
    if when_full not in ("wait", "raise"):
        raise ValueError(f"when_full must be 'wait' or 'raise', got {when_full!r}")
    if max_snapshot_nbytes is None:
        max_snapshot_nbytes = host_memory.limit_nbytes() // 2
    return Limits(max_in_flight, max_snapshot_nbytes, when_full)


def _check_at_least(least: int, **options: int | None) -> None:
    for name, number in options.items():
        if number is not None and not number >= least:
            raise ValueError(f"{name} must be at least {least}, got {number!r}")
