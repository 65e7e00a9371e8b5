"""Loading onto a device whose copies finish late. ../test_device.py runs this file, in a process of its own."""

import zipfile

import pytest
import torch
from conftest import require_native
from oracle import attempt

import statedict_io as sio
from device_standin.checks import LATE_US, MIB, native_slots, random_bytes, registered, standin  # noqa: F401 - fixtures
from statedict_io.reading import readahead


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(readahead, "WINDOW_NBYTES", MIB)


def state():
    """More than one window, ties and views, and small tensors between large ones."""
    base = random_bytes(MIB, 1)
    parts = {f"large{i}": random_bytes(MIB // 2 + i, 2 + i) for i in range(3)}
    small = {f"w{i}": random_bytes(1000 + i, 10 + i) for i in range(50)}
    return {
        "base": base,
        "view": base[7:],
        **parts,
        **small,
        "none": torch.empty(0),
        "p": torch.nn.Parameter(torch.ones(3)),
    }


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].device == tensor.device and type(found[name]) is type(tensor), name
        assert torch.equal(found[name].cpu(), tensor.cpu()), name


FORMS = {
    "name": "standin:1",
    "device": torch.device("cpu"),
    "dict": {"cpu": "standin:0"},
    "callable": lambda storage, _: storage.cpu() if storage.nbytes() < 2000 else storage.to("standin:0"),
}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_the_host_onto_a_device(form, verify, backend, tmp_path, standin):  # noqa: F811
    torch.save(state(), tmp_path / "model.pt")
    standin.delay_us = LATE_US
    expected, refused = attempt(torch.load, tmp_path / "model.pt", map_location=FORMS[form])
    found, error = attempt(sio.load, tmp_path / "model.pt", FORMS[form], verify=verify, backend=backend)
    assert type(error) is type(refused), repr(error)
    if refused is None:
        assert_equal(found, expected)
        if form != "callable":
            assert found["view"].untyped_storage().data_ptr() == found["base"].untyped_storage().data_ptr()


@pytest.mark.parametrize("map_location", [None, "cpu", {"standin:1": "standin:0"}], ids=str)
def test_tensors_of_a_device_to_where_they_were_or_elsewhere(map_location, backend, tmp_path, standin):  # noqa: F811
    tensors = {name: tensor.detach().to("standin:1") for name, tensor in state().items() if name != "view"}
    torch.save(tensors, tmp_path / "model.pt")
    standin.delay_us = LATE_US
    expected = torch.load(tmp_path / "model.pt", map_location=map_location)
    assert_equal(sio.load(tmp_path / "model.pt", map_location, backend=backend), expected)


@pytest.mark.parametrize("form", [*FORMS, "meta"])
def test_a_safetensors_file_onto_a_device(form, backend, tmp_path, standin):  # noqa: F811
    package = pytest.importorskip("safetensors.torch")
    tensors = {name: tensor.detach().clone() for name, tensor in state().items() if name != "view"}
    tensors |= {"huge": random_bytes(21 * MIB + 3, 5), "odd": random_bytes(20 * MIB, 6).view(torch.int32)}
    package.save_file(tensors, tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "model.pt")
    standin.delay_us = LATE_US
    place = FORMS.get(form, form)
    expected, refused = attempt(sio.load, tmp_path / "model.pt", place, backend=backend)
    found, error = attempt(sio.load, tmp_path / "model.safetensors", place, backend=backend)
    assert type(error) is type(refused), repr(error)
    if form == "meta":
        assert all(tensor.is_meta for tensor in found.values()) and found.keys() == tensors.keys()
    elif refused is None:
        assert_equal({name: found[name] for name in expected}, expected)


# ---- through pinned slots, onto one device


def save_and_load(tmp_path, obj, **options):
    torch.save(obj, tmp_path / "model.pt")
    return sio.load(tmp_path / "model.pt", "standin:0", backend="native", **options)


@pytest.mark.parametrize("verify", [False, True])
def test_slots_are_reused_while_copies_are_late(verify, tmp_path, standin, native_slots):  # noqa: F811
    """One tensor that is larger than all slots, between others: no more host memory than the slots."""
    obj = {"a": random_bytes(100, 1), "large": random_bytes(160 * MIB + 5, 2), "z": random_bytes(5 * MIB, 3)}
    standin.delay_us = 3000
    found = save_and_load(tmp_path, obj, verify=verify)
    assert all(torch.equal(found[name].cpu(), tensor) for name, tensor in obj.items())
    assert 0 < standin.pinned_allocations <= 16  # of 8 MiB
    # Each span's copy was queued and not waited for; several were under way at once.
    assert standin.device_copies >= 21 and standin.most_device_copies_in_flight > 1
    assert standin["streams_taken:0"] >= 1 and standin["streams_taken:1"] == 0


def test_nothing_is_copied_from_pageable_memory(tmp_path, standin):  # noqa: F811
    require_native()
    torch.save(state(), tmp_path / "model.pt")
    found = sio.load(tmp_path / "model.pt", "standin:1", backend="native")
    assert standin.blocking_copies == 0 and standin.device_copies > 50 and standin.device_copies_in_flight == 0
    assert {tensor.device.index for tensor in found.values()} == {1}


@pytest.mark.parametrize("num_nbytes", [100, 70_000, 3 * MIB])
def test_records_that_cross_spans(num_nbytes, tmp_path, standin):  # noqa: F811
    """Many of one size: headers and payloads lie across the ends of slots in all ways."""
    require_native()
    from statedict_io import _core

    obj = {f"w{i}": random_bytes(num_nbytes + i % 7, i) for i in range(min(400, 30 * MIB // num_nbytes))}
    torch.save(obj, tmp_path / "model.pt")
    standin.delay_us = 20
    with open(tmp_path / "model.pt", "rb") as file:
        reader = _core.OpenArchive(file.fileno())
        records = [i for i, entry in enumerate(reader.entries()) if entry[0].startswith("data/")]
        for num_threads, span_nbytes in ((1, 4096), (4, 4096), (8, 1 << 16)):
            storages, wrong = _core.testing.load_storages_onto(
                reader, "standin:0", records, verify=True, num_threads=num_threads, span_nbytes=span_nbytes
            )
            assert wrong == []
            for storage, tensor in zip(storages, obj.values(), strict=True):
                assert torch.equal(torch.empty(0, dtype=torch.uint8).set_(storage.cpu()), tensor)


def test_without_waiting_for_the_copies_the_bytes_differ(tmp_path, standin):  # noqa: F811
    require_native()
    obj = {"w": random_bytes(3 * MIB, 1)}
    standin.delay_us = 50_000
    standin.lose_event_synchronize = 1
    found = save_and_load(tmp_path, obj)
    standin.delay_us = 0
    assert not torch.equal(found["w"].cpu(), obj["w"])


@pytest.mark.parametrize("lose", [0, 1])
def test_copies_come_after_what_was_queued_before(lose, tmp_path, standin):  # noqa: F811
    """The memory that the load is given is still in use by the caller's stream. The stand-in can tell."""
    require_native()
    obj = {"w": random_bytes(3 * MIB, 1)}
    old = torch.empty(3 * MIB, dtype=torch.uint8, device="standin:0")
    standin.drain()
    standin.delay_us = 200_000
    old.fill_(1)
    standin.delay_us = 0
    del old
    standin.lose_event_block = lose
    found = save_and_load(tmp_path, obj)
    standin.drain()
    assert torch.equal(found["w"].cpu(), obj["w"]) is (lose == 0)


@pytest.mark.parametrize("setting", ["fail_device_copy", "fail_event_synchronize"])
@pytest.mark.parametrize("nth", [1, 3])
def test_a_failing_device_is_reported(setting, nth, tmp_path, standin):  # noqa: F811
    require_native()
    obj = {f"w{i}": random_bytes(8 * MIB, i) for i in range(4)}
    torch.save(obj, tmp_path / "model.pt")
    standin.delay_us = 5000
    setattr(standin, setting, nth)
    with pytest.raises(RuntimeError, match="standin: the "):
        sio.load(tmp_path / "model.pt", "standin:0", backend="native")
    # The slots belong to the next load.
    assert standin.device_copies_in_flight == 0 and getattr(standin, setting) == 0
    found = sio.load(tmp_path / "model.pt", "standin:0", backend="native")
    assert all(torch.equal(found[name].cpu(), tensor) for name, tensor in obj.items())


@pytest.mark.parametrize(("setting", "value"), [("no_streams", 1), ("fail_allocation", 3), ("pinned_memory", 0)])
def test_what_a_device_lacks_is_done_without(setting, value, tmp_path, standin, native_slots):  # noqa: F811
    """No streams or no room: as torch moves them. No pinned memory: copies wait."""
    torch.save(state(), tmp_path / "model.pt")
    setattr(standin, setting, value)
    found = sio.load(tmp_path / "model.pt", "standin:0", backend="native")
    assert standin.blocking_copies > 0 and standin.device_copies == 0
    expected = {name: tensor.detach().to("standin:0") for name, tensor in state().items()}
    assert all(torch.equal(found[name].cpu(), tensor.cpu()) for name, tensor in expected.items())


def test_a_damaged_record_is_named(tmp_path, standin):  # noqa: F811
    require_native()
    torch.save({"a": random_bytes(5 * MIB, 1), "b": random_bytes(9 * MIB, 2)}, tmp_path / "model.pt")
    with open(tmp_path / "model.pt", "r+b") as file:
        file.seek(8 * MIB)
        byte = file.read(1)
        file.seek(8 * MIB)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(sio.CorruptCheckpointError, match=r"data/1 \(tensors: b\)"):
        sio.load(tmp_path / "model.pt", "standin:0", verify=True, backend="native")
    assert standin.device_copies_in_flight == 0


@pytest.mark.parametrize("weights_only", [True, False])
def test_progress_and_files_zipped_again(weights_only, tmp_path, standin):  # noqa: F811
    require_native()
    obj = state()
    torch.save(obj, tmp_path / "first.pt")
    with zipfile.ZipFile(tmp_path / "first.pt") as old, zipfile.ZipFile(tmp_path / "model.pt", "w") as new:
        for number, record in enumerate(old.namelist()):
            new.writestr(record, old.read(record), zipfile.ZIP_DEFLATED if number % 3 else zipfile.ZIP_STORED)
    seen = []
    found = sio.load(
        tmp_path / "model.pt", "standin:0", backend="native", verify=True, weights_only=weights_only,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen and seen[-1][0] == seen[-1][1] and [done for done, _ in seen] == sorted(done for done, _ in seen)
    for name, tensor in obj.items():
        assert torch.equal(found[name].cpu(), tensor.detach()), name
