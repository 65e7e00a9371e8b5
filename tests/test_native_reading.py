"""The extension's reader: the bytes that torch reads, whoever wrote the archive, and how its storages behave."""

import ctypes
import errno
import functools
import gc
import io
import os
import resource
import signal
import threading
import time
import zipfile
import zlib

import pytest
import torch
from conftest import require_native

import statedict_io as sio
from statedict_io import backends
from statedict_io.backends import extension, native_reading

MIB = 1 << 20


@pytest.fixture(autouse=True)
def needs_native():
    require_native()


@pytest.fixture
def opened(tmp_path):
    """opened(path, direct="auto"): a reader of a file that is closed at the end of the test."""
    fds = []

    def open_reader(path, direct="auto"):
        fds.append(os.open(path, os.O_RDONLY))
        return native_reading.NativeOpenArchive(extension.find().core, fds[-1], str(path), direct)

    yield open_reader
    for fd in fds:
        os.close(fd)


def filled(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"t{i}": torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator) for i, n in enumerate(sizes)}


def saved(tmp_path, obj, name="model.pt"):
    path = tmp_path / name
    torch.save(obj, path)
    return path


def drop_from_page_cache(path):
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def zipped_again(path, compression=zipfile.ZIP_STORED):
    """The same records as Python's zipfile writes them: nothing is aligned, a folder has a record of its own."""
    target = path.with_name("again.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        new.writestr(zipfile.ZipInfo(f"{path.stem}/"), b"")
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    return target


def data_records(reader):
    return [i for i, record in enumerate(reader.records) if record.name.startswith("data/")]


def contents(storage):
    return torch.empty(0, dtype=torch.uint8).set_(storage)


SIZES = [10, 0, 100, 70000, 5 * MIB, 3, 65536, 65535, 300000, 9 * MIB, 1, 1000, 1000]


@pytest.mark.parametrize("direct", ["off", "auto", "on"])
@pytest.mark.parametrize("writer", ["torch", "zipfile", "deflate"])
@pytest.mark.parametrize("verify", [False, True])
def test_storages_are_what_was_saved(tmp_path, opened, writer, direct, verify):
    tensors = filled(*SIZES)
    path = saved(tmp_path, tensors)
    if writer != "torch":
        path = zipped_again(path, zipfile.ZIP_DEFLATED if writer == "deflate" else zipfile.ZIP_STORED)
    drop_from_page_cache(path)
    try:
        reader = opened(path, direct)
    except OSError as e:
        pytest.skip(f"no direct I/O here: {e}")
    records = data_records(reader)
    storages = reader.load_storages(records, verify=verify, progress=None)
    assert len(storages) == len(tensors)
    for storage, tensor in zip(storages, tensors.values(), strict=True):
        assert storage.nbytes() == tensor.numel()
        assert torch.equal(contents(storage), tensor)
    backwards = reader.load_storages(records[::-1] + records[:2], verify=verify, progress=None)
    for storage, tensor in zip(backwards, list(tensors.values())[::-1] + list(tensors.values())[:2], strict=True):
        assert torch.equal(contents(storage), tensor)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_records_are_those_of_zipfile(tmp_path, opened, compression):
    path = zipped_again(saved(tmp_path, filled(*SIZES)), compression)
    reader = opened(path)
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        assert reader.archive_name == "model"
        assert len(reader.records) == len(infos)
        for i, (record, info) in enumerate(zip(reader.records, infos, strict=True)):
            assert record.name == (info.filename.removeprefix("model/") or "model/")
            assert (record.header_offset, record.nbytes) == (info.header_offset, info.file_size)
            assert (record.stored_nbytes, record.crc32) == (info.compress_size, info.CRC)
            assert record.compressed == (info.compress_type == zipfile.ZIP_DEFLATED)
            assert reader.read(i) == archive.read(info)
    assert reader.checksums(range(len(infos)), progress=None) == [info.CRC for info in infos]


def test_offsets_are_torchs(tmp_path, opened):
    path = saved(tmp_path, filled(*SIZES))
    reader = opened(path)
    stock = torch._C.PyTorchFileReader(str(path))
    for i, record in enumerate(reader.records):
        assert reader.payload_offset(i) == stock.get_record_offset(record.name)


def test_ranges(tmp_path, opened):
    tensors = filled(3 * MIB)
    reader = opened(saved(tmp_path, tensors))
    (record,) = data_records(reader)
    expected = tensors["t0"].numpy().tobytes()
    for offset, nbytes in [(0, 0), (0, 10), (12345, 70000), (3 * MIB - 1, 1), (3 * MIB, 0), (0, 3 * MIB)]:
        destination = bytearray(nbytes)
        reader.read_range(record, offset, memoryview(destination))
        assert destination == expected[offset : offset + nbytes]
    for offset, nbytes in [(3 * MIB, 1), (-1, 1), (1 << 63, 1), (1, 3 * MIB)]:
        with pytest.raises(ValueError, match="no range of data/0"):
            reader.read_range(record, offset, memoryview(bytearray(nbytes)))
    with pytest.raises((ValueError, BufferError, TypeError)):
        reader.read_range(record, 0, memoryview(b"read-only"))
    with pytest.raises(IndexError):
        reader.payload_offset(len(reader.records))


def test_rows(tmp_path, opened):
    tensors = filled(20 * MIB)
    reader = opened(saved(tmp_path, tensors))
    (record,) = data_records(reader)
    expected = tensors["t0"].numpy().tobytes()
    for offset, row_nbytes, num_rows, pitch in [
        (0, 10, 1, 0), (3, 1, 7, 2), (5, 4096, 300, 60000), (0, 3 * MIB, 6, 3 * MIB + 1), (0, 0, 5, 9), (9, 8, 4, 0),
        (20 * MIB - 100, 10, 10, 10), (100, 10, 20, 3), (0, 9 * MIB, 2, 11 * MIB),
    ]:  # fmt: skip
        destination = bytearray(row_nbytes * num_rows)
        reader.read_range(record, offset, memoryview(destination), num_rows, pitch)
        rows = [offset + row * pitch for row in range(num_rows)]
        assert destination == b"".join(expected[at : at + row_nbytes] for at in rows)
    for offset, row_nbytes, num_rows, pitch in [
        (20 * MIB - 100, 10, 10, 11), (0, 10, 3, 1 << 62), (0, 10, 1 << 20, MIB), (0, 1, 2, -1), (0, 7, 0, 0),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="no range of data/0"):
            reader.read_range(record, offset, memoryview(bytearray(row_nbytes * max(num_rows, 1))), num_rows, pitch)


def test_verify_names_every_record_that_is_wrong(tmp_path, opened):
    path = saved(tmp_path, filled(100, 200000, 300, 9 * MIB, 70000))
    reader = opened(path)
    records = data_records(reader)
    flipped = [records[1], records[2], records[3]]
    with open(path, "r+b") as file:
        for record in flipped:
            offset = reader.payload_offset(record) + reader.records[record].nbytes // 2
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 4]))
    with pytest.raises(sio.CorruptCheckpointError, match=r"model\.pt: .*data/1, data/2, data/3") as caught:
        reader.load_storages(records, verify=True, progress=None)
    assert caught.value.records == ("data/1", "data/2", "data/3")
    assert len(reader.load_storages(records, verify=False, progress=None)) == 5
    crcs = reader.checksums(records, progress=None)
    wrong = [record for record, crc in zip(records, crcs, strict=True) if crc != reader.records[record].crc32]
    assert wrong == flipped


