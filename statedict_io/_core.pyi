"""The compiled half. Internal: names may change at any time."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import UntypedStorage, dtype
from typing_extensions import Buffer

testing: ModuleType  #: what only tests call: load_storages_onto, num_slots_allocated, without_unused_puts

class PlannedFile:
    """Bytes and ranges of storages that are to be a file; holds them until it is destroyed."""

    @property
    def nbytes(self) -> int: ...
    def write_fd(
        self,
        fd: int,
        *,
        direct: str = "auto",
        progress: Callable[[int, int], Any] | None = None,
        bytes_per_second: float = 0.0,
        sha256: bytearray | None = None,
    ) -> bool:
        """Writes it at offset 0 of a regular file and sets the file's size.

        Args:
            fd: open for writing; nobody else may use it meanwhile.
            direct: ``"auto"``, ``"on"`` or ``"off"``: O_DIRECT.
            progress: called in this thread with (bytes_done, bytes_total).
            bytes_per_second: 0: as fast as it goes.
            sha256: 32 bytes, filled with the hash of the file.

        Returns:
            Whether the file took direct I/O to the end.

        Raises:
            OSError: with ``errno``, without a filename.
        """

    def write_stream(
        self, write: Callable[[memoryview], Any], *, progress: Callable[[int, int], Any] | None = None
    ) -> None:
        """Hands it to ``write`` from front to back; the views are valid during the call only."""

    @property
    def device_nbytes(self) -> dict[str, int]:
        """Of the storages on each device that the pipeline copies from."""

    def snapshot_nbytes(self, *, on_devices: bool) -> int:
        """Of the host memory that :meth:`snapshot` takes."""

    def snapshot(self, *, on_devices: bool, max_nbytes: int) -> Snapshot | None:
        """Copies its bytes; what it needs of this object it holds itself.

        Args:
            on_devices: copies storages on devices there, queued on the current streams, and the others to host memory.
                None is returned where a device has no room. False assembles the whole file in host memory.
            max_nbytes: idle snapshot slots beyond these go back to the system, those of this snapshot included.
        """

class PlannedArchive(PlannedFile):
    """A planned archive of torch.save.

    Args:
        archive_name: prefix of all record names, ASCII.
        head: (name, content) of the records before the storages, in file order.
        storages: become ``data/0``, ``data/1``, ...
        tail: (name, content) of the records after the storages, without the serialization id.
        alignment: of payload offsets, bytes.
        compute_crc32: False leaves all CRCs 0.
        skip_data: leave holes of the storages' sizes.
        device_types: whose storages are copied in the pipeline; others are brought to the CPU here, all at once.

    Raises:
        ValueError: names or sizes that cannot make an archive.
        TypeError: content of another type.
        DeviceWithoutStreams: one of ``device_types`` cannot be copied from in the pipeline.
    """

    def __init__(
        self,
        archive_name: str,
        head: list[tuple[str, bytes]],
        storages: StorageTable | list[UntypedStorage],
        tail: list[tuple[str, bytes]],
        *,
        alignment: int,
        compute_crc32: bool,
        skip_data: bool = False,
        device_types: Sequence[str] = (),
    ) -> None: ...

class GaplessFile(PlannedFile):
    """A planned file of parts, one behind the other and with nothing between them.

    Args:
        parts: bytes, or (name, storage, offset, nbytes) of a range of a storage; names are for messages.
        device_types: as of :class:`PlannedArchive`.

    Raises:
        TypeError: a part of another type.
        ValueError: a storage has no such range.
        DeviceWithoutStreams: as of :class:`PlannedArchive`.
    """

    def __init__(
        self, parts: Sequence[bytes | tuple[str, UntypedStorage, int, int]], *, device_types: Sequence[str] = ()
    ) -> None: ...

class DeviceWithoutStreams(RuntimeError):
    """Storages on it have to be brought to the CPU first; raised before anything is written."""

class CorruptArchive(ValueError):
    """The file's bytes cannot be a sound archive; the message names the record."""

