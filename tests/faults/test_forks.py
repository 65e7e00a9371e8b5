"""A child that is forked in the middle of another thread's work."""

import gc
import os
import signal
import threading

import pytest
import torch

import statedict_io as sio


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