def test_damaged_compressed_records(tmp_path, opened):
    path = zipped_again(saved(tmp_path, {"t": torch.zeros(100000)}), zipfile.ZIP_DEFLATED)
    reader = opened(path)
    (record,) = data_records(reader)
    offset, stored = reader.payload_offset(record), reader.records[record].stored_nbytes
    good = path.read_bytes()
    # One byte more in it than is declared, one less, and no deflate stream at all.
    for payload in (zlib.compress(bytes(400001), wbits=-15), zlib.compress(bytes(399999), wbits=-15), b"\xff" * stored):
        payload = payload[:stored].ljust(stored, b"\0")
        path.write_bytes(good[:offset] + payload + good[offset + stored :])
        for action in (
            lambda: reader.read(record),
            lambda: reader.load_storages([record], verify=False, progress=None),
            lambda: reader.checksums([record], progress=None),
        ):
            with pytest.raises(sio.CorruptCheckpointError, match=r"again\.pt: record 'data/0'"):
                action()


def test_errors_name_the_path(tmp_path, opened):
    path = tmp_path / "no archive.pt"
    path.write_bytes(b"x" * 1000)
    with pytest.raises(sio.CorruptCheckpointError, match=r"no archive\.pt: no end of a zip archive"):
        opened(path)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(OSError) as caught:
            backends.for_reading("native").open_archive(fd, "some/where.pt")
    finally:
        os.close(fd)
    assert (caught.value.errno, caught.value.filename) == (errno.EISDIR, "some/where.pt")


