"""Paths with no file to replace: written from beginning to end, never through a temporary, never renamed over."""

import errno
import os
import stat
import threading

import pytest
import torch
import warm_process
from corpus import CORPUS
from corpus_case import filled
from oracle import names_in, two_directories
from test_targets import collect

import statedict_io as sio

NAMES = ["module_state_dict", "larger_than_one_region"]
PROGRAM = "import sys, torch, statedict_io as sio; sio.save(torch.load(sys.argv[1]), sys.argv[2], backend=sys.argv[3])"


def torch_bytes(obj, directory, name):
    torch.save(obj, directory / name)
    return (directory / name).read_bytes()


def test_dev_null_stays_a_device(backend):
    before = os.stat("/dev/null")
    sio.save(CORPUS["module_state_dict"](), "/dev/null", backend=backend)
    after = os.stat("/dev/null")
    assert stat.S_ISCHR(after.st_mode) and after.st_ino == before.st_ino
    assert not [name for name in os.listdir("/dev") if "null" in name and name != "null"]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["module_state_dict", "larger_than_one_region"])
def test_a_full_device_is_an_oserror(name, zipped, backend):
    options = {"backend": backend, "_use_new_zipfile_serialization": zipped}
    with pytest.raises(OSError) as caught:
        sio.save(CORPUS[name](), "/dev/full", **options)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/dev/full")
    with pytest.raises(OSError) as caught, open("/dev/full", "wb", buffering=0) as file:
        sio.save(CORPUS[name](), file, **options)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("through_a_symlink", [False, True])
def test_a_fifo_is_written_not_replaced(name, through_a_symlink, backend, tmp_path):
    ref, ours = two_directories(tmp_path)
    obj, received = CORPUS[name](), bytearray()
    fifo = ours / "model.pt"
    if through_a_symlink:
        os.mkfifo(tmp_path / "fifo")
        fifo.symlink_to(tmp_path / "fifo")
    else:
        os.mkfifo(fifo)

    def read():
        with open(fifo, "rb") as file:
            collect(file.read1, received)

    reader = threading.Thread(target=read)
    reader.start()
    sio.save(obj, fifo, backend=backend)
    reader.join(60)
    assert bytes(received) == torch_bytes(obj, ref, "model.pt")
    assert stat.S_ISFIFO(os.stat(fifo).st_mode)
    assert names_in(ours) == ["model.pt"]


@pytest.mark.parametrize(("path", "to"), [("/dev/stdout", "pipe"), ("/dev/stdout", "file"), ("/dev/fd/1", "file")])
def test_standard_output(path, to, backend, tmp_path):
    ref, ours = two_directories(tmp_path)
    obj = CORPUS["module_state_dict"]()
    expected = torch_bytes(obj, ref, os.path.basename(path))
    torch.save(obj, tmp_path / "input.pt")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    if to == "pipe":
        read_end, write_end = os.pipe()
        received = bytearray()
        with open(read_end, "rb") as source:
            reader = threading.Thread(target=collect, args=(source.read1, received))
            reader.start()
            done = warm_process.run(program, tmp_path / "input.pt", path, backend, timeout=60, stdout=write_end)
            os.close(write_end)
            reader.join(60)
    else:
        with open(ours / "out", "wb") as file:
            done = warm_process.run(program, tmp_path / "input.pt", path, backend, timeout=60, stdout=file.fileno())
            assert os.fstat(file.fileno()).st_ino == os.stat(ours / "out").st_ino, "the file was replaced"
        received = (ours / "out").read_bytes()
        assert names_in(ours) == ["out"]
    assert done.returncode == 0, done.stderr
    assert bytes(received) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("link", [False, True])
def test_a_descriptor_of_this_process(name, link, backend, tmp_path):
    ref, ours = two_directories(tmp_path)
    obj = CORPUS[name]()
    with open(ours / "out", "wb") as file:
        path = f"/proc/self/fd/{file.fileno()}"
        if link:
            os.symlink(path, tmp_path / "link.pt")
            path = str(tmp_path / "link.pt")
        expected = torch_bytes(obj, ref, os.path.basename(path))
        sio.save(obj, path, backend=backend)
        assert os.fstat(file.fileno()).st_ino == os.stat(ours / "out").st_ino, "the file was replaced"
    assert (ours / "out").read_bytes() == expected
    assert names_in(ours) == ["out"]


def test_a_longer_file_behind_a_descriptor_is_cut_as_torch_cuts_it(backend, tmp_path):
    results = []
    for save in (torch.save, lambda obj, f: sio.save(obj, f, backend=backend)):
        with open(tmp_path / "out", "w+b") as file:
            file.write(b"x" * 100_000)
            file.flush()
            save({"a": filled(3)}, f"/proc/self/fd/{file.fileno()}")
        results.append((tmp_path / "out").stat().st_size)
    assert results[0] == results[1]


def test_a_descriptor_that_is_not_open_is_refused(backend):
    with pytest.raises((OSError, RuntimeError)):
        sio.save({"a": filled(3)}, "/proc/self/fd/987", backend=backend)


def test_a_reader_that_leaves_is_a_broken_pipe(backend, tmp_path):
    fifo = tmp_path / "model.pt"
    os.mkfifo(fifo)

    def read_a_little():
        with open(fifo, "rb", buffering=0) as file:
            file.read(10)

    reader = threading.Thread(target=read_a_little)
    reader.start()
    with pytest.raises(BrokenPipeError):
        sio.save(CORPUS["larger_than_one_region"](), fifo, backend=backend)
    reader.join(60)
    assert names_in(tmp_path) == ["model.pt"]
