"""A real S3 protocol server: the bytes of torch.save, and ranges of them back."""

import pytest
import torch
from corpus_case import filled, random_bytes
from equality import difference

import statedict_io as sio
from remote.conftest import BUCKET, content, keys, uploads

MIB = 1 << 20
URL = f"s3://{BUCKET}/run 7/model.pt"
KEY = "run 7/model.pt"


@pytest.fixture(scope="module")
def state():
    matrix = filled(64, 128 * 1024)  # 32 MiB: parts, and pieces
    return {"matrix": matrix, "t": filled(512, 1024).t(), "few": filled(5), "tail": matrix[60:], "step": 7}


def torch_bytes(obj, tmp_path, name="model.pt"):
    torch.save(obj, tmp_path / name)
    return (tmp_path / name).read_bytes()


@pytest.mark.parametrize("save", [sio.save, lambda *a, **k: sio.save_async(*a, **k).result()], ids=["save", "async"])
def test_the_object_has_the_bytes_of_torch_save(s3, state, save, backend, tmp_path):
    save(state, URL, backend=backend)
    assert content(s3, KEY) == torch_bytes(state, tmp_path)
    assert keys(s3) == [KEY] and uploads(s3) == []
    kinds = s3.kinds()
    assert kinds.count("part") == 7 and kinds.count("create") == kinds.count("complete") == 1
    assert {request.nbytes for request in s3.requests if request.kind == "part" and request.part < 7} == {5 * MIB}


def test_a_small_object_too(s3, backend, tmp_path):
    obj = {"few": filled(5)}
    sio.fastsave(obj, f"s3://{BUCKET}/epoch=3.ckpt", backend=backend)
    assert content(s3, "epoch=3.ckpt") == torch_bytes(obj, tmp_path, "epoch=3.ckpt")


def test_it_replaces_the_old_object(s3, state, backend):
    sio.save({"old": 1}, URL, backend=backend)
    assert sio.load(URL) == {"old": 1}
    sio.save(state, URL, backend=backend)
    assert difference(sio.load(URL, backend=backend), state) is None


def test_load_reads_ranges_side_by_side(s3, state, backend):
    sio.save(state, URL)
    nbytes = len(content(s3, KEY))
    s3.reset()
    s3.delay = 0.05
    done = []
    assert difference(sio.load(URL, backend=backend, progress=lambda *d: done.append(d)), state) is None
    gets = [request for request in s3.requests if request.kind == "get"]
    assert all(request.range for request in gets) and "head" not in s3.kinds()
    assert sum(end - start for start, end in (request.range for request in gets)) <= nbytes + 256 * 1024
    assert max(end - start for start, end in (request.range for request in gets)) <= 17 * MIB
    assert s3.busiest >= 3
    assert done[-1][0] == done[-1][1] > 32 * MIB


def test_one_tensor_is_read_with_ranged_requests_only(s3, state, backend):
    sio.save({**state, "other": random_bytes(24 * MIB)}, URL)
    s3.reset()
    with sio.open_checkpoint(URL, backend=backend) as checkpoint:
        assert s3.kinds() == ["get", "get"]  # the beginning, with data.pkl, and the end, with the directory
        assert set(checkpoint) == {"matrix", "t", "few", "tail", "other"}
        before = len(s3.requests)
        assert difference(checkpoint["t"], state["t"]) is None
        assert [request.kind for request in s3.requests[before:]] == ["get", "get"]  # of a MiB each; header and bytes
        assert difference(checkpoint.get_slice("matrix")[7:9, 5:], state["matrix"][7:9, 5:].clone()) is None
        ranges = [request.range for request in s3.requests if request.kind == "get"]
        assert all(ranges)
        asked_for = 2 * MIB + 2 * 128 * 1024 * 4
        assert sum(end - start for start, end in ranges) <= asked_for + 256 * 1024
    assert len(s3.requests) <= 9


def test_a_column_is_not_a_request_a_row(s3, state):
    sio.save({"wide": filled(2048, 1024)}, URL)
    s3.reset()
    with sio.open_checkpoint(URL) as checkpoint:
        assert checkpoint.get_slice("wide")[:, 3:5].shape == (2048, 2)
    assert len(s3.requests) <= 48


def test_many_small_tensors_are_not_a_request_each(s3, backend):
    state = {f"t{i}": filled(i % 5 + 1, 700, seed=i) for i in range(1000)}
    sio.save(state, URL)
    s3.reset()
    assert difference(sio.load(URL, backend=backend, verify=True), state) is None
    assert sio.verify(URL, backend=backend).ok
    assert len(s3.requests) <= 24


def test_verify_finds_the_damage_and_reads_ranges(s3, state, backend):
    sio.save(state, URL)
    data = bytearray(content(s3, KEY))
    assert sio.verify(URL, backend=backend).ok
    data[20 * MIB] ^= 1
    s3.client.put_object(Bucket=BUCKET, Key=KEY, Body=bytes(data))
    s3.reset()
    report = sio.verify(URL, backend=backend)
    assert not report.ok and [r.name for r in report.records if r.status == "corrupt"] == ["data/0"]
    assert all(URL in problem for problem in report.problems) and "matrix" in report.problems[0]
    assert all(request.range for request in s3.requests if request.kind == "get")
    with pytest.raises(sio.CorruptCheckpointError, match="matrix") as caught:
        sio.load(URL, verify=True, backend=backend)
    assert URL in str(caught.value)


def test_an_object_that_is_replaced_while_it_is_read_is_an_error(s3, state):
    sio.save(state, URL)
    with sio.open_checkpoint(URL) as checkpoint:
        sio.save({**state, "few": filled(5, seed=1)}, URL)
        with pytest.raises(OSError) as caught:
            checkpoint["matrix"]
    assert caught.value.filename == URL


def test_the_restricted_unpickler_stands(s3):
    sio.save({"f": test_the_restricted_unpickler_stands}, URL)
    import pickle

    with pytest.raises(pickle.UnpicklingError):
        sio.load(URL)
    assert sio.load(URL, weights_only=False)["f"] is test_the_restricted_unpickler_stands


@pytest.mark.parametrize("options", [{"_use_new_zipfile_serialization": False}, {}], ids=["legacy", "zip"])
def test_what_torch_wrote_there_loads(s3, options, tmp_path):
    state = {"a": filled(3, 5)}
    torch.save(state, tmp_path / "model.pt", **options)
    s3.client.put_object(Bucket=BUCKET, Key=KEY, Body=(tmp_path / "model.pt").read_bytes())
    assert difference(sio.load(URL), state) is None


def test_through_a_cache(s3, state, tmp_path, backend):
    sio.save(state, f"simplecache::{URL}", backend=backend)
    assert content(s3, KEY) == torch_bytes(state, tmp_path)
    assert difference(sio.load(f"simplecache::{URL}", backend=backend), state) is None
    with sio.open_checkpoint(f"blockcache::{URL}") as checkpoint:
        assert difference(checkpoint["few"], state["few"]) is None
