"""Reading from S3: how many requests, which ranges, and every fault with many under way."""

import asyncio
import contextlib
import errno
import itertools
import os
import signal
import threading
import time

import pytest
import torch
from corpus_case import filled, random_bytes
from equality import difference

import statedict_io as sio
from remote.conftest import BUCKET, content
from remote.s3_server import cut_short, drop, error, held
from statedict_io.remote import s3_object, side_by_side

MIB = 1 << 20
KEY = "model.pt"
URL = f"s3://{BUCKET}/{KEY}"
EDGES = 64 * 1024 + 128 * 1024


@pytest.fixture(scope="module")
def state():
    """Large ones, and small ones between them."""
    state = {}
    for layer in range(4):
        state[f"{layer}.weight"] = filled(512, 2048, seed=layer)  # 4 MiB
        state[f"{layer}.bias"] = filled(512, seed=layer)
    return state


@pytest.fixture
def saved(s3, state, monkeypatch):
    import fsspec.config

    options = fsspec.config.conf["s3"]
    patient = {**options["config_kwargs"], "read_timeout": 100}  # what ends early has not been waited for
    monkeypatch.setitem(fsspec.config.conf, "s3", {**options, "config_kwargs": patient})
    sio.save(state, URL)
    sio.load(URL)  # the client is there
    s3.reset()
    return s3


@pytest.fixture(autouse=True)
def fail_soon(monkeypatch):
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)


@pytest.fixture
def many_ranges(monkeypatch):
    """More than there are connections."""
    monkeypatch.setattr(s3_object, "MAX_READ_NBYTES", MIB // 2)
    monkeypatch.setattr(s3_object.S3Object, "max_read_nbytes", MIB // 2)


def ranges_of(server):
    """In bytes of the object."""
    nbytes = len(content(server, KEY))
    found = [request.range for request in server.requests if request.kind == "get" and request.range]
    return sorted((start + nbytes, nbytes) if start < 0 else (start, end) for start, end in found)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "statedict_io request"]


def no_thread_is_left():
    for thread in threads():
        thread.join(20)
    return threads() == []


def test_the_first_tensor_of_a_cold_object_takes_two_round_trips(saved, state):
    saved.delay = 0.1
    with sio.open_checkpoint(URL) as checkpoint:
        assert saved.kinds() == ["get", "get"]  # at once: the beginning, and the end, which tells the size
        assert difference(checkpoint["2.weight"], state["2.weight"]) is None
    assert saved.kinds() == ["get"] * len(saved.requests)
    assert 2 <= saved.num_round_trips <= 4  # 2, where the machine is quiet
    # Header and bytes at once, by several connections.
    ranges = sorted(request.range for request in saved.requests[2:])
    assert len(ranges) == 4
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(ranges))
    assert ranges[-1][1] - ranges[0][0] <= state["2.weight"].nbytes + 200


def test_no_byte_is_read_twice_and_all_of_one_version(saved, state, backend):
    saved.delay = 0.2
    assert difference(sio.load(URL, backend=backend), state) is None
    gets = [request for request in saved.requests if request.kind == "get"]
    assert len(gets) == len(saved.requests) == 2 + 16
    assert saved.busiest >= 4
    ranges = ranges_of(saved)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    assert ranges[0][0] == 0
    etag = saved.client.head_object(Bucket=BUCKET, Key=KEY)["ETag"]
    assert {request.if_match for request in gets} == {None, etag}
    assert [request.if_match for request in gets].count(None) == 2


def test_a_small_object_takes_the_two_that_open_it(s3):
    sio.save({"few": filled(5)}, URL)
    s3.reset()
    assert difference(sio.load(URL, verify=True), {"few": filled(5)}) is None
    assert s3.kinds() == ["get", "get"], s3.requests


def test_an_object_of_no_bytes(s3):
    s3.client.put_object(Bucket=BUCKET, Key=KEY, Body=b"")
    report = sio.verify(URL)
    assert not report.ok and URL in report.problems[0]
    with pytest.raises(sio.StateDictIOError):
        sio.open_checkpoint(URL)


