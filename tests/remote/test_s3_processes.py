"""Parallel uploads of a process that forks, runs an event loop, and ends with a save under way."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import statedict_io as sio
from remote.conftest import BUCKET, keys, uploads

SCRIPT = """
import asyncio, json, os, sys, torch
import fsspec.config
import statedict_io as sio
from statedict_io.remote import multipart, part_sizes, s3_multipart, stores, uploads

url = sys.argv[1]
fsspec.config.conf["s3"] = json.loads(sys.argv[2])
part_sizes.DEFAULT_PART_NBYTES = part_sizes._AT_ONCE_NBYTES = 64 << 10
s3_multipart.LIMITS = multipart.PartLimits(64 << 10, 5 << 30, 10_000)
state = {"w": torch.arange(1 << 17)}

def in_child(action):
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except ZeroDivisionError:
            os._exit(3)
        finally:
            os._exit(4)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

sio.save(state, f"{url}/first.pt")  # there are connections now, which a child must not use
assert in_child(lambda: sio.save(state, f"{url}/forked.pt")) == 0

async def save_in_a_loop():
    sio.save(state, f"{url}/in-a-loop.pt")

asyncio.run(save_in_a_loop())

def leave():
    with upload:
        raise ZeroDivisionError

with uploads.open_upload(stores.locate(f"{url}/forked-in-the-middle"), 1 << 20) as upload:
    upload.write(memoryview(bytes(1 << 19)))
    assert in_child(leave) == 3
    upload.write(memoryview(bytes(1 << 19)))
    upload.commit()

sio.save_async(state, f"{url}/at-exit.pt")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.usefixtures("small_parts")
def test_saves_of_a_process_that_forks_and_ends(s3):
    import fsspec.config

    s3.delay = 0.02  # what is under way at the end stays so for a while
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(sio.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, f"s3://{BUCKET}", json.dumps(fsspec.config.conf["s3"])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert uploads(s3) == []
    saved = ["at-exit.pt", "first.pt", "forked.pt", "in-a-loop.pt"]
    assert sorted(keys(s3)) == sorted([*saved, "forked-in-the-middle"])
    assert all(sio.verify(f"s3://{BUCKET}/{name}").ok for name in saved)