def test_a_file_that_is_cut_off_meanwhile(tmp_path, opened):
    path = saved(tmp_path, filled(9 * MIB))
    reader = opened(path)
    os.truncate(path, MIB)
    with pytest.raises(sio.CorruptCheckpointError, match=r"model\.pt: the file ends"):
        reader.load_storages(data_records(reader), verify=False, progress=None)


@pytest.mark.parametrize("nbytes", [1000, 5 * MIB])
def test_storages_are_like_those_of_torch_load(tmp_path, opened, nbytes):
    path = saved(tmp_path, filled(nbytes))
    reader = opened(path)
    with torch.device("meta"), torch.inference_mode():
        (storage,) = reader.load_storages(data_records(reader), verify=False, progress=None)
    reference = torch.load(path)["t0"].untyped_storage()
    assert storage.device == reference.device == torch.device("cpu")
    assert storage.resizable() == reference.resizable()
    assert storage.is_shared() == reference.is_shared() is False
    assert storage.data_ptr() % 64 == 0
    tensor = contents(storage)
    assert not tensor.is_inference()
    with pytest.raises(RuntimeError, match="not resizable"):
        contents(storage).resize_(nbytes + 1)
    assert torch.equal(tensor.clone().add_(1), torch.load(path)["t0"].add_(1))
    shared = storage.clone().share_memory_()
    assert shared.nbytes() == nbytes


def resident_nbytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_each_storage_gives_its_memory_back(tmp_path, opened):
    tensors = filled(*[16 * MIB] * 6, *[1000] * 50)
    reader = opened(saved(tmp_path, tensors))
    reader.checksums(data_records(reader), progress=None)  # the slots
    gc.collect()
    before = resident_nbytes()
    storages = reader.load_storages(data_records(reader), verify=False, progress=None)
    assert resident_nbytes() - before > 90 * MIB
    del storages[:3], storages[1]  # 0, 1, 2 and 4
    assert 20 * MIB < resident_nbytes() - before < 50 * MIB
    assert torch.equal(contents(storages[0]), tensors["t3"])
    assert torch.equal(contents(storages[1]), tensors["t5"])
    storages.clear()
    assert resident_nbytes() - before < 12 * MIB


def test_memory_is_that_of_the_tensors(tmp_path, opened):
    sizes = [64 * MIB] + [70000, 60000, 5] * 300
    reader = opened(saved(tmp_path, filled(*sizes)))
    before = resident_nbytes()
    storages = reader.load_storages(data_records(reader), verify=True, progress=None)
    slots = extension.find().core.testing.num_slots_allocated() * 8 * MIB
    assert resident_nbytes() - before < sum(sizes) + slots + 16 * MIB
    assert len(storages) == len(sizes)