def test_another_pool_of_connections(s3, state, monkeypatch):
    import fsspec.config

    sio.save(state, URL)
    monkeypatch.setitem(fsspec.config.conf, "s3", {**fsspec.config.conf["s3"], "max_concurrency": 3})
    s3.reset()
    s3.delay = 0.05
    assert difference(sio.load(URL), state) is None
    assert s3.busiest <= 3


@pytest.mark.parametrize("kind", ["safetensors", "index"])
def test_safetensors_and_shards(s3, state, kind, tmp_path):
    most = {"max_shard_nbytes": 6 * MIB} if kind == "index" else {}
    folder = tmp_path / "weights"
    folder.mkdir()
    sio.save_safetensors(state, folder / "model.safetensors", **most)
    for path in folder.iterdir():
        s3.client.upload_file(str(path), BUCKET, f"weights/{path.name}")
    s3.reset()
    found = sio.load(f"s3://{BUCKET}/weights/")
    assert difference({name: found[name] for name in state}, state) is None
    assert all(request.range or request.kind != "get" or not request.path.endswith(".safetensors")
               for request in s3.requests)  # fmt: skip
    with sio.open_checkpoint(f"s3://{BUCKET}/weights/") as checkpoint:
        assert difference({name: checkpoint[name] for name in state}, state) is None
    number = len(list(folder.glob("*.safetensors")))
    assert number == (1 if kind == "safetensors" else 4)


# Faults, with many ranges under way.

EXPIRED = error(403, "ExpiredToken", "The provided token has expired.")


def in_the_middle(request):
    return request.kind == "get" and request.if_match is not None and request.range[0] > 4 * MIB


PASSING = {"refused": error(500, "InternalError"), "too many": error(503, "SlowDown"), "dropped": drop,
           "cut short": cut_short(200_000)}  # fmt: skip


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_no_error(name, saved, state, many_ranges):
    saved.fail(in_the_middle, PASSING[name], times=3)
    assert difference(sio.load(URL, verify=True), state) is None
    assert saved.faults[0][2] == 0
    assert no_thread_is_left()


def test_after_a_break_only_the_rest_is_requested(saved, state):
    saved.fail(in_the_middle, cut_short(200_000), times=1)
    assert difference(sio.load(URL), state) is None
    ranges = [request.range for request in saved.requests if request.if_match]
    broken, rest = [(start, end) for start, end in ranges if [e for _, e in ranges].count(end) == 2]
    assert broken[0] < rest[0] <= broken[0] + 200_000


