"""``data.pkl`` and storages as an object again: the installed ``torch.load``, with another reader behind it.

Nothing here unpickles. :func:`load_through` runs the code of ``torch.serialization.load`` itself, with the names that
open and unpickle an archive bound to ours for this one call: no module is patched, so other threads and other callers
of torch are not concerned. The unpickler is torch's (its restricted one with ``weights_only``); what is ours is where
its storages come from.

torch.load decides a lot before it unpickles: by environment variables and settings, for TorchScript, legacy files and
fake tensors, in the words of its errors. A copy of that would be wrong with the next release. Before the first load of
a process a small object is loaded both ways and compared (reading/trial); where they differ torch.load reads alone.

Two things are ours, as they are most of the time of a file with many tensors: references to plain storages on the CPU
are resolved without the detours of ``_load`` (persistent_ids), and the restricted unpickler, which takes a microsecond
a step, gets a shorter stream (lean_pickle).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import operator
import sys
import threading
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.serialization

from ..installed import stock
from ..system.processes import in_forked_child
from .allowed_globals import may_call_others
from .hash_bounds import Gate, check_pickle
from .lean_pickle import LeanPickle, TensorCall
from .persistent_ids import PersistentIds, StorageFeed, storage_types, with_persistent_ids
from .sparse_validation import without_placeholders


class SmallRecords(Protocol):
    """An archive as far as ``torch.serialization._load`` looks into it, the storages apart."""

    @property
    def path(self) -> str:
        """For messages."""

    def names(self) -> list[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def read(self, name: str) -> bytes: ...

    def payload_offset(self, name: str) -> int: ...

    def header_offset(self, name: str) -> int: ...


class ZipReader:
    """Stands in for ``torch._C.PyTorchFileReader``."""

    def __init__(
        self,
        records: SmallRecords,
        feed: StorageFeed,
        *,
        lean_pickle: Callable[[bytes], LeanPickle] = LeanPickle.unchanged,
        assume_own_byteorder: bool = False,
        in_place: bool = False,
        placeholders: bool = False,
        defers: bool = False,
        sets_aside: bool = False,
        gate: Gate | None = None,
    ) -> None:
        self._records = records
        self.feed = feed
        self._gate = gate or Gate()
        self._lean_pickle = lean_pickle
        self._assume_own_byteorder = assume_own_byteorder
        self.in_place = in_place  #: storages stay where the feed puts them, whatever their location says
        self.sets_aside = sets_aside  #: what the restricted unpickler refuses becomes a Refused
        self.placeholders = placeholders  #: the feed's storages may be without data
        #: what the lean pickle has taken out becomes a DeferredTensor each; not where functions that the user has
        #: allowed are met, which may ask whether it is a tensor, and do without
        self.defers = defers
        #: set where the unpickler takes long over each step, and understands what stands for a call
        self.abridges = False
        self.calls: Sequence[TensorCall] = ()

    def has_record(self, name: str) -> bool:
        return name in self._records or (self._assume_own_byteorder and name == "byteorder")

    def get_record(self, name: str) -> bytes:
        if self._assume_own_byteorder and name == "byteorder":
            return sys.byteorder.encode()
        data = self._records.read(name)
        if self.abridges and name == "data.pkl":
            lean = self._lean_pickle(data)
            if {call.storage_type for call in lean.calls} <= storage_types().keys():
                data, self.calls = lean
            self.defers = self.defers and not may_call_others(data)
            self._gate.check(data, self._records.path, written=lambda: self._records.read(name))
        return data

    def get_storage_from_record(self, name: str, nbytes: int, _: object) -> _Handed:
        return _Handed(self.feed.take(name, _nbytes(nbytes)))

    def get_record_offset(self, name: str) -> int:
        return self._records.payload_offset(name)

    def get_record_header_offset(self, name: str) -> int:
        return self._records.header_offset(name)

    def get_record_offset_no_read(self, cursor: int, name: str, nbytes: int, alignment: int) -> int:
        del alignment  # what torch computes from it is true of its own files only
        _nbytes(nbytes)
        return self._records.payload_offset(name) if name in self._records else cursor  # nobody looks, in torch

    def get_all_records(self) -> list[str]:
        return self._records.names()

    def serialization_id(self) -> str:
        name = ".data/serialization_id"
        return self._records.read(name).decode(errors="replace") if name in self._records else ""


def _nbytes(claimed: Any) -> int:
    """A forged pickle may say anything; torch takes an unsigned 64-bit number."""
    nbytes = operator.index(claimed)
    if not 0 <= nbytes < 1 << 64:
        raise TypeError(f"not a number of bytes: {nbytes}")
    return nbytes


class _Handed:
    """A storage in the wrapping in which ``PyTorchFileReader.get_storage_from_record`` returns it."""

    __slots__ = ("_untyped_storage",)

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._untyped_storage = storage

    def _typed_storage(self) -> _Handed:
        return self


try:
    from torch.utils._python_dispatch import _disable_current_modes
except ImportError:  # the modes of whoever asks first then apply
    _disable_current_modes = contextlib.nullcontext


class DeferredTensor:
    """Stands for a plain tensor in what was unpickled, until somebody asks for the tensor.

    It can be put into containers and does nothing else that a tensor does: whatever needs a tensor while unpickling
    fails. :meth:`tensor` may be called from several threads.
    """

    __slots__ = ("_call", "_make", "_tensor")
    __hash__ = None  # type: ignore[assignment]  # a dictionary's key or a set's element would be named by it

    def __init__(self, call: TensorCall, make: Callable[[TensorCall], torch.Tensor]) -> None:
        self._call = call
        self._make = make
        self._tensor: torch.Tensor | None = None

    def tensor(self) -> torch.Tensor:
        """The same one each time, whatever modes the caller is in."""
        with _deferred_making:
            if self._tensor is None:
                with _disable_current_modes(), torch.inference_mode(False):
                    self._tensor = self._make(self._call)
            return self._tensor


_deferred_making = threading.RLock()


def _start_anew() -> None:
    """In a forked child: another thread of its parent may hold the lock for ever."""
    global _deferred_making
    _deferred_making = threading.RLock()


in_forked_child(_start_anew)


class LoadSteps:
    """What one ``torch.load`` does beside torch's own steps; to be derived from. Its methods are called in this order:

    =================================================  ==========================================================
    the file is an archive, read by a ZipReader        :meth:`open_archive`, torch's ``_load``, :meth:`after_archive`
    an archive that torch reads by itself              :meth:`open_archive`, :meth:`before_stock`, torch's ``_load``
    no archive                                         :meth:`before_legacy`, torch's ``_legacy_load``
    =================================================  ==========================================================
    """

    name = "the file"  #: what errors call it

    def open_file(self, f: Any, mode: str) -> contextlib.AbstractContextManager[Any]:
        """In place of ``torch.serialization._open_file_like``, before all others."""
        opened: contextlib.AbstractContextManager[Any] = torch.serialization._open_file_like(f, mode)
        return opened

    def open_archive(self, file: Any) -> contextlib.AbstractContextManager[Any]:
        """A :class:`ZipReader`, or torch's own reader, for the opened file."""
        raise NotImplementedError

    def after_archive(self) -> None:
        """What a ZipReader has read has been unpickled; it is still open."""

    def before_stock(self) -> None:
        """torch has mapped the file, if it is to be mapped."""

    def before_legacy(self, file: Any) -> None:
        """``file`` is open, and at its beginning."""

    def after_failed_legacy(self, file: Any) -> None:
        """``file`` is still open, and where torch's unpickler has stopped."""


