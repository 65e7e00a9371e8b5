"""Processes that end with asynchronous saves in flight; each is run by test_async_processes.py.

async_process.py SCENARIO PATH {native,torch}
"""

import multiprocessing
import os
import pathlib
import signal
import sys
import time

import torch

import statedict_io as sio

MIB = 1 << 20
SLOW = 10 * MIB  # bytes per second


def state(value=1, nbytes=4 * MIB):
    return {"value": value, "w": torch.full((nbytes,), value % 251, dtype=torch.uint8)}


def exit_normally(path, **options):
    sio.save_async(state(), path, max_bytes_per_second=SLOW, **options)


def exit_by_sys_exit(path, **options):
    exit_normally(path, **options)
    sys.exit(7)


def exit_by_exception(path, **options):
    exit_normally(path, **options)
    raise RuntimeError("of the script")


def called_by_a_daemon(path, **options):
    import threading

    thread = threading.Thread(target=lambda: exit_normally(path, **options), daemon=True)
    thread.start()
    thread.join()


def at_exit(path, **options):
    """A save that is started when no more threads are waited for."""
    import atexit

    atexit.register(lambda: exit_normally(path, **options))


def error_never_collected_at_exit(path, **options):
    import atexit

    atexit.register(lambda: _fails(path, options))


def in_a_process_of_multiprocessing(path, **options):
    for method in ("fork", "spawn"):
        process = multiprocessing.get_context(method).Process(
            target=exit_normally, args=(f"{path}.{method}",), kwargs=options
        )
        process.start()
        process.join()
        assert process.exitcode == 0
        assert torch.load(f"{path}.{method}")["value"] == 1


def _fails(path, options):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))
    return sio.save_async(state(), path, **options)


def error_never_collected(path, **options):
    _fails(path, options)


def error_collected(path, **options):
    assert isinstance(_fails(path, options).exception(), OSError)


def error_never_collected_in_multiprocessing(path, **options):
    process = multiprocessing.get_context("fork").Process(target=error_never_collected, args=(path,), kwargs=options)
    process.start()
    process.join()


def fork(path, **options):
    """A child neither waits for its parent's saves nor touches them, and saves for itself."""
    torch.set_num_threads(1)  # OpenMP's threads do not survive fork(), and torch waits for them
    sio.save_async(state(1), path, **options).result()  # pools and locks are there before the fork
    pending = sio.save_async(state(2), path, max_bytes_per_second=2 * SLOW, **options)
    child = os.fork()
    if child == 0:
        start = time.monotonic()
        assert not pending.done()
        for ask in (pending.result, pending.exception, pending.snapshot_done, pending.wait_snapshot):
            try:
                ask()
            except sio.StateDictIOError as e:
                assert "belongs to process" in str(e)
            else:
                raise AssertionError(ask)
        sio.wait_all()
        assert time.monotonic() - start < 0.1, "the child waited"
        sio.save_async(state(3), f"{path}.child", max_in_flight=1, **options)
        sys.exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    pending.result()
    assert torch.load(path)["value"] == 2
    assert torch.load(f"{path}.child")["value"] == 3


def fork_at_any_moment(path, **options):
    """Children that are forked while the pools and the register are in use can use their own."""
    torch.set_num_threads(1)
    for number in range(40):
        sio.save_async(state(number, MIB), path, durable=False, **options)
        time.sleep(number % 8 * 0.0005)
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            sio.save_async(state(number, MIB), f"{path}.child", durable=False, **options).result()
            sio.release_buffers()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0, (number, status)
    sio.wait_all()


def terminated(path, **options):
    pending = sio.save_async(state(2), path, max_bytes_per_second=SLOW / 100, **options)
    directory = pathlib.Path(path).parent
    while not any(name.endswith(".sdio-tmp") for name in os.listdir(directory)):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)
    pending.result()


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2], backend=sys.argv[3])
