"""The interpreter exits while threads of the process are at work, or while what only exists in C++ is alive."""

import pathlib
import subprocess
import sys

import pytest
import warm_process
from conftest import require_native

LIMIT_SECONDS = 120  # to catch hangs

# The interpreter is about to go, and waits long enough for every other thread to ask for the GIL.
EXIT_SLOWLY = """
import builtins, time
class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(2)
builtins.destroyed_at_exit = Slow()
"""

DAEMON = """
import sys, threading, time, torch
import statedict_io as sio
path, backend = sys.argv[1:]
began = threading.Event()
def wait(*_, began=began, sleep=time.sleep):
    began.set()
    while True:
        sleep(0.5)  # and asks for the GIL while the main thread sleeps
class Waiting:
    write = wait
    def flush(self):
        pass
state = {"a": torch.zeros(24 << 20, dtype=torch.uint8)}
torch.save(state, path)
def work():
    WORK
threading.Thread(target=work, daemon=True).start()
began.wait()
"""

WORK = {
    "save": "sio.save(state, path, backend=backend, progress=wait)",
    "save to an object": "sio.save(state, Waiting(), backend=backend)",
    "load": "sio.load(path, backend=backend, progress=wait)",
}


def assert_exits(script, *arguments):
    ended = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], timeout=LIMIT_SECONDS, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("name", WORK)
def test_a_daemon_thread_is_in_a_callback(name, backend, tmp_path):
    """It asks for the GIL amid Python code that C++ has called: the process died of SIGABRT."""
    assert_exits(DAEMON.replace("WORK", WORK[name]) + EXIT_SLOWLY, tmp_path / "model.pt", backend)


AMID_NATIVE = pathlib.Path(__file__).with_name("exit_process.py")


@pytest.mark.parametrize(
    "scenario",
    [
        "save",
        "save_without_a_torch_module",
        "save_to_an_object",
        "save_from_a_device",
        "load",
        "verify",
    ],
)
def test_a_daemon_thread_is_in_a_finalizer_amid_native_code(scenario, tmp_path, request):
    """Wherever an object is made there: unwound from most of these places, the process died of SIGABRT."""
    require_native()

    def exits_in(number):
        ended = warm_process.run(AMID_NATIVE, scenario, number, tmp_path, timeout=LIMIT_SECONDS)
        assert (ended.returncode, ended.stderr) == (0, ""), number
        return int(ended.stdout)

    count = exits_in(0)
    step = 1 if request.config.getoption("--long") else max(1, count // 5)
    for number in range(count, 0, -step):
        exits_in(number)


def test_a_daemon_thread_computes_a_checksum():
    require_native()
    script = """
import threading
from statedict_io import _core
began, data = threading.Event(), bytearray(32 << 20)
def work():
    while True:
        began.set()
        _core.crc32(data)
threading.Thread(target=work, daemon=True).start()
began.wait()
"""
    assert_exits(script + EXIT_SLOWLY)


# A storage that says it is on a device, and what _core asks for its copies.
ON_DEVICE = """
import io, os, sys, types, torch
from statedict_io import _core
from statedict_io.backends import torch_access

class OnDevice(torch.UntypedStorage):
    device = property(lambda self: torch.device("cuda:0"))

class Copies:
    @staticmethod
    def source(records):
        return types.SimpleNamespace(copy=lambda pieces, bounce: None)

    @staticmethod
    def pinned(nbytes):
        raise KeyboardInterrupt

access = {**vars(torch_access), "UntypedStorage": OnDevice, "device_copies": lambda: Copies}
_core.use_torch_access(types.SimpleNamespace(**access))
archive = _core.PlannedArchive(
    "archive", [("data.pkl", b"x")], [OnDevice(16)], [], alignment=64, compute_crc32=True, device_types=["cuda"]
)
assert archive.device_nbytes == {"cuda:0": 16}
"""


def test_a_planned_archive_of_a_device_is_alive():
    """What it holds of Python is let go of while modules are torn down: that waited for ever."""
    require_native()
    assert_exits(ON_DEVICE)


def test_a_worker_of_a_daemon_thread_copies_from_a_device(tmp_path):
    """As in a callback, in a thread that Python does not know."""
    require_native()
    script = """
import threading, time
began = threading.Event()
def copy(pieces, bounce, began=began, sleep=time.sleep):
    began.set()
    while True:
        sleep(0.5)
Copies.source = staticmethod(lambda records: types.SimpleNamespace(copy=copy))
Copies.pinned = staticmethod(lambda nbytes: None)
archive = _core.PlannedArchive(
    "archive", [], [OnDevice(24 << 20)], [], alignment=64, compute_crc32=True, device_types=["cuda"]
)
file = open(sys.argv[1], "wb")
threading.Thread(target=archive.write_fd, args=(file.fileno(),), daemon=True).start()
began.wait()
"""
    assert_exits(ON_DEVICE + script + EXIT_SLOWLY, tmp_path / "model.pt")


def test_an_interrupt_while_memory_is_pinned():
    """Plain memory serves where none can be pinned; that also swallowed what was to end the process."""
    require_native()
    script = """
for save in (
    lambda: archive.write_stream(io.BytesIO().write), lambda: archive.snapshot(on_devices=False, max_nbytes=0)
):
    try:
        save()
    except KeyboardInterrupt:
        continue
    sys.exit("it was swallowed")
"""
    assert_exits(ON_DEVICE + script)
