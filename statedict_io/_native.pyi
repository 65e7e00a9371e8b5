"""The compiled half. Internal: names may change at any time."""

from collections.abc import Callable
from typing import Any

from torch import UntypedStorage
from typing_extensions import Buffer

class Archive:
    """A planned archive; holds ``records`` until it is destroyed.

    Args:
        archive_name: prefix of all record names, ASCII.
        records: (name, content) in file order, without the serialization id; an int is the size of a hole.
        alignment: of payload offsets, bytes.
        compute_crc32: False leaves all CRCs 0.

    Raises:
        ValueError: names or sizes that cannot make an archive.
        TypeError: content of another type.
    """

    def __init__(
        self,
        archive_name: str,
        records: list[tuple[str, bytes | UntypedStorage | int]],
        *,
        alignment: int,
        compute_crc32: bool,
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def write_fd(
        self,
        fd: int,
        *,
        direct: str = "auto",
        progress: Callable[[int, int], Any] | None = None,
        num_threads: int = 0,
        region_nbytes: int = 0,
    ) -> bool:
        """Writes the archive at offset 0 of a regular file and sets the file's size.

        Args:
            fd: open for writing; nobody else may use it meanwhile.
            direct: ``"auto"``, ``"on"`` or ``"off"``: O_DIRECT.
            progress: called in this thread with (bytes_done, bytes_total).
            num_threads, region_nbytes: 0 chooses.

        Returns:
            Whether the file took direct I/O to the end.

        Raises:
            OSError: with ``errno``, without a filename.
        """

    def write_stream(
        self, write: Callable[[memoryview], Any], *, progress: Callable[[int, int], Any] | None = None
    ) -> None:
        """Hands the archive to ``write`` from front to back; the views are valid during the call only."""

def crc32(data: Buffer, crc: int = 0) -> int:
    """As ``zlib.crc32``."""

def simd() -> str:
    """Name of the CRC-32 implementation in use."""

def num_slots_allocated() -> int:
    """Staging slots allocated since the process started; a second save adds none."""

def release_buffers() -> None:
    """Gives idle staging memory back to the system."""
