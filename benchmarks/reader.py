"""What a worker of `benchmarks.reading` does: load, read one tensor or some rows, and say what memory that takes."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cases import tensors_in
from .contenders.base import Unsupported
from .contenders.raw import RawServer
from .measure import drop_cache, fill_cache, peak_nbytes, reset_peak, resident_nbytes, touch, touch_free_memory


class Library:
    """How one library loads, opens a file lazily, and reads rows of a tensor in it. Paths are of its own format."""

    suffix = ".pt"
    maps = False  #: what load() returns is not read yet: its time is until every page was touched

    def load(self, path: str) -> Any:
        raise NotImplementedError

    def first_tensor(self, path: str, name: str) -> Any:
        raise NotImplementedError

    def rows(self, path: str, name: str, begin: int, end: int) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        """Ends what it has started."""


class StatedictIO(Library):
    def __init__(self, **options: Any) -> None:
        import statedict_io

        self.sio = statedict_io
        self.options = options

    def load(self, path: str) -> Any:
        return self.sio.load(path, **self.options)

    def first_tensor(self, path: str, name: str) -> Any:
        with self.sio.open_checkpoint(path, **self.options) as checkpoint:
            return checkpoint[name]

    def rows(self, path: str, name: str, begin: int, end: int) -> Any:
        with self.sio.open_checkpoint(path, **self.options) as checkpoint:
            return checkpoint.get_slice(name)[begin:end]

    def diff(self, path: str, to: str) -> None:
        assert self.sio.diff(path, to, **self.options).equal

    def verify(self, path: str) -> None:
        assert self.sio.verify(path, **self.options).ok

    def convert(self, path: str, to: str) -> None:
        from statedict_io import conversion

        conversion.convert(path, to)


class OfSafetensors(StatedictIO):
    """Files of safetensors."""

    suffix = ".safetensors"


class Torch(Library):
    def __init__(self, **options: Any) -> None:
        import torch

        self.torch = torch
        self.options = options
        self.maps = bool(options.get("mmap"))

    def load(self, path: str) -> Any:
        return self.torch.load(path, weights_only=True, **self.options)

    def first_tensor(self, path: str, name: str) -> Any:
        return self.load(path)[name].clone()

    def rows(self, path: str, name: str, begin: int, end: int) -> Any:
        return self.load(path)[name][begin:end].clone()


class Safetensors(Library):
    suffix = ".safetensors"
    maps = True

    def __init__(self) -> None:
        import safetensors.torch

        self.safetensors = safetensors

    def load(self, path: str) -> Any:
        return self.safetensors.torch.load_file(path)

    def first_tensor(self, path: str, name: str) -> Any:
        with self.safetensors.safe_open(path, framework="pt") as file:
            return file.get_tensor(name).clone()

    def rows(self, path: str, name: str, begin: int, end: int) -> Any:
        with self.safetensors.safe_open(path, framework="pt") as file:
            return file.get_slice(name)[begin:end].clone()


class Raw(Library):
    """Four threads that read the file into fresh huge-page memory: direct where it is cold, else buffered."""

    def __init__(self) -> None:
        self.servers = {how: RawServer("raw_read", "--threads", "4", f"--{how}") for how in ("direct", "buffered")}

    def timed(self, path: str, cold: bool) -> float:
        return float(self.servers["direct" if cold else "buffered"].order(path)["read_s"])

    def close(self) -> None:
        for server in self.servers.values():
            server.close()


LIBRARIES: dict[str, Callable[[], Library]] = {
    "statedict_io": StatedictIO,
    "statedict_io, .safetensors": OfSafetensors,
    "statedict_io, Python backend, .safetensors": lambda: OfSafetensors(backend="torch"),
    "statedict_io, verify": lambda: StatedictIO(verify=True),
    "statedict_io, Python backend": lambda: StatedictIO(backend="torch"),
    "torch.load": Torch,
    "torch.load mmap": lambda: Torch(mmap=True),
    "safetensors": Safetensors,
    "raw": Raw,
}


def fraction_in_page_cache(path: str) -> float:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=3) as memory:
        num_pages = -(-len(memory) // mmap.PAGESIZE)
        pages = (ctypes.c_ubyte * num_pages)()
        start = ctypes.c_char.from_buffer(memory)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(memory)), pages) != 0:
                raise OSError(ctypes.get_errno(), "mincore", path)
        finally:
            del start
        return bytes(page & 1 for page in pages).count(1) / num_pages


def put(path: str, cold: bool) -> None:
    """Nothing of the file in the page cache, or all of it: looked at, not hoped for."""
    if cold:
        drop_cache(Path(path))
    else:
        fill_cache(Path(path))
    found = fraction_in_page_cache(path)
    if (found > 0.01) if cold else (found < 0.99):
        raise OSError(f"{path}: {found:.0%} of it in the page cache, which was to be {'cold' if cold else 'warm'}")


def read_from_disk_nbytes() -> int:
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes:"))


def start(name: str) -> Reader:
    try:
        return Reader(LIBRARIES[name]())
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        raise Unsupported(f"{type(error).__name__}: {error}") from error


class Reader:
    def __init__(self, library: Library) -> None:
        self.library = library
        self.about = {"suffix": library.suffix}

    def do_load(self, path: str, cold: bool) -> dict[str, float]:
        """`s`: until the bytes are in memory of the process's own, or mapped and every page was touched."""
        gc.collect()
        touch_free_memory(os.path.getsize(path))
        put(path, cold)
        if isinstance(self.library, Raw):
            return {"s": self.library.timed(path, cold)}
        start = time.perf_counter()
        loaded = self.library.load(path)
        returned = time.perf_counter() - start
        for tensor in tensors_in(loaded) if self.library.maps else ():
            touch(tensor)
        return {"s": time.perf_counter() - start, "return_s": returned}

    def do_diff(self, a: str, b: str) -> dict[str, float]:
        """Of two files that are not in the page cache; raw: until the bytes of both have been read."""
        gc.collect()
        for path in (a, b):
            put(path, cold=True)
        before = resident_nbytes([os.getpid()])
        assert before is not None and reset_peak(os.getpid())
        start = time.perf_counter()
        if isinstance(self.library, Raw):
            return {"s": sum(self.library.timed(path, cold=True) for path in (a, b))}
        self.library.diff(a, b)  # type: ignore[attr-defined]
        seconds = time.perf_counter() - start
        peak = peak_nbytes([os.getpid()])
        assert peak is not None
        return {"s": seconds, "extra_bytes": peak - before}

    def do_first_tensor(self, path: str, name: str) -> dict[str, float]:
        gc.collect()
        put(path, cold=True)
        start = time.perf_counter()
        self.library.first_tensor(path, name)
        return {"s": time.perf_counter() - start}

    def do_rows(self, path: str, name: str, begin: int, end: int) -> dict[str, float]:
        put(path, cold=True)
        before = read_from_disk_nbytes()
        start = time.perf_counter()
        rows = self.library.rows(path, name, begin, end)
        seconds = time.perf_counter() - start
        return {"s": seconds, "read_bytes": read_from_disk_nbytes() - before, "wanted_bytes": rows.nbytes}

    def do_memory(self, what: str, path: str, to: str | None = None) -> dict[str, float]:
        """What it takes over what the process has after its imports; of a load, over the tensors too."""
        arguments = (path,) if to is None else (path, to)
        before = resident_nbytes([os.getpid()])
        assert before is not None and reset_peak(os.getpid())
        result = getattr(self.library, what)(*arguments)
        peak = peak_nbytes([os.getpid()])
        assert peak is not None
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(result)}
        return {"extra_bytes": peak - before - sum(storages.values())}

    def close(self) -> None:
        self.library.close()
