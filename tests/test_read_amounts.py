"""How much is read and how much memory it takes: counted, in processes of their own."""

import json

import pytest
import torch
import warm_process
from corpus_case import random_bytes

import statedict_io as sio

MIB = 1 << 20
IMPORTED = ("statedict_io", "statedict_io.conversion")

MEASURE = """
import ctypes, json, os, sys, torch, statedict_io as sio
from statedict_io.conversion import convert
backend, path = sys.argv[1:3]
def chars():
    with open("/proc/self/io") as file:
        return int(next(line for line in file if line.startswith("rchar:")).split()[1])
def memory(field):
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith(field)).split()[1])
def reset():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
# Freed is given back: left to itself glibc raises the threshold, and now and then kept all of 256 MiB for later.
M_MMAP_THRESHOLD = -3
assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 << 10) == 1
WARM
reset()
rss, read = memory("VmRSS"), chars()
ACTION
print(json.dumps({"read": chars() - read, "extra": memory("VmHWM") - rss}))
"""


def measured(action, path, backend, warm="sio.verify(path + '.small', backend=backend); sio.load(path + '.small')"):
    torch.save({"a": torch.rand(3)}, str(path) + ".small")
    program = path.with_name("program.py")
    program.write_text(MEASURE.replace("WARM", warm).replace("ACTION", action))
    done = warm_process.run(program, backend, path, timeout=280, imported=IMPORTED)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A matrix of 384 MiB and a few other tensors."""
    path = tmp_path_factory.mktemp("large") / "large.pt"
    matrix = random_bytes(384 * MIB).view(torch.float32).view(384 * 64, 4096)
    sio.save(
        {"matrix": matrix, "t": random_bytes(32 * MIB).view(4096, -1).t(), "s": torch.rand(5)}, path, durable=False
    )
    yield path
    path.unlink()


@pytest.mark.parametrize(
    ("action", "at_most"),
    [
        ("sio.open_checkpoint(path, backend=backend)", 1 * MIB),
        ("c = sio.open_checkpoint(path, backend=backend); [c.info(n) for n in c]", 1 * MIB),
        ("assert sio.open_checkpoint(path, backend=backend)['s'].shape == (5,)", 1 * MIB),
        ("assert sio.open_checkpoint(path, backend=backend).get_slice('matrix')[64:128].nbytes == 2**20", 2 * MIB),
        ("assert sio.open_checkpoint(path, backend=backend).get_slice('matrix')[:256, :1024].nbytes == 2**20", 2 * MIB),
        ("assert sio.open_checkpoint(path, backend=backend).get_slice('t')[0:256].nbytes == 2**20", 3 * MIB),
        ("sio.load(path, map_location='meta', backend=backend)", 1 * MIB),
    ],
)
def test_only_what_is_needed_is_read(action, at_most, large, backend):
    found = measured(action, large, backend)
    assert found["read"] <= at_most, found
    assert found["extra"] <= 24 * MIB, found


@pytest.mark.parametrize(
    ("action", "kept"),
    [
        ("assert sio.verify(path, backend=backend).ok", 0),
        ("x = sio.load(path, backend=backend)", 416 * MIB),
        ("x = sio.load(path, verify=True, backend=backend)", 416 * MIB),
        ("x = sio.load(path, map_location=lambda s, _: s, backend=backend)", 416 * MIB),
        ("x = sio.open_checkpoint(path, backend=backend)['matrix']", 384 * MIB),
        ("convert(path, path + '.safetensors')", 0),
        ("convert(path + '.safetensors', path + '.again.pt')", 0),
    ],
)
def test_memory_is_bounded(action, kept, large, backend):
    found = measured(action, large, backend)
    assert found["extra"] <= kept + 160 * MIB, found


DEVICE = """
import gc, torch
from statedict_io.reading import load_steps, readahead
load_steps.stays_on_cpu = lambda *_: False
readahead.WINDOW_NBYTES = 8 << 20
x = sio.load(path, map_location=lambda s, _: torch.UntypedStorage(s.nbytes(), device="meta"), backend=backend)
"""


def test_host_storages_go_as_soon_as_they_are_copied(backend, tmp_path):
    """Where storages do not stay, no more than a window of them is in host memory; meta stands for the device."""
    sio.save({str(i): random_bytes(4 * MIB, seed=i) for i in range(64)}, tmp_path / "model.pt", durable=False)
    found = measured(DEVICE, tmp_path / "model.pt", backend)
    assert found["read"] >= 0 and found["extra"] <= 48 * MIB, found
