"""A child that is forked in the middle of another thread's work."""

import contextlib
import gc
import io
import os
import signal
import threading

import pytest
import torch
import torch.distributed.checkpoint as dcp

import statedict_io as sio
from statedict_io.conversion import convert
from statedict_io.dcp import SingleFileReader, SingleFileWriter


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_while_another_thread_loads_collects_garbage(tmp_path, backend):
    path, other = tmp_path / "model.pt", tmp_path / "other.pt"
    torch.save({str(i): torch.ones(1) for i in range(100)}, path)
    inside, go_on = threading.Event(), threading.Event()

    def stop(*_):
        inside.set()
        go_on.wait(60)

    thread = threading.Thread(target=lambda: sio.load(path, backend=backend, progress=stop))
    thread.start()
    assert inside.wait(60)
    try:
        assert not gc.isenabled()
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            status = 1
            try:
                before = gc.isenabled()
                sio.save([1], other, backend=backend)
                status = 0 if before and sio.load(other, backend=backend) == [1] and gc.isenabled() else 2
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        go_on.set()
        thread.join()
    assert gc.isenabled()


class Stopping(io.RawIOBase):
    """A file object whose first read or write calls ``stop`` and waits."""

    def __init__(self, stop, content=b""):
        self._stop, self._file = stop, io.BytesIO(content)

    def writable(self):
        return True

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=0):
        return self._file.seek(offset, whence)

    def tell(self):
        return self._file.tell()

    def readinto(self, buffer):
        self._stop()
        return self._file.readinto(buffer)

    def write(self, data):
        self._stop()
        return self._file.write(data)


class Reduced:
    """Stops while it is pickled."""

    def __init__(self, stop):
        self._stop = stop

    def __reduce__(self):
        self._stop()
        return (int, ())


def everything(directory, backend):
    """What the child does: each operation once."""
    state, path = {"w": torch.ones(1000)}, directory / "of the child.pt"
    sio.save(state, path, backend=backend)
    sio.save_async(state, path, backend=backend).result(timeout=60)
    assert torch.equal(sio.load(path, backend=backend, verify=True)["w"], state["w"])
    assert sio.verify(path).ok
    with sio.open_checkpoint(path, backend=backend) as checkpoint:
        assert torch.equal(checkpoint["w"], state["w"])
    sio.save(state, buffer := io.BytesIO(), backend=backend)
    assert torch.equal(sio.load(io.BytesIO(buffer.getvalue()), backend=backend)["w"], state["w"])
    with sio.patch_torch(backend=backend):
        torch.save(state, path)
    convert(str(path), str(path) + ".safetensors")
    assert gc.isenabled()


def _patching(directory, stop, backend):
    with sio.patch_torch(backend=backend, progress=stop):
        torch.save({"w": torch.ones(1 << 20)}, directory / "model.pt")


def _through_dcp(directory, stop, backend):
    state = {"w": torch.ones(1 << 20)}
    dcp.save(state, storage_writer=SingleFileWriter(directory / "model.pt", progress=stop), no_dist=True)


def _loading_through_dcp(directory, stop, backend):
    state = {"w": torch.empty(1 << 20)}
    reader = SingleFileReader(directory / "loaded.pt")
    read = reader.read_data

    def stopping(*arguments):
        stop()
        return read(*arguments)

    reader.read_data = stopping
    dcp.load(state, storage_reader=reader, no_dist=True)


OPERATIONS = {
    "save": lambda d, stop, b: sio.save({"w": torch.ones(1 << 20)}, d / "model.pt", backend=b, progress=stop),
    "save, pickling": lambda d, stop, b: sio.save([torch.ones(9), Reduced(stop)], d / "model.pt", backend=b),
    "save to an object": lambda d, stop, b: sio.save({"w": torch.ones(1 << 20)}, Stopping(stop), backend=b),
    "save_async": lambda d, stop, b: sio.save_async(
        {"w": torch.ones(1 << 20)}, d / "model.pt", backend=b, progress=stop
    ).result(),
    "save_async, pickling": lambda d, stop, b: sio.save_async([Reduced(stop)], d / "model.pt", backend=b).result(),
    "load": lambda d, stop, b: sio.load(d / "loaded.pt", backend=b, progress=stop),
    "load an object": lambda d, stop, b: sio.load(Stopping(stop, (d / "loaded.pt").read_bytes()), backend=b),
    "load verified": lambda d, stop, b: sio.load(d / "loaded.pt", backend=b, verify=True, progress=stop),
    "verify": lambda d, stop, b: sio.verify(d / "loaded.pt", progress=stop),
    "patch_torch": _patching,
    "SingleFileWriter": _through_dcp,
    "SingleFileReader": _loading_through_dcp,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_child_forked_in_the_middle_of_it_can_do_everything(operation, tmp_path, backend):
    torch.set_num_threads(1)  # OpenMP's threads do not survive fork()
    torch.save({"w": torch.rand(1 << 20)}, tmp_path / "loaded.pt")
    everything(tmp_path, backend)  # what is done once is done
    inside, go_on = threading.Event(), threading.Event()

    def stop(*_):
        inside.set()
        go_on.wait(120)

    errors = []

    def run():
        try:
            OPERATIONS[operation](tmp_path, stop, backend)
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(60), errors
    try:
        child = os.fork()
        if child == 0:
            signal.alarm(120)
            status = 1
            try:
                with contextlib.redirect_stdout(None):
                    everything(tmp_path, backend)
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        go_on.set()
        thread.join()
    assert errors == []
