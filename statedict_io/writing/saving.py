"""``save`` and ``fastsave``: everything is pickled and planned before the target is opened."""

from __future__ import annotations

import os
import pickle
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.serialization

from .. import backends
from .. import progress as progress_module
from ..backends import reproduction
from ..backends.protocol import Backend, Content, PlannedFile
from ..installed import torch_format
from ..options import check_choice, check_flags
from ..pickles.pickling import pickle_object, reduces_like_torch
from ..progress import Progress
from ..system.descriptors import sync
from ..system.file_digest import FileDigest
from ..system.full_writes import full_writer
from ..system.pacing import paced
from .in_flight import Call, current_call, register
from .places import write_content, write_file
from .sidecar import Sidecar, StoredSidecar
from .stock_saves import StockContent, StockLegacy, StockZip
from .suffixes import check_suffix
from .targets import FileTarget, ObjectTarget, PathStreamTarget, Target, URLTarget, resolve


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
    atomic: bool = True,
    digest: str | None = None,
) -> str | None:
    """Saves ``obj`` as :func:`torch.save` would, byte for byte, faster and safely.

    May be called while the same thread is inside another save, by a signal handler or a progress callback: if both
    write one file, it holds in the end what the call that began later wrote. While storages are written nobody can
    resize them: ``resize_`` raises RuntimeError, or the save does.

    Args:
        obj: anything that ``torch.save`` takes.
        f: a path (``str`` or ``os.PathLike``), replaced atomically; a URL of fsspec such as ``"s3://bucket/model.pt"``
            (``str``), which appears whole or not at all; or an object with ``write`` and ``flush``, written to from
            where it stands.
        pickle_module: pickles what is not tensor bytes: :mod:`pickle`, or another with a ``Pickler``, as ``dill``.
        pickle_protocol: its protocol, as for ``torch.save``.
        durable: on return the file's bytes and name are on the device. ``False`` leaves that to the kernel, as
            ``torch.save`` does; the replacement is atomic either way. A file object is not flushed to the device: the
            caller has to. How durable a finished upload is, is up to the store.
        backend: ``"auto"`` uses the compiled extension where it can be used, else the Python backend; ``"native"``
            insists on the extension, ``"python"`` does without it.
        progress: ``True`` for a bar on stderr (needs ``tqdm``), or a callable taking (bytes_done, bytes_total), called
            in the calling thread.
        atomic: ``False`` writes into the file itself, for places that cannot replace it: a mount without rename, a
            single file mounted into a container, a directory that takes no new names. The old file is lost when the
            writing begins: a reader finds a part of the new one until the save ends, and also after a crash or a failed
            write. Mode, owner and hard links stay. Targets that are not files, such as URLs, are written as always.
        digest: ``"sha256"`` hashes the bytes as they are written, returns the sum in hex, and writes it into a file
            beside the saved one, ``NAME.sha256``, as ``sha256sum -c`` takes it. That file is removed before the old
            checkpoint goes, and comes after the new one: it is never there for other bytes.

    Returns:
        The sum, where one is wanted.

    Raises:
        OSError: what the system reported, with its ``errno`` and the path; the old file is whole and nothing is left
            behind, unless ``atomic=False``. There ``EBUSY`` means that another save of this process is writing the
            file.
        FileKindError: the path ends in ``.safetensors``, which promises another format: :func:`save_safetensors` writes
            it. Where ``save`` is bound to the name ``torch.save`` it writes under any name, as ``torch.save`` does.
        StateDictIOError: ``atomic=False``, and this process has the file mapped into its memory, as after
            ``torch.load(mmap=True)``: emptying it would take the tensors' data away.
        NativeUnavailableError: ``backend="native"`` and the extension cannot be used.
        TypeError: an option is of a wrong type, such as ``durable="no"``; names it.
        Exception: for bad arguments and objects that cannot be pickled, what ``torch.save`` raises, before the target
            is touched.

    Example:
        >>> sio.save({"model": model.state_dict(), "step": 100}, "checkpoint.pt")
        >>> torch.load("checkpoint.pt")["step"]
        100
    """
    wanted = wanted_digest(digest)
    save_hashed(
        wanted,
        obj,
        f,
        pickle_module,
        pickle_protocol,
        _use_new_zipfile_serialization,
        _disable_byteorder_record,
        durable=durable,
        backend=backend,
        progress=progress,
        atomic=atomic,
    )
    return None if wanted is None else wanted.hexdigest()


