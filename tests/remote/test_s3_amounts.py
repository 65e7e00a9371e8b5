"""How much memory an upload and a download take, whatever the size: measured in processes of their own.

The small files are of several parts, so that the bound would catch a whole file held in memory.
"""

import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

import statedict_io as sio
from remote.conftest import BUCKET, keys, uploads
from remote.s3_server import KEY, SECRET
from statedict_io.remote.part_sizes import part_sizes
from statedict_io.remote.s3_multipart import LIMITS

MIB = 1 << 20

MEASURE = """
import json, sys, time, torch, statedict_io as sio
backend, url, nbytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
def memory(field):
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith(field)).split()[1])
if "zeros" in sys.argv:  # which take no memory
    sio.save({"s": torch.rand(2**21)}, url, backend=backend)
    state = {"w": torch.zeros(nbytes // 8, dtype=torch.int64)}
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
    sio.save(state, url, backend=backend)
    peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
    print(json.dumps({"save": {"extra": 1024 * (peak - before), "seconds": 0}}))
    sys.exit()
generator = torch.Generator().manual_seed(5)
state = {"w": torch.randint(-2**62, 2**62, (nbytes // 16,), generator=generator)}
state["v"] = state["w"] + 1
sio.save({"s": torch.rand(2**21)}, url + ".small", backend=backend)  # modules and connections are there
sio.load(url + ".small", backend=backend, verify=True)
def measured(action, counted=0):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before, start = memory("VmRSS"), time.perf_counter()
    result = action()
    return result, {"extra": memory("VmHWM") - before - counted, "seconds": time.perf_counter() - start}
_, save = measured(lambda: sio.save(state, url, backend=backend))
report, verify = measured(lambda: sio.verify(url, backend=backend))
loaded, load = measured(lambda: sio.load(url, backend=backend), nbytes)
assert report.ok and all(torch.equal(loaded[name], state[name]) for name in state)
print(json.dumps({"save": save, "verify": verify, "load": load}))
"""


def measured(s3, backend, nbytes, *options):
    environment = {
        **os.environ,
        "PYTHONPATH": str(pathlib.Path(sio.__file__).parent.parent),
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": s3.url,
        "AWS_DEFAULT_REGION": "us-east-1",
        # Freed is given back: left to itself glibc raises the threshold, and keeps parts of parts.
        "MALLOC_MMAP_THRESHOLD_": str(128 << 10),
    }
    url = f"s3://{BUCKET}/large.pt"
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, backend, url, str(nbytes), *options],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print({name: f"{f['extra'] / MIB:.0f} MiB extra, {f['seconds']:.1f} s" for name, f in found.items()})
    assert {*keys(s3)} <= {"large.pt", "large.pt.small"} and uploads(s3) == []
    return found


def check(found, most, of_save):
    for name, figures in found.items():
        limit = {"save": of_save, "verify": most, "load": min(most, 32 * MIB)}[name]
        assert figures["extra"] <= limit, (name, found)


def buffers_nbytes(nbytes):
    return part_sizes(SimpleNamespace(storage_options={}), nbytes, LIMITS).buffers_nbytes


@pytest.mark.alone  # what is in flight at once is a matter of time
def test_memory_is_bounded(s3, backend):
    most = buffers_nbytes(256 * MIB) + 64 * MIB
    assert most < 256 * MIB
    check(measured(s3, backend, 256 * MIB), (16 * 8 + 32) * MIB, most)  # verify: docs/remote.md


@pytest.mark.long
@pytest.mark.timeout(900)
def test_memory_of_an_upload_of_eight_gibibytes(s3, backend):
    """Into a store that keeps nothing."""

    def forget(environ, start_response, app):
        left = int(environ["CONTENT_LENGTH"])
        while left:
            left -= len(environ["wsgi.input"].read(min(left, MIB)))
        start_response("200 OK", [("ETag", '"0"'), ("Content-Length", "0")])
        return [b""]

    def end(environ, start_response, app):
        environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        b"".join(app({**environ, "REQUEST_METHOD": "DELETE", "CONTENT_LENGTH": "0"}, lambda *_: None))
        body = b"<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"
        start_response("200 OK", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    forget.needs_app = end.needs_app = True
    s3.fail(lambda request: request.kind == "part", forget)
    s3.fail(lambda request: request.kind == "complete", end)
    check(measured(s3, backend, 8 << 30, "zeros"), 0, buffers_nbytes(8 << 30) + 64 * MIB)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_memory_of_one_gibibyte(s3, backend):
    check(measured(s3, backend, 1024 * MIB), 256 * MIB, buffers_nbytes(1024 * MIB) + 64 * MIB)
