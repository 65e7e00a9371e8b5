"""``save`` and ``fastsave``: everything is pickled and planned before the target is opened."""

from __future__ import annotations

import os
import pickle
import stat
from typing import Any

import torch
import torch.serialization

from . import backends
from . import progress as progress_module
from .backends import formats, stock
from .backends.protocol import Content
from .pickling import pickle_object
from .progress import Progress, ProgressCallback
from .replacement import Replacement
from .targets import FileTarget, PathStreamTarget, Target, full_writer, resolve


def save(
    obj: object,
    f: Any,
    pickle_module: Any = pickle,
    pickle_protocol: int = torch.serialization.DEFAULT_PROTOCOL,
    _use_new_zipfile_serialization: bool = True,
    _disable_byteorder_record: bool = False,
    *,
    durable: bool = True,
    backend: str = "auto",
    progress: Progress = None,
) -> None:
    """Saves ``obj`` as :func:`torch.save` would, byte for byte, faster and safely.

    Args:
        obj: anything that ``torch.save`` takes.
        f: a path (``str`` or ``os.PathLike``), replaced atomically; or an object with ``write`` and ``flush``, written
            to from where it stands.
        pickle_module: pickles what is not tensor bytes.
        pickle_protocol: its protocol.
        durable: on return the file's bytes and name are on the device. ``False`` leaves that to the kernel, as
            ``torch.save`` does; the replacement is atomic either way. A file object is the caller's to flush to the
            device.
        backend: ``"auto"``, ``"native"`` or ``"torch"``.
        progress: ``True`` for a bar on stderr, or a callable taking (bytes_done, bytes_total).

    Raises:
        OSError: what the system reported, with its ``errno`` and the path; the old file is whole and nothing is left
            behind.
        NativeUnavailableError: ``backend="native"`` and the extension cannot be used.
        Exception: for bad arguments and objects that cannot be pickled, what ``torch.save`` raises, before the target
        is touched.
    """
    torch.serialization._check_dill_version(pickle_module)
    progress_module.check(progress)
    chosen = backends.choose(backend)
    target = resolve(f, names_archive=_use_new_zipfile_serialization)
    # A hole cannot be streamed: torch seeks there, and says so where it cannot.
    streams_holes = formats.skip_data() and not isinstance(target, FileTarget)
    torch_options = {
        "pickle_module": pickle_module,
        "pickle_protocol": pickle_protocol,
        "_disable_byteorder_record": _disable_byteorder_record,
    }
    if not _use_new_zipfile_serialization:
        _write(stock.LegacyFile(obj, **torch_options), target, durable, None)
        return
    if chosen is None or streams_holes:
        stock.save_zip(obj, target, durable=durable, **torch_options)
        return
    pickled = pickle_object(obj, pickle_module, pickle_protocol, chosen.native_table())
    alignment = formats.storage_alignment()
    archive = chosen.plan(
        target.archive_name,
        formats.contents(pickled, alignment, disable_byteorder_record=_disable_byteorder_record),
        alignment=alignment,
        compute_crc32=torch.serialization.get_crc32_options(),
    )
    with progress_module.reporting(progress, target.archive_name) as callback:
        _write(archive, target, durable, callback)


def fastsave(model: object, path: Any, **options: Any) -> None:
    """Saves ``model.state_dict()`` when given an :class:`torch.nn.Module`, else exactly what it is given.

    Takes the keyword options of :func:`save`.
    """
    save(model.state_dict() if isinstance(model, torch.nn.Module) else model, path, **options)


def _write(content: Content, target: Target, durable: bool, progress: ProgressCallback | None) -> None:
    if isinstance(target, FileTarget):
        with Replacement(target, durable=durable) as replacement:
            content.write_fd(replacement.fd, durable=durable, progress=progress)
            replacement.commit()
    elif isinstance(target, PathStreamTarget):
        try:
            with open(target.given, "wb", buffering=0) as stream:
                content.write_stream(full_writer(stream.write), progress=progress)
                if durable and stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                    os.fsync(stream.fileno())
        except OSError as e:
            if e.errno is not None:
                e.filename = target.given
            raise
    else:
        content.write_stream(full_writer(target.given.write), progress=progress)
        target.given.flush()
