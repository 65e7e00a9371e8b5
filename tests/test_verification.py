"""verify and load(verify=True): every flipped bit of a payload is reported, with the record and its tensors."""

import io
import pathlib
import random
import struct
import zipfile

import pytest
import torch
from corpus_case import filled, random_bytes
from load_comparison import rezipped

import statedict_io as sio
from statedict_io.names.tensors_of_records import tensors_by_record


def checkpoint():
    shared = filled(64, seed=9)
    return {
        "model": {f"layers.{i}.weight": filled(33 + i, seed=i) for i in range(5)} | {"large": filled(1 << 17)},
        "optimizer": {"state": {0: {"exp_avg": filled(40, seed=7), "step": 5}}, "param_groups": [{"lr": 0.1}]},
        "ties": [shared, shared[3:9], torch.nn.Parameter(shared)],
        "sparse": torch.eye(4).to_sparse(),
    }


def payloads(path):
    """(record, offset, nbytes) of all records with bytes."""
    found = []
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            file.seek(info.header_offset + 26)
            name_nbytes, extra_nbytes = struct.unpack("<HH", file.read(4))
            start = info.header_offset + 30 + name_nbytes + extra_nbytes
            if info.compress_size:
                found.append((info.filename.partition("/")[2], start, info.compress_size))
    return found


def flip(path, offset, bit):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def check_flips(path, count, seed, backend):
    """Flips `count` random bits, one at a time, half of them in small records; each has to be reported."""
    generator = random.Random(seed)
    places = payloads(path)
    with zipfile.ZipFile(path) as archive:
        data_pkl = archive.read(next(n for n in archive.namelist() if n.endswith("/data.pkl")))
        tensors = tensors_by_record(data_pkl, path.stat().st_size)
    assert sio.verify(path, backend=backend).ok
    for i in range(count):
        large = [generator.choice(places)] if i % 2 else generator.choices(places, [n for _, _, n in places])
        record, start, nbytes = large[0]
        offset, bit = start + generator.randrange(nbytes), generator.randrange(8)
        where = f"seed {seed}, flip {i}: bit {bit} of byte {offset} in {record}"
        flip(path, offset, bit)
        report = sio.verify(path, backend=backend)
        assert [r.name for r in report.records if r.status == "corrupt"] == [record], where
        assert not report.ok and record in report.problems[0], where
        with pytest.raises(sio.CorruptCheckpointError) as caught:
            sio.load(path, verify=True, backend=backend)
        assert caught.value.records == (record,), where
        for text in (report.problems[0], str(caught.value)):
            assert f"record {record}" in text and path.name in text, f"{where}: {text}"
            for name in tensors.get(record, []):
                assert name in text, f"{where}: {text} does not name {name}"
        flip(path, offset, bit)
    assert sio.verify(path, backend=backend).ok


def test_flipped_bits(backend, tmp_path):
    torch.save(checkpoint(), tmp_path / "model.pt")
    check_flips(tmp_path / "model.pt", 150, 1, backend)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_ten_thousand_flipped_bits(backend, tmp_path):
    torch.save(checkpoint(), tmp_path / "model.pt")
    check_flips(tmp_path / "model.pt", 10_000, 2, backend)


def test_flips_that_are_not_reported_fail_the_check(backend, tmp_path, monkeypatch):
    torch.save(checkpoint(), tmp_path / "model.pt")
    monkeypatch.setitem(globals(), "flip", lambda *_: None)  # nothing is there to report
    with pytest.raises(AssertionError, match="seed 1, flip 0"):
        check_flips(tmp_path / "model.pt", 1, 1, backend)


def test_a_report_of_a_sound_file(backend, tmp_path):
    torch.save(checkpoint(), tmp_path / "model.pt")
    report = sio.verify(tmp_path / "model.pt", backend=backend)
    assert report.ok and report.problems == []
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        expected = [(info.filename.partition("/")[2], info.file_size) for info in archive.infolist()]
    assert [(r.name, r.nbytes) for r in report.records] == expected
    assert {r.status for r in report.records} == {"ok"}


