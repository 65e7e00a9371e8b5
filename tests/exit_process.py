"""A process that exits while one of its threads runs Python code that the extension did not call.

exit_process.py SCENARIO NUMBER DIRECTORY

Where C++ makes an object that the cyclic collector knows, CPython before 3.12 may collect, and so run any finalizer;
later versions do in PyErr_CheckSignals(). Here each such object has the collector run, and calls back. The
callback with the given number does not return: it gives up the GIL and asks for it until the process ends. Prints how
many callbacks there were amid C++; with number 0 these are all of the scenario.
"""

import builtins
import gc
import pathlib
import sys
import threading
import time
import types

import torch

import statedict_io as sio
from statedict_io import _core
from statedict_io.backends import torch_access


def native(function):
    """``function`` of the extension, called by a frame with the code NATIVE, as is what it returns to be called."""

    def call(*arguments, **keywords):
        result = function(*arguments, **keywords)
        return native(result) if isinstance(result, types.BuiltinFunctionType) else result

    return call


NATIVE = native(None).__code__


def mark_native_frames():
    for name, value in list(vars(_core).items()):
        if isinstance(value, types.BuiltinFunctionType):
            setattr(_core, name, native(value))
        elif isinstance(value, type) and not issubclass(value, BaseException):
            for method, function in list(vars(value).items()):
                if isinstance(function, property):
                    setattr(value, method, property(native(function.fget)))
                elif callable(function) and (method == "__init__" or not method.startswith("_")):
                    setattr(value, method, native(function))


class Known:
    """An object that the cyclic collector knows."""


class Callback:
    def __init__(self, last):
        self._kept = []
        self._last = last
        self._main = threading.get_ident()
        self.count = 0
        self.is_over = threading.Event()

    def __call__(self, phase, info, get_ident=threading.get_ident, frame=sys._getframe, sleep=time.sleep, known=Known):
        if phase == "stop":
            self._kept.append(known())  # so many that the next object is one too many
        if phase == "stop" or get_ident() == self._main:
            return
        try:
            is_amid_native = frame(1).f_code is NATIVE
        except ValueError:  # a thread of the extension's
            is_amid_native = True
        if not is_amid_native:
            return
        self.count += 1
        if self.count == self._last:
            self.is_over.set()
            while True:
                sleep(0.005)


class Slow:
    """Is destroyed late, and waits for the other threads to ask for the GIL."""

    def __del__(self, sleep=time.sleep):
        sleep(0.05)


def run(work, last):
    """Exits in the callback ``last`` of ``work``, or after it."""
    work()  # imports what it needs
    mark_native_frames()
    callback = Callback(last)

    def in_thread():
        gc.set_threshold(1)
        try:
            work()
        finally:
            gc.set_threshold(0)
            callback.is_over.set()

    # So that new ones are not those of CPython's free lists, of which the collector is not told.
    builtins.hoarded = [(0,) * size for size in range(1, 9) for _ in range(2000)] + [[] for _ in range(100)]
    gc.callbacks.append(callback)
    threading.Thread(target=in_thread, daemon=True).start()
    callback.is_over.wait()
    print(callback.count, flush=True)
    builtins.destroyed_at_exit = Slow()


class Stream:
    def write(self, data):
        return len(data)

    def flush(self):
        pass


class OnDevice(torch.UntypedStorage):
    """Says that it is on a device."""

    device = property(lambda self: torch.device("cuda:0"))


COPIES = types.SimpleNamespace(
    source=lambda records: types.SimpleNamespace(copy=lambda pieces, bounce: None), pinned=lambda nbytes: None
)


class Scenarios:
    # What a daemon thread drops must not be a tensor's last reference: torch itself would end the process.
    def __init__(self, directory):
        self.path = directory / "model.pt"
        self.obj = {"a": torch.zeros(3), "b": torch.nn.Parameter(torch.zeros(4)), "c": torch.zeros(2 << 20)}
        self.loaded = []
        sio.save(self.obj, self.path, backend="native")

    def progress(self, done, total):
        pass

    def save(self):
        sio.save(self.obj, self.path, backend="native", progress=self.progress)

    def save_without_a_torch_module(self):
        _core.use_torch_access(torch_access)
        self.save()

    def save_to_an_object(self):
        sio.save(self.obj, Stream(), backend="native", progress=self.progress)

    def save_from_a_device(self):
        access = {**vars(torch_access), "UntypedStorage": OnDevice, "device_copies": lambda: COPIES}
        _core.use_torch_access(types.SimpleNamespace(**access))
        planned = {"alignment": 64, "compute_crc32": True, "device_types": ["cuda"]}
        archive = _core.PlannedArchive("archive", [], [OnDevice(24 << 20)], [], **planned)
        with open(self.path, "wb") as file:
            archive.write_fd(file.fileno())

    def load(self):
        self.loaded.append(sio.load(self.path, backend="native", progress=self.progress))

    def verify(self):
        self.loaded.append(sio.verify(self.path))


if __name__ == "__main__":
    scenarios = Scenarios(pathlib.Path(sys.argv[3]))
    run(getattr(scenarios, sys.argv[1]), int(sys.argv[2]))