class ReadBy(LoadSteps):
    """Whatever the file is: ``reader`` reads it."""

    def __init__(self, reader: ZipReader) -> None:
        self._reader = reader

    def open_archive(self, file: Any) -> contextlib.AbstractContextManager[Any]:
        del file
        return contextlib.nullcontext(self._reader)


def can_rebind() -> bool:
    """Whether the installed ``torch.load`` has the parts that :func:`load_through` exchanges."""
    load = stock.torch_load
    return (
        isinstance(load, types.FunctionType)
        and load.__closure__ is None
        and {"_open_zipfile_reader", "_load", "_legacy_load"} <= set(load.__code__.co_names)
    )


def load_through(steps: LoadSteps) -> Callable[..., Any]:
    """``torch.load`` with the steps of one load, to be called once."""
    module = vars(torch.serialization)
    names = {
        **module,
        "_open_file_like": steps.open_file,
        "_open_zipfile_reader": steps.open_archive,
        "_load": functools.partial(_unpickle_archive, steps),
        "_legacy_load": functools.partial(_unpickle_legacy, steps),
        "warnings": _WarningsAbove,
        # Where Python keeps what it has warned of already.
        "__warningregistry__": module.setdefault("__warningregistry__", {}),
    }
    load = stock.torch_load
    rebound = types.FunctionType(load.__code__, names, load.__name__, load.__defaults__)
    rebound.__kwdefaults__ = load.__kwdefaults__
    return rebound