def wanted_digest(digest: str | None) -> FileDigest | None:
    """For the option of that name.

    Raises:
        ValueError: no such.
    """
    if digest is None:
        return None
    check_choice("digest", digest, ("sha256",))
    return FileDigest()


def save_hashed(
    digest: FileDigest | None,
    obj: object,
    f: Any,
    pickle_module: Any = pickle,
    pickle_protocol: int = torch.serialization.DEFAULT_PROTOCOL,
    use_new_zipfile_serialization: bool = True,
    disable_byteorder_record: bool = False,
    *,
    durable: bool = True,
    backend: str = "auto",
    progress: Progress = None,
    atomic: bool = True,
) -> None:
    """:func:`save`, with a digest that says itself what becomes of it; None: none is wanted."""
    check_flags(durable=durable, atomic=atomic)
    check_suffix(f)
    with Call():
        planned = plan(
            obj,
            f,
            pickle_module,
            pickle_protocol,
            use_new_zipfile_serialization,
            disable_byteorder_record,
            backend=backend,
            progress=progress,
        )
        write_planned(planned, durable=durable, progress=progress, atomic=atomic, digest=digest)


def fastsave(model: object, path: Any, **options: Any) -> str | None:
    """Saves ``model.state_dict()`` when given an :class:`torch.nn.Module`, else exactly what it is given.

    Args:
        model: a module, or anything that :func:`save` takes.
        path: as ``f`` of :func:`save`.
        options: of :func:`save`, by keyword.

    Returns:
        What :func:`save` returns.

    Raises:
        Exception: what :func:`save` raises.

    Example:
        >>> sio.fastsave(model, "model.pt")
        >>> model.load_state_dict(sio.load("model.pt"))
        <All keys matched successfully>
    """
    return save(model.state_dict() if isinstance(model, torch.nn.Module) else model, path, **options)


@dataclass(slots=True)  # as targets.FileTarget
class PlannedSave:
    target: Target
    content: PlannedFile | StockContent


def plan(
    obj: object,
    f: Any,
    pickle_module: Any,
    pickle_protocol: int,
    use_new_zipfile_serialization: bool,
    disable_byteorder_record: bool,
    *,
    backend: str,
    progress: Progress,
) -> PlannedSave:
    """Everything that can be refused without touching the target; arguments and errors are those of :func:`save`.
    Called inside a :class:`~statedict_io.writing.in_flight.Call`, as is what writes."""
    if pickle_module is not pickle and hasattr(torch.serialization, "_check_dill_version"):
        torch.serialization._check_dill_version(pickle_module)
    progress_module.check(progress)
    chosen = backends.choose(backend)

    def content(target: Target) -> PlannedFile | StockContent:
        made = _content(
            obj,
            target,
            chosen,
            pickle_module,
            pickle_protocol,
            use_new_zipfile_serialization,
            disable_byteorder_record,
        )
        tables = None if chosen is None else chosen.native_tables()
        backends.warn_if_saving_is_slow(backend, reduction=reduces_like_torch.known(tables))
        return made

    return planned_for(resolve(f, names_archive=use_new_zipfile_serialization), content)


def planned_for(target: Target, content: Callable[[Target], PlannedFile | StockContent]) -> PlannedSave:
    """Of the innermost call; ``target`` is closed where ``content`` raises."""
    if isinstance(target, (FileTarget, URLTarget)):
        current_call().file = lambda: target.identity
    try:
        return PlannedSave(target, content(target))
    except BaseException:
        target.close()
        raise


