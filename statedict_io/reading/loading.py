"""``load``: what ``torch.load`` returns, read in parallel."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.serialization

from .. import backends
from .. import progress as progress_module
from ..backends.protocol import Backend
from ..errors import (
    CorruptArchiveError,
    CorruptCheckpointError,
    FileKindError,
    LoadedKindError,
    StateDictIOError,
    corrupt,
)
from ..formats import kinds
from ..installed import stock, torch_format
from ..pickles.persistent_ids import StorageFeed
from ..pickles.unpickling import ZipReader, can_rebind, torch_load
from ..progress import Progress, ProgressCallback
from ..remote.urls import is_url
from .map_location import is_meta, only_device, stays_on_cpu
from .object_source import ObjectSource
from .opened_again import Replaced, opened_again
from .readahead import ReadAhead
from .records import StoredRecords, archive_at, check_kind, of_ranges
from .trial import loads_like_torch

if TYPE_CHECKING:
    from ..remote.ranges import RangedObject

_HAS_META = hasattr(torch.serialization, "_is_meta_location")
_MAX_ATTEMPTS = 100  # to map a file that is replaced while torch opens it by its path


def load(
    f: Any,
    map_location: Any = None,
    pickle_module: Any = None,
    *,
    weights_only: bool | None = True,
    mmap: bool | None = None,
    verify: bool = False,
    backend: str = "auto",
    progress: Progress = None,
    **pickle_load_args: Any,
) -> Any:
    """Loads what :func:`torch.load` would, from the same files, faster.

    Storages are read in parallel, straight into their final memory; the unpickler is torch's own. File objects, the
    legacy format, TorchScript archives, ``.safetensors`` files, ``mmap`` and fake tensors are left to ``torch.load``
    altogether.

    Args:
        f: a path; a URL of fsspec (``str``), of which ranges are read; or an object with ``read``, ``readline``,
            ``tell`` and ``seek``.
        map_location: None, a string, a :class:`torch.device`, a dict or a callable. ``"meta"`` reads no data.
        weights_only: unpickle with torch's restricted unpickler: the security boundary. Load with ``False`` only what
            you trust.
        mmap: map the file instead of reading it.
        verify: check the CRC-32 of every record, those that are not asked for too. Records without one (saved with CRCs
            off) pass.
        backend: what reads the file: ``"auto"`` the compiled extension where it can be used, else the Python
            backend; ``"native"`` insists on the extension, ``"python"`` does without it.
        progress: ``True`` for a bar on stderr (needs ``tqdm``), or a callable taking (bytes_done, bytes_total).
        pickle_module, pickle_load_args: as for ``torch.load``.

    Returns:
        What was saved, with tensors on the devices that ``map_location`` says, or that they were saved from.

    Raises:
        CorruptCheckpointError: the file is not a sound archive, or a checksum does not match; names the record and the
            tensors in it. It is a :class:`RuntimeError` too, which ``torch.load`` raises.
        FileKindError: it is a file of another kind, and torch.load cannot read it; names the kind. It is also what
            ``torch.load`` raises there.
        ValueError: ``verify=True`` for a file without checksums.
        OSError: what the system reported.
        NativeUnavailableError: ``backend="native"`` and the extension cannot be used.
        Exception: otherwise what ``torch.load`` raises for the same arguments.

    Example:
        >>> sio.save({"w": torch.zeros(2, 3)}, "weights.pt")
        >>> sio.load("weights.pt", "cpu", verify=True)["w"].shape
        torch.Size([2, 3])
    """
    progress_module.check(progress)
    chosen = backends.for_reading(backend)
    with contextlib.ExitStack() as exit_stack:
        source: RangedObject | None = None
        name = f
        if is_url(f):
            from ..remote import ranges

            found = exit_stack.enter_context(ranges.open_url(f))
            f, name = found.content, found.url
            if not isinstance(f, str):
                source, f = f, exit_stack.enter_context(f.stream())
        if verify and isinstance(f, (str, os.PathLike)) and os.fsdecode(f).endswith(".safetensors"):
            raise ValueError(_without_checksums(name, "a safetensors file"))
        loading = loads_like_torch(chosen.lean_pickle)
        backends.warn_if_reading_is_slow(backend, loading=loading)
        quick = bool(loading) and can_rebind()
        callback = exit_stack.enter_context(progress_module.reporting(progress, "load"))
        options: dict[str, Any] = {"weights_only": weights_only, "mmap": mmap, **pickle_load_args}
        for _ in range(_MAX_ATTEMPTS):
            archive = _Archive(f, source, name, map_location, mmap, verify, backend, chosen, callback)
            try:
                if not quick:
                    with archive.verified() as content:
                        return stock.torch_load(content, map_location, pickle_module, **options)
                load_quickly = torch_load(
                    archive.open,
                    archive.finish,
                    before_stock=archive.before_stock,
                    before_legacy=archive.before_legacy,
                    name=os.fsdecode(name) if isinstance(name, (str, os.PathLike)) else "the file",
                )
                return load_quickly(f, map_location, pickle_module, **options)
            except Replaced:
                continue
            except CorruptCheckpointError as e:
                raise _as_torch_error(e) from None
            except FileKindError as e:
                raise LoadedKindError(*e.args) from None
            except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
                kind = _foreign_kind(f)
                if kind is None:
                    raise
                raise LoadedKindError(f"{os.fsdecode(name)}: {kind}") from None
        raise StateDictIOError(
            f"{name}: was replaced each of the {_MAX_ATTEMPTS} times that it was mapped; load it with mmap=False"
        )


def _foreign_kind(f: Any) -> kinds.FileKind | None:
    """The kind of a file that torch.load cannot read and does not say why; None for others and for objects."""
    if not isinstance(f, (str, os.PathLike)) or os.fsdecode(f).endswith(".safetensors"):
        return None
    try:
        with open(f, "rb") as file:
            kind = kinds.of_start(file.read(kinds.START_NBYTES), os.fsdecode(f))
    except OSError:
        return None
    return None if kind in _TORCH_EXPLAINS else kind


# torch.load reads the first two, refuses some of what is in them, and says so.
_TORCH_EXPLAINS = (kinds.LEGACY, kinds.TAR, kinds.UNKNOWN)


class _Archive:
    """The archive of one call."""

    def __init__(
        self,
        f: Any,
        source: RangedObject | None,
        name: Any,
        map_location: Any,
        mmap: bool | None,
        verify: bool,
        wish: str,
        backend: Backend,
        progress: ProgressCallback | None,
    ) -> None:
        self._f = f  #: as torch takes it
        self._source = source  #: where it came as a URL
        self._name = name  #: for messages
        self._map_location = map_location
        self._mmap = mmap
        self._verify = verify
        self._wish = wish
        self._backend = backend
        self._progress = progress
        self._feed: ReadAhead | None = None
        self._records: StoredRecords | None = None
        self._unchecked: StoredRecords | None = None  #: an archive that torch reads by itself, to be verified before
        self._settle: Callable[[], None] = lambda: None  #: of :func:`opened_again`

    def open(self, file: Any) -> contextlib.AbstractContextManager[Any]:
        """Called by torch's code with the opened file, once it has seen that it begins like an archive."""
        records = self._open_records(file)
        if records is None or self._is_for_torch(records):
            self._unchecked = records if self._verify else None
            if records is not None and self._is_mapped() and not _is_torchscript(records):
                return self._open_to_map(file)
            self._check_all()
            return torch.serialization._open_zipfile_reader(file)
        check_kind(records)
        _check_made_by_torch(records)
        self._records = records
        if self._verify:
            _check(records, records.others())
        if torch.serialization._is_meta_location(self._map_location) if _HAS_META else is_meta(self._map_location):
            return contextlib.nullcontext(self._reader(records, _MetaFeed(), meta=True))
        device = only_device(self._map_location, records)
        backends.warn_if_reading_is_slow(self._wish, device=device)
        self._feed = ReadAhead(
            records,
            stay=stays_on_cpu(self._map_location, records),
            device=device,
            verify=self._verify,
            progress=self._progress,
        )
        return contextlib.nullcontext(self._reader(records, self._feed))

    def _reader(self, records: StoredRecords, feed: StorageFeed, meta: bool = False) -> ZipReader:
        # Without data there is nothing to swap.
        return ZipReader(records, feed, lean_pickle=self._backend.lean_pickle, assume_own_byteorder=meta)

    def finish(self) -> None:
        """What was not read has to be sound too."""
        if self._verify and self._records is not None:
            unread = self._records.storages() if self._feed is None else self._feed.unread()
            _check(self._records, unread)

    @contextlib.contextmanager
    def _open_to_map(self, file: Any) -> Iterator[Any]:
        with torch.serialization._open_zipfile_reader(file) as reader, opened_again(file, self._f) as self._settle:
            yield reader

    def before_stock(self) -> None:
        """Called before torch unpickles an archive that it reads by itself, when it has mapped what is to be mapped.

        Raises:
            Replaced: that may be another file.
        """
        self._settle()
        self._check_all()

    def before_legacy(self, file: Any) -> None:
        """Called with the opened file where torch takes it for no archive.

        Raises:
            ValueError: it is to be verified, and has nothing to do that by.
        """
        if not self._verify:
            return
        start = file.tell()
        legacy = kinds.is_legacy(file.read(kinds.START_NBYTES))
        file.seek(start)
        if legacy:
            raise ValueError(_without_checksums(self._name, "in torch's legacy format", " and save it again"))

    @contextlib.contextmanager
    def verified(self) -> Iterator[Any]:
        """What to load instead of ``f``, for a torch whose code cannot be used in part: verified where that is wanted.

        Raises:
            Replaced: as :meth:`before_stock`, at the end.
        """
        if not self._verify:
            yield self._f
            return
        with torch.serialization._open_file_like(self._f, "rb") as file:
            start = file.tell()
            self.before_legacy(file)
            self._unchecked = self._open_records(file)
            self._check_all()
            file.seek(start)
            if not self._is_path():
                yield self._f
            elif not self._is_mapped():
                yield file
            else:
                with opened_again(file, self._f):
                    yield self._f

    def _check_all(self) -> None:
        """Checks the archive that torch reads, if that has not been done and is wanted."""
        records, self._unchecked = self._unchecked, None
        if records is not None:
            _check(records, range(len(records.entries)), self._progress)

    def _open_records(self, file: Any) -> StoredRecords | None:
        """None where nobody needs them."""
        if self._source is not None:
            return of_ranges(self._source, self._backend)
        if self._is_path():
            name = os.fsdecode(self._name)
            nbytes = os.fstat(file.fileno()).st_size
            return StoredRecords(archive_at(file.fileno(), name, self._backend), name, file_nbytes=nbytes)
        if not self._verify:
            return None
        from ..backends.python_reader import PythonReader

        source = ObjectSource(file)
        try:
            return StoredRecords(PythonReader(source, source.name), source.name, file_nbytes=source.nbytes)
        finally:
            file.seek(source.start)

    def _is_path(self) -> bool:
        return isinstance(self._f, (str, os.PathLike))

    def _is_mapped(self) -> bool:
        if self._mmap is None:
            return self._is_path() and bool(stock.setting("load", "mmap", False))
        return self._is_path() and bool(self._mmap)

    def _is_for_torch(self, records: StoredRecords) -> bool:
        return (
            not (self._is_path() or self._source is not None)
            or self._is_mapped()
            or _is_torchscript(records)
            or torch._guards.detect_fake_mode(None) is not None
            or torch_format.skip_data()
        )


def _check(records: StoredRecords, indices: Iterable[int], progress: ProgressCallback | None = None) -> None:
    from .verification import check

    check(records, indices, progress)


def _is_torchscript(records: StoredRecords) -> bool:
    return "constants.pkl" in records


class _MetaFeed:
    """For a torch that reads before it finds out that nobody wants the data."""

    def take(self, name: str, nbytes: int) -> torch.UntypedStorage:
        del name
        return torch.UntypedStorage(nbytes, device="meta")


def _without_checksums(name: Any, kind: str, cure: str = "") -> str:
    return f"verify=True: {name} is {kind}, which has no checksums; load it with verify=False{cure}"


def _check_made_by_torch(records: StoredRecords) -> None:
    """What ``torch._C.PyTorchFileReader`` asks of every archive."""
    if not records.archive.archive_name:
        raise corrupt(records.path, "its records are not in a folder, torch.save did not write this archive")
    if "version" not in records and ".data/version" not in records:
        raise corrupt(records.path, "it has no record 'version', torch.save did not write this archive")


def _as_torch_error(error: CorruptCheckpointError) -> CorruptArchiveError:
    described = CorruptArchiveError(*error.args)
    described.records = error.records
    return described
