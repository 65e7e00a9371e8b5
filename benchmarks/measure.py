"""What one save costs: time until it returns, time until it is on the device, CPU, memory, bytes. Linux only."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .heartbeat import Heartbeat

if TYPE_CHECKING:
    from .contenders import Contender


def timed_save(
    contender: Contender, state: dict[str, Any], path: Path, ready_rss: int | None, *, heartbeat: bool = False
) -> dict[str, Any]:
    """One sample. `ready_rss` is the resident size before the first save: memory kept between saves counts."""
    gc.collect()
    synchronize_device(contender.device)
    processes = contender.processes()
    peak_known = all([reset_peak(pid) for pid in processes])
    cpu_start = cpu_seconds(processes)
    beat = Heartbeat()
    with beat if heartbeat else contextlib.nullcontext():
        start = time.perf_counter()
        contender.save(state, path)
        returned = time.perf_counter()
    if not contender.durable and contender.writes_file:
        fsync_tree(path)
    durable = time.perf_counter()
    cpu = cpu_seconds(processes) - cpu_start
    peak = peak_nbytes(processes) if peak_known else None
    nbytes = tree_nbytes(path) if contender.writes_file else contender.payload_nbytes
    return {
        "return_s": returned - start,
        "durable_s": durable - start,
        "largest_gap_s": beat.largest_gap_s if heartbeat else None,
        "cpu_s": cpu,
        "cpu_s_per_gb": cpu / (contender.payload_nbytes / 1e9) if contender.payload_nbytes else None,
        "peak_over_ready_bytes": None if peak is None or ready_rss is None else max(0, peak - ready_rss),
        "file_bytes": nbytes,
    }


def timed_load(contender: Contender, path: Path, cold: bool) -> dict[str, Any]:
    """Until load() returns, and until every page of every tensor was touched: a mapped file is not loaded yet."""
    from .cases import tensors_in

    how = drop_cache(path) if cold else fill_cache(path)
    gc.collect()
    processes = contender.processes()
    cpu_start = cpu_seconds(processes)
    start = time.perf_counter()
    loaded = contender.load(path)
    synchronize_device(contender.device)
    returned = time.perf_counter()
    for tensor in tensors_in(loaded):
        touch(tensor)
    touched = time.perf_counter()
    cpu = cpu_seconds(processes) - cpu_start
    return {"return_s": returned - start, "touched_s": touched - start, "cpu_s": cpu, "cache": how}


def touch(tensor: Any) -> int:
    import torch

    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return 0
    every_page = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)[::4096]
    return int(every_page.sum(dtype=torch.int64)) if tensor.device.type == "cpu" else 0


def touch_free_memory(nbytes: int) -> None:
    """Takes and returns `nbytes` of fresh memory. A virtual machine may have lent its free pages back to the host, and
    whoever is next to fill the page cache then pays for their return, at under 1 GB/s: chance, not the contender. It
    lends large blocks, so huge pages are asked for."""
    from .environment import memory_nbytes

    if nbytes <= 0 or nbytes > (memory_nbytes("MemAvailable") or 0) // 2:
        return
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        memory[::4096] = bytes(len(range(0, nbytes, 4096)))


def synchronize_device(device: str) -> None:
    if device != "cpu":
        import torch

        torch.accelerator.synchronize()


def fsync_tree(path: Path) -> None:
    """The files, their directories, and the directory that names them: what makes bytes and name durable."""
    if path.is_dir():
        for child in path.iterdir():
            fsync_tree(child)
    fsync(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_in(path: Path) -> list[Path]:
    return [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]


def tree_nbytes(path: Path) -> int:
    return sum(p.stat().st_size for p in files_in(path))


def drop_cache(path: Path) -> str:
    """Makes the next read come from the device; says how. Where neither way works (tmpfs) nothing is ever cold."""
    for file in files_in(path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return "cold by fadvise"
    return "cold by drop_caches"


def fill_cache(path: Path) -> str:
    """A load with O_DIRECT before this one has left nothing there."""
    for file in files_in(path):
        with open(file, "rb", buffering=0) as reading:
            piece = bytearray(8 << 20)
            while reading.readinto(piece):
                pass
    return "warm"


def cpu_seconds(processes: list[int]) -> float:
    """User and system time of all threads of these processes. The kernel's writeback is not in it."""
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in processes)


def resident_nbytes(processes: list[int]) -> int | None:
    return _status_nbytes(processes, "VmRSS")


def peak_nbytes(processes: list[int]) -> int | None:
    return _status_nbytes(processes, "VmHWM")


def reset_peak(pid: int) -> bool:
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_nbytes(processes: list[int], field: str) -> int | None:
    total = 0
    for pid in processes:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            total += next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field + ":")) * 1024
        except (OSError, StopIteration):
            return None
    return total