def _content(
    obj: object,
    target: Target,
    chosen: Backend | None,
    pickle_module: Any,
    pickle_protocol: int,
    use_new_zipfile_serialization: bool,
    disable_byteorder_record: bool,
) -> PlannedFile | StockContent:
    # A hole cannot be streamed: torch seeks there, and says so where it cannot.
    streams_holes = torch_format.skip_data() and not isinstance(target, FileTarget)
    if chosen is None or streams_holes or not use_new_zipfile_serialization:
        options = {
            "pickle_module": pickle_module,
            "pickle_protocol": pickle_protocol,
            "_disable_byteorder_record": disable_byteorder_record,
        }
        if not use_new_zipfile_serialization:
            return StockLegacy(obj, **options)
        stream = target.given if isinstance(target, ObjectTarget) else None
        return StockZip(obj, target.archive_name, stream=stream, **options)
    pickled = pickle_object(obj, pickle_module, pickle_protocol, chosen.native_tables())
    alignment = torch_format.storage_alignment()
    return chosen.plan(
        target.archive_name,
        reproduction.records(pickled, alignment, disable_byteorder_record=disable_byteorder_record),
        alignment=alignment,
        compute_crc32=torch_format.compute_crc32(),
    )


def write_planned(
    planned: PlannedSave,
    *,
    durable: bool,
    progress: Progress,
    atomic: bool | None,
    digest: FileDigest | None = None,
) -> OSError | None:
    """Writes and commits, after asynchronous saves to the same path that were started earlier.

    Args:
        atomic: as of :func:`~statedict_io.writing.places.write_file`, whose result this returns.
    """
    try:
        if isinstance(planned.target, (FileTarget, URLTarget)) and register.in_flight:
            register.wait_for_earlier(current_call(), planned.target.identity)
        return write(planned.content, planned.target, durable, progress, atomic=atomic, digest=digest)
    finally:
        planned.target.close()


def write(
    content: Content,
    target: Target,
    durable: bool,
    progress: Progress,
    bytes_per_second: float | None = None,
    *,
    atomic: bool | None,
    digest: FileDigest | None = None,
) -> OSError | None:
    """Writes what was planned, and commits it, unless a call that began later has committed the same file meanwhile.
    Arguments and result as of :func:`write_planned`."""
    call = current_call()
    refusal = None
    is_wanted = digest is not None and digest.has_sidecar
    sidecar = _sidecar(target, durable=durable, atomic=atomic, is_wanted=is_wanted)
    before = _nothing if sidecar is None else sidecar.remove

    def hashed(write: Callable[[memoryview], Any]) -> Callable[[memoryview], Any]:
        if digest is None:
            return write
        digest.begin()
        return digest.teed(write)

    with progress_module.reporting(progress, target.archive_name) as callback:
        if isinstance(target, FileTarget):
            refusal = write_file(
                target,
                lambda file: write_content(
                    content,
                    file,
                    durable=durable,
                    progress=callback,
                    bytes_per_second=bytes_per_second,
                    digest=digest,
                ),
                durable=durable,
                atomic=atomic,
                is_superseded=call.is_superseded,
                for_torch=isinstance(content, StockZip),
                before=before,
            )
        elif isinstance(target, URLTarget):
            from ..remote.uploads import open_upload

            with open_upload(target.place, content.nbytes, callback) as upload:
                content.write_stream(hashed(paced(upload.write, bytes_per_second)), progress=None)
                upload.flush()
                if not call.is_superseded():
                    before()
                    upload.commit()
        elif isinstance(target, PathStreamTarget):
            try:
                with target.open() as stream:
                    if isinstance(content, StockZip) and digest is None:
                        content.write_open_file(stream.fileno(), [target.given])
                    else:
                        content.write_stream(hashed(paced(full_writer(stream), bytes_per_second)), progress=callback)
                    if durable and stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                        sync(stream.fileno())
            except OSError as e:
                if e.errno is not None:
                    e.filename = target.given
                raise
        else:
            content.write_stream(hashed(full_writer(target.given)), progress=callback)
            target.given.flush()
    call.committed = True
    if sidecar is not None and digest is not None and is_wanted:
        sidecar.write(digest.hexdigest(), call.is_superseded)
    return refusal


def _nothing() -> None:
    pass


def _sidecar(target: Target, *, durable: bool, atomic: bool | None, is_wanted: bool) -> Sidecar | StoredSidecar | None:
    """None where there is no place for one."""
    if isinstance(target, FileTarget):
        return Sidecar(target, durable=durable, atomic=atomic, is_wanted=is_wanted)
    return StoredSidecar(target, is_wanted=is_wanted) if isinstance(target, URLTarget) else None