def test_checksums_take_bounded_memory(tmp_path, opened):
    reader = opened(saved(tmp_path, filled(200 * MIB)))
    extension.find().core.release_buffers()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    crcs = reader.checksums(data_records(reader), progress=None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < 160 * MIB
    assert crcs == [reader.records[data_records(reader)[0]].crc32]


def test_progress_ends_at_the_total(tmp_path, opened):
    path = saved(tmp_path, filled(9 * MIB, 10, 70000))
    for source in (path, zipped_again(path, zipfile.ZIP_DEFLATED)):
        reader = opened(source)
        for action in (reader.checksums, functools.partial(reader.load_storages, verify=True)):
            seen = []
            action(data_records(reader), progress=lambda done, total, seen=seen: seen.append((done, total)))
            assert [done for done, _ in seen] == sorted(done for done, _ in seen)
            assert seen[-1][0] == seen[-1][1] > 9 * MIB


def test_an_exception_of_progress_ends_the_load(tmp_path, opened):
    reader = opened(saved(tmp_path, filled(9 * MIB)))
    with pytest.raises(ZeroDivisionError):
        reader.load_storages(data_records(reader), verify=False, progress=lambda done, total: 1 // 0)
    assert len(reader.load_storages(data_records(reader), verify=True, progress=None)) == 1


@pytest.fixture
def slow_to_fault(tmp_path, opened):
    """A reader of a file large enough for a load to take many watch intervals."""
    path = tmp_path / "large.pt"
    torch.save({f"t{i}": torch.empty(64 * MIB, dtype=torch.uint8).random_() for i in range(4)}, path)
    return opened(path)


def test_ctrl_c_ends_the_load(slow_to_fault):
    def interrupt_until_stopped():
        while not stopped.is_set():
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.001)

    def handler(*_):
        raise KeyboardInterrupt

    stopped = threading.Event()
    previous = signal.signal(signal.SIGUSR1, handler)
    thread = threading.Thread(target=interrupt_until_stopped)
    try:
        with pytest.raises(KeyboardInterrupt):
            try:
                thread.start()
                for _ in range(100):
                    slow_to_fault.load_storages(data_records(slow_to_fault), verify=True, progress=None)
            finally:
                stopped.set()
                thread.join()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert len(slow_to_fault.load_storages(data_records(slow_to_fault)[:1], verify=True, progress=None)) == 1


@pytest.mark.alone
def test_the_gil_is_free(slow_to_fault):
    beats = []
    stopped = threading.Event()

    def beat():
        while not stopped.is_set():
            beats.append(time.monotonic())
            time.sleep(0.001)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        started = time.monotonic()
        slow_to_fault.load_storages(data_records(slow_to_fault), verify=True, progress=None)
        ended = time.monotonic()
    finally:
        stopped.set()
        thread.join()
    during = [t for t in beats if started <= t <= ended]
    assert len(during) >= 5


def test_the_descriptor_stays_the_callers(tmp_path):
    path = saved(tmp_path, filled(9 * MIB))
    before = len(os.listdir("/proc/self/fd"))
    fd = os.open(path, os.O_RDONLY)
    os.lseek(fd, 7, os.SEEK_SET)
    for _ in range(20):
        drop_from_page_cache(path)
        reader = backends.for_reading("native").open_archive(fd, str(path))
        reader.load_storages(data_records(reader), verify=False, progress=None)
        del reader
    assert os.lseek(fd, 0, os.SEEK_CUR) == 7
    os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_child_may_be_forked_while_loaded_storages_live(tmp_path, opened):
    tensors = filled(8 * MIB, 100)
    reader = opened(saved(tmp_path, tensors))
    storages = reader.load_storages(data_records(reader), verify=False, progress=None)
    expected = [tensor.numpy().tobytes() for tensor in tensors.values()]
    child = os.fork()
    if child == 0:  # without torch's threads, which did not come along
        same = [ctypes.string_at(s.data_ptr(), s.nbytes()) for s in storages] == expected
        ctypes.memset(storages[0].data_ptr(), 0, storages[0].nbytes())
        del storages
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(contents(storages[0]), tensors["t0"])


def test_cold_files_are_read_past_the_page_cache_and_warm_ones_through_it(tmp_path):
    path = saved(tmp_path, filled(9 * MIB))
    core = extension.find().core
    with open(path, "rb") as file:
        records = [
            i for i, entry in enumerate(core.OpenArchive(file.fileno()).entries()) if entry[0].startswith("data/")
        ]
        file.read()
        warm = core.OpenArchive(file.fileno())
        warm.load_storages(records, verify=False)
        assert warm.direct_nbytes == 0
        drop_from_page_cache(path)
        cold = core.OpenArchive(file.fileno())
        cold.load_storages(records, verify=False)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("no direct I/O here")
    assert cold.direct_nbytes in (0, *range(9 * MIB, 10 * MIB))  # 0: a file system that keeps its pages, as tmpfs
    assert cold.direct_nbytes > 0 or path.stat().st_dev == os.stat("/dev/shm").st_dev


def test_names_of_any_bytes(tmp_path, opened):
    path = tmp_path / "names.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("modèle/data/0", "modèle/数据", "elsewhere", "modèle/", "modèle2/data/1"):
            archive.writestr(zipfile.ZipInfo(name), name.encode())
    raw = path.read_bytes().replace("数".encode(), b"\xff\xfe\x00")
    path.write_bytes(raw)
    reader = opened(path)
    assert reader.archive_name == "modèle"
    names = [record.name for record in reader.records]
    assert names == ["data/0", "\\xff\\xfe\x00据", "elsewhere", "modèle/", "modèle2/data/1"]
    assert reader.read(2) == b"elsewhere"


def test_the_memory_of_a_saved_buffer(opened, tmp_path):
    """What torch reads from a buffer, we read from a file of the same bytes."""
    buffer = io.BytesIO()
    torch.save(filled(70000, 3), buffer)
    path = tmp_path / "buffer.pt"
    path.write_bytes(buffer.getvalue())
    reader = opened(path)
    assert reader.archive_name == "archive"
    expected = torch.load(io.BytesIO(buffer.getvalue()))
    storages = reader.load_storages(data_records(reader), verify=True, progress=None)
    assert [torch.equal(contents(s), t) for s, t in zip(storages, expected.values(), strict=True)] == [True, True]