FAULTS = {
    "refused": (error(500, "InternalError"), OSError, None),
    "dropped": (drop, OSError, None),
    "cut short": (cut_short(1000), ConnectionError, errno.ECONNABORTED),
    "forbidden": (error(403, "AccessDenied"), PermissionError, errno.EACCES),
    "credentials expire": (EXPIRED, PermissionError, errno.EACCES),
    "replaced": (error(412, "PreconditionFailed"), OSError, errno.ESTALE),
    "deleted": (error(404, "NoSuchKey"), OSError, errno.ESTALE),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_pass_is_one_error(name, saved, many_ranges):
    fault, kind, number = FAULTS[name]
    saved.fail(in_the_middle, fault)
    for action in (sio.load, lambda url: sio.open_checkpoint(url)["2.weight"], sio.verify):
        with pytest.raises(kind) as caught:
            action(URL)
        assert caught.value.filename == URL
        assert number is None or caught.value.errno == number, repr(caught.value)
        assert no_thread_is_left()
    if number == errno.ESTALE:
        assert "replaced" in str(caught.value)


def test_an_object_that_is_replaced_in_the_middle(saved, state, many_ranges, monkeypatch):
    """By the store, not by the door."""
    monkeypatch.setattr(side_by_side, "_LATE_FACTOR", 1e9)  # a second request may still get the old one
    new = {name: tensor + 1 for name, tensor in state.items()}
    replaced = threading.Lock()

    def replace(request):
        if in_the_middle(request) and replaced.acquire(blocking=False):
            sio.save(new, URL)
        return False

    saved.fail(replace, drop)
    with pytest.raises(OSError, match="replaced") as caught:
        sio.load(URL)
    assert (caught.value.errno, caught.value.filename) == (errno.ESTALE, URL)
    saved.reset()
    assert difference(sio.load(URL), new) is None


def test_with_versions_the_one_that_was_opened_is_read_to_the_end(saved, state, monkeypatch):
    import fsspec.config

    def of_version(environ, start_response, app):
        return app(
            environ,
            lambda status, headers, *more: start_response(status, [*headers, ("x-amz-version-id", "v1")], *more),
        )

    of_version.needs_app = True
    saved.fail(lambda request: request.kind == "get", of_version)
    assert difference(sio.load(URL), state) is None
    assert not any("versionId" in request.query for request in saved.requests)
    saved.requests.clear()
    monkeypatch.setitem(fsspec.config.conf, "s3", {**fsspec.config.conf["s3"], "version_aware": True})
    assert difference(sio.load(URL), state) is None
    found = [request.query.get("versionId") for request in saved.requests]
    assert found[:2] == [None, None] and found[2:] == [["v1"]] * len(found[2:]) and len(found) > 2


def test_a_range_that_is_late_is_requested_again(saved, state, many_ranges):
    release = threading.Event()
    saved.fail(in_the_middle, held(release), times=1)
    try:
        assert difference(sio.load(URL, verify=True), state) is None
        assert not release.is_set()
        ranges = [request.range for request in saved.requests if request.if_match]
        assert max(ranges.count(each) for each in ranges) == 2
        assert no_thread_is_left()
    finally:
        release.set()


def test_a_late_range_and_no_second_request(saved, state, many_ranges, monkeypatch):
    """That the test above would notice."""
    monkeypatch.setattr(side_by_side, "_LATE_FACTOR", 1e9)
    release = threading.Event()
    saved.fail(in_the_middle, held(release), times=1)
    threading.Timer(3, release.set).start()
    assert difference(sio.load(URL), state) is None
    assert release.is_set()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs a signal for a thread")
def test_ctrl_c_ends_requests_that_are_not_answered(saved, many_ranges, ctrl_c):
    release = threading.Event()

    def interrupt(request):
        if in_the_middle(request):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            return True
        return False

    saved.fail(interrupt, held(release), times=1)
    saved.fail(in_the_middle, held(release))
    try:
        with pytest.raises(KeyboardInterrupt):
            sio.load(URL)
        assert no_thread_is_left() and not release.is_set()
    finally:
        release.set()


def test_in_a_coroutine(saved, state, many_ranges):
    async def loaded():
        return sio.load(URL, verify=True)

    assert difference(asyncio.run(loaded()), state) is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_process_reads_what_its_parent_has_opened(saved, state):
    with sio.open_checkpoint(URL) as checkpoint:
        assert difference(checkpoint["0.weight"], state["0.weight"]) is None
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                os._exit(0 if difference(checkpoint["1.weight"], state["1.weight"]) is None else 1)
            os._exit(2)
        assert difference(checkpoint["2.weight"], state["2.weight"]) is None
        deadline = time.monotonic() + 60
        while (found := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        if found[0] == 0:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert found == (pid, 0)


def test_legacy_files_are_read_by_several_connections(s3, tmp_path):
    state = {"w": random_bytes(24 * MIB)}
    torch.save(state, tmp_path / KEY, _use_new_zipfile_serialization=False)
    s3.client.upload_file(str(tmp_path / KEY), BUCKET, KEY)
    s3.reset()
    s3.delay = 0.05
    assert difference(sio.load(URL), state) is None
    assert s3.busiest >= 2
