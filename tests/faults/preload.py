"""The Python half of preload.c: builds the library, starts processes under it and, inside such a process, drives it."""

import contextlib
import ctypes
import errno
import os
import pathlib
import shutil
import subprocess
import sys
from dataclasses import dataclass

import warm_process

HERE = pathlib.Path(__file__).parent
INSTEAD, AFTERWARDS, SHORT = range(3)
BEFORE, HALFWAY, AFTER = range(3)
FOREVER = 2**31 - 1


def build(directory):
    """The library, compiled into `directory`; None where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        return None
    library = pathlib.Path(directory, "preload.so")
    flags = ["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    subprocess.run([compiler, *flags, "-o", library, HERE / "preload.c", "-ldl", "-lpthread"], check=True)
    return library


def environment(library):
    """For a child process: this library loaded, and the modules of the tests found."""
    paths = [str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    # After what is there: a sanitizer's runtime has to be the first.
    preloaded = [os.environ.get("LD_PRELOAD", ""), str(library or "")]
    joined = {"PYTHONPATH": paths, "LD_PRELOAD": preloaded}
    return {**os.environ, **{name: os.pathsep.join(filter(None, values)) for name, values in joined.items()}}


def run_module(library, module, *arguments, timeout=280, wrapper=()):
    """Runs a ``*_process`` of this directory, or one named with its package, under the library; returns what it
    printed, or fails with all it said. ``wrapper``: a command that starts it."""
    module = module if "." in module else f"faults.{module}"
    variables = environment(library)
    if wrapper:
        command = [*wrapper, sys.executable, "-m", module, *map(str, arguments)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout, check=False)
    else:
        script = HERE.parent / f"{module.replace('.', '/')}.py"
        preloaded = variables["LD_PRELOAD"]
        done = warm_process.run(script, *arguments, timeout=timeout, environment=variables, preloaded=preloaded)
    assert done.returncode == 0, f"{module} ended with {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


class _Control(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("active", "record", "call", "first", "last", "error", "how", "kill_at")),
        *((name, ctypes.c_int32) for name in ("kill_when", "no_sync", "alignment", "fired", "total")),
        ("count", ctypes.c_int32 * 64),
        ("num_events", ctypes.c_int32),
        ("num_data", ctypes.c_int64),
    ]


class _Event(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("call", "fd", "fd2", "error")),
        *((name, ctypes.c_int64) for name in ("result", "offset", "nbytes", "data_at")),
        ("path", ctypes.c_char * 256),
        ("path2", ctypes.c_char * 256),
    ]


@dataclass
class Event:
    """One call that was made; `data` is what it wrote, where that was recorded."""

    call: str
    fd: int
    path: str
    fd2: int
    path2: str
    offset: int
    nbytes: int
    result: int
    error: int
    data: bytes | None = None

    def __str__(self):
        where = " ".join(str(p) for p in (self.fd if self.fd >= 0 else "", self.path, self.path2) if p != "")
        outcome = errno.errorcode.get(self.error, self.error) if self.error else self.result
        return f"{self.call}({where}) = {outcome}"


class Preload:
    """The library that this process was started under. One per process."""

    def __init__(self):
        library = ctypes.CDLL(None)
        self.control = _Control.in_dll(library, "sdio_fault_control")
        self._events = (_Event * 4096).in_dll(library, "sdio_fault_events")
        self._data = ctypes.c_void_p.in_dll(library, "sdio_fault_data")
        names = (ctypes.c_char_p * 65).in_dll(library, "sdio_fault_names")
        self.names = []
        for name in names:
            if name is None:
                break
            self.names.append(name.decode())

    @contextlib.contextmanager
    def watching(self, *, record=0, no_sync=False, fail=None, error=0, first=1, last=None, how=INSTEAD, **others):
        """Counts calls in the block; makes occurrences `first`..`last` of the call `fail` fail with `error`.

        `others`: kill_at and kill_when, alignment.
        """
        control = self.control
        control.record, control.no_sync = record, no_sync
        control.call = -1 if fail is None else self.names.index(fail)
        control.error, control.how = error, how
        control.first, control.last = first, first if last is None else last
        control.kill_at, control.kill_when = others.pop("kill_at", 0), others.pop("kill_when", 0)
        control.alignment = others.pop("alignment", -1)
        assert not others, others
        control.fired = control.total = control.num_events = control.num_data = 0
        ctypes.memset(ctypes.byref(control, _Control.count.offset), 0, ctypes.sizeof(control.count))
        control.active = 1
        try:
            yield control
        finally:
            control.active = 0

    def events(self):
        found = []
        for raw in self._events[: self.control.num_events]:
            data = None if raw.data_at < 0 else ctypes.string_at(self._data.value + raw.data_at, raw.result)
            found.append(
                Event(
                    self.names[raw.call], raw.fd, os.fsdecode(raw.path), raw.fd2, os.fsdecode(raw.path2),
                    raw.offset, raw.nbytes, raw.result, raw.error, data,
                )
            )  # fmt: skip
        return found