class OpenArchive:
    """An open archive; holds its directory. All methods release the GIL, and may be called from several threads.

    Args:
        fd: open for reading; must stay open, keeps its position.
        direct: ``"auto"`` reads large, cold files past the page cache, ``"on"`` all that allows it, ``"off"`` none.
        payloads: the records of a file in another format, which have neither headers nor names: (offset, nbytes,
            alignment in memory) of each, within the file and without overlap. Those of no bytes can be neither loaded
            nor checksummed.

    Raises:
        CorruptArchive: also from the methods that read.
        OSError: with ``errno``, without a filename; also from the methods that read.
    """

    def __init__(
        self, fd: int, *, direct: str = "auto", payloads: list[tuple[int, int, int]] | None = None
    ) -> None: ...
    @property
    def archive_name(self) -> str: ...
    @property
    def direct_nbytes(self) -> int:
        """How many bytes were read past the page cache."""

    def entries(self) -> list[tuple[str, int, int, int, int, bool]]:
        """(name, header_offset, nbytes, stored_nbytes, crc32, compressed) of each record, in directory order."""

    def payload_offset(self, record: int) -> int: ...
    def read_stored(self, record: int, offset: int, nbytes: int) -> bytes:
        """A range of the record as it lies in the file, compressed or not."""

    def read_into(self, record: int, offset: int, destination: Buffer, num_rows: int = 1, pitch: int = 0) -> None:
        """The same into a writable, contiguous buffer: rows of one length, which begin ``pitch`` bytes after each
        other in the record."""

    def load_storages(
        self,
        records: Sequence[int],
        *,
        verify: bool,
        progress: Callable[[int, int], Any] | None = None,
    ) -> tuple[list[UntypedStorage], list[int]]:
        """CPU storages that cannot be resized, and the records whose CRC-32 is wrong; no storages if there are any.

        Args:
            records: stored ones, each once.
            progress: called in this thread with (bytes_done, bytes_total), headers included.
        """

    def load_storages_onto(
        self,
        device: str,
        records: Sequence[int],
        *,
        verify: bool,
        progress: Callable[[int, int], Any] | None = None,
    ) -> tuple[list[UntypedStorage], list[int]] | None:
        """The same on a device, through pinned slots, after what is queued on the caller's current stream there; every
        copy has landed on return.

        None where the device has no streams and events, or no room. The device must have been initialized.
        """

    def checksums(
        self,
        records: Sequence[int],
        *,
        progress: Callable[[int, int], Any] | None = None,
    ) -> list[int]:
        """The CRC-32 of the payloads of stored records, in memory that does not grow with them."""

class Snapshot:
    """An archive whose bytes are its own; made by :meth:`PlannedArchive.snapshot`, written as often as it takes."""

    @property
    def nbytes(self) -> int: ...
    def done(self) -> bool:
        """Whether every byte has been copied."""

    def wait(self) -> None:
        """Returns when it has, and lets go of the originals on devices."""

    def write_fd(
        self,
        fd: int,
        *,
        direct: str = "auto",
        progress: Callable[[int, int], Any] | None = None,
        bytes_per_second: float = 0.0,
        sha256: bytearray | None = None,
    ) -> bool:
        """See :meth:`PlannedArchive.write_fd`."""

    def write_stream(
        self, write: Callable[[memoryview], Any], *, progress: Callable[[int, int], Any] | None = None
    ) -> None:
        """See :meth:`PlannedArchive.write_stream`."""

def crc32(data: Buffer, crc: int = 0) -> int:
    """As ``zlib.crc32``."""

def abridged_pickle(
    data_pkl: bytes,
) -> tuple[bytes, list[tuple[str, str, str, int, int, tuple[int, ...], tuple[int, ...], bool]]]:
    """The pickle with the calls that rebuild plain tensors taken out; see csrc/pickle/tensor_calls.h."""

def simd() -> str:
    """Name of the CRC-32 implementation in use."""

def use_torch_access(access: ModuleType) -> None:
    """Reaches torch through its Python API from now on; ``access`` is :mod:`statedict_io.backends.torch_access`."""

def use_torch_functions(capsule: object) -> None:
    """Reaches torch through the functions of a module ``_torch_<release>`` from now on.

    Raises:
        ValueError: they are of another version of the interface.
    """

def forget_fixed_storages() -> None:
    """In a forked child: storages that threads of the parent kept from being resized."""

def snapshot_pool_nbytes() -> int:
    """Of all snapshot slots, idle or not."""

def release_buffers() -> None:
    """Gives idle staging memory back to the system."""

class TensorReduction:
    """What ``torch.Tensor.__reduce_ex__`` names in the stream and asks; the same for every :class:`StorageTable`."""

    def __init__(
        self,
        *,
        tensor_type: type,
        parameter_type: type,
        ordered_dict: type,
        rebuild_tensor: Callable[..., Any],
        rebuild_parameter: Callable[..., Any],
        storage_types: dict[dtype, type],
        location_tag: Callable[[UntypedStorage], str],
    ) -> None: ...

class StorageTable:
    """Reduces plain tensors for the C pickler, as ``torch.Tensor.__reduce_ex__`` does; see
    csrc/core/storage_table.cpp."""

    storages: list[UntypedStorage]
    persistent_id: Callable[[Any], Any]
    reduce: Callable[[Any], Any]

    def __init__(self, reduction: TensorReduction, reference: Callable[[Any], Any]) -> None: ...
    def key_of(self, storage: UntypedStorage, dtype: dtype) -> str: ...

def write_strips(
    storages: list[UntypedStorage],
    strips: Sequence[tuple[int, int, int, int, int, int, int]],
    *,
    direct_fd: int,
    fd: int,
    direct: str = "auto",
    compute_crc32: bool = True,
    progress: Callable[[int, int], Any] | None = None,
) -> list[tuple[int, bytes]]:
    """Writes parts of records into a file of which others write other parts.

    Args:
        storages: on the CPU or on a device with streams.
        strips: :class:`~statedict_io.backends.protocol.Strip`.
        direct_fd, fd: the file, opened twice; the first may be switched to O_DIRECT.
        direct: ``"auto"``, ``"on"`` or ``"off"``: O_DIRECT.
        progress: called in this thread with (bytes_done, bytes_total).

    Returns:
        For each strip, what it adds to its record's CRC, and its first bytes, at most eight.

    Raises:
        OSError: with ``errno``, without a filename.
        ValueError: a strip that is not within its storage.
    """
