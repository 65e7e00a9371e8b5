"""``SingleFileWriter``: every rank writes its part of one file."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import io
import os
import threading
import uuid
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from .. import backends
from ..errors import StateDictIOError
from ..installed import torch_format
from ..installed.stock import torch_load
from ..options import check_flags
from ..progress import Progress, reporting
from ..remote.multipart import MultipartUpload
from ..remote.multipart_stores import join, takes_parts
from ..remote.part_sizes import connections_of
from ..remote.stores import Place, locate, naming_errors, note_discard_failed
from ..remote.urls import is_url
from ..writing.places import takes_bytes_in_order_only
from ..writing.suffixes import check_suffix
from ..writing.targets import FileTarget, Target, URLTarget, resolve
from .call_watch import when_call_has_ended, when_results_are_gathered
from .exchange import Listener
from .global_plan import GlobalState, LocalItems
from .orders import PartsOrder, WorkOrder, Written
from .part_writer import PartWriter
from .range_writer import RangeWriter
from .refused_values import warn_of_refused
from .shared_save import FailureNotice, SharedFile, SharedSave
from .shared_upload import SharedUpload


class SingleFileWriter(StorageWriter):  # type: ignore[misc]
    """Writes one file of :func:`torch.save`'s format from all ranks, for ``dcp.save`` and ``dcp.async_save``.

    The storages in it are those that ``torch.save`` of the gathered state would write, byte for byte and in the same
    order; of a state of tensors alone, such as a model's, so is the whole file. ``torch.load`` reads it. No rank ever
    holds the whole state. The file appears, whole, when every rank has written its part; until then the old one stays.

    Args:
        path: of the file, on a file system that all ranks share; or a URL of an object in a store that takes it in
            parts, such as ``"s3://bucket/model.pt"``: each rank then sends its own, and needs the store's configuration
            and credentials.
        durable: on return the file is on the device, whichever rank wrote what. A store makes no difference.
        backend: ``"auto"``, ``"native"`` or ``"python"``, as for :func:`statedict_io.save`.
        progress: a callable taking (bytes_done, bytes_total) of this rank, or True for a bar of this rank's on stderr.
            In a store these are the bytes of the parts that this rank sends, done when the store has them.
        overwrite: ``False`` raises :class:`FileExistsError` where there is a file: before anything is written, and
            again before the file would be replaced; in a store by the request itself that makes the object appear.
        thread_count: ignored; ``FileSystemWriter`` has it, and code that was written for that one passes it.
        atomic: False writes into the file itself, as for :func:`statedict_io.save`. A rank that has the file mapped
            into its memory must not; only the coordinator finds out. In a store it makes no difference.

    Missing directories above the file are made. In a store the object appears when all parts are there; what goes wrong
    in one rank discards them. Values that a reader refuses unless it has ``weights_only=False`` are
    named in a warning, in the coordinator.

    Attributes:
        bytes_written: payload bytes that this rank wrote in the last save.

    Use one writer for one save at a time. It is part of a collective call: what one rank raises, all raise
    (as ``CheckpointException``).
    """

    _warns_of_refused = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        durable: bool = True,
        backend: str = "auto",
        progress: Progress = None,
        overwrite: bool = True,
        thread_count: int | None = None,
        atomic: bool = True,
    ) -> None:
        del thread_count
        super().__init__()
        check_flags(durable=durable, overwrite=overwrite, atomic=atomic)
        check_suffix(path)
        self.path = os.fspath(path)
        self.overwrite = overwrite
        self.durable = durable
        self.backend = backend
        self.progress = progress
        self.atomic = atomic
        self.bytes_written = 0
        self._save_id = str(uuid.uuid4())
        self._save: SharedSave | None = None  #: of the coordinator
        self._listener: Listener | None = None  #: where other ranks reach this one
        self._has_written: threading.Event | None = None
        self._unpickle: Callable[[str, bytes], Any] = _unpickled

    @property
    def checkpoint_id(self) -> str:
        return self.path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._abandon()
        if checkpoint_id:
            check_suffix(checkpoint_id)
            self.path = os.fspath(checkpoint_id)
        self._save_id = str(uuid.uuid4())

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        del checkpoint_id
        return True

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self.path, save_id=self._save_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True) and torch.distributed.is_initialized():
            raise ValueError("use_collectives=False gives each rank a checkpoint of its own; one file needs them")
        self._abandon()
        self.bytes_written = 0

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if not getattr(plan, "usable", True):
            raise ValueError(
                "the planner's enable_plan_caching sends no plan where nothing changed, but each file needs its own: "
                "use DefaultSavePlanner(enable_plan_caching=False) with SingleFileWriter"
            )
        if _has_other_ranks() and self._place() is not None:
            self._listener = Listener()
            self._has_written = threading.Event()
            # Whoever needs bytes of this rank learns that they will not come.
            when_results_are_gathered(self._listener.close, unless=self._has_written)
            when_call_has_ended(self._listener.close, unless=threading.Event())
        address = None if self._listener is None else self._listener.address
        return dataclasses.replace(plan, storage_data=LocalItems(tuple(plan.items), address))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._check_may_replace()
        file_path = self._file_path()
        if file_path:
            os.makedirs(os.path.dirname(file_path) or os.curdir, exist_ok=True)
        target = resolve(self.path)
        try:
            save = self._begin(target, plans)
        except BaseException:
            target.close()
            raise
        orders = []
        for rank, work in enumerate(save.work):
            order = WorkOrder(
                path=self.path,
                paths=save.paths,
                ranges=work.ranges,
                nbytes=work.nbytes,
                compute_crc32=save.compute_crc32,
                key=save.key,
                parts=save.parts_order(rank),
            )
            orders.append(order)
        return [
            dataclasses.replace(plan, items=[*work.opaque, *work.items], storage_data=order)
            for plan, work, order in zip(plans, save.work, orders, strict=True)
        ]

    def _begin(self, target: Target, plans: list[SavePlan]) -> SharedSave:
        if isinstance(target, URLTarget) and getattr(target.place.fs, "fixed_upload_size", False):
            raise OSError(
                errno.EOPNOTSUPP,
                "fixed_upload_size: the store wants parts of one size, and those of many ranks are not; let one rank "
                "that has all save it by statedict_io.save",
                target.given,
            )
        if not isinstance(target, FileTarget) and not (isinstance(target, URLTarget) and takes_parts(target.place)):
            raise OSError(
                errno.ESPIPE,
                "many ranks can write into a regular file only, or an object of a store that takes it in parts, as S3 "
                "does: save to a file and copy it there, or let one rank that has all save it by statedict_io.save",
                target.given,
            )
        if backends.choose(self.backend) is None:
            raise StateDictIOError(
                f"torch {torch.__version__} writes a format that statedict_io does not reproduce, and cannot write "
                "itself from many ranks; save with FileSystemWriter"
            )
        backends.warn_if_saving_is_slow(self.backend)
        if torch_format.skip_data():
            raise ValueError("torch.serialization.skip_data: a file without data needs one rank only; use torch.save")
        self._abandon_save()
        if isinstance(target, FileTarget):
            self._save = SharedFile(
                target, GlobalState(plans), durable=self.durable, atomic=self.atomic, unpickle=self._unpickle
            )
        else:
            addresses = [plan.storage_data.address for plan in plans]
            own_address = None if self._listener is None else self._listener.address
            self._save = SharedUpload(
                target,
                GlobalState(plans),
                addresses,
                own_address,
                replace=self.overwrite,
                unpickle=self._unpickle,
            )
        return self._save

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        order: WorkOrder = plan.storage_data.reachable()
        try:
            with _naming(order):
                written = self._write(plan, order, planner)
        except BaseException as e:
            if self._save is not None and len(self._save.work) == 1:
                self._abandon_save()  # nobody sends the notice
            if self._listener is not None:
                self._listener.close()
            e.__dict__["statedict_io_notice"] = FailureNotice(order.key)
            raise
        if self._has_written is not None:
            self._has_written.set()
        self.bytes_written = written.nbytes
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(MetadataIndex(self.path), written.nbytes, written)])
        return future

    def _check_may_replace(self) -> None:
        """
        Raises:
            IsADirectoryError, FileExistsError: the path may not be replaced.
        """
        path = self._file_path()
        place = self._place()
        if place is not None and not self.overwrite and _is_there(place):
            raise FileExistsError(errno.EEXIST, "there is an object, and overwrite=False", place.url)
        if not path:
            return  # which resolving it says
        if os.path.isdir(path) or not os.path.basename(path):
            raise IsADirectoryError(
                errno.EISDIR, "SingleFileWriter writes one file: name it, such as model.pt in that directory", self.path
            )
        if not self.overwrite and os.path.exists(path):
            raise FileExistsError(errno.EEXIST, "there is a file, and overwrite=False", self.path)

    def _file_path(self) -> str | None:
        """None where it is that of an object in a store."""
        return locate(self.path).local_path if is_url(self.path) else self.path

    def _place(self) -> Place | None:
        """Of an object in a store; None where it is a file."""
        place = locate(self.path) if is_url(self.path) else None
        return None if place is None or place.local_path is not None else place

    def _abandon(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = self._has_written = None
        self._abandon_save()

    def _abandon_save(self) -> None:
        if self._save is not None:
            self._save.abandon()
            self._save = None

    def _write(self, plan: SavePlan, order: WorkOrder, planner: SavePlanner) -> Written:
        backend = backends.choose(self.backend)
        assert backend is not None, "checked when it was planned"
        backends.warn_if_saving_is_slow(self.backend)
        num_opaque = len(plan.items) - order.num_ranges
        opaque = {}
        for item in plan.items[:num_opaque]:
            value = planner.resolve_data(item)
            assert isinstance(value, io.BytesIO)
            opaque[item.index.fqn] = value.getvalue()
        items = plan.items[num_opaque:]
        with reporting(self.progress, self.path) as progress:
            if order.parts is not None:
                written = self._send_parts(order, order.parts, items, planner, progress)
                written.opaque = opaque
                return written
            ranges = RangeWriter(order, planner, backend, durable=self.durable, progress=progress)
            for index, item in enumerate(items):
                ranges.add(index, item)
            return ranges.finish(opaque)

    def _send_parts(
        self,
        order: WorkOrder,
        parts: PartsOrder,
        items: list[WriteItem],
        planner: SavePlanner,
        progress: Callable[[int, int], Any] | None,
    ) -> Written:
        place = self._place()
        assert place is not None, "all ranks are given the same path"
        upload = None if parts.ticket is None else join(place, parts.ticket)
        try:
            written = PartWriter(
                order, items, planner, upload, self._listener, connections=connections_of(place.fs), progress=progress
            ).write()
        except BaseException as e:
            # Who is last of all ranks to end its parts leaves none behind.
            if upload is not None:
                try:
                    upload.abort()
                except Exception as failure:
                    note_discard_failed(e, failure, place.url)
            raise
        if parts.is_deputy and upload is not None:
            # Where the object is there by then, the store has no such upload any more.
            when_call_has_ended(functools.partial(_discard, upload), unless=threading.Event())
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        save, self._save = self._save, None
        assert save is not None, "finish comes after prepare_global_plan, in the coordinator"
        written: list[Written] = [result.storage_data for of_rank in results for result in of_rank]
        try:
            if self._warns_of_refused:
                warn_of_refused(self.path, written)  # which raises where the caller makes errors of warnings
            self._check_may_replace()
        except BaseException:
            save.abandon()
            raise
        save.finish(written)
        metadata.storage_meta = self.storage_meta()


def _has_other_ranks() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _is_there(place: Place) -> bool:
    with naming_errors(place.url):
        place.fs.invalidate_cache(place.path)
        return bool(place.fs.exists(place.path))


def _discard(upload: MultipartUpload) -> None:
    with contextlib.suppress(Exception):
        upload.abort()


def _unpickled(name: str, data: bytes) -> Any:
    """A value that a rank of this job pickled for this save: DCP passes its own messages the same way."""
    del name
    return torch_load(io.BytesIO(data), map_location="cpu", weights_only=False)


@contextlib.contextmanager
def _naming(order: WorkOrder):  # type: ignore[no-untyped-def]
    """System errors carry the path that the caller gave."""
    try:
        yield
    except FileNotFoundError as e:
        if not order.paths or e.filename != order.temporary:
            raise
        raise FileNotFoundError(
            errno.ENOENT,
            "this rank does not see the coordinator's file: all ranks need one shared file system",
            order.path,
        ) from None
    except OSError as e:
        if order.paths and e.filename == order.temporary:
            e.filename = order.path
            if takes_bytes_in_order_only(e):
                e.strerror = (
                    f"{e.strerror}: what takes bytes only from front to back cannot hold a file that many ranks write; "
                    "save with FileSystemWriter there"
                )
                e.args = (e.errno, e.strerror)  # what it is made of again when it arrives at other ranks
        raise