def _unpickle_archive(steps: LoadSteps, reader: Any, map_location: Any, pickle_module: Any, **options: Any) -> Any:
    """In place of ``torch.serialization._load``."""
    load = torch.serialization._load
    if not isinstance(reader, ZipReader):
        steps.before_stock()
        if pickle_module is torch._weights_only_unpickler:
            check_pickle(reader.get_record("data.pkl"), steps.name)
        return load(reader, map_location, pickle_module, **options)
    with _collector_paused:
        persistent_ids = _persistent_ids(reader, map_location, pickle_module)
        if persistent_ids is not None:
            pickle_module = with_persistent_ids(pickle_module, sets_aside=reader.sets_aside)
            options["persistent_ids"] = persistent_ids
        if reader.placeholders:
            load = without_placeholders(load)
        result = load(reader, map_location, pickle_module, **options)
    steps.after_archive()
    return result


def _unpickle_legacy(steps: LoadSteps, file: Any, *args: Any, **options: Any) -> Any:
    """In place of ``torch.serialization._legacy_load``."""
    steps.before_legacy(file)
    try:
        return torch.serialization._legacy_load(file, *args, **options)
    except Exception:
        steps.after_failed_legacy(file)
        raise


class _CollectorPause:
    """No cyclic garbage collection while somebody unpickles: nothing that is being built is garbage, and the collector
    would go through all of it again and again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may load, too
        self._inside: list[int] = []  # a thread's id for each time that it is inside
        self._was_enabled = False

    def __enter__(self) -> None:
        with self._lock:
            # In first and out last: a handler that loads in between finds somebody inside, and changes nothing.
            self._inside.append(threading.get_ident())
            if len(self._inside) == 1:
                self._was_enabled = gc.isenabled()
                gc.disable()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if len(self._inside) == 1 and self._was_enabled:
                gc.enable()
            self._inside.remove(threading.get_ident())

    def start_anew(self) -> None:
        """In a forked child, where nobody but this thread is inside."""
        self._lock = threading.RLock()
        was_inside, me = bool(self._inside), threading.get_ident()
        self._inside = [thread for thread in self._inside if thread == me]
        if was_inside and not self._inside and self._was_enabled:
            gc.enable()


_collector_paused = _CollectorPause()
in_forked_child(_collector_paused.start_anew)


class _WarningsAbove:
    """``warnings``, for code that the functions of this package call: what it says of its caller is said of theirs."""

    @staticmethod
    def warn(message: Any, category: Any = None, stacklevel: int = 1, **options: Any) -> None:
        depth = 1  # of the code that warns; this function is a frame too
        if stacklevel > 1:
            depth, frame = stacklevel, sys._getframe(2)
            while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(_PACKAGE):
                depth, frame = depth + 1, frame.f_back
        warnings.warn(message, category, stacklevel=depth + 1, **options)


_PACKAGE = __name__.split(".")[0] + "."


def _persistent_ids(zip_file: ZipReader, map_location: Any, pickle_module: Any) -> PersistentIds | None:
    """None where torch's way is the only one for all storages, and no worse for tensors."""
    # Whatever its location: map_location sends it to the CPU. str() of any device of theirs is their own.
    in_place = zip_file.in_place or (isinstance(map_location, (str, torch.device)) and str(map_location) == "cpu")
    direct = (
        (in_place or map_location is None)
        and torch.serialization._package_registry[0][1] is torch.serialization._cpu_tag
        and _own_byteorder(zip_file)
    )
    restricted = pickle_module is torch._weights_only_unpickler
    if not (direct or restricted):
        return None
    # Not where a storage takes torch's own way: that one ends with the load.
    defer = DeferredTensor if zip_file.defers and direct else None
    zip_file.abridges = restricted
    return PersistentIds(zip_file, direct=direct, in_place=in_place, defer=defer)


def _own_byteorder(zip_file: ZipReader) -> bool:
    """As ``torch.serialization._load`` finds it."""
    if zip_file.has_record("byteorder"):
        return zip_file.get_record("byteorder") == sys.byteorder.encode()
    return _byteorder_without_record() == sys.byteorder


def swaps_bytes(records: SmallRecords) -> bool:
    """Whether the storages have the other byte order than this machine."""
    recorded = records.read("byteorder").decode() if "byteorder" in records else _byteorder_without_record()
    if recorded not in ("little", "big"):
        raise ValueError(f"Unknown endianness type: {recorded}")  # as torch.load
    return recorded != sys.byteorder


def _byteorder_without_record() -> str:
    """Of files that do not say: torch before 2.1 wrote none."""
    endianness = torch.serialization.get_default_load_endianness()
    kinds = torch.serialization.LoadEndianness
    if endianness == kinds.NATIVE:
        return sys.byteorder
    return "big" if endianness == kinds.BIG else "little"