def test_tensor_names_of_every_record(tmp_path):
    torch.save(checkpoint(), tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        names = tensors_by_record(archive.read("model/data.pkl"), (tmp_path / "model.pt").stat().st_size)
    assert names["data/0"] == ["model.layers.0.weight"]
    assert names["data/6"] == ["optimizer.state.0.exp_avg"]
    assert names["data/7"] == ["ties.0", "ties.1", "ties.2"]
    assert names["data/8"] == names["data/9"] == ["sparse"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensor_names_without_unpickling_what_is_refused(protocol, backend, tmp_path):
    """verify never unpickles: a class that nobody allowed does not hide the names, and is not called."""
    torch.save(
        {"module": torch.nn.Linear(3, 2), "p": pathlib.PurePath("x")}, tmp_path / "m.pt", pickle_protocol=protocol
    )
    _, start, _ = next(place for place in payloads(tmp_path / "m.pt") if place[0] == "data/0")
    flip(tmp_path / "m.pt", start + 3, 4)
    report = sio.verify(tmp_path / "m.pt", backend=backend)
    assert "module" in report.problems[0] and "weight" in report.problems[0]
    with pytest.raises(sio.CorruptCheckpointError, match="weight"):
        sio.load(tmp_path / "m.pt", weights_only=False, verify=True, backend=backend)


def statuses(path, backend):
    return {r.name: r.status for r in sio.verify(path, backend=backend).records}


def test_crc_off_is_not_recorded(backend, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": filled(100), "none": filled(0)}, tmp_path / "model.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    found = statuses(tmp_path / "model.pt", backend)
    assert found["data/0"] == found["data.pkl"] == "crc-not-recorded"
    assert found["data/1"] == "ok", "the CRC of nothing is 0"
    assert sio.verify(tmp_path / "model.pt", backend=backend).ok
    sio.load(tmp_path / "model.pt", verify=True, backend=backend)


def test_skipped_data_is_not_recorded(backend, tmp_path):
    with torch.serialization.skip_data():
        torch.save({"a": filled(100), "b": filled(50)}, tmp_path / "model.pt")
    start = {record: start for record, start, _ in payloads(tmp_path / "model.pt")}
    flip(tmp_path / "model.pt", start["data/0"], 0)  # somebody filled it in
    found = statuses(tmp_path / "model.pt", backend)
    assert found["data/0"] == "crc-not-recorded" and found["data.pkl"] == "ok"
    sio.load(tmp_path / "model.pt", verify=True, backend=backend)


def test_a_real_crc_of_zero_is_a_crc(backend, tmp_path):
    """One record in 2^32 has it; four chosen bytes give it to any."""
    data = bytes(random_bytes(64))
    zero = torch.frombuffer(bytearray(data + _bytes_to_crc_zero(data)), dtype=torch.uint8)
    torch.save({"zero": zero, "other": filled(10)}, tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        assert archive.getinfo("model/data/0").CRC == 0
    assert statuses(tmp_path / "model.pt", backend)["data/0"] == "ok"
    start = {record: start for record, start, _ in payloads(tmp_path / "model.pt")}
    flip(tmp_path / "model.pt", start["data/0"] + 5, 0)
    assert statuses(tmp_path / "model.pt", backend)["data/0"] == "corrupt"
    with pytest.raises(sio.CorruptCheckpointError, match="zero"):
        sio.load(tmp_path / "model.pt", verify=True, backend=backend)


def _bytes_to_crc_zero(data):
    """Four bytes after which the CRC-32 of `data` is 0: the register run backwards."""
    import zlib

    table = []
    for i in range(256):
        value = i
        for _ in range(8):
            value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
        table.append(value)
    want = 0xFFFFFFFF  # the register whose complement is 0
    indices = []
    for _ in range(4):
        index = next(i for i in range(256) if table[i] >> 24 == want >> 24)
        indices.append(index)
        want = (want ^ table[index]) << 8 & 0xFFFFFFFF
    register = zlib.crc32(data) ^ 0xFFFFFFFF
    result = b""
    for index in reversed(indices):
        result += bytes([(register ^ index) & 0xFF])
        register = register >> 8 ^ table[index]
    assert zlib.crc32(data + result) == 0
    return result


def test_records_that_nobody_asks_for_are_checked_too(backend, tmp_path):
    torch.save({"a": filled(10)}, tmp_path / "first.pt")
    with zipfile.ZipFile(tmp_path / "first.pt", "a") as archive:
        archive.writestr("first/data/extra", b"nobody asks for this")
    start = {record: start for record, start, _ in payloads(tmp_path / "first.pt")}
    flip(tmp_path / "first.pt", start["data/extra"], 0)
    sio.load(tmp_path / "first.pt", backend=backend)
    for options in ({}, {"map_location": "meta"}, {"mmap": True}):
        with pytest.raises(sio.CorruptCheckpointError, match="data/extra"):
            sio.load(tmp_path / "first.pt", verify=True, backend=backend, **options)


@pytest.mark.parametrize("form", ["cpu", "meta"])
def test_compressed_records(form, backend, tmp_path):
    torch.save({"a": filled(1000), "b": torch.zeros(1 << 20)}, tmp_path / "first.pt")
    path = rezipped(tmp_path / "first.pt", tmp_path / "model.pt", zipfile.ZIP_DEFLATED)
    assert sio.verify(path, backend=backend).ok
    record, start, nbytes = next(place for place in payloads(path) if place[0] == "data/0")
    flip(path, start + nbytes // 2, 0)
    assert statuses(path, backend)[record] == "corrupt"
    assert statuses(path, backend)["data/1"] == "ok"
    with pytest.raises(sio.CorruptCheckpointError, match="data/0"):
        sio.load(path, map_location=form, verify=True, backend=backend)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text" * 100])
def test_what_is_no_archive(content, backend, tmp_path):
    (tmp_path / "model.pt").write_bytes(content)
    report = sio.verify(tmp_path / "model.pt", backend=backend)
    assert not report.ok and report.records == [] and "model.pt" in report.problems[0]


def test_system_errors_carry_the_path(backend, tmp_path):
    for path, kind in ((tmp_path / "missing.pt", FileNotFoundError), (tmp_path, IsADirectoryError)):
        for action in (sio.verify, sio.open_checkpoint):
            with pytest.raises(kind) as caught:
                action(path, backend=backend)
            assert caught.value.filename == str(path)


def test_progress(backend, tmp_path):
    torch.save({"a": filled(3 << 20)}, tmp_path / "model.pt")
    calls = []
    sio.verify(tmp_path / "model.pt", backend=backend, progress=lambda *call: calls.append(call))
    assert calls and calls[-1][0] == calls[-1][1] > 0


def test_an_outline_of_random_bytes_is_empty():
    generator = random.Random(5)
    data = bytearray(_pickle_of(checkpoint()))
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(generator.randrange(1, 20)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        assert isinstance(tensors_by_record(bytes(damaged), len(damaged)), dict)


def _pickle_of(obj):
    file = io.BytesIO()
    torch.save(obj, file)
    with zipfile.ZipFile(file) as archive:
        return archive.read("archive/data.pkl")
